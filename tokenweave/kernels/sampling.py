"""Drawing tokens in two Triton kernels: which tokens may be drawn, and which of them is.

Scores are read as they come, and shifted and scaled on the way, the same in both kernels: a score becomes 0 for the
row's highest and is negative below. Of negative numbers the bits without the sign, read as an integer, are in their
order: such a magnitude is what tokens are compared by, and the largest that is kept is the row's limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program that draws
LIMIT_BLOCK = 4096  # columns that a program looks at a time where it seeks a limit
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # the magnitude of -inf
LARGEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


def draw(scores: Tensor, integers: Tensor, floats: Tensor, gamma: int, first: int, second: int) -> Tensor:
    """Token ids, int64 [R].

        x = (scores - scores.amax(-1, keepdim=True)) * floats[:, :1]
        truncate(x, rows, integers[:, 2], floats[:, 1], floats[:, 2])                  # of engine/truncation.py
        noise = gumbel(integers[:, 0], integers[:, 1], torch.arange(V))                # of engine/random.py
        return (x + noise * floats[:, 3:]).argmax(-1)

    Exponentials and logarithms may differ from torch's in their last bits; sums of masses and random integers do not.
    A score that is NaN is not drawn. scores: fp32 [R, V]; integers: int64 [R, 4]; floats: fp32 [R, 4]; contiguous.
    gamma, first, second: CONSTANTS of engine/random.py.
    """
    rows, width = scores.shape
    tops, limits = scores.new_empty(rows), torch.empty(rows, dtype=torch.int32, device=scores.device)
    given = (scores, integers, floats, tops, limits)
    limit_kernel[(rows,)](*given, width, LIMIT_BLOCK, num_warps=32, enable_fp_fusion=False)
    blocks = triton.cdiv(width, BLOCK)
    best, columns = scores.new_empty(rows, blocks), integers.new_empty(rows, blocks)
    draw_kernel[(blocks, rows)](
        *(*given, best, columns, width, gamma, first, second, BLOCK), num_warps=4, enable_fp_fusion=False
    )
    return columns.gather(1, best.argmax(-1, keepdim=True))[:, 0]


@triton.jit
def limit_kernel(scores, integers, floats, tops, limits, width, BLOCK: tl.constexpr):
    """A row: its highest score, and its limit by min_p, top_k and top_p."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        highest = tl.maximum(highest, block_of(scores, start, width, BLOCK))
    top = tl.max(highest, 0)
    tl.store(tops + row, top)
    scale = tl.load(floats + row * 4)
    top_k = tl.load(integers + row * 4 + 2)
    top_p = tl.load(floats + row * 4 + 1)
    limit = tl.full([], INFINITE, tl.int32)
    if top_k < width:
        limit = nearest(scores, top, scale, width, top_k, limit, True, BLOCK)
    if top_p < 1:
        total = mass_within(scores, top, scale, width, top_k, limit, BLOCK)
        target = tl.maximum((total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)
        limit = nearest(scores, top, scale, width, target, limit, False, BLOCK)
    lowest = tl.load(floats + row * 4 + 2).to(tl.int32, bitcast=True)
    tl.store(limits + row, tl.minimum(limit, lowest))


@triton.jit
def nearest(scores, top, scale, width, target, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest magnitude up to which a row holds `target`, of tokens (COUNT) or of mass; `limit` if none below is.

    Bisection, by a pass over the row each time. Both ends are magnitudes that the row has, so it is over when there is
    none between them; they come closer in any case, whatever the scores are.
    """
    low = tl.full([], 0, tl.int32)
    high = limit
    while low < high:
        middle = low + (high - low) // 2
        held = tl.zeros([BLOCK], tl.int64)
        within = tl.full([BLOCK], -1, tl.int32)
        beyond = tl.full([BLOCK], LARGEST, tl.int32)
        for start in range(0, width, BLOCK):
            x = shifted(block_of(scores, start, width, BLOCK), top, scale)
            magnitude = magnitude_of(x)
            inside = magnitude <= middle
            if COUNT:
                held += inside.to(tl.int64)
            else:
                held += tl.where(inside, mass_of(x), 0)
            within = tl.maximum(within, tl.where(inside, magnitude, -1))
            beyond = tl.minimum(beyond, tl.where(inside, LARGEST, magnitude))
        if tl.sum(held, 0) >= target:
            high = tl.max(within, 0)
        else:
            low = tl.min(beyond, 0)
    return high


@triton.jit
def mass_within(scores, top, scale, width, top_k, limit, BLOCK: tl.constexpr):
    """The mass of top_k tokens, of which the last have the magnitude `limit`; that of all, if it is infinite."""
    mass = tl.zeros([BLOCK], tl.int64)
    count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, width, BLOCK):
        x = shifted(block_of(scores, start, width, BLOCK), top, scale)
        inside = magnitude_of(x) < limit
        mass += tl.where(inside, mass_of(x), 0)
        count += inside.to(tl.int64)
    return tl.sum(mass, 0) + (top_k - tl.sum(count, 0)) * mass_of(-limit.to(tl.float32, bitcast=True))


@triton.jit
def draw_kernel(
    scores,
    integers,
    floats,
    tops,
    limits,
    best,
    columns,
    width,
    GAMMA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row: the highest of its noisy scores, and where it is."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    x = shifted(block_of(scores + row * width, start, width, BLOCK), tl.load(tops + row), tl.load(floats + row * 4))
    column = start + tl.arange(0, BLOCK)
    key, position = tl.load(integers + row * 4), tl.load(integers + row * 4 + 1)
    noise = gumbel(uniform(key, position, column, GAMMA, FIRST, SECOND))
    noisy = x + tl.load(floats + row * 4 + 3) * noise
    kept = (magnitude_of(x) <= tl.load(limits + row)) & (column < width)
    noisy = tl.where(kept, noisy, float("-inf"))
    highest, at = tl.max(noisy, 0, return_indices=True)
    place = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(best + place, highest)
    tl.store(columns + place, (start + at).to(tl.int64))


@triton.jit
def block_of(scores, start, width, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    return tl.load(scores + at, mask=at < width, other=float("-inf"))


@triton.jit
def shifted(scores, top, scale):
    """0 for the highest, be it infinite; negative below."""
    return tl.where(scores == top, 0.0, (scores - top) * scale)


@triton.jit
def magnitude_of(x):
    """int32, the larger the lower x is, for x <= 0; the largest of all for NaN."""
    return x.to(tl.int32, bitcast=True) & LARGEST


@triton.jit
def mass_of(x):
    """exp(x) for x <= 0 in units of 2**-40, whose sums are exact in any order; of NaN nothing."""
    return tl.where(x == x, tl.exp(x) * 1099511627776.0, 0.0).to(tl.int64)


@triton.jit
def uniform(key, position, column, GAMMA: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Bitwise the numbers of engine/random.py."""
    row = mix(mix(key, FIRST, SECOND) + (position + 1) * GAMMA, FIRST, SECOND)
    odd = (mix(row + (column.to(tl.int64) + 1) * GAMMA, FIRST, SECOND) & 0x1FFFFFFFFFFFFF) | 1
    return tl.minimum(odd.to(tl.float32) * 1.1102230246251565e-16, 0.999999940395355224609375)  # 2 ** -53, below 1


@triton.jit
def gumbel(number):
    """-log(-log1p(-number)), with what 1 - number loses to rounding made up for."""
    rest = 1.0 - number
    exponential = tl.where(rest == 1.0, number, tl.log(rest) * number / (rest - 1.0))
    return -tl.log(exponential)


@triton.jit
def mix(z, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """splitmix64's finaliser on int64, whose shifts to the right copy the sign: the masks drop the copies."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
