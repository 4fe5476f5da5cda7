"""Each token's experts and their weights from the router's logits, in one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def choose_experts(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """(weights fp32, experts int32), each [tokens, top_k], the largest first; of equal ones the lower number.

        weights, chosen = logits.float().softmax(-1).topk(top_k)
        if renormalise: weights = weights / weights.sum(-1, keepdim=True)

    logits: [tokens, experts], of stride 1 in a row. A row with NaN gets weights of NaN.
    """
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int32)
    choose_kernel[(tokens,)](
        logits,
        weights,
        chosen,
        logits.stride(0),
        experts,
        triton.next_power_of_2(experts),
        top_k,
        triton.next_power_of_2(top_k),
        renormalise,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return weights, chosen


@triton.jit
def choose_kernel(
    logits,
    weights,
    chosen,
    row_stride,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    logit = tl.load(logits + token * row_stride + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    left = tl.exp(logit - tl.max(logit, axis=0))
    left = left / tl.sum(left, axis=0)
    place = tl.arange(0, BLOCK_K)
    kept = tl.zeros([BLOCK_K], tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.max(left, axis=0)
        at = tl.min(tl.where(left == best, expert, EXPERTS - 1), axis=0)  # NaN equals nothing: an expert that exists
        tl.store(chosen + token * TOP_K + rank, at)
        kept = tl.where(place == rank, best, kept)
        left = tl.where(expert == at, -1.0, left)
    if RENORMALISE:
        kept = kept / tl.sum(kept, axis=0)
    tl.store(weights + token * TOP_K + place, kept, mask=place < TOP_K)
