"""The lanes of a CPU: order, errors, bounded waits, and what observers see where."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tokenweave.weave.lanes import InlineLane, Job, Observer, ThreadLane, open_lane


class Watcher(Observer):
    """Notes every hook: (hook, half, thread)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.results: list[Any] = []

    def note(self, hook: str, job: Job) -> None:
        self.seen.append((hook, job.half, threading.current_thread().name))

    def submitted(self, job: Job) -> None:
        self.note("submitted", job)

    def started(self, job: Job) -> None:
        self.note("started", job)

    def finished(self, job: Job) -> None:
        self.note("finished", job)

    def waiting(self, job: Job) -> None:
        self.note("waiting", job)

    def waited(self, job: Job) -> None:
        self.note("waited", job)

    def received(self, job: Job, result: Any) -> None:
        self.note("received", job)
        self.results.append(result)

    def hooks(self, half: int) -> list[str]:
        return [hook for hook, seen_half, _ in self.seen if seen_half == half]


COMPUTE, COMM = threading.current_thread().name, "tokenweave-comm-lane"


def fail() -> None:
    raise OSError("lost a peer")


@pytest.fixture
def thread_lane() -> Iterator[Callable[..., ThreadLane]]:
    """thread_lane(*observers, timeout_s=60) -> ThreadLane, closed when the test ends."""
    lanes: list[ThreadLane] = []

    def make(*observers: Observer, timeout_s: float = 60.0) -> ThreadLane:
        lanes.append(ThreadLane(timeout_s, observers))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()
        lane._thread.join(10)
        assert not lane._thread.is_alive()


# -- inline -----------------------------------------------------------------------------------------------------------


def test_inline_runs_at_once_on_the_caller():
    ran = []
    pending = InlineLane().submit(lambda: ran.append(threading.get_ident()) or 7)
    assert ran == [threading.get_ident()]
    assert (pending.wait(), pending.drain()) == (7, None)


def test_inline_observers():
    watcher = Watcher()
    InlineLane((watcher,)).submit(lambda: 7, half=1).wait()
    assert watcher.seen == [(hook, 1, COMPUTE) for hook in ("submitted", "started", "finished", "waited", "received")]
    assert watcher.results == [7]


def test_inline_errors_go_up_at_submit():
    with pytest.raises(OSError, match="lost a peer"):
        InlineLane().submit(fail)


# -- one worker thread ------------------------------------------------------------------------------------------------


def test_a_cpu_gets_a_thread():
    lane = open_lane(torch.device("cpu"), 5.0)
    assert isinstance(lane, ThreadLane)
    assert lane.submit(threading.current_thread).wait().name == COMM
    lane.close()


def test_thread_runs_in_order_of_submission(thread_lane):
    lane, ran = thread_lane(), []

    def job(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        ran.append(number)
        return number

    pendings = [lane.submit(lambda number=number: job(number)) for number in range(20)]
    assert [pending.wait() for pending in reversed(pendings)] == list(reversed(range(20)))
    assert ran == list(range(20))


def test_thread_runs_beside_the_caller(thread_lane):
    """What the job waits for happens on the compute lane after the submit."""
    go = threading.Event()
    pending = thread_lane().submit(lambda: go.wait(30))
    go.set()
    assert pending.wait() is True


def test_thread_jobs_run_in_inference_mode(thread_lane):
    """Else the thread, new to it, would record gradients and refuse to write into the compute lane's tensors."""
    with torch.inference_mode():
        partial = torch.ones(2)
    assert thread_lane().submit(lambda: partial.add_(1.0).is_inference()).wait()


def test_thread_errors_belong_to_the_waiter(thread_lane):
    lane = thread_lane()
    failing, fine = lane.submit(fail), lane.submit(lambda: 7)
    with pytest.raises(OSError, match="lost a peer"):
        failing.wait()
    assert fine.wait() == 7


def test_thread_drain_lets_a_job_end_and_swallows_its_error(thread_lane):
    lane, ended = thread_lane(), []

    def slow() -> None:
        time.sleep(0.02)
        ended.append(True)
        fail()

    assert lane.submit(slow).drain() is None
    assert ended == [True]


def test_a_thread_wait_is_bounded_and_says_for_what(thread_lane):
    go = threading.Event()
    pending = thread_lane(timeout_s=0.05).submit(lambda: go.wait(30), kind="gather", half=1, site="head", rows=12)
    try:
        with pytest.raises(TimeoutError) as raised:
            pending.wait()
    finally:
        go.set()
    message = str(raised.value)
    assert all(words in message for words in ("gather", "half 1", "head", "12 rows", "0.05 s", "other ranks"))
    assert "\n" not in message


def test_a_thread_drain_is_bounded_and_hides_no_other_error(thread_lane):
    go = threading.Event()
    pending = thread_lane(timeout_s=0.05).submit(lambda: go.wait(30))
    pending.drain()
    assert not pending._done.is_set()
    go.set()


def test_thread_keeps_the_partial_until_it_is_waited_for(thread_lane):
    lane, go = thread_lane(), threading.Event()

    def submit() -> tuple[Any, weakref.ref]:
        partial = torch.ones(4)
        return lane.submit(lambda: (go.wait(30), partial.sum().item())[1]), weakref.ref(partial)

    pending, partial = submit()
    gc.collect()
    assert partial() is not None
    go.set()
    assert pending.wait() == 4.0


def test_thread_observers(thread_lane):
    watcher = Watcher()
    lane = thread_lane(watcher)
    for pending in [lane.submit(lambda half=half: 7 + half, half=half) for half in range(2)]:
        pending.wait()
    for half in range(2):
        assert watcher.hooks(half)[0] == "submitted"
        assert watcher.hooks(half)[-2:] == ["waited", "received"]
        assert sorted(watcher.hooks(half)) == sorted(
            ["submitted", "started", "finished", "waiting", "waited", "received"]
        )
    threads = {(hook, thread) for hook, _, thread in watcher.seen}
    assert threads == {("started", COMM), ("finished", COMM)} | {
        (hook, COMPUTE) for hook in ("submitted", "waiting", "waited", "received")
    }
    assert watcher.results == [7, 8]


def test_thread_observers_of_a_job_that_fails(thread_lane):
    watcher = Watcher()
    with pytest.raises(OSError, match="lost a peer"):
        thread_lane(watcher).submit(fail).wait()
    assert sorted(watcher.hooks(0)) == sorted(["submitted", "started", "finished", "waiting", "waited"])


@pytest.mark.parametrize("hook", ["started", "finished"])
def test_thread_observers_that_fail_do_not_end_the_lane(thread_lane, hook):
    """Else whoever waits would learn of it by a timeout that blames a peer."""
    watcher = Watcher()
    setattr(watcher, hook, lambda job: fail())
    lane = thread_lane(watcher)
    with pytest.raises(OSError, match="lost a peer"):
        lane.submit(lambda: 7).wait()
    setattr(watcher, hook, lambda job: None)
    assert lane.submit(lambda: 7).wait() == 7


def test_thread_close_ends_what_was_submitted():
    lane, ran = ThreadLane(timeout_s=30), []
    pendings = [lane.submit(lambda number=number: ran.append(number)) for number in range(5)]
    lane.close()
    assert ran == list(range(5))
    assert not lane._thread.is_alive()
    assert [pending.wait() for pending in pendings] == [None] * 5
