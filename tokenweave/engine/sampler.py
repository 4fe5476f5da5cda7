"""Draws the next token of every row from its logits: a pure function, so that all ranks agree without talking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokenweave.engine.drawing import draw, drawing_arrays
from tokenweave.engine.histories import Histories, history_arrays
from tokenweave.engine.logprobs import Reports, RowLogprobs, report
from tokenweave.engine.penalties import penalise, penalty_arrays, suppress, suppression_arrays
from tokenweave.engine.sampling_row import GREEDY, NO_HISTORY, History, SamplingRow, sampling_row
from tokenweave.engine.upload import upload

__all__ = ["GREEDY", "Histories", "History", "RowLogprobs", "Sampled", "SamplingRow", "sample", "sampling_row"]


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


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], previous: Tensor | None = None, histories: Histories | None = None
) -> Sampled:
    """Draw a token per row of logits, [R, V] of any floating dtype; logits are left as they are.

    In order: penalties, suppression, temperature, top_k, top_p, min_p, then the argmax of scores + Gumbel noise, which
    draws from softmax(scores). Noise belongs to (key, position, token id), and so does the result: batch composition,
    world size and preemption matter only where two noisy scores are as close as the rounding errors of the logits.
    previous: the token_ids of the step before, among which rows find a token that the host does not know (`late`).
    histories: what was told before, and takes in what the rows tell; None where they tell all there is.
    Never waits for the device. ValueError if there is not one row per row of logits.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(
            f"logits are {list(logits.shape)}; expected [{len(rows)}, vocabulary]; pass one row per sample"
        )
    special = [i for i, row in enumerate(rows) if not row.plain]
    chosen = [rows[i] for i in special]
    asked = {i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None}
    parts = {"special": special, "asked": list(asked)}
    arrays = {name: np.array(part, np.int64) for name, part in parts.items() if 0 < len(part) < len(rows)}
    on = upload(arrays | arrays_of(chosen, logits.shape[1]), logits.device)
    if not special:
        token_ids = logits.argmax(-1)
    else:
        token_ids = _choose(_scores(logits, on), chosen, on, previous, histories)
        if "special" in on:
            token_ids = logits.argmax(-1).index_copy_(0, on["special"], token_ids)
    return Sampled(token_ids, report(logits, token_ids, asked, on.get("asked")) if asked else None)


def arrays_of(rows: Sequence[SamplingRow], vocabulary: int) -> dict[str, np.ndarray]:
    """All that the device must know of rows that are not plain, to be uploaded at once."""
    arrays = suppression_arrays(rows, vocabulary)
    if any(row.random for row in rows):
        arrays |= drawing_arrays(rows, vocabulary)
    if any(row.penalised for row in rows):
        arrays |= penalty_arrays(rows) | history_arrays(told_by(rows))
    return arrays


def told_by(rows: Sequence[SamplingRow]) -> list[History]:
    return [row.history or NO_HISTORY for row in rows]


def _scores(logits: Tensor, on: Mapping[str, Tensor]) -> Tensor:
    """Of the rows that are not plain, fp32: not the logits' memory where penalties or suppression will write."""
    scores = (logits[on["special"]] if "special" in on else logits).float()
    written = "penalties" in on or "suppressed" in on
    return scores.clone() if written and scores is logits else scores


def _choose(
    scores: Tensor,
    rows: Sequence[SamplingRow],
    on: Mapping[str, Tensor],
    previous: Tensor | None,
    histories: Histories | None,
) -> Tensor:
    """Token ids, int64 [R], of scores, fp32 [R, V]."""
    if "penalties" in on:
        histories = Histories(scores.device) if histories is None else histories
        histories.take_in(told_by(rows), on, previous)
        penalise(scores, histories, on["histories"], on["penalties"], max(one.length for one in told_by(rows)))
    if "suppressed" in on:
        suppress(scores, on["suppressed"])
    return draw(scores, rows, on["integers"], on["floats"]) if "floats" in on else scores.argmax(-1)
