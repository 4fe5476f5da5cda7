"""Batch: what one step computes, as integers."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """One sequence's part of a batch: new `tokens` after `context` tokens that are already in the cache."""

    tokens: tuple[int, ...]
    context: int
    block_table: tuple[int, ...]
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

    @property
    def rows(self) -> int:
        return sum(map(len, self.spans))

    def narrow(self, start: int, stop: int) -> Batch:
        """Rows start..stop; a cut may go through the middle of a span."""
        kept, at = [], 0
        for span in self.spans:
            first, last = max(start - at, 0), min(stop - at, len(span))
            if first < last:
                kept.append(span.narrow(first, last))
            at += len(span)
        return Batch(tuple(kept), tuple((row - start, index) for row, index in self.late if start <= row < stop))

    def wanted_rows(self) -> tuple[int, ...]:
        """The rows that make logits, ascending."""
        rows: list[int] = []
        at = 0
        for span in self.spans:
            at += len(span)
            rows += range(at - span.wanted, at)
        return tuple(rows)
