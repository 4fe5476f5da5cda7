"""Draws the next token of every row from its logits: a pure function, so that all ranks agree without talking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweave.engine.logprobs import Reports, RowLogprobs, report
from tokenweave.engine.penalties import penalise, suppress
from tokenweave.engine.random import gumbel
from tokenweave.engine.sampling_row import GREEDY, SamplingRow, sampling_row
from tokenweave.engine.truncation import truncate
from tokenweave.engine.upload import floats, integers

__all__ = ["GREEDY", "RowLogprobs", "Sampled", "SamplingRow", "sample", "sampling_row"]


@dataclass(frozen=True)
class Sampled:
    """What a step draws. token_ids: int64 [R] on the logits' device. reports: None if no row asks for log-probs.

    The tensors are there for a step that is launched next; the host reads them only once they have been copied to it.
    """

    token_ids: Tensor
    reports: Reports | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that the host wants."""
        return [self.token_ids, *(self.reports.tensors if self.reports else ())]

    def holding(self, tensors: Sequence[Tensor]) -> Sampled:
        """The same with other `tensors`: copies of them on the host."""
        return Sampled(tensors[0], self.reports and Reports(self.reports.asked, *tensors[1:]))

    def read(self) -> list[tuple[int, RowLogprobs | None]]:
        """Per row its token, and its log-probabilities if it asks for them."""
        reports = self.reports.read() if self.reports else {}
        return [(token_id, reports.get(row)) for row, token_id in enumerate(self.token_ids.tolist())]


def sample(logits: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None = None) -> Sampled:
    """Draw a token per row of logits, [R, V] of any floating dtype; logits are left as they are.

    In order: penalties, suppression, temperature, top_k, top_p, min_p, then the argmax of scores + Gumbel noise, which
    draws from softmax(scores). Noise belongs to (key, position, token id), and so does the result: batch composition,
    world size and preemption matter only where two noisy scores are as close as the rounding errors of the logits.
    previous: the token_ids of the step before, among which rows find a token that the host does not know (`late`).
    Never waits for the device. ValueError if there is not one row per row of logits.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(
            f"logits are {list(logits.shape)}; expected [{len(rows)}, vocabulary]; pass one row per sample"
        )
    token_ids = logits.argmax(-1)
    special = [i for i, row in enumerate(rows) if not row.plain]
    if special:
        index = integers(special, logits.device)
        token_ids[index] = _choose(logits[index].float(), [rows[i] for i in special], previous)
    return Sampled(token_ids, report(logits, token_ids, rows))


def _choose(scores: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None) -> Tensor:
    """Token ids, int64 [R]; scores, fp32 [R, V], are overwritten."""
    penalise(scores, rows, previous)
    suppress(scores, rows)
    token_ids = scores.argmax(-1)
    random = [i for i, row in enumerate(rows) if row.random]
    if random:
        index = integers(random, scores.device)
        token_ids[index] = _draw(scores[index], [rows[i] for i in random])
    return token_ids


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    # The maximum becomes 0, so that no temperature overflows and noise is added where fp32 is finest.
    scores = scores - scores.amax(-1, keepdim=True)
    scores /= floats([row.temperature for row in rows], scores.device)[:, None]
    truncate(scores, rows)
    keys = integers([row.key for row in rows], scores.device)
    positions = integers([row.position for row in rows], scores.device)
    columns = torch.arange(scores.shape[1], device=scores.device)
    return scores.add_(gumbel(keys, positions, columns)).argmax(-1)
