"""Log-probabilities to report, from raw logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.upload import integers


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities under a row's raw logits: the sampled token first, then the likeliest others in order.

    Ranks count from 1; tokens of equal probability share a rank and are listed by id.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


def row_logprobs(logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> list[RowLogprobs | None]:
    """Per row of logits [R, V] with sampled token_ids, int64 [R]; None where the row asks for none."""
    results: list[RowLogprobs | None] = [None] * len(rows)
    asked = {i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None}
    if not asked:
        return results
    index = integers(list(asked), logits.device)
    logprobs, sampled = logits[index].float().log_softmax(-1), token_ids[index][:, None]
    listed = torch.cat([sampled, _likeliest(logprobs, max(asked.values()))], -1)
    values = logprobs.gather(-1, listed)
    rank = (logprobs > values[:, :1]).sum(-1) + 1
    for i, *row in zip(asked, listed.tolist(), values.tolist(), rank.tolist(), strict=True):
        results[i] = _row_logprobs(asked[i], *row)
    return results


def _likeliest(logprobs: Tensor, count: int) -> Tensor:
    """Ids of the `count` likeliest tokens, int64 [R, count]; ties by id, so that every device and batch lists the same.

    A log-probability is <= 0: the bits of its magnitude, read as an integer, are in its order. With the token id below
    them no two keys are equal.
    """
    magnitude = logprobs.contiguous().view(torch.int32).bitwise_and(2**31 - 1).long()
    keys = (magnitude << 32) | torch.arange(logprobs.shape[1], device=logprobs.device)
    return keys.topk(min(count, logprobs.shape[1]), largest=False).values & (2**32 - 1)


def _row_logprobs(count: int, token_ids: list[int], logprobs: list[float], rank: int) -> RowLogprobs:
    """The sampled token, which comes first in the lists and has this rank, and the `count` likeliest, none twice."""
    ranks, keep = [rank], [0]
    for place in range(1, min(count + 1, len(token_ids))):
        tied = place > 1 and logprobs[place] == logprobs[place - 1]
        ranks.append(ranks[-1] if tied else place)
        if token_ids[place] != token_ids[0]:
            keep.append(place)
    return RowLogprobs([token_ids[i] for i in keep], [logprobs[i] for i in keep], [ranks[i] for i in keep])
