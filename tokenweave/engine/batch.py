"""Batch: what one step computes, as integers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

INT32 = "i"  # as `array` calls it


@dataclass(slots=True)  # not frozen: every step makes one per sequence, and a frozen one takes three times as long
class Span:
    """One sequence's part of a batch: new `tokens` after `context` tokens that are already in the cache."""

    tokens: tuple[int, ...]
    context: int
    block_table: Sequence[int]
    prompt_len: int
    wanted: int = 0  # how many of the last tokens make logits: 1 when a token is to be sampled, else 0

    def __len__(self) -> int:
        return len(self.tokens)

    def narrow(self, start: int, stop: int) -> Span:
        """Tokens start..stop of this span, as a span; those before them count as context."""
        wanted = max(0, min(stop, len(self)) - max(start, len(self) - self.wanted))
        return replace(self, tokens=self.tokens[start:stop], context=self.context + start, wanted=wanted)


@dataclass(frozen=True)
class Batch:
    """The spans of one step, one after the other; a row is a token.

    late: (row, index) of every row whose token the host does not know yet: it is the token that the previous step has
    sampled at `index`, and still on the device. Such a row's span holds any token id in its place.
    """

    spans: tuple[Span, ...]
    late: tuple[tuple[int, int], ...] = ()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each span."""
        return list(map(len, self.spans))

    @cached_property
    def ends(self) -> list[int]:
        """Of each span, how many tokens its sequence has in the cache after this step."""
        return [span.context + length for span, length in zip(self.spans, self.lengths, strict=True)]

    @cached_property
    def wanted(self) -> list[int]:
        """Rows of each span that make logits."""
        return [span.wanted for span in self.spans]

    @cached_property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def decodes(self) -> bool:
        """Whether every row makes logits for a sequence of its own."""
        return self.rows == len(self.spans) == sum(self.wanted)

    @cached_property
    def owners(self) -> np.ndarray:
        """int64 [rows]: the span of each token."""
        return np.repeat(np.arange(len(self.spans)), self.lengths)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [rows]: of each token in its sequence."""
        behind = np.array(self.ends, np.int64) - list(accumulate(self.lengths))  # a token's position less its row
        return np.arange(self.rows) + behind[self.owners]

    def narrow(self, start: int, stop: int) -> Batch:
        """Rows start..stop; a cut may go through the middle of a span."""
        kept = []
        for span, length, end in zip(self.spans, self.lengths, accumulate(self.lengths), strict=True):
            first, last = max(start - end + length, 0), min(stop - end + length, length)
            if first < last:
                kept.append(span if last - first == length else span.narrow(first, last))
        return Batch(tuple(kept), tuple((row - start, index) for row, index in self.late if start <= row < stop))

    def wanted_rows(self) -> tuple[int, ...]:
        """The rows that make logits, ascending."""
        return self._wanted_rows

    @cached_property
    def _wanted_rows(self) -> tuple[int, ...]:
        if self.decodes:
            return tuple(range(self.rows))
        stops = accumulate(self.lengths)
        return tuple([row for stop, of in zip(stops, self.wanted, strict=True) for row in range(stop - of, stop)])

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """Pickled by columns, block tables as int32: span by span it takes several times as long."""
        spans = (
            (span.tokens, span.context, array(INT32, span.block_table).tobytes(), span.prompt_len, span.wanted)
            for span in self.spans
        )
        return unpickled, (tuple(zip(*spans, strict=True)), tuple(zip(*self.late, strict=True)))


def unpickled(columns: tuple[Any, ...], late: tuple[Any, ...]) -> Batch:
    """What `Batch.__reduce__` took apart; its block tables are arrays."""
    spans = (
        Span(tokens, context, array(INT32, table), prompt_len, wanted)
        for tokens, context, table, prompt_len, wanted in zip(*columns, strict=True)
    )
    return Batch(tuple(spans), tuple(zip(*late, strict=True)))
