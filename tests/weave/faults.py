"""Faults that the weave could have, planted in the running code. The numbers stay right, or may: that is what is nasty.

Each is a context manager over a runner. The sums really are waited for; only the order that the code states is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tokenweave.engine.runner import Runner
from tokenweave.weave.lanes import Job, ThreadLane, ThreadPending


@contextmanager
def without_wait(number: int) -> Iterator[list[Job]]:
    """The `number`th wait of a step is not there: by luck, the sum is done all the same. Yields all jobs waited for."""
    wait, waits = ThreadPending.wait, []

    def faulty(pending: ThreadPending) -> Any:
        waits.append(pending.job)
        if len(waits) - 1 != number:
            return wait(pending)
        pending.drain()
        return pending._result

    with patch.object(ThreadPending, "wait", faulty):
        yield waits


@contextmanager
def without_submit_edge(number: int) -> Iterator[list[Job]]:
    """The comm lane starts on the `number`th job without knowing that the compute lane was done with the partial."""
    submit, jobs = ThreadLane.submit, []

    def faulty(lane: ThreadLane, run: Callable[[], Any], **words: Any) -> ThreadPending:
        jobs.append(Job(run, **words))
        if len(jobs) - 1 != number:
            return submit(lane, run, **words)
        pending = ThreadPending(jobs[-1], lane)
        lane._queue.put(pending)
        return pending

    with patch.object(ThreadLane, "submit", faulty):
        yield jobs


@contextmanager
def shared_buffers(runner: Runner) -> Iterator[None]:
    """Both halves communicate through the same memory."""
    one, _ = halves(runner)
    with patch.object(runner.communicator, "_halves", [one, one]):
        yield


@contextmanager
def shared_partials(runner: Runner) -> Iterator[None]:
    """Both halves write their partials into the same memory."""
    one, other = halves(runner)
    with patch.object(other, "partial", one.partial):
        yield


@contextmanager
def hidden_is_partial(runner: Runner) -> Iterator[None]:
    """Each half gets its hidden where it is to write its next partial."""
    buffers = halves(runner)
    with patch.object(buffers[0], "hidden", buffers[0].partial), patch.object(buffers[1], "hidden", buffers[1].partial):
        yield


@contextmanager
def hidden_is_the_other_partial(runner: Runner) -> Iterator[None]:
    """Each half gets its hidden where the other half writes its partials."""
    buffers = halves(runner)
    with patch.object(buffers[0], "hidden", buffers[1].partial), patch.object(buffers[1], "hidden", buffers[0].partial):
        yield


def halves(runner: Runner) -> list[Any]:
    runner.communicator.open(1, 1, runner.lane, "reference", {})
    return runner.communicator._halves[:2]
