"""Batch: what one step computes, as integers; and Half: a range of its rows, as tensors for the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokenweave.engine.upload import integers
from tokenweave.models.attention import PagedAttention
from tokenweave.weave.request import Rows


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
    """The spans of one step, one after the other; a row is a token."""

    spans: tuple[Span, ...]

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
        return Batch(tuple(kept))

    def wanted_rows(self) -> tuple[int, ...]:
        """The rows that make logits, ascending."""
        rows: list[int] = []
        at = 0
        for span in self.spans:
            at += len(span)
            rows += range(at - span.wanted, at)
        return tuple(rows)


class Half:
    """What a strand sees of its rows: ids and positions, the rows that make logits, attention, and buffers to fill."""

    def __init__(self, batch: Batch, storage: Tensor, channel: Any):
        device = storage.device
        self.channel = channel
        self.token_ids = integers([token for span in batch.spans for token in span.tokens], device)
        positions = [range(span.context, span.context + len(span)) for span in batch.spans]
        self.positions = integers([position for run in positions for position in run], device)
        self.rope_lengths = [
            max(span.prompt_len, position + 1)
            for span, run in zip(batch.spans, positions, strict=True)
            for position in run
        ]
        wanted = batch.wanted_rows()
        self.logits_rows = Rows(wanted, integers(wanted, device))
        self.attention = PagedAttention(batch.spans, storage)

    def partial(self, rows: int) -> Tensor:
        """[rows, hidden]: where the next partial is to be written."""
        return self.channel.partial(rows)
