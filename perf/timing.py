"""Honest timing on a noisy machine: the contestants in turn, A B A B, and the median of each and of their ratios."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over all rounds."""

    median_s: float
    min_s: float
    max_s: float


@dataclass(frozen=True)
class Comparison:
    """ratio: median over rounds of (other's seconds / ours in the same round); above 1, ours is faster."""

    what: str
    ours: Timing
    other: Timing
    ratio: float
    ratio_min: float
    ratio_max: float
    unit: str = "s"
    goal: float | None = None

    def row(self) -> str:
        spread = f"{self.ratio_min:.2f}-{self.ratio_max:.2f}"
        goal = "" if self.goal is None else f"{self.goal:.2f}"
        seconds = f"{self.ours.median_s:.4f} | {self.other.median_s:.4f}"
        return f"| {self.what} | {seconds} | {self.ratio:.2f} | {spread} | {goal} |"


def interleaved(contestants: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Run every contestant to warm up, once, and once more on GPUs, where a step that comes again is captured; then in
    turn, `rounds` times. Returns seconds by contestant.

    A contestant may return its own seconds; else it is timed as a whole. All ranks start each run together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm_ups = 2 if torch.cuda.is_available() else 1
    for round_ in range(-warm_ups, rounds):
        for name, run in contestants.items():
            if dist.is_initialized():
                dist.barrier()
            start_s = time.perf_counter()
            own_s = run()
            elapsed_s = time.perf_counter() - start_s
            if round_ >= 0:
                seconds[name].append(elapsed_s if own_s is None else own_s)
    return seconds


def compare(what: str, ours: list[float], other: list[float], goal: float | None = None) -> Comparison:
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return Comparison(what, timing(ours), timing(other), statistics.median(ratios), min(ratios), max(ratios), goal=goal)


def timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def table(rows: list[Comparison], other: str) -> str:
    head = f"| what | tokenweave, s | {other}, s | ratio | spread | goal |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(row.row() for row in rows)])


def machine() -> dict[str, Any]:
    """What a reader must know to place the figures."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "transformers")},
        "commit": commit(),
    }


def cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return done.stdout.strip() or "unknown"
