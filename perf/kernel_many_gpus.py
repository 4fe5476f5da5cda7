"""The fused AllReduce + RMSNorm kernel on several GPUs: right or wrong, how fast, and whether that is fast enough.

First every implementation is held against fp64 and compared bitwise between ranks; a wrong one ends the run. Then
Figures 10 and 4 of the TokenWeave paper are measured, beside NCCL, torch's multimem all-reduce and FlashInfer. Exit
code: 0 = right, and fast enough or not judged; 1 = wrong, too slow, or failed.
Usage: launch/kernel.sh (or torchrun --nproc-per-node N -m perf.kernel_many_gpus).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from perf.kernels.correctness import LAYERS, Case, WrongResult, cases_of, check
from perf.kernels.figures import ROWS, Measured, Sweep
from perf.kernels.ours import MULTIMEM, Ours, headline, open_ours
from perf.kernels.peers import NO_CUDA, Bench, sort_out_wrong, vote
from perf.kernels.problem import Problem
from perf.kernels.report import DRY, Run, page, read_reference, write
from perf.kernels.timers import EventTimer, Timer, WallTimer
from perf.kernels.verdict import judge, why_not_judged, word
from perf.timing import installed, machine
from tokenweave.comm.group import PeerError, Ranks, is_shared, join
from tokenweave.cost.collectives import FUSED_SMS

RESULTS = Path(__file__).parent / "results"
TIMEOUT_S = 180.0  # of every wait for another rank, and of the kernel's own


@dataclass(frozen=True)
class Scale:
    """How much is run. checks: (problem, layers) that results are checked for."""

    checks: tuple[tuple[Problem, tuple[str, ...]], ...]
    check_rows: tuple[int, ...]
    check_sms: tuple[int, ...]
    problem: Problem  # of the figures
    rows: tuple[int, ...]
    rounds: int

    cut: bool = True  # whether checked sums go on with a part of the rows

    def cases(self, layers: Sequence[str]) -> list[Case]:
        return cases_of(layers, self.check_rows, self.check_sms, self.cut)


def full(device: torch.device) -> Scale:
    checks = (
        (Problem(8192, torch.bfloat16, 1000, device), tuple(LAYERS)),
        (Problem(4096, torch.float16, 1000, device), ("norm",)),
        (Problem(2888, torch.float32, 1000, device), ("norm",)),  # vectors that no number of threads divides
    )
    figures = Problem(8192, torch.bfloat16, max(ROWS), device)
    return Scale(checks, (1, 3, 8, 33, 257, 1000), (1, 2, 8, 64), figures, ROWS, rounds=21)


def quick(device: torch.device) -> Scale:
    whole = full(device)
    figures = Problem(8192, torch.bfloat16, 8192, device)
    return Scale(whole.checks[:1], (1, 33, 257), (1, 8), figures, (256, 1024, 8192), rounds=9)


def dry(device: torch.device) -> Scale:
    tiny = Problem(64, torch.float32, 16, device)
    return Scale(((tiny, ("norm",)),), (1, 5, 9), (1, 3), tiny, (4, 8), rounds=2, cut=False)


# -- the stages -------------------------------------------------------------------------------------------------------


def check_all(scale: Scale, ranks: Ranks, twins_folder: Path | None) -> dict[str, int]:
    """Cases checked by implementation. Raises WrongResult on every rank."""
    checked: dict[str, int] = {}
    for problem, layers in scale.checks:
        cases = scale.cases(layers)
        opened = open_ours(ranks, problem, twins_folder)
        for ours in opened.usable:
            words = f"checking {ours.name}, {problem.dtype} x {problem.hidden_size}"
            with bar(len(cases), words, ranks) as progress:
                check(ours, cases, problem, ranks, progress.update)
            checked[ours.name] = checked.get(ours.name, 0) + sum(case.rows <= ours.most_rows for case in cases)
    return checked


def measure_all(scale: Scale, ranks: Ranks, twins_folder: Path | None) -> tuple[Measured, Ours, dict[str, str]]:
    """(times, the implementation that figures are about, what is missing)."""
    opened = open_ours(ranks, scale.problem, twins_folder)
    bench = Bench(ranks, scale.problem, opened.missing.get(MULTIMEM, "") if ranks.device.type == "cuda" else NO_CUDA)
    peers, missing = vote(bench)
    peers, wrong = sort_out_wrong(bench, peers, scale.rows[0])
    timed = [ours for ours in opened.usable if ours.kernels] or opened.usable[:1]
    sweep = Sweep(timed, peers, bench, timer_of(ranks), scale.rounds, multiprocessors(ranks.device))
    measured = Measured()
    with bar(len(scale.rows), "measuring", ranks) as progress:
        for rows in scale.rows:
            progress.set_postfix_str(f"{rows} tokens")
            sweep.measure(rows, measured)
            progress.update()
    bench.close()
    return measured, headline(opened, ranks.world_size), opened.missing | missing | wrong


def timer_of(ranks: Ranks) -> Timer:
    return EventTimer(ranks.device, ranks.comm) if ranks.device.type == "cuda" else WallTimer(ranks.control)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return max(FUSED_SMS)
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def bar(total: int, words: str, ranks: Ranks) -> tqdm:
    return tqdm(total=total, desc=words, disable=None if ranks.rank == 0 else True, leave=False)


def about(ranks: Ranks, scale: Scale) -> dict[str, Any]:
    cuda = ranks.device.type == "cuda"
    found = machine()
    versions = {name: installed(name) for name in ("torch", "triton", "cuda-python", "flashinfer-python", "matplotlib")}
    return found | {
        "device": f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}" if cuda else found["cpu"],
        "compute_capability": list(torch.cuda.get_device_capability(ranks.device)) if cuda else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "versions": versions,
        "rounds": scale.rounds,
        "timer": "CUDA events, cold L2 cache, all contestants in turn" if cuda else f"wall clock ({DRY})",
    }


# -- the command ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, ranks: Ranks) -> int:
    """The exit code. Collective."""
    reference = None
    with ranks.together("reading the published figures"):
        reference = read_reference(options.reference) if options.reference else None
    scale = (dry if options.dry_run else quick if options.quick else full)(ranks.device)
    with ExitStack() as stack:
        twins = Path(ranks.gather(stack.enter_context(scratch(ranks)))[0]) if options.dry_run else None
        checked = check_all(scale, ranks, twins)
        measured, ours, missing = measure_all(scale, ranks, twins)
        ranks.gather(None)  # nobody needs the folder any more
    kind = (options.dry_run, ranks.world_size, scale.problem.hidden_size, scale.problem.dtype, ours.name)
    judgements = judge(measured.by_ctas(ours.name))
    result = Run(
        about(ranks, scale) if ranks.rank == 0 else {},
        scale.problem,
        ranks.world_size,
        ours.name,
        checked,
        measured,
        missing,
        judgements,
        word(judgements, why_not_judged(*kind)),
        options.dry_run,
    )
    with ranks.together("writing the results"):
        if ranks.rank == 0:
            folder = options.output or default_folder(options.dry_run, result)
            folder.mkdir(parents=True, exist_ok=True)
            write(result, folder, reference)
            print(page(result) + f"\nwritten into {folder}: CSV, JSON, PNG, kernel.md", flush=True)
    return 1 if result.verdict == "FAIL" else 0


def scratch(ranks: Ranks) -> Any:
    """A folder of rank 0's, removed in the end; other ranks make one, too, and leave it empty."""
    return tempfile.TemporaryDirectory(prefix="tokenweave-twins-")


