"""The sampler's random numbers by themselves, which its kernels keep in registers. Imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenweave.kernels.sampling import uniform

BLOCK = 64


def numbers(integers: Tensor, width: int, gamma: int, first: int, second: int) -> Tensor:
    """fp32 [R, width]; integers: int64 [R, 4], as for draw."""
    out = torch.empty(len(integers), width, device=integers.device)
    grid = (triton.cdiv(width, BLOCK), len(integers))
    numbers_kernel[grid](integers, out, width, gamma, first, second, BLOCK)
    return out


@triton.jit
def numbers_kernel(
    integers,
    out,
    width,
    GAMMA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, position = tl.load(integers + row * 4), tl.load(integers + row * 4 + 1)
    number = uniform(key, position, column, GAMMA, FIRST, SECOND)
    tl.store(out + row * width + column, number, mask=column < width)
