"""Attention over a paged key-value cache, in plain torch operators. Another device may bring another callable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenweave.models.rope import rotate
from tokenweave.weave.request import Norm, Rows

SHORT_CONTEXT = 64  # tokens; below it padding costs less than a further group
QUERIES = 256  # at a time after a context, as torch computes masked scores too; and where it materialises them all


@dataclass(frozen=True)
class Options:
    """How one layer attends. window: keys visible to a query, itself included; None = all before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Span(Protocol):
    """One sequence's part of a half: `len` new tokens after `context` cached ones, in the cache's blocks.

    The last `wanted` tokens make logits; `narrow` gives a part of the span, with what comes before it as context.
    """

    @property
    def context(self) -> int: ...

    @property
    def block_table(self) -> Sequence[int]: ...

    @property
    def wanted(self) -> int: ...

    def __len__(self) -> int: ...

    def narrow(self, start: int, stop: int) -> Span: ...


class PagedAttention:
    """Write a half's keys and values into the cache, then attend. Built once per half and step, used by every layer.

    storage: [block, layer, 2, token, kv_head, head_dim]. Viewed as rows of kv_head * head_dim elements, the key of
    token t of block b in layer l is row ((b * layers + l) * 2) * block_size + t, and its value block_size rows on.
    """

    def __init__(self, spans: Sequence[Span], storage: Tensor):
        self.spans = spans
        self.storage = storage
        self.rows = storage.view(-1, storage.shape[4] * storage.shape[5])
        self.device = storage.device
        self.block_size = storage.shape[3]
        self.layers = storage.shape[1]
        starts = np.cumsum([0] + [len(span) for span in spans])
        parts = [_Prefill(self, int(at), span) for at, span in zip(starts, spans, strict=False) if len(span) > 1]
        single = [(int(at), span) for at, span in zip(starts, spans, strict=False) if len(span) == 1]
        self.parts: list[_Prefill | _Decode] = [*parts, *(_Decode(self, group) for group in alike(single))]

    def __call__(
        self,
        layer: int,
        qk: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        options: Options,
        rows: Rows | None = None,
        norms: tuple[Norm, Norm] | None = None,
    ) -> Tensor:
        """Norm, rotate, write keys and values into the cache, attend. What a half brings as `half.attention`.

        qk: [tokens, heads + kv_heads, head_dim], not rotated yet. v: [tokens, kv_heads, head_dim].
        rotary: (cos, sin) fp32, each [tokens, 1, head_dim]. rows: those that make logits; then they alone attend.
        norms: of each head of q, and of k. Returns [tokens or rows, heads * head_dim].
        """
        heads = (qk.shape[1] - v.shape[1], v.shape[1])
        if norms is not None:
            qk = torch.cat([norm(x) for norm, x in zip(norms, qk.split(heads, dim=1), strict=True)], dim=1)
        q, k = rotate(qk, rotary).split(heads, dim=1)
        self.write(layer, k, v)
        if rows is None or len(rows.host) == len(v):
            return self.attend(layer, q, k, v, options)
        q, k, v = (x.index_select(0, rows.index) for x in (q, k, v))
        return self.tail.attend(layer, q, k, v, options)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """Attention alone, keys and values of all tokens being in the cache."""
        out = torch.empty_like(q)
        for part in self.parts:
            part.attend(layer, q, k, v, options, out)
        return out.flatten(1)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys = self._written + 2 * layer * self.block_size
        self.rows.index_copy_(0, keys, k.flatten(1))
        self.rows.index_copy_(0, keys + self.block_size, v.flatten(1))

    def read(self, layer: int, slots: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """(keys, values), each [slots..., kv_heads, head_dim]."""
        keys = slots + 2 * layer * self.block_size
        shape = (*slots.shape, kv_heads, -1)
        pick = [self.rows.index_select(0, rows.flatten()).view(shape) for rows in (keys, keys + self.block_size)]
        return pick[0], pick[1]

    def slots(self, span: Span, start: int, stop: int) -> np.ndarray:
        """Rows of layer 0's keys for token positions start..stop of the span's sequence."""
        position = np.arange(start, stop)
        block = np.asarray(span.block_table, dtype=np.int64)[position // self.block_size]
        return block * (2 * self.layers * self.block_size) + position % self.block_size

    @cached_property
    def tail(self) -> PagedAttention:
        """Of the rows that make logits."""
        tails = [span.narrow(len(span) - span.wanted, len(span)) for span in self.spans if span.wanted]
        return PagedAttention(tails, self.storage)

    @cached_property
    def _written(self) -> Tensor:
        rows = [self.slots(span, span.context, span.context + len(span)) for span in self.spans]
        return torch.from_numpy(np.concatenate(rows)).to(self.device)


Block = tuple[slice, slice, Tensor | None]  # queries, the keys that any of them sees, mask; None: plainly causal


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """0 where a key is visible and -inf elsewhere, in the dtype and on the device of `like`."""
    return torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, float("-inf")).to(like.device)


class _Prefill:
    """A span of several tokens."""

    def __init__(self, paged: PagedAttention, at: int, span: Span):
        self.paged = paged
        self.at, self.count, self.context = at, len(span), span.context
        self.span = span
        self._views: dict[int | None, tuple[Tensor | None, list[Block]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor) -> None:
        mine = slice(self.at, self.at + self.count)
        slots, blocks = self._view(options.window)
        keys, values = (k[mine], v[mine]) if slots is None else self.paged.read(layer, slots, k.shape[1])
        q, k, v, mine_out = (x.transpose(0, 1)[None] for x in (q[mine], keys, values, out[mine]))
        for queries, seen, mask in blocks:
            part = q[:, :, queries], k[:, :, seen], v[:, :, seen]
            mine_out[:, :, queries] = attend(*part, mask, mask is None, options)

    def _view(self, window: int | None) -> tuple[Tensor | None, list[Block]]:
        """(slots to read, None when all keys are this span's own; what to attend, block by block)."""
        if window not in self._views:
            if self.context == 0 and (window is None or self.count <= window):
                self._views[window] = (None, [(slice(None), slice(None), None)])
            else:
                self._views[window] = (self._slots(window), self._blocks(window))
        return self._views[window]

    def _first_key(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.context - window + 1)

    def _slots(self, window: int | None) -> Tensor | None:
        if self.context == 0:
            return None
        read = self.paged.slots(self.span, self._first_key(window), self.context + self.count)
        return torch.from_numpy(read).to(self.paged.device)

    def _blocks(self, window: int | None) -> list[Block]:
        """QUERIES at a time, each with no key that it cannot see before the window or after its last query."""
        first = self._first_key(window)
        blocks: list[Block] = []
        for start in range(0, self.count, QUERIES):
            begin, end = self.context + start, self.context + min(start + QUERIES, self.count)
            low = first if window is None else max(first, begin - window + 1)
            behind = torch.arange(begin, end)[:, None] - torch.arange(low, end)
            visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            keys = slice(low - first, end - first)
            blocks.append((slice(start, start + QUERIES), keys, additive(visible, self.paged.storage)))
        return blocks


class _Decode:
    """Spans of one token, attended together: their keys are read into one rectangle and masked to their lengths."""

    def __init__(self, paged: PagedAttention, spans: list[tuple[int, Span]]):
        self.paged = paged
        self.spans = [span for _, span in spans]
        self.at = torch.tensor([at for at, _ in spans], device=paged.device)
        self._views: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor) -> None:
        slots, mask = self._view(options.window)
        keys, values = self.paged.read(layer, slots, k.shape[1])
        picked = q.index_select(0, self.at).view(len(self.at), k.shape[1], -1, q.shape[2])  # heads of one KV head
        got = attend(picked, keys.transpose(1, 2), values.transpose(1, 2), mask, False, options)
        out.index_copy_(0, self.at, got.reshape(len(self.at), *q.shape[1:]))

    def _view(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """(slots [spans, most keys], mask [spans, 1, 1, most keys] or None where all are as long).

        A place past a sequence's end repeats its first key: whatever is there is finite and masked.
        """
        if window not in self._views:
            lengths = [span.context + 1 for span in self.spans]
            counts = [length if window is None else min(length, window) for length in lengths]
            most = max(counts)
            slots = np.empty((len(counts), most), dtype=np.int64)
            for row, span, length, count in zip(slots, self.spans, lengths, counts, strict=True):
                row[:count] = self.paged.slots(span, length - count, length)
                row[count:] = row[0]
            mask = np.arange(most)[None] < np.asarray(counts)[:, None]
            visible = None if mask.all() else additive(torch.from_numpy(mask)[:, None, None], self.paged.storage)
            self._views[window] = (torch.from_numpy(slots).to(self.paged.device), visible)
        return self._views[window]


def alike(spans: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Group spans whose contexts are within a factor of two, so that at most half of a group's rectangle is padding."""
    groups: dict[int, list[tuple[int, Span]]] = {}
    for at, span in spans:
        groups.setdefault(max(span.context, SHORT_CONTEXT).bit_length(), []).append((at, span))
    return list(groups.values())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, options: Options) -> Tensor:
    """softmax(cap(q k^T * scale) + mask) v for q [batch, heads, queries, head_dim] and fewer, shared KV heads.

    mask: 0 or -inf, in q's dtype. causal: the mask is that of query i and keys up to i.
    """
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _attend_capped(q, k, v, mask, causal, options.scale, options.softcap)


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> Tensor:
    """The maths written out, a block of queries at a time."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if causal:
        mask = additive(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q)
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], QUERIES):
        block = slice(start, start + QUERIES)
        scores = (q[:, :, block] @ k.transpose(2, 3)).float().mul_(scale / softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores.add_(mask[..., block if mask.shape[-2] > 1 else slice(None), :])
        out[:, :, block] = scores.softmax(-1).to(v.dtype) @ v
    return out
