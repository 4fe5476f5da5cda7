"""Drawing: a token of each row of scores, by temperature, filters and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenweave.engine.random import CONSTANTS, gumbel
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.truncation import truncate

SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32: 0 times -inf would be NaN


def drawing_arrays(rows: Sequence[SamplingRow], vocabulary: int) -> dict[str, np.ndarray]:
    """What `draw` needs on the device: `integers` and `floats`."""
    integers = [(row.key, row.position, min(row.top_k or vocabulary, vocabulary), 0) for row in rows]
    floats = [(scale_of(row), row.top_p, lowest_of(row), row.random) for row in rows]
    return {"integers": np.array(integers, np.int64), "floats": np.array(floats, np.float32)}


def scale_of(row: SamplingRow) -> float:
    return max(1 / row.temperature, SMALLEST_SCALE) if row.random else 1.0


def lowest_of(row: SamplingRow) -> float:
    return abs(math.log(row.min_p)) if row.min_p > 0 else math.inf


def draw(scores: Tensor, rows: Sequence[SamplingRow], integers: Tensor, floats: Tensor) -> Tensor:
    """Token ids, int64 [R], of scores, fp32 [R, V], which are left as they are. On CUDA it is two kernels.

    integers: int64 [R, 4]: key, position, top_k (V for all), and nothing. floats: fp32 [R, 4]: 1 / temperature, top_p,
    -log(min_p), and 1 where noise is added, 0 where the highest score is taken.
    """
    if scores.is_cuda:
        from tokenweave.kernels.sampling import draw as in_two_kernels

        return in_two_kernels(scores.contiguous(), integers, floats, *CONSTANTS)
    # The maximum becomes 0, be it infinite, so that no temperature overflows and noise is added where fp32 is finest.
    top = scores.amax(-1, keepdim=True)
    x = (scores - top).mul_(floats[:, :1]).masked_fill_(scores == top, 0)
    truncate(x, rows, integers[:, 2], floats[:, 1], floats[:, 2])
    noise = gumbel(integers[:, 0], integers[:, 1], torch.arange(x.shape[1], device=x.device))
    return x.add_(noise if all(row.random for row in rows) else noise.mul_(floats[:, 3:])).argmax(-1)
