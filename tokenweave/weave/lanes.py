"""Lanes: where work is queued in order. The compute lane is the caller; these are what the comm lane can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch

CLOSE_S, POLL_S = 10.0, 1e-3  # of a stream that is closed


@dataclass(frozen=True, eq=False)  # a job is itself, however like another it is
class Job:
    """One piece of work for a lane, with the words that timelines and errors describe it by."""

    run: Callable[[], Any]
    kind: str = "sum"  # "sum" | "gather"
    site: str = ""
    half: int = 0
    rows: int = 0
    inline: bool = False  # runs on the compute lane


class Pending(Protocol):
    """The handle of a job in flight."""

    def wait(self) -> Any: ...  # the result, once the compute lane may use it; raises what the job raised

    def drain(self) -> None: ...  # let the job end, whatever comes of it


class Observer:
    """What may watch a lane: timelines and the hazard checker. Every hook does nothing here."""

    def submitted(self, job: Job) -> None:
        """On the compute lane, before the job is queued."""

    def started(self, job: Job) -> None:
        """On the comm lane, before the job runs."""

    def finished(self, job: Job) -> None:
        """On the comm lane, after the job ran."""

    def waiting(self, job: Job) -> None:
        """On the compute lane, before it waits."""

    def waited(self, job: Job) -> None:
        """On the compute lane, after it waited."""

    def received(self, job: Job, result: Any) -> None:
        """On the compute lane, when the job's strand gets the result, which is its until its half's next request."""


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


class StreamLane:
    """The comm lane on CUDA: a high-priority stream. Waiting orders streams by events; the host never blocks.

    Memory that a job allocates may be used again by a later job as soon as the host lets go of it, although the compute
    stream may still have reads of it queued. That is safe because every job first waits for all that was queued there.
    """

    def __init__(self, device: torch.device, observers: tuple[Observer, ...] = ()):
        self.observers = observers
        self.stream = torch.cuda.Stream(device, priority=-1)

    def submit(self, run: Callable[[], Any], **words: Any) -> StreamPending:
        job = Job(run, **words)
        for observer in self.observers:
            observer.submitted(job)
            observer.started(job)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            result = job.run()
            done = torch.cuda.Event()
            done.record(self.stream)
        for observer in self.observers:
            observer.finished(job)
        return StreamPending(job, result, done, self)

    def close(self) -> None:
        """Waits for what is queued, but not long: it may be a collective whose peer is gone."""
        done, deadline_s = torch.cuda.Event(), time.monotonic() + CLOSE_S
        done.record(self.stream)
        while not done.query() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)


@dataclass(frozen=True)
class StreamPending:
    job: Job
    result: Any
    done: torch.cuda.Event
    lane: StreamLane

    def wait(self) -> Any:
        torch.cuda.current_stream(self.lane.stream.device).wait_event(self.done)
        for observer in self.lane.observers:
            observer.waited(self.job)
            observer.received(self.job, self.result)
        return self.result

    def drain(self) -> None:
        torch.cuda.current_stream(self.lane.stream.device).wait_event(self.done)


Lane = InlineLane | ThreadLane | StreamLane


def open_lane(device: torch.device, timeout_s: float, observers: tuple[Observer, ...] = ()) -> Lane:
    """The comm lane that fits the device."""
    if device.type == "cuda":
        return StreamLane(device, observers)
    return ThreadLane(timeout_s, observers)
