"""The sampler's random numbers in one Triton kernel: of the random path, what costs most, and is exact on any device.

The logarithms of Gumbel noise stay torch's: another kernel's may differ in the last bit, and so may the token drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program


def uniform(keys: Tensor, positions: Tensor, columns: Tensor, gamma: int, first: int, second: int) -> Tensor:
    """Uniform numbers, fp32 [R, V], bitwise those of engine/random.py, whose maths these are.

    keys, positions: int64 [R]; columns: int64 [V]; contiguous. gamma, first, second: its constants, as signed integers.
    """
    rows, width = len(keys), len(columns)
    out = torch.empty(rows, width, dtype=torch.float32, device=keys.device)
    uniform_kernel[(triton.cdiv(width, BLOCK), rows)](
        keys, positions, columns, out, width, gamma, first, second, BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return out


@triton.jit
def uniform_kernel(
    keys,
    positions,
    columns,
    out,
    width,
    GAMMA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = mix(tl.load(keys + row), FIRST, SECOND) + (tl.load(positions + row) + 1) * GAMMA
    column = tl.load(columns + at, mask=at < width, other=0)
    bits = mix(mix(start, FIRST, SECOND) + (column + 1) * GAMMA, FIRST, SECOND)
    odd = (bits & 0x1FFFFFFFFFFFFF) | 1
    number = odd.to(tl.float32) * 1.1102230246251565e-16  # 2 ** -53
    tl.store(out + row * width + at, tl.minimum(number, 0.999999940395355224609375), mask=at < width)


@triton.jit
def mix(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """splitmix64's finaliser on int64, whose shifts to the right copy the sign: the masks drop the copies."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
