"""`tokenweave calibrate`: measure this machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from tokenweave.cli.bar import Bar
from tokenweave.cli.options import above_zero, positive
from tokenweave.cli.parser import Parser, UsageError
from tokenweave.comm.group import environment_world_size, join
from tokenweave.config import DEVICES
from tokenweave.cost.calibrate import POOR, Calibration, Point, calibrate, off_by, store
from tokenweave.cost.hardware import as_json
from tokenweave.cost.machine import usable_cores
from tokenweave.engine.rank import local_place, pick_device
from tokenweave.engine.workers import share_cores

EXPECTED_S = 15.0

DESCRIPTION = """\
Measure what this machine does (GEMMs, attention, copies, launches, and with several ranks the sums between them), fit
the cost model to it, and keep the record: under TOKENWEAVE_CACHE, XDG_CACHE_HOME/tokenweave or ~/.cache/tokenweave, by
the machine's name. Takes well under a minute. `--hardware FILE` of other commands reads the file."""


def parser() -> Parser:
    parser = Parser(prog="tokenweave calibrate", usage="tokenweave calibrate [options]", description=DESCRIPTION)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is one")
    parser.add_argument(
        "--tp",
        "--tensor-parallel-size",
        dest="tensor_parallel_size",
        type=positive,
        metavar="N",
        help="ranks that sum with each other; a plain process has torchrun start them (default: 1, or all that run)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record here instead (a .json file)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    parser.add_argument("--timeout-s", type=above_zero, default=120.0, help="the bound on every wait for another rank")
    return parser


def run(options: argparse.Namespace, out: TextIO) -> None:
    if options.output is not None and options.output.suffix != ".json":
        raise ValueError(f"--output must name a .json file, got {options.output}")
    asked, running = options.tensor_parallel_size, environment_world_size()
    if asked not in (None, running):
        return run_ranks(options, out)
    share_cores(local_place(None)[1])
    device = pick_device(options.device, *local_place(None))
    ranks = join(device, options.timeout_s)
    try:
        with Bar("calibrating", EXPECTED_S, options.progress and ranks.rank == 0) as bar:
            calibration = calibrate(ranks, lambda point: bar.update(f"{point.what} {size(point)}"))
        if ranks.rank == 0:
            path = store(calibration, device, options.output)
            out.write(json.dumps(record(calibration, path)) + "\n" if options.json else table(calibration, path))
    finally:
        ranks.leave()


def run_ranks(options: argparse.Namespace, out: TextIO) -> None:
    """This command again, by torchrun, on as many ranks as asked for."""
    if environment_world_size() > 1:
        raise UsageError(
            f"--tensor-parallel-size {options.tensor_parallel_size}, but torchrun started {environment_world_size()}"
        )
    ranks = options.tensor_parallel_size
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "tokenweave.cli", "calibrate", "--device", options.device]
    command += ["--timeout-s", str(options.timeout_s)]
    command += ["--output", str(options.output.absolute())] if options.output else []
    command += ["--json"] if options.json else []
    command += [] if options.progress else ["--no-progress"]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    path = os.pathsep.join(map(os.path.abspath, sys.path))  # the ranks import what this process does
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    out.flush()
    done = subprocess.run(command, stdout=out, env=environment)
    if done.returncode:
        raise ChildProcessError(f"the ranks failed with exit code {done.returncode}; their output is above")


def record(calibration: Calibration, path: Path) -> dict[str, object]:
    """Everything, for json.dumps. Times are seconds."""
    points = [
        asdict(point) | {"predicted_s": predicted_s}
        for point, predicted_s in zip(calibration.points, calibration.predicted_s, strict=True)
    ]
    return {"path": str(path), "hardware": as_json(calibration.hardware), "points": points}


def table(calibration: Calibration, path: Path) -> str:
    hardware, share = calibration.hardware, calibration.hardware.efficiency
    peaks = ", ".join(f"{dtype} {flops / 1e12:.3g}" for dtype, flops in hardware.flops.items())
    lines = [
        *rows(calibration),
        "",
        f"machine       {hardware.name}",
        f"peak          {peaks} TFLOP/s; GEMMs reach {share.gemm:.0%}, attention {share.attention:.0%}",
        f"memory        {hardware.memory_bandwidth * share.memory / 1e9:.3g} GB/s",
        f"link          {hardware.link_bandwidth * share.ring_link / 1e9:.3g} GB/s, {of_sum(calibration)}",
        f"kernel        {hardware.kernel_s * 1e6:.3g} us",
        *warnings(calibration),
        f"written       {path}",
    ]
    return "\n".join(lines) + "\n"


def of_sum(calibration: Calibration) -> str:
    if calibration.world_size == 1:
        return "not measured: one rank"
    return f"and {calibration.sum_s * 1e6:.3g} us for each sum of {calibration.world_size} ranks"


def warnings(calibration: Calibration) -> Iterator[str]:
    """One line, where the model is far off."""
    if not calibration.poor:
        return
    worst = ", ".join(f"{f'{p.what} {size(p)}'.strip()} by {off_by(ratio):.1f}" for p, ratio in calibration.poor[:3])
    yield (
        f"warning       the model is off by more than a factor of {POOR:g} at {len(calibration.poor)} of "
        f"{sum(s is not None for s in calibration.predicted_s)} points ({worst}); leave the machine alone and run this "
        "again"
    )


def rows(calibration: Calibration) -> Iterator[str]:
    yield f"{'what':<13}{'size':<20}{'dtype':<10}{'measured':>11}{'rate':>15}{'model':>11}{'error':>8}"
    for point, predicted_s in zip(calibration.points, calibration.predicted_s, strict=True):
        model = "" if predicted_s is None else f"{predicted_s * 1e3:8.3f} ms{predicted_s / point.seconds - 1:>+8.0%}"
        measured = f"{point.seconds * 1e3:8.3f} ms"
        yield f"{point.what:<13}{size(point):<20}{point.dtype:<10}{measured}{rate(point):>15}{model}".rstrip()


def size(point: Point) -> str:
    return " x ".join(map(str, point.size))


def rate(point: Point) -> str:
    if point.amount <= 1.0:
        return ""
    unit = "GFLOP/s" if point.what in ("gemm", "attention") else "GB/s"
    return f"{point.amount / point.seconds / 1e9:.4g} {unit}"
