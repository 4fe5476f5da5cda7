"""What each Triton kernel computes, in torch, by its arguments: its interpreter takes a tenth of a second a launch.

REFERENCES: by the kernel's name, the parameters that it writes and the function that does. Both are held against the
interpreter in tests/test_emulated_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.norm import Norm
from tokenweave.engine.random import gumbel
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.truncation import INFINITE, magnitudes, ranked_limits
from tokenweave.models.layers import activation_function
from tokenweave.models.rope import rotate

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def gated(gate_up: Tensor, out: Tensor, width: int, KIND: str, **_: Any) -> None:
    out.copy_(activated(gate_up, width, KIND))


def activated(gate_up: Tensor, width: int, kind: str) -> Tensor:
    gate, up = gate_up.split(width, dim=-1)
    return activation_function(ACTIVATIONS[kind])(gate) * up


def residual_rms_norm(
    total: Tensor, before: Tensor | None, residual: Tensor, out: Tensor, rows: Tensor | None, **at: Any
) -> None:
    total = total if at["bias"] is None else total + at["bias"]
    if at["post_weight"] is not None:
        total = Norm(at["post_weight"], at["post_eps"], at["post_offset"])(total)
    if before is not None:
        total = total + (before if rows is None else before[rows])
    residual.copy_(total)
    out.copy_(residual if at["weight"] is None else Norm(at["weight"], at["eps"], at["offset"])(residual))


def rotate_and_write(
    qk: Tensor, v: Tensor, slots: Tensor, storage_rows: Tensor, q: Tensor, HEADS: int, **at: Any
) -> None:
    if at["q_weight"] is not None:
        norms = (Norm(at[name], at["eps"], at["offset"]) for name in ("q_weight", "k_weight"))
        parts = qk.split([HEADS, at["KV_HEADS"]], dim=1)
        qk = torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], dim=1)
    rotated = rotate(qk, (at["cos"], at["sin"]))
    q.copy_(rotated[:, :HEADS])
    keys = slots[slots >= 0] + at["layer_rows"]
    storage_rows[keys] = rotated[slots >= 0, HEADS:].flatten(1)
    storage_rows[keys + at["block_size"]] = v[slots >= 0].flatten(1)


def prefill(starts: Tensor, SKIP_SINGLE: bool, **at: Any) -> None:
    attend(starts, lambda count: count > (1 if SKIP_SINGLE else 0), **at)


def decode(starts: Tensor, parts: Tensor, SPLIT: bool, **at: Any) -> None:
    """Of several splits the first takes all keys, for `join` to find."""
    attend(starts, lambda count: count == 1, **at)
    if SPLIT:
        spans = [i for i, count in enumerate(starts.diff().tolist()) if count == 1]
        queries = starts[spans].long()
        parts[0, spans] = at["out"][queries].float()
        at["out"][queries] = float("nan")


def join(out: Tensor, parts: Tensor, starts: Tensor, **_: Any) -> None:
    spans = [i for i, count in enumerate(starts.diff().tolist()) if count == 1]
    out[starts[spans].long()] = parts[0, spans].to(out.dtype)


def attend(starts: Tensor, takes: Callable[[int], bool], out: Tensor, **at: Any) -> None:
    for i, (start, stop) in enumerate(pairwise(starts.tolist())):
        if takes(stop - start):
            seen, blocks = int(at["kv_lengths"][i]), at["block_tables"][i].long()
            used = blocks[: -(-seen // at["BLOCK_SIZE"])]
            keys, values = (at[name][used].flatten(0, 1)[:seen] for name in ("keys", "values"))
            out[start:stop] = attended(at["q"][start:stop], keys, values, at)


def attended(q: Tensor, keys: Tensor, values: Tensor, at: dict[str, Any]) -> Tensor:
    """q: [queries, heads, head_dim], of a sequence's last tokens; keys, values: [keys, kv_heads, head_dim]."""
    if not len(keys):
        return torch.zeros_like(q)
    keys, values = (x.repeat_interleave(at["GROUP"], 1).float() for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * at["scale"]
    if at["CAPPED"]:
        scores = torch.tanh(scores / at["softcap"]) * at["softcap"]
    behind = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))
    visible = (behind >= 0) & (behind < (at["WINDOW"] or len(keys)))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def limit(scores: Tensor, integers: Tensor, floats: Tensor, tops: Tensor, limits: Tensor, **_: Any) -> None:
    tops.copy_(scores.amax(-1))
    x = (scores - tops[:, None]) * floats[:, :1]
    top_k, top_p, every = integers[:, 2:3], floats[:, 1:2], [SamplingRow(top_k=1, top_p=0.5)]
    ranked = ranked_limits(x, every, top_k, top_p).masked_fill_((top_k >= x.shape[1]) & (top_p >= 1), INFINITE)
    limits.copy_(ranked[:, 0].minimum(floats[:, 2].view(torch.int32)))


