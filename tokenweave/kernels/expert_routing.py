"""Assignments in the order of their experts, and the tiles of a grouped GEMM over them: two Triton kernels.

Everything stays on the device, in memory whose size depends on counts alone that the host knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenweave.kernels.expert_tiles import most_tiles

BLOCK = 2048  # assignments looked at in one turn


@dataclass(frozen=True)
class Groups:
    """order: int32 [assignments], token * top_k + rank, sorted by expert and within one ascending.
    tiles: int32 [most tiles, 3]: expert, first and last + 1 place in `order`; the unused ones come last and are empty.
    """

    order: Tensor
    tiles: Tensor
    top_k: int
    rows: int  # of a tile


def group_by_expert(chosen: Tensor, experts: int, rows: int) -> Groups:
    """The order is that of a stable sort:

        order = chosen.flatten().argsort(stable=True)

    chosen: int32 or int64 [tokens, top_k], contiguous. rows: of a tile, at most.
    """
    assignments, top_k = chosen.numel(), chosen.shape[1]
    counts, order = (chosen.new_empty(size, dtype=torch.int32) for size in (experts, assignments))
    most = most_tiles(assignments, experts, rows)
    tiles = chosen.new_empty(most, 3, dtype=torch.int32)
    count_kernel[(experts,)](chosen, counts, assignments, BLOCK, num_warps=4, enable_fp_fusion=True)
    block_experts = triton.next_power_of_2(experts)
    order_kernel[(experts,)](
        chosen,
        counts,
        order,
        tiles,
        assignments,
        most,
        rows,
        experts,
        block_experts,
        BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Groups(order, tiles, top_k, rows)


@triton.jit(do_not_specialize=["assignments"])
def count_kernel(chosen, counts, assignments, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, assignments, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen += (tl.load(chosen + at, mask=at < assignments, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(seen))


@triton.jit(do_not_specialize=["assignments", "most", "rows"])
def order_kernel(
    chosen,
    counts,
    order,
    tiles,
    assignments,
    most,
    rows,
    EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes one expert's part of the order, and its tiles; the last one also the tiles that are not used."""
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK_EXPERTS)
    count = tl.load(counts + each, mask=each < EXPERTS, other=0)
    needed = (count + rows - 1) // rows
    first = tl.sum(tl.where(each < expert, count, 0))
    end = first + tl.sum(tl.where(each == expert, count, 0))
    tile = tl.sum(tl.where(each < expert, needed, 0))
    for start in range(first, end, rows):
        write_tile(tiles, tile, expert, start, tl.minimum(start + rows, end))
        tile += 1
    if expert == EXPERTS - 1:
        for unused in range(tile, most):
            write_tile(tiles, unused, 0, 0, 0)
    for start in range(0, assignments, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(chosen + at, mask=at < assignments, other=-1) == expert).to(tl.int32)
        tl.store(order + first + tl.cumsum(mine) - 1, at, mask=mine == 1)
        first += tl.sum(mine)


@triton.jit
def write_tile(tiles, tile, expert, first, end):
    tl.store(tiles + 3 * tile, expert)
    tl.store(tiles + 3 * tile + 1, first)
    tl.store(tiles + 3 * tile + 2, end)