def default_folder(dry_run: bool, result: Run) -> Path:
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="tokenweave-kernel-dry-run-"))
    device = str(result.about["device"]).replace(" x ", "x-").replace(" ", "-")
    return RESULTS / f"kernel-{date.today().isoformat()}-{device}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kernel_many_gpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for CSV, JSON and plots (default: one in perf/results)")
    parser.add_argument("--reference", type=Path, help="folder with the published CSV files, to plot them beside ours")
    parser.add_argument("--quick", action="store_true", help="fewer checks, row counts and rounds; judged all the same")
    parser.add_argument("--dry-run", action="store_true", help="CPU ranks, tiny sizes, the kernel's host twins")
    return parser.parse_args(arguments)


def open_ranks(dry_run: bool) -> Ranks:
    """Raises ValueError where this cannot be run."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1:
        raise ValueError("one rank has nothing to sum: start two or more, with launch/kernel.sh --nproc N")
    if dry_run:
        torch.set_num_threads(1)
        return join(torch.device("cpu"), TIMEOUT_S)
    gpus = torch.cuda.device_count()
    if gpus < world_size:
        raise ValueError(f"{world_size} ranks need {world_size} GPUs, torch sees {gpus}; --dry-run needs none")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return join(device, TIMEOUT_S)


def main() -> int:
    """What went wrong is said once: by every rank that failed by itself, and by rank 0 where all know of it."""
    options, ranks = parse(), None
    try:
        ranks = open_ranks(options.dry_run)
        return run(options, ranks)
    except (WrongResult, PeerError, ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not (isinstance(error, WrongResult) or ranks is None or is_shared(error)):
            print(f"kernel: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if ranks is not None:
            ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
