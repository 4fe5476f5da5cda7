"""Penalties and suppression: what changes logits token by token, before temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenweave.engine.histories import Histories
from tokenweave.engine.sampling_row import SamplingRow

MOST_TOKENS = 1 << 20  # of histories at a time: each takes some 40 bytes for a while


def penalty_arrays(rows: Sequence[SamplingRow]) -> dict[str, np.ndarray]:
    """What `penalise` needs on the device, besides tokens."""
    factors = [(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) for row in rows]
    return {"penalties": np.array(factors, np.float32)}


def penalise(scores: Tensor, histories: Histories, told: Tensor, penalties: Tensor, longest: int) -> None:
    """Apply each row's penalties to scores, fp32 [R, V], in place; some rows at a time where histories are long.

    told: int64 [R, 3]: slot, length, and how many of these are the prompt's. penalties: fp32 [R, 3]: repetition,
    presence, frequency. longest: the greatest length.
    """
    rows = max(1, MOST_TOKENS // max(longest, 1))
    for part, one, by in zip(scores.split(rows), told.split(rows), penalties.split(rows), strict=True):
        slots, lengths, prompt_lens = one.split(1, -1)
        penalise_rows(part, histories.read(slots[:, 0], max(longest, 1)), lengths, prompt_lens, by)


def penalise_rows(scores: Tensor, tokens: Tensor, lengths: Tensor, prompt_lens: Tensor, penalties: Tensor) -> None:
    """As `penalise`. tokens: int64 [R, L], of which a row has the first lengths; lengths, prompt_lens: int64 [R, 1].

    repetition, over prompt and output: positive scores are divided by it, negative ones multiplied.
    presence and frequency, over the output: subtracted once, and once per occurrence.
    """
    repetition, presence, frequency = penalties.split(1, -1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    # A place beyond the length stands for the row's first token: what is written twice is the same both times.
    tokens = tokens.where(places < lengths, tokens[:, :1])
    written = ((places >= prompt_lens) & (places < lengths)).float()
    outputs = torch.zeros_like(scores).scatter_add_(1, tokens, written).gather(1, tokens)
    values = scores.gather(1, tokens)
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(lengths > 0, repeated, values) - presence * (outputs > 0) - frequency * outputs
    scores.scatter_(1, tokens, values)


def suppression_arrays(rows: Sequence[SamplingRow], vocabulary: int) -> dict[str, np.ndarray]:
    """What `suppress` needs on the device; nothing where no row suppresses any.

    A tokenizer may have end tokens that its model does not: those are never drawn anyway.
    """
    ids = [(row, token) for row, one in enumerate(rows) for token in one.suppressed_token_ids]
    places = [row * vocabulary + token for row, token in ids if token < vocabulary]
    return {"suppressed": np.array(places, np.int64)} if places else {}


def suppress(scores: Tensor, places: Tensor) -> None:
    """Set scores, contiguous, to -inf where suppressed tokens are in them, in place."""
    scores.view(-1).index_fill_(0, places, -math.inf)
