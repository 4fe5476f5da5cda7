"""Waiting for a device without hanging: every wait of the host has a bound, and an error that says for what."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 20e-6  # between two looks at work that runs


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
