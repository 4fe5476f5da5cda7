"""Options of python -m perf.paper."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from datetime import date
from pathlib import Path

from perf.overlap.options import PEER_NAMES, count, positive, shape
from perf.overlap.points import Setting
from perf.paper.plan import DRY, FIGURES, FULL, QUICK, Scale
from perf.shapes import TINY

RESULTS = Path(__file__).parents[1] / "results"
ABOUT = """\
Figures 1, 4, 10, 11, 12 and 13 of the TokenWeave paper on the GPUs of this machine, beside what the paper published.

  1   what all-reduce takes of a prefill       10  the fused kernel by its number of CTAs
  4   collectives by size                      11  prefill latency by prompt length and mode
  12  throughput by workload and mode          13  throughput by tokens of a step (first model)

A model is a name of the cost model's published table, run with random weights (nothing is downloaded), a folder with
a config.json (its safetensors, where it has some), or a hub id (config.json alone is downloaded).

Needs two GPUs or more, joined by NVLink, with room for the model in bf16 (Llama-3.3-70B: 141 GB in all), and wants them
for itself. Everything takes hours, --quick a small part of that; neither has run on GPUs yet, so nobody knows better.
"""
EXAMPLES = """\
examples:
  launch/figures.sh                                         Llama-3.3-70B on all GPUs, everything
  launch/figures.sh --models Qwen2.5-72B Mixtral-8x22B      other shapes
  launch/figures.sh --figures 4 10                          the kernel alone, no model
  launch/figures.sh --models ./my-model --quick             few and small points
  launch/figures.sh --dry-run                               no GPU: the same steps over gloo, tiny

Prints what it measures on the way, and where the report is. Writes report.md with its plots, figures.csv and
figures.json to --out, what is done so far to journal.jsonl there: the same command goes on where an earlier one was
ended. Exit code 0: everything was measured; 1: not, and the report says what lacks; 2: bad usage; 130: stopped.
"""


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        "launch/figures.sh",
        usage="launch/figures.sh [options]",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=form,
    )
    p.add_argument("--models", type=shape, nargs="+", metavar="MODEL", default=["Llama-3.3-70B"],
                   help="default: Llama-3.3-70B")  # fmt: skip
    p.add_argument("--figures", choices=FIGURES, nargs="+", default=list(FIGURES), help="default: all")
    p.add_argument("--nproc", type=count, metavar="W", help="ranks, one GPU each (default: all GPUs; 2 in a dry run)")
    p.add_argument("--prompts", type=count, nargs="+", metavar="N", help="tokens (default: 1024, 2048 ... 65536)")
    p.add_argument("--rounds", type=count, metavar="N", help="of each prefill (default: 5); a mix is run once")
    p.add_argument("--requests", type=count, metavar="N", help="of each mix (default: 1000, as in the paper)")
    p.add_argument("--without", choices=PEER_NAMES, nargs="+", default=[], metavar="PEER",
                   help=f"leave out peers, of {', '.join(map(repr, PEER_NAMES))}")  # fmt: skip
    p.add_argument("--quick", action="store_true", help="few prompts, mixes and requests")
    p.add_argument("--dry-run", action="store_true", help="CPU ranks over gloo, the models shrunk to next to nothing")
    p.add_argument("--reference", type=Path, metavar="DIR", help="the artifact's CSV files, to show all they hold")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: perf/results/paper-<date>-<W>-gpus (or -dry-run)")
    p.add_argument("--timeout-s", type=positive, default=4 * 3600.0, metavar="S", help="of a model (default: 4 hours)")
    return p


def parse(argv: list[str], gpus: int) -> argparse.Namespace:
    """The command line with every default filled in. Leaves with code 2 for what cannot be."""
    p = parser()
    options = p.parse_args(argv)
    options.nproc = options.nproc or (2 if options.dry_run else gpus)
    if not options.dry_run and options.nproc > gpus:
        p.error(f"--nproc {options.nproc}: torch sees {gpus} GPUs; --dry-run needs none")
    if options.nproc < 2:
        p.error(f"two ranks or more have something to sum, and torch sees {gpus} GPUs; --dry-run needs none")
    options.figures = [figure for figure in FIGURES if figure in options.figures]
    where = "dry-run" if options.dry_run else f"{options.nproc}-gpus"
    options.out = (options.out or RESULTS / f"paper-{date.today().isoformat()}-{where}").absolute()
    return options


def scale_of(options: argparse.Namespace) -> Scale:
    scale = DRY if options.dry_run else QUICK if options.quick else FULL
    given = {name: getattr(options, name) for name in ("prompts", "rounds", "requests") if getattr(options, name)}
    return replace(scale, **given)


def settings(options: argparse.Namespace) -> list[Setting]:
    """One a model."""
    device, before = ("cpu", TINY) if options.dry_run else ("cuda", "")
    threads = max(1, (os.cpu_count() or 1) // options.nproc) if not options.dry_run else 1
    return [Setting(before + model, "none", 0.0, options.nproc, threads, device) for model in options.models]