def draw(scores: Tensor, integers: Tensor, floats: Tensor, tops: Tensor, limits: Tensor, **at: Any) -> None:
    x = (scores - tops[:, None]) * floats[:, :1]
    noise = gumbel(integers[:, 0], integers[:, 1], torch.arange(x.shape[1])) * floats[:, 3:]
    noisy = (x + noise).masked_fill_(magnitudes(x) > limits[:, None], -torch.inf)
    for i, block in enumerate(noisy.split(at["BLOCK"], -1)):
        at["best"][:, i], at["columns"][:, i] = block.max(-1)
        at["columns"][:, i] += i * at["BLOCK"]


def choose(logits: Tensor, weights: Tensor, chosen: Tensor, TOP_K: int, RENORMALISE: bool, **_: Any) -> None:
    kept, experts = logits.float().softmax(-1).topk(TOP_K, dim=-1)
    weights.copy_(kept / kept.sum(-1, keepdim=True) if RENORMALISE else kept)
    chosen.copy_(experts)


def count(chosen: Tensor, counts: Tensor, **_: Any) -> None:
    counts.copy_(chosen.flatten().bincount(minlength=len(counts)))


def order(chosen: Tensor, counts: Tensor, order: Tensor, tiles: Tensor, rows: int, **_: Any) -> None:
    order.copy_(chosen.flatten().argsort(stable=True))
    ends, listed = counts.cumsum(0).tolist(), []
    for expert, (end, size) in enumerate(zip(ends, counts.tolist(), strict=True)):
        listed += [(expert, first, min(first + rows, end)) for first in range(end - size, end, rows)]
    tiles.copy_(torch.tensor(listed + [(0, 0, 0)] * (len(tiles) - len(listed))))


def grouped_gemm(x: Tensor, weight: Tensor, out: Tensor, order: Tensor, tiles: Tensor, **at: Any) -> None:
    kind = at["KIND"]
    for expert, first, end in tiles.tolist():
        assignments = order[first:end].long()
        if kind is None:
            out[assignments] = x[first:end] @ weight[expert].t()
        else:
            out[first:end] = activated(x[assignments // at["TOP_K"]] @ weight[expert].t(), at["columns"], kind)


def combine(parts: Tensor, weights: Tensor, out: Tensor, **_: Any) -> None:
    out.copy_((parts.view(*weights.shape, -1).float() * weights[..., None]).sum(1))


Reference = tuple[tuple[str, ...], Callable[..., None]]
REFERENCES: dict[str, Reference] = {
    "gated_kernel": (("out",), gated),
    "residual_rms_norm_kernel": (("residual", "out"), residual_rms_norm),
    "rotate_and_write_kernel": (("storage_rows", "q"), rotate_and_write),
    "prefill": (("out",), prefill),
    "decode": (("out", "parts", "sums"), decode),
    "join": (("out",), join),
    "limit_kernel": (("tops", "limits"), limit),
    "draw_kernel": (("best", "columns"), draw),
    "choose_kernel": (("weights", "chosen"), choose),
    "count_kernel": (("counts",), count),
    "order_kernel": (("order", "tiles"), order),
    "grouped_gemm_kernel": (("out",), grouped_gemm),
    "combine_kernel": (("out",), combine),
}
