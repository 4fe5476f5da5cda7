"""The recorder of what a GPU's streams do, on the GPU's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tokenweave.trace.spans import Recorder, Span
from tokenweave.waiting import wait_until

START_S = 10.0  # for a device on which nothing is queued yet


class TimingEvent(Protocol):
    """As torch.cuda.Event, of those that have a time."""

    def record(self) -> Any: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float: ...  # ms; both are done


class StreamRecorder(Recorder):
    """Its times are events, each recorded on the stream that was current. What they say is read when they are done:
    `export` after a wait for the device finds all.

    elapsed_time is an fp32 of ms, which is fine near its first event only: each step begins with an event of its own.
    """

    def __init__(self, rank: int, make_event: Callable[[], TimingEvent] | None = None):
        """make_event: None makes CUDA's."""
        super().__init__(rank)
        self._make_event = make_event or cuda_event
        self._open: deque[tuple[Span | None, TimingEvent, TimingEvent]] = deque()  # None: a step begins
        self._base = self.now()
        wait_until(self._base.query, START_S, lambda: None, "an event on an idle stream")
        self._base_ns = time.perf_counter_ns()

    def now(self) -> TimingEvent:
        event = self._make_event()
        event.record()
        return event

    def begin_step(self, phase: str) -> None:
        super().begin_step(phase)
        self._read()
        base = self.now()
        self._open.append((None, base, base))

    def record(
        self, lane: Any, kind: Any, half: int, name: str, start: Any, end: Any, tokens: int = 0, bytes: int = 0
    ) -> None:
        span = self._span(lane, kind, half, name, 0, 0, tokens, bytes)
        self._open.append((span, start, end))

    def export(self) -> list[Span]:
        self._read()
        return super().export()

    def clear(self) -> None:
        super().clear()
        self._open = deque(each for each in self._open if each[0] is None)  # times count from the steps' events

    def _read(self) -> None:
        """Take in what is done, in order."""
        while self._open and self._open[0][2].query():
            span, start, end = self._open.popleft()
            start_ns, end_ns = (self._base_ns + round(1e6 * self._base.elapsed_time(event)) for event in (start, end))
            if span is None:
                self._base, self._base_ns = end, end_ns
            else:
                self.spans.append(span._replace(start_ns=start_ns, end_ns=end_ns))


def cuda_event() -> TimingEvent:
    return torch.cuda.Event(enable_timing=True)
