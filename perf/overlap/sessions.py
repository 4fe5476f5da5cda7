"""Sessions: the ranks of one setting, started with torchrun on its link, and watched until they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perf.overlap import netns
from perf.overlap.points import Point, Setting, point_from

ROOT = Path(__file__).parents[2]
PORT = "29500"  # inside a namespace of our own, where every port is free
POLL_S = 0.5  # rarely, too
GRACE_S = 5.0  # for ranks to end when told to
LAST_LINES = 25


class SessionFailed(RuntimeError):
    """The ranks ended badly, or not at all. Says what they printed last."""


@dataclass(frozen=True)
class Job:
    """What the ranks read: the points to measure, the model as EngineConfig takes it, the journal that rank 0 writes
    to, and the peers that are left out."""

    points: list[Point]
    folder: str
    load_format: str
    journal: str
    code: str
    without: list[str] = field(default_factory=list)

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


def read_job(path: Path) -> Job:
    fields = json.loads(path.read_text())
    return Job(**fields | {"points": [point_from(point) for point in fields["points"]]})


def run_session(job: Job, log: Path, timeout_s: float, tick: Callable[[], Any]) -> None:
    """Measure a job's points; `tick` is called several times a second. Whatever ends it, no process is left.

    Raises SessionFailed, or NetworkRefused where the link cannot be made.
    """
    setting = job.points[0].setting
    with ExitStack() as stack:
        file = job.write(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "job.json")
        output = stack.enter_context(log.open("a"))
        processes = [
            stack.enter_context(started(command, environment(setting), output, output))
            for command in stack.enter_context(commands(setting, str(file)))
        ]
        watch(processes, log, timeout_s, tick)


@contextmanager
def commands(setting: Setting, job: str) -> Iterator[list[list[str]]]:
    """A torchrun for each node, on a link that exists as long as the block runs."""
    if setting.link != "real":
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        yield [torchrun(job, setting.ranks, meeting)]
        return
    with netns.joined(setting.mbit_per_s, setting.ranks) as ends:
        first = ends[0].address
        nodes = ["--nnodes", str(len(ends)), "--master-addr", first, "--master-port", PORT]
        meetings = [[*nodes, "--node-rank", str(i), "--local-addr", end.address] for i, end in enumerate(ends)]
        yield [[*end.enter, *torchrun(job, 1, meeting)] for end, meeting in zip(ends, meetings)]


def torchrun(job: str, ranks: int, meeting: list[str]) -> list[str]:
    """Its ranks end with it, however it ends."""
    agent = [sys.executable, str(ROOT / "launch" / "ranks.py"), *meeting, "--nproc-per-node", str(ranks)]
    agent += ["--monitor-interval", "1"]  # seconds: rarely, for the ranks need the cores
    return [*agent, "--no-python", *tied(), sys.executable, "-m", "perf.overlap.rank", job]


def tied() -> list[str]:
    """What makes a command end when the process that started it does, on Linux."""
    return ["setpriv", "--pdeathsig", "KILL"] if sys.platform == "linux" else []


def environment(setting: Setting) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    own = {"OMP_NUM_THREADS": str(setting.threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own | ({"GLOO_SOCKET_IFNAME": netns.INTERFACE} if setting.link == "real" else {})


@contextmanager
def started(command: list[str], env: dict[str, str], stdout: Any, stderr: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with the block: asked first, then killed."""
    process = subprocess.Popen(
        [*tied(), *command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # it had a session of its own: what is left of it goes as well
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watch(processes: list[subprocess.Popen[bytes]], log: Path, timeout_s: float, tick: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        codes = [code for process in processes if (code := process.poll()) is not None]
        if any(codes):
            break
        if time.monotonic() > deadline_s:
            raise SessionFailed(f"not done within {timeout_s:g} s; see {log}, or raise --timeout-s\n{tail(log)}")
        tick()
        time.sleep(POLL_S)
    tick()
    if codes := [code for process in processes if (code := process.poll())]:
        raise SessionFailed(f"a torchrun ended with exit code {codes[0]}; {log} says:\n{tail(log)}")


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
