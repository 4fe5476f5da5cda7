"""Timing one contestant on all ranks at a time: by CUDA events, and on CPU ranks by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from perf.timing import interleaved
from tokenweave.comm.group import Ranks

FLUSH_BYTES = 256 << 20  # several times the L2 cache
SPIN_CYCLES = 2_000_000  # about a millisecond, in which the host queues what is timed


def nothing() -> None: ...


@dataclass(frozen=True)
class Contestant:
    """run: what is timed. before: what must come before each run, not timed."""

    run: Callable[[], object]
    before: Callable[[], object] = nothing


class Timer(Protocol):
    def seconds(self, contestant: Contestant) -> float: ...


class EventTimer:
    """The GPU's time from the first kernel's start to the last one's end.

    The host has queued all of it before. The L2 cache is cold, as in the paper's measurement. Ranks start together: an
    all-reduce of one number comes first.
    """

    def __init__(self, device: torch.device, group: Any):
        self.group = group
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.token = torch.zeros(1, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, contestant: Contestant) -> float:
        contestant.before()
        self.flushed.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        dist.all_reduce(self.token, group=self.group)
        self.start.record()
        contestant.run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


class WallTimer:
    """For CPU ranks: the clock, from when all ranks are there."""

    def __init__(self, group: Any):
        self.group = group

    def seconds(self, contestant: Contestant) -> float:
        contestant.before()
        dist.barrier(group=self.group)
        start_s = time.perf_counter()
        contestant.run()
        return time.perf_counter() - start_s


@dataclass(frozen=True)
class Time:
    """Microseconds: over rounds, of the slowest rank in each."""

    median_us: float
    min_us: float
    max_us: float


def measure(contestants: Mapping[str, Contestant], timer: Timer, rounds: int, ranks: Ranks) -> dict[str, Time]:
    """Collective. One round to warm up, then the contestants in turn, `rounds` times."""
    seconds = interleaved({name: partial(timer.seconds, each) for name, each in contestants.items()}, rounds)
    return slowest(ranks.gather(seconds))


def slowest(by_rank: list[dict[str, list[float]]]) -> dict[str, Time]:
    """From each rank's seconds by contestant and round."""
    return {name: time_of([max(each) for each in zip(*(rank[name] for rank in by_rank))]) for name in by_rank[0]}


def time_of(seconds: list[float]) -> Time:
    return Time(*(value * 1e6 for value in (statistics.median(seconds), min(seconds), max(seconds))))
