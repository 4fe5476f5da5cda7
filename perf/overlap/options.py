"""Options: the command line, and the points that it asks for."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from perf.overlap.netns import MOST_ENDS
from perf.overlap.peers import PEERS
from perf.overlap.points import LINKS, MEASURES, Point, Setting
from perf.overlap.workloads import MIXES
from perf.shapes import SHAPES, check, full_name

PEER_NAMES = [peer.name for peer in PEERS]
RESULTS = Path(__file__).parents[1] / "results"
ABOUT = """\
What overlap is worth: every mode in turn (A B A B), on the same weights, ranks, threads and link.

modes     off     plain all-reduce, then residual and norm on every rank; on GPUs the fastest of NCCL, torch's multimem
                  and FlashInfer, each with a fused residual and norm (perf/overlap/baselines/)
          fused   sharded sums, the batch not split
          weave   two halves, one computes while the other's sum is on the wire
          auto    what the runtime chooses by the step times that it measured when it started
          nocomm  nothing is sent: compute alone (wrong results by design)
          ideal   computed: the longer of compute alone and communication alone
          and peers, with the weights and the ranks that tokenweave has (perf/overlap/peers/)
measures  prefill   seconds of one step by prompt length
          timeline  what both lanes of each rank did in one of them (CPU)
          decode    seconds of one step by batch
          mix       tokens/s, TTFT, TPOT and E2E at p50/p90/p99 of requests that come at their own times
links     real   network namespaces, one a rank, joined by shaped veth pairs (Linux; root or unshare -Ur)
          paced  simulated: loopback, and the comm lane sleeps until a wire of that speed would be done
          none   what joins the ranks anyway; the only one with --device cuda
"""
EXAMPLES = """\
examples:
  python -m perf.overlap --quick                          a minute or two: does everything work here?
  python -m perf.overlap --measures prefill timeline      the figures by prompt length; leave the machine alone
  python -m perf.overlap --link paced --mbit 1000         without any privileges
  python -m perf.overlap --ranks 1 --measures prefill mix --mixes mixed      one rank, beside transformers
  python -m perf.overlap --device cuda --ranks 8 --shapes Llama-3.3-70B      GPUs; the paper: launch/figures.sh

Writes report.md with its plots, results.csv and results.json to the folder --out. The same command goes on where an
earlier one was ended; what other code or another machine measured is measured again.
"""


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    name = "python -m perf.overlap"
    p = argparse.ArgumentParser(
        name, usage=f"{name} [options]", description=ABOUT, epilog=EXAMPLES, formatter_class=form
    )
    p.add_argument("--link", choices=LINKS, help="default: real, and none with --device cuda or one rank")
    p.add_argument("--mbit", type=positive, nargs="+", metavar="N", help="link speeds, Mbit/s (default: 1000 500)")
    p.add_argument("--shapes", type=shape, nargs="+", metavar="MODEL", help=f"models: {', '.join(SHAPES)}; a published "
                   "one such as Llama-3.3-70B, with random weights; a folder; a hub id, of which config.json alone is "
                   "downloaded (default: llama-512x8 llama-1024x8)")  # fmt: skip
    p.add_argument("--measures", choices=MEASURES, nargs="+", default=list(MEASURES), help="default: all")
    p.add_argument("--prompts", type=count, nargs="+", metavar="N", help="tokens (default: 256 512 1024 2048)")
    p.add_argument("--batches", type=count, nargs="+", metavar="N", help="decode batches (default: 1 4 16 64)")
    p.add_argument(
        "--mixes", choices=MIXES, nargs="+", metavar="MIX", help=f"of {', '.join(MIXES)} (default: fixed chat)"
    )
    p.add_argument("--rounds", type=count, metavar="N", help="of each comparison (default: 5); of each mix 3 at most")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--ranks", type=count, default=2, metavar="W", help="default: 2")
    p.add_argument(
        "--threads", type=count, default=os.cpu_count() or 1, metavar="N", help="of all ranks together (default: cores)"
    )
    p.add_argument("--without", choices=PEER_NAMES, nargs="+", default=[], metavar="PEER",
                   help=f"leave out peers, of {', '.join(map(repr, PEER_NAMES))}")  # fmt: skip
    p.add_argument("--quick", action="store_true", help="a tiny model, few and small points: figures mean nothing")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="default: perf/results/overlap-<date>-<link>; temporary if --quick"
    )
    p.add_argument(
        "--timeout-s", type=positive, default=1800.0, metavar="S", help="for one model on one link (default: 1800)"
    )
    return p


FULL: dict[str, Any] = {
    "mbit": [1000.0, 500.0],
    "shapes": ["llama-512x8", "llama-1024x8"],
    "prompts": [256, 512, 1024, 2048],
    "batches": [1, 4, 16, 64],
    "mixes": ["fixed", "chat"],
    "rounds": 5,
}
QUICK: dict[str, Any] = {
    "mbit": [200.0],
    "shapes": ["llama-128x2"],
    "prompts": [64, 256],
    "batches": [1, 4],
    "mixes": ["quick-fixed", "quick-chat"],
    "rounds": 2,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line with every default filled in. Leaves with code 2 for what cannot be."""
    p = parser()
    options = p.parse_args(argv)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.link is None:
        options.link = "none" if options.device == "cuda" or options.ranks == 1 else "real"
    if options.link != "none" and (options.device == "cuda" or options.ranks == 1):
        p.error(f"--link {options.link} needs --device cpu and two ranks or more; use --link none")
    if options.link == "real" and options.ranks > MOST_ENDS:
        p.error(f"--link real joins up to {MOST_ENDS} ranks, not {options.ranks}")
    try:
        check_models(options)
    except (ValueError, OSError) as error:
        p.error(str(error))
    name = f"overlap-{date.today().isoformat()}-{options.link}{'-quick' if options.quick else ''}"
    folder = Path(tempfile.gettempdir()) if options.quick else RESULTS
    options.out = (options.out or folder / name).absolute()
    return options


def points(options: argparse.Namespace) -> list[Point]:
    """What is to be measured, by model and link; the timeline is of the longest prompt up to 1024 tokens."""
    xs = {"prefill": options.prompts, "decode": options.batches, "mix": options.mixes}
    xs["timeline"] = [max((tokens for tokens in options.prompts if tokens <= 1024), default=min(options.prompts))]
    rounds = {"mix": min(3, options.rounds), "timeline": 1}
    return [
        Point(setting, measure, x, rounds.get(measure, options.rounds))
        for setting in settings(options)
        for measure in MEASURES
        if measure in options.measures and (measure, options.device) != ("timeline", "cuda")  # lanes of a CPU only
        for x in xs[measure]
    ]


def settings(options: argparse.Namespace) -> list[Setting]:
    threads = max(1, options.threads // options.ranks)
    first = Setting("", options.link, 0.0, options.ranks, threads, options.device)
    speeds = [0.0] if options.link == "none" else options.mbit
    return [replace(first, shape=shape, mbit_per_s=speed) for shape in options.shapes for speed in speeds]


def check_models(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for a model that so many ranks cannot share, or that is not made for the prompts."""
    tokens = max(options.prompts) if {"prefill", "timeline"} & {*options.measures} else 0
    for name in options.shapes:
        check(name, options.ranks, tokens)


def shape(text: str) -> str:
    try:
        return full_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value
