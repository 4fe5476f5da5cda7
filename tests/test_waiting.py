"""The host's waits: bounded, and of a device's the communicator's report comes before the clock."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import pytest

from tokenweave.comm.group import PeerError
from tokenweave.waiting import wait_until, within


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


# -- calls of libraries -----------------------------------------------------------------------------------------------


def test_a_call_that_comes_back_is_waited_for():
    assert within(30.0, lambda: 3, "a call") == 3


def test_a_call_that_raises_does():
    with pytest.raises(ZeroDivisionError):
        within(30.0, lambda: 1 / 0, "a call")


def test_a_call_that_never_comes_back_is_an_error_that_says_what():
    forever = threading.Event()
    with pytest.raises(TimeoutError, match=r"^leaving NCCL did not end within 0\.05 s; a peer is stuck or gone$"):
        within(0.05, forever.wait, "leaving NCCL")
    forever.set()


@pytest.mark.parametrize(("hangs", "code", "said"), [(False, 0, "called"), (True, 1, "Timeout (0:00:01)!")])
def test_a_process_ends_whatever_is_done_at_its_end(hangs, code, said):
    """Also where no thread can be started any more: from Python 3.12 on."""
    script = f"""
import atexit, threading
from tokenweave.waiting import ending_within, within
def end():
    with ending_within(1.0):
        within(600.0, threading.Event().wait if {hangs} else lambda: print("called"), "a call")
atexit.register(end)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert ("in end" in done.stderr) == hangs  # where it hangs
