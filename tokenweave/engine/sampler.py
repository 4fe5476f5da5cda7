"""Draws the next token of every row from its logits: a pure function, so that all ranks agree without talking."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenweave.engine.logprobs import RowLogprobs, row_logprobs
from tokenweave.engine.penalties import penalise, suppress
from tokenweave.engine.random import gumbel
from tokenweave.engine.sampling_row import GREEDY, SamplingRow, sampling_row
from tokenweave.engine.truncation import truncate
from tokenweave.engine.upload import floats, integers

__all__ = ["GREEDY", "RowLogprobs", "Sampled", "SamplingRow", "sample", "sampling_row"]


@dataclass(frozen=True)
class Sampled:
    """token_ids: int64 [R] on the device of the logits. logprobs: per row, None where the row asked for none."""

    token_ids: Tensor
    logprobs: list[RowLogprobs | None]


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Draw a token per row of logits, [R, V] of any floating dtype; logits are left as they are.

    In order: penalties, suppression, temperature, top_k, top_p, min_p, then the argmax of scores + Gumbel noise, which
    draws from softmax(scores). Noise belongs to (key, position, token id), and so does the result: batch composition,
    world size and preemption matter only where two noisy scores are as close as the rounding errors of the logits.
    ValueError if there is not one row per row of logits.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(
            f"logits are {list(logits.shape)}; expected [{len(rows)}, vocabulary]; pass one row per sample"
        )
    token_ids = logits.argmax(-1)
    special = [i for i, row in enumerate(rows) if not row.plain]
    if special:
        index = integers(special, logits.device)
        token_ids[index] = _choose(logits[index].float(), [rows[i] for i in special])
    return Sampled(token_ids, row_logprobs(logits, token_ids, rows))


def _choose(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids, int64 [R]; scores, fp32 [R, V], are overwritten."""
    penalise(scores, rows)
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
