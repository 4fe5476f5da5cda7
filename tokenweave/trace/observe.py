"""The observer that records what lanes and strands do, on the host's clock."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from tokenweave.trace.spans import Recorder
from tokenweave.weave.lanes import Job, Observer


class TraceObserver(Observer):
    """Records sums and gathers where they run, and the compute lane's waits for them."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self._since: dict[tuple[str, int], int] = {}

    def started(self, job: Job) -> None:
        self._since["run", id(job)] = time.perf_counter_ns()

    def finished(self, job: Job) -> None:
        self._record("run", "compute" if job.inline else "comm", job.kind, job)

    def waiting(self, job: Job) -> None:
        self._since["wait", id(job)] = time.perf_counter_ns()

    def waited(self, job: Job) -> None:
        if ("wait", id(job)) in self._since:
            self._record("wait", "compute", "wait", job)

    def _record(self, action: str, lane: Any, kind: Any, job: Job) -> None:
        start_ns = self._since.pop((action, id(job)))
        self.recorder.record(lane, kind, job.half, job.site, start_ns, time.perf_counter_ns(), tokens=job.rows)


def observed(strand: Generator[Any, Any, Any], half: int, recorder: Recorder) -> Generator[Any, Any, Any]:
    """The same strand, each segment between two requests recorded under the name of the request that ends it."""
    value = None
    while True:
        start_ns = time.perf_counter_ns()
        try:
            request = strand.send(value)
        except StopIteration as done:
            recorder.record("compute", "segment", half, "end", start_ns, time.perf_counter_ns())
            return done.value
        recorder.record("compute", "segment", half, request.site, start_ns, time.perf_counter_ns())
        value = yield request
