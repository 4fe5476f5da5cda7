"""Waiting without hanging: every wait of the host has a bound, and an error that says for what."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

POLL_S = 20e-6  # between two looks at work that runs
EXIT_S = 60.0  # for all that is done when a process ends
STDERR = 2
T = TypeVar("T")


def wait_until(done: Callable[[], bool], timeout_s: float, look: Callable[[], None], what: str) -> None:
    """Come back once `done()`. Raises what `look` raises, which is called while it waits and once at the end, and
    TimeoutError after `timeout_s`. what: a noun phrase, for the error.

    A look comes before each judgement of the time: behind a launch that gave up on a rank, collectives may be queued
    that never end, and its report says more than that time is over.
    """
    deadline_s = time.monotonic() + timeout_s
    while not done():
        look()
        if time.monotonic() > deadline_s:
            raise TimeoutError(
                f"this rank's GPU has not finished {what} for {timeout_s:g} s; a peer is stuck or gone, or a kernel "
                "does not end: look at the other ranks' output"
            )
        time.sleep(POLL_S)
    look()


def within(timeout_s: float, run: Callable[[], T], what: str) -> T:
    """run(), a call of a library that has no bound of its own, on a thread of its own. Raises what it raises, and
    TimeoutError after `timeout_s`: the thread is then left behind. what: a noun phrase, for the error."""
    made: Future[T] = Future()

    def make() -> None:
        try:
            made.set_result(run())
        except BaseException as error:  # it belongs to the caller
            made.set_exception(error)

    try:
        threading.Thread(target=make, name=f"tokenweave: {what}", daemon=True).start()
    except RuntimeError:  # the interpreter is ending and starts none: ending_within bounds all of it
        return run()
    if not wait([made], timeout_s).done:
        raise TimeoutError(f"{what} did not end within {timeout_s:g} s; a peer is stuck or gone")
    return made.result()


@contextmanager
def ending_within(timeout_s: float) -> Iterator[None]:
    """Around what is done while the process ends, where nobody catches an error: after `timeout_s` it prints where each
    of its threads is, and ends with exit code 1."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
