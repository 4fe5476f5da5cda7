"""Batch: what a step computes, as counts alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from tokenweave.cost.ops import Attention, AttentionTime
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
        self.ends = list(accumulate(chunk.tokens for chunk in self.chunks))
        self.rows = self.ends[-1] if self.ends else 0
        self._wanted = [0, *accumulate(min(chunk.wanted, chunk.tokens) for chunk in self.chunks)]  # before each chunk
        self.wanted = self._wanted[-1]

    def find(self, row: int) -> tuple[int, int]:
        """(the chunk that holds `row`, how many of its tokens lie before it); `row` may be the end."""
        index = bisect_right(self.ends, row)
        return index, row - (self.ends[index - 1] if index else 0)

    def wanted_from(self, row: int) -> int:
        """Rows that make logits, from `row` on."""
        index, before = self.find(row)
        if index == len(self.chunks):
            return 0
        chunk = self.chunks[index]
        return self.wanted - self._wanted[index + 1] + min(chunk.wanted, chunk.tokens - before)


class BatchAttention:
    """One layer kind's attention over a batch, summed up so that any cut costs next to nothing."""

    def __init__(self, batch: Batch, attention: Attention):
        self.batch, self.attention = batch, attention
        known: dict[tuple[int, int], AttentionTime] = {}
        times: list[AttentionTime] = []
        before = None
        for chunk in batch.chunks:
            if chunk is not before:  # rows that decode often share one
                key, before = (chunk.tokens, chunk.context), chunk
                if key not in known:
                    known[key] = attention.chunk(*key)
                time = known[key]
            times.append(time)
        compute_s, memory_s, longest_s = zip(*times) if times else ((), (), ())
        self.compute_s = [0.0, *accumulate(compute_s)]
        self.memory_s = [0.0, *accumulate(memory_s)]
        self.longest_before = [0.0, *accumulate(longest_s, max)]
        self.longest_after = [*accumulate(reversed(longest_s), max, initial=0.0)][::-1]

    def whole(self) -> AttentionTime:
        return AttentionTime(self.compute_s[-1], self.memory_s[-1], self.longest_before[-1])

    def halves(self, cut: int) -> tuple[AttentionTime, AttentionTime]:
        """Of rows before and from `cut`. A sequence cut in two has its first part as the context of its second."""
        index, before = self.batch.find(cut)
        first = AttentionTime(self.compute_s[index], self.memory_s[index], self.longest_before[index])
        if before == 0:
            return first, self._after(index)
        chunk = self.batch.chunks[index]
        head = self.attention.chunk(before, chunk.context)
        tail = self.attention.chunk(chunk.tokens - before, chunk.context + before)
        return _sum(first, head), _sum(tail, self._after(index + 1))

    def _after(self, index: int) -> AttentionTime:
        return AttentionTime(
            max(0.0, self.compute_s[-1] - self.compute_s[index]),
            max(0.0, self.memory_s[-1] - self.memory_s[index]),
            self.longest_after[index],
        )


def _sum(a: AttentionTime, b: AttentionTime) -> AttentionTime:
    return AttentionTime(a.compute_s + b.compute_s, a.memory_s + b.memory_s, max(a.longest_s, b.longest_s))


@dataclass(frozen=True)
class Work:
    """A half, or a whole batch: its rows, those that make logits, and one layer's attention by window."""

    rows: int
    wanted: int
    attention: dict[int | None, AttentionTime]

    def coming(self, part: Part) -> int:
        """Rows that the part works on."""
        return self.wanted if part.comes_wanted else self.rows

    def going(self, part: Part) -> int:
        """Rows that its request sums, or gathers."""
        return self.wanted if part.goes_wanted else self.rows
