"""Schedule: what the weave's order of work allows, on segments as measured and sums at line rate. Pure functions.

It tells a schedule that cannot hide more from a machine that does not: sending takes no CPU time here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perf.overlap.figures import hidden_share


@dataclass(frozen=True)
class Strands:
    """Seconds, by half and in order: each segment (the first before any sum, the last after all), and each sum.

    compute_s: of the batch not split.
    """

    segments_s: Sequence[Sequence[float]]
    sums_s: Sequence[Sequence[float]]
    compute_s: float

    @property
    def communication_s(self) -> float:
        return sum(map(sum, self.sums_s))


def woven_s(strands: Strands) -> float:
    """Seconds of the woven step: one segment at a time, one sum at a time, halves in turn, each after its own sum."""
    compute_s = comm_s = 0.0  # when each lane is free
    ready_s = [0.0] * len(strands.segments_s)
    for i in range(max(map(len, strands.segments_s))):
        for half, segments in enumerate(strands.segments_s):
            if i < len(segments):
                compute_s = max(compute_s, ready_s[half]) + segments[i]
            if i < len(strands.sums_s[half]):
                comm_s = max(comm_s, compute_s) + strands.sums_s[half][i]
                ready_s[half] = comm_s
    return max(compute_s, comm_s)


def most_hidden(strands: Strands) -> float | None:
    """The share that the schedule can hide: of the time between one after the other, and the longer of the two."""
    off_s = strands.compute_s + strands.communication_s
    return hidden_share(off_s, woven_s(strands), max(strands.compute_s, strands.communication_s))
