"""The experts' GEMMs as one launch for all experts, each tile with its expert's weights, in Triton.

torch._grouped_mm is no base for it: below compute capability 9.0 it is a loop that copies the group sizes to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenweave.kernels.activation import activate
from tokenweave.kernels.expert_routing import Groups, group_by_expert
from tokenweave.kernels.expert_tiles import gemm_tile, tile_rows

COMBINE_BLOCK = 1024  # columns of a program


def run_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kind: str, out: Tensor
) -> Tensor:
    """Every token through its experts, without a host that waits or looks. Bitwise the same in every run.

        for t, j in assignments:
            e = chosen[t, j]
            gate, up = (x[t] @ gate_up[e].T).chunk(2)
            out[t] += weights[t, j] * ((act(gate) * up) @ down[e].T)    # in fp32, j ascending, rounded once

    x: [tokens, hidden], of stride 1 in a row. chosen: int32 or int64, weights: fp32, both contiguous [tokens, top_k].
    gate_up: [experts, 2 * width, hidden], down: [experts, hidden, width]. kind: one of activation.KINDS' values.
    """
    experts, hidden = down.shape[:2]
    groups = group_by_expert(chosen, experts, tile_rows(chosen.numel(), experts))
    inner = grouped_gemm(x, gate_up, groups, kind)
    parts = grouped_gemm(inner, down, groups)
    combine_kernel[(len(out), triton.cdiv(hidden, COMBINE_BLOCK))](
        parts,
        weights,
        out,
        out.stride(0),
        hidden,
        groups.top_k,
        COMBINE_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def grouped_gemm(x: Tensor, weight: Tensor, groups: Groups, kind: str | None = None) -> Tensor:
    """With a kind: act(x gate^T) * (x up^T) for x [tokens, depth] and weight [experts, 2 * columns, depth].
    Without: x weight^T, for x as the first form gives it, and weight [experts, columns, depth].

    The first form gives [assignments, columns] in the order of the experts, the second in that of the tokens.
    """
    gated = kind is not None
    columns, depth = weight.shape[1] // (2 if gated else 1), weight.shape[2]
    out = x.new_empty(len(groups.order), columns)
    tile = gemm_tile(groups.rows, gated, x.element_size())
    grid = (len(groups.tiles), triton.cdiv(columns, tile.columns))
    grouped_gemm_kernel[grid](
        x,
        weight,
        out,
        groups.order,
        groups.tiles,
        x.stride(0),
        weight.stride(0),
        columns,
        depth,
        groups.top_k,
        kind,
        tile.rows,
        tile.columns,
        tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def grouped_gemm_kernel(
    x,
    weight,
    out,
    order,
    tiles,
    x_stride,
    expert_stride,
    columns,
    depth,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Neighbouring programs share a column block: those of one expert read its weights from memory once."""
    tile = tl.program_id(0)
    expert, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first < end:
        place = first + tl.arange(0, ROWS)
        assignment = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        source = place.to(tl.int64)  # rows past the end are computed from what lies there, and dropped
        if KIND is not None:
            source = assignment // TOP_K
        else:
            source = tl.minimum(source, end - 1)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.arange(0, DEPTH)
        left = x + source[:, None] * x_stride + inner[None, :]
        start = weight + expert.to(tl.int64) * expert_stride
        right = start + (column % columns).to(tl.int64)[None, :] * depth + inner[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        second = tl.zeros([ROWS, COLUMNS], tl.float32)
        for done in range(0, depth, DEPTH):
            rest = inner < depth - done
            values = tl.load(left, mask=rest[None, :], other=0.0)
            weights = tl.load(right, mask=rest[:, None], other=0.0)
            total = tl.dot(values, weights, total, input_precision="ieee")
            if KIND is not None:
                weights = tl.load(right + columns * depth, mask=rest[:, None], other=0.0)
                second = tl.dot(values, weights, second, input_precision="ieee")
            left += DEPTH
            right += DEPTH
        dtype = out.dtype.element_ty
        result = total.to(dtype)
        into = assignment
        if KIND is not None:  # rounded as torch rounds between its operators
            active = activate(result.to(tl.float32), KIND).to(dtype).to(tl.float32)
            result = (active * second.to(dtype).to(tl.float32)).to(dtype)
            into = place.to(tl.int64)
        inside = (place < end)[:, None] & (column < columns)[None, :]
        tl.store(out + into[:, None] * columns + column[None, :], result, mask=inside)


@triton.jit
def combine_kernel(parts, weights, out, out_stride, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + rank) * hidden + column, mask=inside, other=0.0)
        total += part.to(tl.float32) * tl.load(weights + token * TOP_K + rank)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
