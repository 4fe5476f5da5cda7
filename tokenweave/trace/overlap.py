"""Overlap: how much of the communication was hidden behind compute. Pure functions of spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenweave.trace.spans import COMMUNICATION, Span

Interval = tuple[int, int]  # start_ns, end_ns


@dataclass(frozen=True)
class Overlap:
    """Where the time of one rank went, or of the mean rank. hidden_s + exposed_s == communication_s.

    communication_s: at least one sum or gather in flight, on the comm lane or inline. A rank that came first is in
        flight while its peers are late; see `in_flight`.
    exposed_s: the part of it during which the compute lane waited, or ran it inline.
    hidden_s: the rest of it. hidden_share: hidden_s / communication_s, None when nothing was communicated.
    idle_s: the compute lane waited although nothing was in flight (threads handing over).
    compute_s: segments.
    """

    communication_s: float
    exposed_s: float
    hidden_s: float
    hidden_share: float | None
    idle_s: float
    compute_s: float


@dataclass(frozen=True)
class OverlapSummary(Overlap):
    """The mean over ranks, with what each rank and each phase (mean over ranks) had."""

    by_rank: dict[int, Overlap]
    by_phase: dict[str, Overlap]


def summary(spans: Iterable[Span]) -> OverlapSummary:
    """Sum up any number of steps and ranks. Without spans all times are 0 and the share is None."""
    spans = list(spans)
    by_rank = overlap_by_rank(spans)
    phases = sorted({span.phase for span in spans})
    by_phase = {phase: mean(overlap_by_rank(s for s in spans if s.phase == phase).values()) for phase in phases}
    return OverlapSummary(**vars(mean(by_rank.values())), by_rank=by_rank, by_phase=by_phase)


def overlap_by_rank(spans: Iterable[Span]) -> dict[int, Overlap]:
    ranks: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        ranks[span.rank].append(span)
    return {rank: measure(ranks[rank]) for rank in sorted(ranks)}


def measure(spans: Sequence[Span]) -> Overlap:
    """The overlap of one rank's spans."""
    communication_ns = length(communication(spans))
    exposed_ns = length(exposed(spans))
    idle_ns = (
        length(union(interval(s) for s in spans if s.kind == "wait" or s.kind in COMMUNICATION)) - communication_ns
    )
    compute_ns = length(union(interval(s) for s in spans if s.kind == "segment"))
    return overlap(communication_ns / 1e9, exposed_ns / 1e9, idle_ns / 1e9, compute_ns / 1e9)


def mean(overlaps: Iterable[Overlap]) -> Overlap:
    """The mean rank. Its share is that of the mean times, so a rank that communicated more weighs more."""
    rows = [(o.communication_s, o.exposed_s, o.idle_s, o.compute_s) for o in overlaps]
    return overlap(*(sum(column) / len(rows) for column in zip(*rows, strict=True))) if rows else overlap(0, 0, 0, 0)


def overlap(communication_s: float, exposed_s: float, idle_s: float, compute_s: float) -> Overlap:
    hidden_s = communication_s - exposed_s
    share = hidden_s / communication_s if communication_s else None
    return Overlap(communication_s, exposed_s, hidden_s, share, idle_s, compute_s)


def communication(spans: Iterable[Span]) -> list[Interval]:
    """When one rank had a sum or gather in flight: disjoint, ascending."""
    return union(interval(span) for span in spans if span.kind in COMMUNICATION)


def exposed(spans: Sequence[Span]) -> list[Interval]:
    """When one rank's compute lane stood still for communication in flight: disjoint, ascending."""
    stands = [span for span in spans if span.lane == "compute" and span.kind != "segment"]
    return intersection(union(map(interval, stands)), communication(spans))


def in_flight(spans: Iterable[Span]) -> list[Span]:
    """The same spans, every sum and gather cut to the time from which all ranks were in it.

    `summary(in_flight(spans))` thus counts waiting for a late peer as idle, not as communication. It compares clocks
    across ranks, so it is only meaningful where they agree better than a sum lasts: on one host.
    Raises ValueError if the ranks did not record the same sums.
    """
    spans = list(spans)
    world_size = len({span.rank for span in spans})
    order: dict[tuple[int, int, int], int] = defaultdict(int)
    meetings: dict[tuple[int, int, int], list[Span]] = defaultdict(list)
    for span in sorted((s for s in spans if s.kind in COMMUNICATION), key=interval):
        meetings[span.step, span.half, order[span.rank, span.step, span.half]].append(span)
        order[span.rank, span.step, span.half] += 1
    cut = [span for span in spans if span.kind not in COMMUNICATION]
    for (step, half, _), meeting in meetings.items():
        if len(meeting) != world_size:
            raise ValueError(
                f"half {half} of step {step} has a sum with spans of {len(meeting)} ranks, expected all {world_size}; "
                "pass the spans of every rank"
            )
        all_in_ns = max(span.start_ns for span in meeting)
        cut += [span._replace(start_ns=min(all_in_ns, span.end_ns)) for span in meeting]
    return cut


def interval(span: Span) -> Interval:
    return span.start_ns, span.end_ns


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as disjoint, ascending intervals."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def intersection(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The points in time that are in both; left and right must be disjoint and ascending, as the result is."""
    common: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(intervals: Iterable[Interval]) -> int:
    """The total of disjoint intervals, ns."""
    return sum(end - start for start, end in intervals)
