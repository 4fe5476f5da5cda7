"""top_k, top_p and min_p: which tokens may be drawn at all."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.upload import floats, integers

# A nucleus (top_p) seldom holds more tokens; one that does costs a full sort.
NUCLEUS_GUESS = 1024


def truncate(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Set what is not kept to -inf, in place. scores, fp32 [R, V], are scaled by temperature and have the maximum 0.

    top_k first, then top_p of what is left, then min_p of what is left. Each is a lowest score to keep, so tokens that
    tie with it are kept too and the order of a sort does not show.
    """
    filtered = [i for i, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1 or row.min_p > 0]
    if not filtered:
        return
    # The maximum is 0, so that min_p is a difference of log-probabilities.
    cutoff = floats([math.log(row.min_p) if row.min_p > 0 else -math.inf for row in rows], scores.device)
    ranked = [i for i, row in enumerate(rows) if row.top_k > 0 or row.top_p < 1]
    if ranked:
        index = integers(ranked, scores.device)
        cutoff[index] = cutoff[index].maximum(_ranked_cutoff(scores[index], [rows[i] for i in ranked]))
    scores.masked_fill_(scores < cutoff[:, None], -math.inf)


def _ranked_cutoff(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The lowest scores that top_k and top_p keep, fp32 [R], found among the highest `width` scores if they suffice."""
    vocabulary = scores.shape[1]
    # Whether a guess was enough only the device knows, and asking it would be waiting for it.
    guess = NUCLEUS_GUESS if scores.device.type == "cpu" else vocabulary
    width = min(max(row.top_k or guess for row in rows), vocabulary)
    cutoff, found = _cutoff_within(width, scores, rows)
    if width == vocabulary or all(row.top_k for row in rows) or found.all():
        return cutoff
    return _cutoff_within(vocabulary, scores, rows)[0]


def _cutoff_within(width: int, scores: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """Lowest kept scores, fp32 [R], and whether the highest `width` scores were enough to tell, bool [R]."""
    top_k = integers([row.top_k or scores.shape[1] for row in rows], scores.device)[:, None]
    top_p = floats([row.top_p if row.top_p < 1 else 2.0 for row in rows], scores.device)[:, None]
    ordered = (scores.topk(width) if width < scores.shape[1] else scores.sort(descending=True)).values
    inside = torch.arange(width, device=scores.device) < top_k
    # In fp64, so that the order of summation, which depends on the width, does not show.
    weights = ordered.double().exp().masked_fill(~inside, 0)
    total = weights.sum(-1, keepdim=True)
    if not all(row.top_k for row in rows):
        total = torch.where(top_k < scores.shape[1], total, scores.double().exp().sum(-1, keepdim=True))
    through = weights.cumsum(-1) / total  # probability of a token and all above it
    kept = inside & (through - weights / total < top_p)
    last = (kept.sum(-1, keepdim=True) - 1).clamp_min(0)  # of NaN none is kept; on a GPU place -1 would end the process
    cutoff = ordered.gather(-1, last)
    return cutoff[:, 0], ((top_k <= width) | (through[:, -1:] >= top_p))[:, 0]
