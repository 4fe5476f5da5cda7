"""Log-probabilities to report, from raw logits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities under a row's raw logits: the sampled token first, then the likeliest others in order.

    Ranks count from 1; tokens of equal probability share a rank and are listed by id.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True)
class Reports:
    """The log-probabilities of a step, as tensors: A rows ask for some, at most for the K likeliest tokens.

    token_ids: int64 [A, 1 + K], the sampled token first. logprobs: fp32 [A, 1 + K]. ranks: int64 [A], of the sampled.
    """

    asked: Mapping[int, int]  # {row of the step: how many of the likeliest it asks for}
    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.token_ids, self.logprobs, self.ranks

    def read(self) -> dict[int, RowLogprobs]:
        """By row. Reads the tensors, which should be on the host by now."""
        values = zip(*(tensor.tolist() for tensor in self.tensors), strict=True)
        pairs = zip(self.asked.items(), values, strict=True)
        return {row: _row_logprobs(count, *listed) for (row, count), listed in pairs}


def report(logits: Tensor, token_ids: Tensor, asked: Mapping[int, int], index: Tensor | None) -> Reports:
    """For the rows that ask, as in Reports, of logits [R, V] with sampled token_ids, int64 [R].

    index: those rows, int64 on the logits' device; None: it is all of them.
    """
    if index is not None:
        logits, token_ids = logits[index], token_ids[index]
    logprobs = logits.float().log_softmax(-1)
    listed = torch.cat([token_ids[:, None], _likeliest(logprobs, max(asked.values()))], -1)
    values = logprobs.gather(-1, listed)
    return Reports(asked, listed, values, (logprobs > values[:, :1]).sum(-1) + 1)


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
