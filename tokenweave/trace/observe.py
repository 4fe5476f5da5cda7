"""What has a recorder record what lanes and strands do."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tokenweave.trace.spans import Recorder
from tokenweave.weave.lanes import Job, Observer


class TraceObserver(Observer):
    """Records sums and gathers where they run, and the compute lane's waits for them."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self._since: dict[tuple[str, int], Any] = {}

    def started(self, job: Job) -> None:
        self._since["run", id(job)] = self.recorder.now()

    def finished(self, job: Job) -> None:
        self._record("run", "compute" if job.inline else "comm", job.kind, job)

    def waiting(self, job: Job) -> None:
        self._since["wait", id(job)] = self.recorder.now()

    def waited(self, job: Job) -> None:
        if ("wait", id(job)) in self._since:
            self._record("wait", "compute", "wait", job)

    def _record(self, action: str, lane: Any, kind: Any, job: Job) -> None:
        start = self._since.pop((action, id(job)))
        self.recorder.record(lane, kind, job.half, job.site, start, self.recorder.now(), tokens=job.rows)


def observed(strand: Generator[Any, Any, Any], half: int, recorder: Recorder) -> Generator[Any, Any, Any]:
    """The same strand, each segment between two requests recorded under the name of the request that ends it."""
    value = None
    while True:
        start = recorder.now()
        try:
            request = strand.send(value)
        except StopIteration as done:
            recorder.record("compute", "segment", half, "end", start, recorder.now())
            return done.value
        recorder.record("compute", "segment", half, request.site, start, recorder.now())
        value = yield request
