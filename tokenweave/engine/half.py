"""Half: a range of a step's rows, as the model sees it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from tokenweave.engine.attention import HalfAttention
from tokenweave.engine.batch import Batch
from tokenweave.engine.inputs import Inputs, known_tokens
from tokenweave.weave.request import Rows


class Half:
    """What a strand sees of its rows: ids and positions, the rows that make logits, attention, and buffers to fill.

    alive_rows: those that go on from the last layer's attention. None: all do, and those that make logits are picked at
    the end. So it is where a graph is captured: which rank owns a row that goes on alone is a host integer.
    """

    def __init__(
        self,
        batch: Batch,
        inputs: Inputs[Tensor],
        attention: HalfAttention,
        channel: Any,
        previous: Tensor | None = None,
        captured: bool = False,
    ):
        """previous: int64, the tokens that the step before drew, on the same device; needed for late rows."""
        self.batch = batch
        self.token_ids = known_tokens(inputs, previous)
        self.positions = inputs.positions
        self.logits_rows = Rows(batch.wanted_rows(), inputs.logits_rows)
        self.alive_rows = None if captured else self.logits_rows
        self.attention = attention
        self.channel = channel

    def partial(self, rows: int) -> Tensor:
        """[rows, hidden]: where the next partial is to be written."""
        return self.channel.partial(rows)

    @cached_property
    def rope_lengths(self) -> list[int]:
        """For each row, the length that dynamic rope rotates it for."""
        return [
            max(span.prompt_len, position + 1)
            for span in self.batch.spans
            for position in range(span.context, span.context + len(span))
        ]
