"""Spans: what each lane did and when. Recorded by the runtime, read by overlap, chrome and picture."""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple, get_args

LaneName = Literal["compute", "comm"]
Kind = Literal["segment", "sum", "gather", "wait"]

LANES: tuple[str, ...] = get_args(LaneName)
KINDS: tuple[str, ...] = get_args(Kind)
COMMUNICATION = ("sum", "gather")


class Span(NamedTuple):
    """One piece of work, or of waiting, on one lane of one rank.

    kind: "segment" is compute between two sums of a half; "sum" and "gather" are communication, on the comm lane or,
        when it runs inline, on the compute lane; "wait" is the compute lane waiting for a half's sum.
    name: where in the model: "embed", "attn", "mlp", "head".
    start_ns, end_ns: on one clock for all spans of a recorder; end_ns >= start_ns.
    tokens: rows of the half. bytes: what this rank sent, 0 where that is not known.
    phase: what the step was, "prefill" or "decode"; "" where the step was not labelled.
    """

    rank: int
    step: int
    lane: LaneName
    kind: Kind
    half: int
    name: str
    start_ns: int
    end_ns: int
    tokens: int = 0
    bytes: int = 0
    phase: str = ""


class Recorder:
    """Collects the spans of one rank. Both lanes' threads may record: list.append is atomic.

    Times are what `now` gives, here `time.perf_counter_ns`; `origin_ns` is what turns them into wall-clock time.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.step = 0
        self.phases: dict[int, str] = {}
        self.spans: list[Span] = []
        self.origin_ns = time.time_ns() - time.perf_counter_ns()

    def now(self) -> Any:
        """The time, as `record` takes it."""
        return time.perf_counter_ns()

    def begin_step(self, phase: str) -> None:
        """What is recorded from here on is of the next step."""
        self.step += 1
        self.phases[self.step] = phase

    def record(
        self,
        lane: LaneName,
        kind: Kind,
        half: int,
        name: str,
        start: Any,
        end: Any,
        tokens: int = 0,
        bytes: int = 0,
    ) -> None:
        """Add a span to the current step; times as `now` gives them."""
        self.spans.append(self._span(lane, kind, half, name, start, end, tokens, bytes))

    def _span(
        self, lane: LaneName, kind: Kind, half: int, name: str, start_ns: int, end_ns: int, tokens: int, bytes: int
    ) -> Span:
        if lane not in LANES or kind not in KINDS or end_ns < start_ns:
            raise ValueError(
                f"a span needs a lane of {LANES}, a kind of {KINDS} and end_ns >= start_ns, "
                f"got {lane!r}, {kind!r}, {start_ns} to {end_ns}"
            )
        phase = self.phases.get(self.step, "")
        return Span(self.rank, self.step, lane, kind, half, name, start_ns, end_ns, tokens, bytes, phase)

    def export(self) -> list[Span]:
        """The spans with times in wall-clock ns, so that ranks on different hosts share one axis."""
        origin_ns = self.origin_ns
        return [s._replace(start_ns=s.start_ns + origin_ns, end_ns=s.end_ns + origin_ns) for s in self.spans]

    def clear(self) -> None:
        """Forget all spans and phases, for runs too long to keep; `step` and the clock stay."""
        self.spans.clear()
        self.phases.clear()


def half_name(half: int) -> str:
    """0 -> "A", 1 -> "B": how timelines call the halves."""
    return chr(ord("A") + half)
