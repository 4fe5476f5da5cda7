"""What follows a sum of partials, in one Triton kernel: bias, post-norm, residual, norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenweave.comm.norm import Norm


def residual_rms_norm(
    total: Tensor,
    residual: Tensor | None,
    out: Tensor,
    bias: Tensor | None = None,
    post_norm: Norm | None = None,
    norm: Norm | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Returns the residual, in place where `rows` are not given; writes `out`. Statistics are fp32.

        total = total + bias
        total = post_norm(total)
        residual = residual[rows] + total    # or total, when there is none yet
        out = norm(residual)                 # or the residual

    What is None is left out. Rounded where comm/communicator.py rounds: to total's dtype after the bias and after
    post_norm, to out's dtype after the residual and after norm.
    total: [rows, hidden]; left as it is. residual, out: [rows, hidden] of one dtype. rows: int64 [rows].
    """
    count, hidden = total.shape
    before = residual
    if residual is None or rows is not None:
        residual = torch.empty_like(out)
    block = triton.next_power_of_2(hidden)
    residual_rms_norm_kernel[(count,)](
        total,
        before,
        residual,
        out,
        rows,
        bias,
        *weights_of(post_norm),
        *weights_of(norm),
        *(0 if x is None else x.stride(0) for x in (total, before, residual, out)),
        hidden,
        block,
        num_warps=warps(block),
        enable_fp_fusion=True,
    )
    return residual


def weights_of(norm: Norm | None) -> tuple[Tensor | None, float, float]:
    """(weight, eps, offset)"""
    return (None, 0.0, 0.0) if norm is None else (norm.weight, float(norm.eps), float(norm.offset))


def warps(block: int) -> int:
    """So that a thread holds at most 32 elements."""
    return min(max(block // 1024, 4), 16)


@triton.jit
def residual_rms_norm_kernel(
    total,
    before,
    residual,
    out,
    rows,
    bias,
    post_weight,
    post_eps,
    post_offset,
    weight,
    eps,
    offset,
    total_stride,
    before_stride,
    residual_stride,
    out_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    summed = tl.load(total + row * total_stride + column, mask=inside, other=0.0)
    if bias is not None:
        wide = summed.to(tl.float32) + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        summed = wide.to(summed.dtype)
    if post_weight is not None:
        gain = tl.load(post_weight + column, mask=inside, other=0.0).to(tl.float32) + post_offset
        summed = rms_normed(summed.to(tl.float32), gain, post_eps, HIDDEN).to(summed.dtype)
    wide = summed.to(tl.float32)
    if before is not None:
        source = row
        if rows is not None:
            source = tl.load(rows + row)
        wide += tl.load(before + source * before_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded = wide.to(out.dtype.element_ty)
    tl.store(residual + row * residual_stride + column, rounded, mask=inside)
    if weight is not None:
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        rounded = rms_normed(rounded.to(tl.float32), gain, eps, HIDDEN).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, rounded, mask=inside)


@triton.jit
def rms_normed(x, gain, eps, HIDDEN: tl.constexpr):
    """x: fp32, one row, zero past HIDDEN."""
    return x * tl.rsqrt(tl.sum(x * x) / HIDDEN + eps) * gain
