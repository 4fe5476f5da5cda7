"""The comm lane on CUDA: a stream of high priority. Waiting orders streams by events; the host never blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokenweave.waiting import wait_until
from tokenweave.weave.job import Job, Observer

log = logging.getLogger(__name__)
COMPUTE, COMM = "compute", "comm"
CLOSE_S = 10.0  # of a lane that is closed: what is queued may be a collective whose peer is gone


class Event(Protocol):
    def query(self) -> bool: ...  # whether all that it was recorded behind is done


class Streams(Protocol):
    """Two queues of a device, each worked off in order: `compute`, where the caller queues, and `comm`."""

    def record(self, stream: str) -> Event:
        """An event behind all that is queued on `stream` so far."""

    def wait(self, stream: str, event: Event) -> None:
        """What is queued on `stream` from here on starts after the event. The host does not wait."""

    def comm(self) -> AbstractContextManager[Any]:
        """Inside, work is queued on `comm`."""


class CudaStreams:
    """compute is torch's current stream at each call, so that a CUDA graph which captures it captures both: comm joins
    the capture by its first wait, and leaves it by the last wait for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)

    def record(self, stream: str) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: str, event: Any) -> None:
        self._stream(stream).wait_event(event)

    def comm(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def _stream(self, stream: str) -> torch.cuda.Stream:
        return self.stream if stream == COMM else torch.cuda.current_stream(self.device)


class StreamLane:
    """Queues jobs on the comm stream.

    A job starts after what the compute stream had queued when it was submitted, and not after what comes later. Memory
    that a job allocates may be used again by a later job as soon as the host lets go of it, although the compute stream
    may still have reads of it queued: they were queued before the later job was submitted, so it starts after them.
    What the compute stream allocated and a job reads is kept by the Pending until the compute stream waits for the job.
    """

    def __init__(self, streams: Streams, observers: tuple[Observer, ...] = ()):
        self.streams = streams
        self.observers = observers

    def submit(self, run: Callable[[], Any], **words: Any) -> StreamPending:
        job = Job(run, **words)
        for observer in self.observers:
            observer.submitted(job)
        self.streams.wait(COMM, self.streams.record(COMPUTE))
        try:
            with self.streams.comm():
                result = self._observed(job)
        except BaseException:
            self.streams.wait(COMPUTE, self.streams.record(COMM))  # an unjoined capture's error would hide this one
            raise
        return StreamPending(job, result, self.streams.record(COMM), self)

    def _observed(self, job: Job) -> Any:
        """On the comm stream, so that what observers record there is behind what the job waits for."""
        for observer in self.observers:
            observer.started(job)
        result = job.run()
        for observer in self.observers:
            observer.finished(job)
        return result

    def close(self) -> None:
        """Wait for what is queued, but not long, and say so where it does not end: whoever closes has reasons."""
        try:
            wait_until(self.streams.record(COMM).query, CLOSE_S, lambda: None, "what its comm stream has queued")
        except (TimeoutError, RuntimeError) as error:  # the latter of a device that has failed
            log.warning("%s", error)


@dataclass(frozen=True)
class StreamPending:
    job: Job
    result: Any
    done: Event
    lane: StreamLane

    def wait(self) -> Any:
        for observer in self.lane.observers:
            observer.waiting(self.job)
        self.drain()
        for observer in self.lane.observers:
            observer.waited(self.job)
            observer.received(self.job, self.result)
        return self.result

    def drain(self) -> None:
        self.lane.streams.wait(COMPUTE, self.done)
