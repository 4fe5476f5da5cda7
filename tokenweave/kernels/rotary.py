"""Rotation of queries and keys and the write of keys and values into the paged cache, in one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenweave.comm.norm import Norm
from tokenweave.kernels.rms_norm import weights_of

BLOCK = 1024  # elements of a program: whole heads of one token


def rotate_and_write(
    qk: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    storage_rows: Tensor,
    layer: int,
    block_size: int,
    heads: int,
    norms: tuple[Norm, Norm] | None = None,
) -> Tensor:
    """Returns the rotated queries [tokens, heads, head_dim]; keys and values go into the cache.

        if norms: q, k = norms[0](q), norms[1](k)              # over head_dim
        q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))    # in fp32: models/rope.py
        keys = slots + 2 * layer * block_size
        storage_rows[keys] = k                                 # where slots >= 0
        storage_rows[keys + block_size] = v

    qk: [tokens, heads + kv_heads, head_dim], v: [tokens, kv_heads, head_dim], of stride 1 in a head.
    cos, sin: fp32 [tokens, 1, head_dim] as Rope makes them: the second half of each is as the first, and not read.
    slots: int64 [tokens], the row of a token's key in layer 0; -1: padding, of which nothing is written.
    storage_rows: [rows, kv_heads * head_dim], the cache (models/attention.py).
    """
    tokens, head_dim, kv_heads = len(qk), qk.shape[2], v.shape[1]
    q = qk.new_empty(tokens, heads, head_dim)
    q_norm, k_norm = norms or (None, None)
    q_weight, q_eps, offset = weights_of(q_norm)
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(triton.next_power_of_2(heads), max(1, BLOCK // (2 * block_half)))
    grid = (tokens, triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads))
    rotate_and_write_kernel[grid](
        qk,
        v,
        cos,
        sin,
        slots,
        storage_rows,
        q,
        q_weight,
        weights_of(k_norm)[0],
        q_eps,
        offset,
        2 * layer * block_size,
        block_size,
        *qk.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        storage_rows.stride(0),
        heads,
        kv_heads,
        head_dim // 2,
        block_heads,
        block_half,
        num_warps=max(1, block_heads * block_half // 256),  # a thread takes 8 elements of either half of a head
        enable_fp_fusion=True,
    )
    return q


@triton.jit(do_not_specialize=["layer_rows"])
def rotate_and_write_kernel(
    qk,
    v,
    cos,
    sin,
    slots,
    storage_rows,
    q,
    q_weight,
    k_weight,
    eps,
    offset,
    layer_rows,
    block_size,
    qk_stride,
    qk_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    storage_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """A program takes BLOCK_HEADS heads of one token: query heads first, then key heads with their values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    QUERY_PARTS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    column = tl.arange(0, BLOCK_HALF)[None, :]
    low_cos = tl.load(cos + token * cos_stride + column, mask=column < HALF, other=0.0)
    low_sin = tl.load(sin + token * cos_stride + column, mask=column < HALF, other=0.0)
    if part < QUERY_PARTS:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        inside = (head < HEADS) & (column < HALF)
        source = qk + token * qk_stride + head * qk_head_stride + column
        low, high = rotated(source, inside, low_cos, low_sin, q_weight, column, eps, offset, HALF)
        into = q + token * (HEADS * 2 * HALF) + head * (2 * HALF) + column
        tl.store(into, low, mask=inside)
        tl.store(into + HALF, high, mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = (part - QUERY_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
            inside = (head < KV_HEADS) & (column < HALF)
            source = qk + token * qk_stride + (HEADS + head) * qk_head_stride + column
            low, high = rotated(source, inside, low_cos, low_sin, k_weight, column, eps, offset, HALF)
            key = storage_rows + (slot + layer_rows) * storage_stride + head * (2 * HALF) + column
            tl.store(key, low, mask=inside)
            tl.store(key + HALF, high, mask=inside)
            value = v + token * v_stride + head * v_head_stride + column
            into = key + tl.cast(block_size, tl.int64) * storage_stride
            tl.store(into, tl.load(value, mask=inside), mask=inside)
            tl.store(into + HALF, tl.load(value + HALF, mask=inside), mask=inside)


@triton.jit
def rotated(source, inside, cos, sin, weight, column, eps, offset, HALF: tl.constexpr):
    """The two halves of each head at `source`, normed where there is a weight, rotated, in the source's dtype."""
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = low.dtype
    if weight is not None:
        low, high = head_normed(low.to(tl.float32), high.to(tl.float32), weight, column, eps, offset, HALF)
        low, high = low.to(dtype), high.to(dtype)  # as the norm's own output is rounded
    low, high = low.to(tl.float32), high.to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def head_normed(low, high, weight, column, eps, offset, HALF: tl.constexpr):
    """RMSNorm of each row of both halves together. fp32, zero past HALF."""
    squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    low_gain = tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32) + offset
    high_gain = tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32) + offset
    return low * scale * low_gain, high * scale * high_gain
