"""Attention over the paged cache by Triton kernels: the launches. Grids depend on shapes alone, never on contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenweave.kernels.attention_decode import decode, join
from tokenweave.kernels.attention_prefill import prefill
from tokenweave.kernels.attention_sizes import (
    MOST_SPLITS,
    SPLIT_KEYS,
    Gpu,
    decode_tile,
    padded_dim,
    prefill_tile,
    splits_of,
)


@dataclass(frozen=True)
class Pages:
    """Which queries see which keys; the tensors are read on the device alone.

    starts: int32 [spans + 1]: span s has queries starts[s] to starts[s + 1]. kv_lengths: int32 [spans]: keys that its
    last query sees; 0: padding. block_tables: int32 [spans, most blocks]. shortest, longest: of queries that a span may
    have; with a shortest of 1 and a longest above it both kernels run, and each does the spans that are its own.
    """

    starts: Tensor
    kv_lengths: Tensor
    block_tables: Tensor
    shortest: int
    longest: int


@dataclass(frozen=True)
class Call:
    """One attention over one layer. See paged_attention."""

    q: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    pages: Pages
    scale: float
    window: int | None
    softcap: float | None
    gpu: Gpu

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.kv_heads

    @property
    def most_keys(self) -> int:
        """That a query may see."""
        keys = self.pages.block_tables.shape[1] * self.keys.shape[1]
        return keys if self.window is None else min(keys, self.window)

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride()[:2], *self.keys.stride()[:3], self.pages.block_tables.stride(0))

    @property
    def constants(self) -> dict[str, Any]:
        dim = self.q.shape[2]
        return {
            "GROUP": self.group,
            "BLOCK_SIZE": self.keys.shape[1],
            "DIM": dim,
            "DIM_PADDED": padded_dim(dim),
            "WINDOW": self.window or 0,
            "CAPPED": self.softcap is not None,
        }


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Pages,
    scale: float,
    window: int | None,
    softcap: float | None,
    gpu: Gpu,
) -> Tensor:
    """Attention of spans of queries over their keys in the cache, which their own are in already.

    q: [queries, heads, head_dim]; keys, values: [blocks, block_size, kv_heads, head_dim], one layer of the cache; all
    with a contiguous last dimension. window: keys that a query sees, None: all up to its own.
    Returns [queries, heads * head_dim]; zeros for queries of padding.

        for span s, query i of n, with keys k and values v of kv_lengths[s] = m tokens, found through block_tables[s]:
            seen = slice(max(0, m - n + i + 1 - window), m - n + i + 1)
            scores = cap(k[seen] @ q[starts[s] + i] * scale)              # cap(x) = softcap * tanh(x / softcap)
            out[starts[s] + i] = softmax(scores) @ v[seen]
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    call = Call(q, keys, values, out, pages, scale, window, softcap, gpu)
    if pages.longest > 1:
        launch_prefill(call)
    if pages.shortest == 1:
        launch_decode(call)
    return out.flatten(1)


def launch_prefill(call: Call) -> None:
    q, pages = call.q, call.pages
    tile = prefill_tile(q.shape[2], q.element_size(), call.group, call.gpu)
    tile_queries, spans = tile.rows // call.group, len(pages.kv_lengths)
    prefill[(call.kv_heads, len(q) // tile_queries + spans)](
        q, call.out, call.keys, call.values, pages.starts, pages.kv_lengths, pages.block_tables,
        call.scale, call.softcap or 1.0, spans, *call.strides, **call.constants,
        QUERIES=tile_queries, ROWS=tile.rows, KEYS=tile.keys, SKIP_SINGLE=pages.shortest == 1,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def launch_decode(call: Call) -> None:
    (_, heads, dim), pages = call.q.shape, call.pages
    spans = len(pages.kv_lengths)
    tile = decode_tile(dim, call.q.element_size(), call.group)
    splits = splits_of(call.gpu.sms, spans, call.kv_heads, call.most_keys)
    parts = call.q.new_empty(splits, spans, heads, dim, dtype=torch.float32)
    sums = call.q.new_empty(splits, spans, heads, dtype=torch.float32)
    shares = {"KEYS": tile.keys, "LEAST": SPLIT_KEYS}
    decode[(splits, call.kv_heads, spans)](
        call.q, call.out, parts, sums, call.keys, call.values, pages.starts, pages.kv_lengths, pages.block_tables,
        call.scale, call.softcap or 1.0, *call.strides, **call.constants, **shares,
        ROWS=tile.rows, SPLIT=splits > 1, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        join[(heads, spans)](
            call.out, parts, sums, pages.starts, pages.kv_lengths, splits,
            DIM=dim, DIM_PADDED=padded_dim(dim), WINDOW=call.window or 0, MOST_SPLITS=MOST_SPLITS, **shares,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
