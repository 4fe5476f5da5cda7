"""python -m perf.overlap: measure what is not in the journal yet, then write the report."""

from __future__ import annotations

import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perf.overlap import netns
from perf.overlap.journal import Journal, digest
from perf.overlap.options import parse, points
from perf.overlap.points import Point, by_setting
from perf.overlap.report import write_report
from perf.overlap.sessions import Job, SessionFailed, run_session
from perf.shapes import USER, model_folder
from perf.timing import machine

ROOT = Path(__file__).parents[2]


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


def about(options: Any, argv: list[str]) -> dict[str, Any]:
    """What a reader must know to place the figures."""
    return machine() | {
        "threads": options.threads,
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
        "code": digest([ROOT / "tokenweave", Path(__file__).parent]),
        "command": " ".join(["python -m perf.overlap", *argv]),
    }


def measure(wanted: dict[str, Point], journal: Journal, code: str, timeout_s: float) -> None:
    """Every point that the journal does not have, in sessions of one setting each."""
    progress = Progress(wanted, journal)
    progress.update()
    known = journal.read()
    log = journal.path.with_name("ranks.log")
    log.unlink(missing_ok=True)
    try:
        for setting, group in by_setting([p for key, p in wanted.items() if key not in known]).items():
            folder = str(model_folder(setting.shape))  # made before two ranks could race to make it
            job = Job(group, folder, str(journal.path), code)
            run_session(job, log, timeout_s, progress.update)
    finally:
        progress.close()


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.link == "real":
        netns.become_root_of_a_user_namespace(argv, USER)
        if reason := netns.refusal():
            return refused(reason)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, and so takes everything down
    options.out.mkdir(parents=True, exist_ok=True)
    journal, facts = Journal(options.out / "journal.jsonl"), about(options, argv)
    code = f"{facts['code']}, {facts['cpu']}, torch {facts['versions']['torch']}"
    wanted = {point.key(code): point for point in points(options)}
    try:
        measure(wanted, journal, code, options.timeout_s)
    except SessionFailed as error:
        print(f"perf.overlap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perf.overlap: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    results = journal.read()
    print(write_report([(point, results[key]) for key, point in wanted.items()], facts, options.out))
    return 0


def refused(reason: str) -> int:
    print(
        f"perf.overlap: a real link cannot be made here: {reason}. It takes root or user namespaces (unshare -Ur), "
        "with iproute2 and util-linux. Without them use --link paced, whose figures are labelled simulated",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
