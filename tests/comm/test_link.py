"""The simulated wire: what it charges, against the interface's own counters, and how long it then holds the lane."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.comm.wire import DATA_BYTES, WORLD_SIZES
from tokenweave.comm import link as link_module
from tokenweave.comm.link import Link, PacedTransport

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather_rows", "sum_rows", "all_gather_columns")
IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]


# -- the bytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict:
    """(world size, data bytes, collective) -> what tests.comm.wire measured."""
    try:
        subprocess.run([*IN_A_NAMESPACE, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this system gives no network namespace, and a shared interface counts others' bytes: {error}")
    command = [*IN_A_NAMESPACE, sys.executable, "-m", "tests.comm.wire"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {(one["world_size"], one["data_bytes"], one["collective"]): one for one in json.loads(done.stdout)}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("data_bytes", DATA_BYTES)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_charged_bytes_are_those_that_the_interface_counts(measured, world_size, data_bytes, collective):
    one = measured[world_size, data_bytes, collective]
    assert one["charged_bytes"] >= 5 * data_bytes / 2
    assert one["counted_bytes"] == pytest.approx(one["charged_bytes"], rel=0.05)


# -- the time ---------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the time module: time passes by sleeping and by `pass_by`."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


class Sending:
    """A transport whose every collective takes `takes_s` on `clock` and sends `sent_bytes`."""

    world_size = 2

    def __init__(self, sent_bytes: int, clock: Clock | None = None, takes_s: float = 0.0):
        self.sent_bytes, self.clock, self.takes_s = sent_bytes, clock, takes_s
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self._send(name, *arguments)

    def _send(self, name: str, *arguments) -> int:
        self.calls.append((name, *arguments))
        if self.clock is not None:
            self.clock.now_s += self.takes_s
        return self.sent_bytes


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(link_module, "time", clock := Clock())
    return clock


ARGUMENTS = {
    "all_reduce": (torch.zeros(2, 3),),
    "reduce_scatter": (torch.zeros(2, 3), [range(1), range(1, 2)], torch.zeros(1, 3)),
    "all_gather_rows": (torch.zeros(2, 3), [range(1), range(1, 2)]),
    "sum_rows": (torch.zeros(2, 3), [range(1), range(1, 2)], torch.zeros(1, 3), print, torch.zeros(2, 3)),
    "all_gather_columns": (torch.zeros(2, 3), [torch.zeros(2, 3), torch.zeros(2, 3)]),
}


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_ends_when_the_wire_would(clock, collective):
    inner = Sending(500, clock, takes_s=0.25)
    paced = PacedTransport(inner, Link(bandwidth_bytes_per_s=1000, latency_s=2.0))
    assert getattr(paced, collective)(*ARGUMENTS[collective]) == 500
    assert inner.calls == [(collective, *ARGUMENTS[collective])]
    assert clock.now_s == pytest.approx(100.0 + 2.0 + 0.5)  # the 0.25 s that it took are part of it
    assert paced.world_size == 2


def test_a_collective_slower_than_the_wire_is_not_held(clock):
    PacedTransport(Sending(500, clock, takes_s=5.0), Link(1000, 2.0)).all_reduce(torch.zeros(1))
    assert clock.now_s == 105.0


def test_nothing_sent_costs_nothing(clock):
    assert PacedTransport(Sending(0, clock), Link(1000, 2.0)).all_reduce(torch.zeros(0)) == 0
    assert clock.slept_s == []


def test_on_the_real_clock_it_takes_at_least_as_long():
    paced = PacedTransport(Sending(10_000), Link(bandwidth_bytes_per_s=1e6, latency_s=0.005))
    start_s = time.perf_counter()
    for _ in range(3):
        paced.all_reduce(torch.zeros(1))
    assert time.perf_counter() - start_s >= 3 * 0.015


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0, 0), (-1, 0), (float("nan"), 0), (1e9, -1e-6), (1, float("nan"))]
)
def test_a_link_that_cannot_be_is_refused(bandwidth, latency):
    with pytest.raises(ValueError, match=r"^a link needs bandwidth_bytes_per_s > 0 and latency_s >= 0, got "):
        Link(bandwidth, latency)
