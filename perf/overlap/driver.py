"""Driver: measures what is not in the journal yet, and shows how far it has come."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perf.overlap.journal import Journal, digest
from perf.overlap.points import Point, by_setting
from perf.overlap.sessions import Job, run_session
from perf.shapes import find_model
from perf.timing import installed, machine

ROOT = Path(__file__).parents[2]
GPU_PACKAGES = ("triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "cuda-python", "flashinfer-python", "vllm")


class Progress:
    """A bar over points on a terminal, elsewhere a line for each that is done. Follows the journal."""

    def __init__(self, wanted: dict[str, Point], journal: Journal):
        self.wanted = wanted
        self.journal = journal
        self._size = -1
        self._done: set[str] = set()
        self._bar = tqdm(total=len(wanted), unit="point", disable=None, smoothing=0)

    def update(self) -> None:
        """Cheap while nothing is new: the ranks need the cores."""
        size = self.journal.path.stat().st_size if self.journal.path.exists() else 0
        if size == self._size:
            return
        self._size = size
        new = (self.journal.read().keys() & self.wanted.keys()) - self._done
        for key in (key for key in self.wanted if key in new):
            self._done.add(key)
            if self._bar.disable:
                print(f"[{len(self._done)}/{len(self.wanted)}] {self.wanted[key].label}", file=sys.stderr, flush=True)
        self._bar.set_description_str(self._next(), refresh=False)
        self._bar.update(len(new))

    def _next(self) -> str:
        return next((point.label for key, point in self.wanted.items() if key not in self._done), "report")

    def close(self) -> None:
        self._bar.close()


def about(program: str, argv: list[str], threads: int, device: str) -> dict[str, Any]:
    """What a reader must know to place the figures."""
    found = machine()
    if device == "cuda":
        found["versions"] |= {name: there for name in GPU_PACKAGES if (there := installed(name))}
    return found | {
        "gpus": gpus() if device == "cuda" else "",
        "threads": threads,
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
        "code": digest([ROOT / "tokenweave", Path(__file__).parent]),
        "command": shlex.join([*program.split(), *argv]),
    }


def gpus() -> str:
    """How many of which kind, and the driver, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except OSError:
        return "no nvidia-smi"
    return ", ".join(f"{count} x {name}" for name, count in Counter(told).items())


def code_of(facts: dict[str, Any]) -> str:
    """What a result in the journal must agree with to be taken up."""
    return f"{facts['code']}, {facts['cpu']}, torch {facts['versions']['torch']}"


def measure(
    wanted: dict[str, Point], journal: Journal, code: str, timeout_s: float, without: Sequence[str] = ()
) -> None:
    """Every point that the journal does not have, in sessions of one setting each."""
    progress = Progress(wanted, journal)
    progress.update()
    known = journal.read()
    log = journal.path.with_name("ranks.log")
    log.unlink(missing_ok=True)
    try:
        for setting, group in by_setting([p for key, p in wanted.items() if key not in known]).items():
            model = find_model(setting.shape)  # made before two ranks could race to make it
            job = Job(group, model.folder, model.load_format, str(journal.path), code, [*without])
            run_session(job, log, timeout_s, progress.update)
    finally:
        progress.close()


def unwind_when_told_to_end() -> None:
    """As Ctrl-C does: whatever was started or made is taken down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
