"""Inputs: all that a half needs of the host, as a few arrays of integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from tokenweave.engine.batch import Batch
from tokenweave.engine.tables import Array, Tables

LATE = "a batch with late tokens comes after a step that drew them"


@dataclass(frozen=True)
class Inputs(Generic[Array]):
    """token_ids, positions: int64 [tokens]. logits_rows: int64 [rows], of the half's rows, those that make logits.

    sources: int64 [tokens], where among the tokens that the step before drew a token is found, or -1: it is the one in
    token_ids. None where no token is late. tables: None where attention reads spans.
    """

    token_ids: Array
    positions: Array
    logits_rows: Array
    sources: Array | None = None
    tables: Tables[Array] | None = None

    @property
    def arrays(self) -> list[Array]:
        late = () if self.sources is None else (self.sources,)
        return [self.token_ids, self.positions, self.logits_rows, *late, *(self.tables.arrays if self.tables else ())]

    def holding(self, arrays: Iterable[Any]) -> Inputs[Any]:
        """The same with other `arrays`, as on another device."""
        left = iter(arrays)
        token_ids, positions, logits_rows = (next(left) for _ in range(3))
        sources = None if self.sources is None else next(left)
        tables: Any = self.tables and Tables(self.tables.capacity, *left)
        return Inputs(token_ids, positions, logits_rows, sources, tables)


def inputs_of(batch: Batch, tables: Tables[np.ndarray] | None) -> Inputs[np.ndarray]:
    """The inputs of exactly this batch."""
    arrays = rows_of(batch, batch.rows, len(batch.wanted_rows()))
    return Inputs(*arrays, sources_of(batch, batch.rows) if batch.late else None, tables)


def padded_inputs_of(batch: Batch, tables: Tables[np.ndarray]) -> Inputs[np.ndarray]:
    """The inputs of this batch, padded to the capacity of its tables with token 0 at position 0, and with logits of
    row 0. Where it has no late token, its sources say so: they are always there."""
    capacity = tables.capacity
    arrays = rows_of(batch, capacity.tokens, capacity.rows)
    return Inputs(*arrays, sources_of(batch, capacity.tokens), tables)


def rows_of(batch: Batch, tokens: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids, positions, rows that make logits), with zeros behind them up to so many."""
    token_ids, positions, logits_rows = (np.zeros(size, np.int64) for size in (tokens, tokens, rows))
    token_ids[: batch.rows] = [token for span in batch.spans for token in span.tokens]
    positions[: batch.rows] = batch.positions
    logits_rows[: len(batch.wanted_rows())] = batch.wanted_rows()
    return token_ids, positions, logits_rows


def sources_of(batch: Batch, tokens: int) -> np.ndarray:
    sources = np.full(tokens, -1, np.int64)
    for row, index in batch.late:
        sources[row] = index
    return sources


def known_tokens(inputs: Inputs[Tensor], previous: Tensor | None) -> Tensor:
    """int64 [tokens], with those in place that the step before drew. previous: int64, what it drew.

    torch.where(sources < 0, token_ids, previous[sources])
    """
    if inputs.sources is None:
        return inputs.token_ids
    assert previous is not None, LATE
    drawn = previous.index_select(0, inputs.sources.clamp_min(0))
    return torch.where(inputs.sources < 0, inputs.token_ids, drawn)
