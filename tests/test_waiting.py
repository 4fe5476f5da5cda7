"""The host's waits for a device: bounded, and the communicator's report comes before the clock."""

from __future__ import annotations

import itertools
import time

import pytest

from tokenweave.comm.group import PeerError
from tokenweave.waiting import wait_until


def never() -> bool:
    return False


def test_what_is_done_is_not_waited_for_and_looked_at_once():
    looks: list[float] = []
    wait_until(lambda: True, 0.0, lambda: looks.append(time.monotonic()), "a step")
    assert len(looks) == 1


def test_it_looks_while_it_waits():
    looks = itertools.count()
    polls = iter([False] * 5 + [True])
    wait_until(lambda: next(polls), 30.0, lambda: next(looks) and None, "a step")
    assert next(looks) == 6


def test_a_device_that_never_ends_is_an_error_that_says_what():
    with pytest.raises(TimeoutError) as caught:
        wait_until(never, 0.05, lambda: None, "step 7: 3 rows, cut at 2")
    message = str(caught.value)
    assert message.startswith("this rank's GPU has not finished step 7: 3 rows, cut at 2 for 0.05 s; ")
    assert "other ranks" in message
    assert "\n" not in message


@pytest.mark.parametrize("timeout_s", [0.0, 30.0])
def test_a_report_says_more_than_the_clock(timeout_s):
    def look() -> None:
        raise PeerError("rank 1 did not arrive")

    with pytest.raises(PeerError, match="rank 1 did not arrive"):
        wait_until(never, timeout_s, look, "a step")
