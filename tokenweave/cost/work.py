"""Batch: what a step computes, as counts alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokenweave.cost.ops import Attention, AttentionTime, Numbers
from tokenweave.cost.parts import Part


@dataclass(frozen=True)
class Chunk:
    """New `tokens` of one sequence after `context` cached ones; the last `wanted` make logits. A decode row has one."""

    tokens: int
    context: int = 0
    wanted: int = 1


class Batch:
    """The chunks of one step, one after the other."""

    def __init__(self, chunks: Iterable[Chunk]):
        self.chunks = tuple(chunk for chunk in chunks if chunk.tokens > 0)
        sizes = [(chunk.tokens, chunk.context, min(chunk.wanted, chunk.tokens)) for chunk in self.chunks]
        # an empty chunk at the end, so that the batch's end is a place in it as well
        self.tokens, self.contexts, self.wanted_of = np.array([*sizes, (0, 0, 0)], dtype=np.int64).T
        self.starts = sums_before(self.tokens)[:-1]
        self.wanted_before = sums_before(self.wanted_of)
        self.rows, self.wanted = int(self.starts[-1]), int(self.wanted_before[-1])

    def find(self, row: Numbers) -> tuple[Numbers, Numbers]:
        """(the chunk that holds `row`, how many of its tokens lie before it); `row` may be the end."""
        index = self.starts.searchsorted(row, side="right") - 1
        return index, row - self.starts[index]

    def wanted_from(self, row: Numbers) -> Numbers:
        """Rows that make logits, from `row` on."""
        index, tokens_before = self.find(row)
        left = np.minimum(self.wanted_of[index], self.tokens[index] - tokens_before)
        return self.wanted - self.wanted_before[index + 1] + left


def sums_before(values: np.ndarray) -> np.ndarray:
    """Of what lies before each value, and of all."""
    return np.concatenate((np.zeros(1, values.dtype), values.cumsum()))


class BatchAttention:
    """One layer kind's attention over a batch, summed up so that many cuts cost no more than one."""

    def __init__(self, batch: Batch, attention: Attention):
        self.batch, self.attention = batch, attention
        compute_s, memory_s, longest_s = attention.chunk(batch.tokens, batch.contexts)
        self.compute_s, self.memory_s = sums_before(compute_s), sums_before(memory_s)
        none = np.zeros(1)
        self.longest_before = np.maximum.accumulate(np.concatenate((none, longest_s)))
        self.longest_after = np.maximum.accumulate(np.concatenate((none, longest_s[::-1])))[::-1]

    def whole(self) -> AttentionTime:
        return AttentionTime(self.compute_s[-1], self.memory_s[-1], self.longest_before[-1])

    def halves(self, cuts: np.ndarray) -> AttentionTime:
        """[2, cuts]: of rows before and from each cut. A sequence cut in two has its first part as the context of its
        second."""
        index, head = self.batch.find(cuts)
        context, tail = self.batch.contexts[index], self.batch.tokens[index] - head
        parts = self.attention.chunk(np.array([head, tail]), np.array([context, context + head]))
        return AttentionTime(
            parts.compute_s + self._outside(self.compute_s, index),
            parts.memory_s + self._outside(self.memory_s, index),
            np.maximum(parts.longest_s, np.array([self.longest_before[index], self.longest_after[index + 1]])),
        )

    def _outside(self, sums: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Of the chunks before and after chunk `index`."""
        return np.array([sums[index], np.maximum(0.0, sums[-1] - sums[index + 1])])


@dataclass(frozen=True)
class Work:
    """A whole batch, or both halves of it for each of some cuts, [2, cuts]: rows, those that make logits, and one
    layer's attention by window."""

    rows: Numbers
    wanted: Numbers
    attention: dict[int | None, AttentionTime]

    def select(self, indices: np.ndarray) -> Work:
        """Both halves for some of the cuts."""
        times = {window: AttentionTime(*(each[:, indices] for each in time)) for window, time in self.attention.items()}
        return Work(self.rows[:, indices], self.wanted[:, indices], times)

    def coming(self, part: Part) -> Numbers:
        """Rows that the part works on."""
        return self.wanted if part.comes_wanted else self.rows

    def going(self, part: Part) -> Numbers:
        """Rows that its request sums, or gathers."""
        return self.wanted if part.goes_wanted else self.rows
