"""Penalties and suppression: what changes logits token by token, before temperature."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.upload import floats, integers


def penalise(scores: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None = None) -> None:
    """Apply each row's penalties to scores, fp32 [R, V], in place.

    previous: int64, the tokens of the step before; row.late is the place among them of the row's last output token.

    repetition, over prompt and output: positive scores are divided by it, negative ones multiplied.
    presence and frequency, over the output: subtracted once, and once per occurrence.
    """
    penalised = [i for i, row in enumerate(rows) if row.penalised]
    if penalised:
        index = integers(penalised, scores.device)
        scores[index] = _penalised(scores[index], [rows[i] for i in penalised], previous)


def suppress(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Set the scores of each row's suppressed tokens to -inf, in place."""
    token_ids = [row.suppressed_token_ids for row in rows]
    if any(token_ids):
        scores.index_put_(_places(token_ids, scores.device), scores.new_full((), -math.inf))


def _penalised(scores: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None) -> Tensor:
    outputs = _counts([row.output_token_ids for row in rows], scores)
    _count_late(outputs, rows, previous)
    seen = outputs + _counts([row.prompt_token_ids for row in rows], scores) > 0
    repetition = floats([row.repetition_penalty for row in rows], scores.device)[:, None]
    presence = floats([row.presence_penalty for row in rows], scores.device)[:, None]
    frequency = floats([row.frequency_penalty for row in rows], scores.device)[:, None]
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    return torch.where(seen, repeated, scores) - presence * (outputs > 0) - frequency * outputs


def _counts(token_ids: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token occurs in each row, in the shape and dtype of `like`."""
    return torch.zeros_like(like).index_put_(_places(token_ids, like.device), like.new_ones(()), accumulate=True)


def _count_late(counts: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None) -> None:
    late = {i: row.late for i, row in enumerate(rows) if row.late is not None}
    if late:
        assert previous is not None  # or there was no step before
        places = integers(list(late), counts.device), previous[integers(list(late.values()), counts.device)]
        counts.index_put_(places, counts.new_ones(()), accumulate=True)


def _places(token_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column indices of a ragged list of token ids."""
    rows = [row for row, ids in enumerate(token_ids) for _ in ids]
    return integers(rows, device), integers(list(chain.from_iterable(token_ids)), device)
