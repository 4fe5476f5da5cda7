"""Figures 4 and 10: perf.kernel_many_gpus on ranks of its own, once for a folder and a state of the code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from perf.overlap.points import Setting
from perf.overlap.sessions import ROOT, environment, started, tied

DONE = "code.txt"  # in its folder: the code that measured it


class KernelFailed(RuntimeError):
    """Nothing was measured. Says what it printed last."""


def measure_kernel(setting: Setting, folder: Path, code: str, options: list[str], timeout_s: float) -> dict[str, Any]:
    """What it wrote as JSON. A verdict of FAIL is a result as well."""
    done = folder / DONE
    if not (done.is_file() and done.read_text() == code):
        run(setting, folder, options, timeout_s)
        done.write_text(code)
    return json.loads((folder / "kernel.json").read_text())


def run(setting: Setting, folder: Path, options: list[str], timeout_s: float) -> None:
    result = folder / "kernel.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "launch" / "ranks.py"), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "--nproc-per-node", str(setting.ranks)]
    command += ["--no-python", *tied(), sys.executable, "-m", "perf.kernel_many_gpus", f"--output={folder}", *options]
    with started(command, environment(setting), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=timeout_s)
    if not result.is_file():
        raise KernelFailed(last_line(said.decode(errors="replace")) or f"exit code {process.returncode}")


def last_line(text: str) -> str:
    """What the command itself said, without its name."""
    said = [line.removeprefix("kernel: ") for line in text.splitlines() if line.startswith("kernel: ")]
    return said[-1] if said else ""
