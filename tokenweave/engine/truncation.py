"""top_k, top_p and min_p: which tokens may be drawn at all.

Tokens are compared by magnitudes: of scores x <= 0 the bits without the sign, read as an integer, which is the larger
the lower x is. Masses are integers too, exp(x) in units of 2**-40, so that no sum depends on its order, nor on what
else is in a batch. Nothing is sorted: a limit is found digit by digit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenweave.engine.sampling_row import SamplingRow

ONE = 2**40  # of mass
INFINITE = 0x7F800000  # the magnitude of -inf


def truncate(x: Tensor, rows: Sequence[SamplingRow], top_k: Tensor, top_p: Tensor, lowest: Tensor) -> None:
    """Set what is not kept to -inf, in place. x: fp32 [R, V], scaled by temperature, with the maximum 0.

    top_k first, then top_p of what is left, then min_p of what is left. Each is a lowest score to keep, so tokens that
    tie with it are kept too. They count as often as top_k has room for them where top_p takes its part.
    top_k: int64 [R], V for all. top_p: fp32 [R], 1 for all. lowest: fp32 [R], -log(min_p), or inf for all.
    """
    filtered = [i for i, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1]
    limits = lowest.view(torch.int32).clone()
    if filtered:
        index = torch.tensor(filtered, device=x.device)
        ranked = ranked_limits(x[index], [rows[i] for i in filtered], top_k[index, None], top_p[index, None])
        limits[index] = limits[index].minimum(ranked[:, 0])
    if filtered or any(row.min_p > 0 for row in rows):
        x.masked_fill_(magnitudes(x) > limits[:, None], -torch.inf)


def ranked_limits(x: Tensor, rows: Sequence[SamplingRow], top_k: Tensor, top_p: Tensor) -> Tensor:
    """The largest magnitudes that top_k and top_p keep, int32 [R, 1]; they are [R, 1] as well."""
    found = magnitudes(x)
    limits = torch.full_like(found[:, :1], INFINITE)
    if any(row.top_k > 0 for row in rows):
        limits = nearest(found, torch.ones_like(found, dtype=torch.long), top_k)
    if all(row.top_p == 1 for row in rows):
        return limits
    masses = masses_of(x)
    above = found < limits
    ties = top_k - above.sum(-1, keepdim=True)
    total = masses.where(above, 0).sum(-1, keepdim=True) + ties * masses_of(-limits.view(torch.float32))
    part = (total.double() * top_p.double()).long().clamp_min(1)
    return torch.where(top_p < 1, nearest(found, masses, part).minimum(limits), limits)


def nearest(magnitudes: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The smallest magnitude up to which the weights of a row sum to `target`, int32 [R, 1]; one that no score has, if
    they never do. magnitudes: int32 [R, V]; weights: int64 [R, V]; target: int64 [R, 1].
    """
    limit = torch.zeros_like(magnitudes[:, :1])
    for shift in (24, 16, 8, 0):
        digits = ((magnitudes >> shift) & 255).long()
        sums = weights.new_zeros(len(weights), 256).scatter_add_(1, digits, weights)
        upto = sums.cumsum(-1)
        digit = (upto < target).sum(-1, keepdim=True).clamp_max(255)
        target = target - (upto - sums).gather(1, digit)
        weights = weights.where(digits == digit, 0)
        limit = (limit << 8) | digit.int()
    return limit


def magnitudes(x: Tensor) -> Tensor:
    """int32, of x <= 0; the largest of all for NaN."""
    return x.view(torch.int32) & 0x7FFFFFFF


def masses_of(x: Tensor) -> Tensor:
    """int64; of NaN nothing."""
    return (x.exp() * ONE).nan_to_num_(0).long()
