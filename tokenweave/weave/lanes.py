"""Lanes: where work is queued in order. The compute lane is the caller; these are what the comm lane can be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from tokenweave.weave.job import Job, Observer
from tokenweave.weave.streams import CudaStreams, StreamLane

__all__ = ["Finished", "InlineLane", "Job", "Lane", "Observer", "Pending", "StreamLane", "ThreadLane", "open_lane"]


class Pending(Protocol):
    """The handle of a job in flight."""

    def wait(self) -> Any: ...  # the result, once the compute lane may use it; raises what the job raised

    def drain(self) -> None: ...  # let the job end, whatever comes of it


class InlineLane:
    """No lane at all: a job runs at once on the compute lane, and nothing is hidden."""

    def __init__(self, observers: tuple[Observer, ...] = ()):
        self.observers = observers

    def submit(self, run: Callable[[], Any], **words: Any) -> Finished:
        job = Job(run, inline=True, **words)
        for observer in self.observers:
            observer.submitted(job)
            observer.started(job)
        result = job.run()
        for observer in self.observers:
            observer.finished(job)
            observer.waited(job)
            observer.received(job, result)
        return Finished(result)

    def close(self) -> None: ...


@dataclass(frozen=True)
class Finished:
    result: Any

    def wait(self) -> Any:
        return self.result

    def drain(self) -> None: ...


class ThreadLane:
    """The comm lane on a CPU: one worker thread that runs jobs in order. Every wait is bounded by `timeout_s`."""

    def __init__(self, timeout_s: float, observers: tuple[Observer, ...] = ()):
        self.timeout_s = timeout_s
        self.observers = observers
        self._queue: SimpleQueue[ThreadPending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tokenweave-comm-lane", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], Any], **words: Any) -> ThreadPending:
        job = Job(run, **words)
        for observer in self.observers:
            observer.submitted(job)
        pending = ThreadPending(job, self)
        self._queue.put(pending)
        return pending

    @torch.inference_mode()
    def _work(self) -> None:
        while (pending := self._queue.get()) is not None:
            pending.run()
            del pending  # or an idle lane would keep the last job, and all that it holds

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(self.timeout_s)


class ThreadPending:
    """A job of a ThreadLane. Keeps the job, and with it the partial, alive until it is waited for."""

    def __init__(self, job: Job, lane: ThreadLane):
        self.job = job
        self.lane = lane
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._observed()
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
        self._done.set()

    def _observed(self) -> Any:
        for observer in self.lane.observers:
            observer.started(self.job)
        try:
            return self.job.run()
        finally:
            for observer in self.lane.observers:
                observer.finished(self.job)

    def wait(self) -> Any:
        for observer in self.lane.observers:
            observer.waiting(self.job)
        self._await()
        for observer in self.lane.observers:
            observer.waited(self.job)
        if self._error is not None:
            raise self._error
        for observer in self.lane.observers:
            observer.received(self.job, self._result)
        return self._result

    def drain(self) -> None:
        self._done.wait(self.lane.timeout_s)
        self._error = None  # nobody wants it, and its traceback refers to this job, with all that the job holds

    def _await(self) -> None:
        if not self._done.wait(self.lane.timeout_s):
            job = self.job
            raise TimeoutError(
                f"the {job.kind} of half {job.half} at {job.site or 'an unnamed site'} ({job.rows} rows) did not "
                f"finish in {self.lane.timeout_s:g} s; a peer is stuck or gone: look at the other ranks' output"
            )


Lane = InlineLane | ThreadLane | StreamLane


def open_lane(device: torch.device, timeout_s: float, observers: tuple[Observer, ...] = ()) -> Lane:
    """The comm lane that fits the device."""
    if device.type == "cuda":
        return StreamLane(CudaStreams(device), observers)
    return ThreadLane(timeout_s, observers)
