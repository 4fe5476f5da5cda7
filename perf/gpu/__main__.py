"""The runtime on one GPU: is it right, how fast is it, and does the cost model know it.

perf/gpu.sh runs it, part by part, after the tests and `tokenweave calibrate`. Writes runtime-one-gpu-<date>-<gpu>.json
and .md. --dry-run needs no GPU: it runs the same lines on the CPU with tiny sizes. Exit code 0: every part ran and no
goal was missed; 1: not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perf import stand_in, timing
from perf.fused_one_gpu import driver
from perf.gpu import decode, equality, kernels, predicted, prefill, report, sampling, throughput, two_ranks
from perf.gpu.figure import Figure
from perf.gpu.scale import FULL, TINY, Scale

RESULTS = Path(__file__).parents[1] / "results"
PARTS: dict[str, Callable[[Scale, Callable[[Figure], None]], None]] = {
    "equality": equality.measure,
    "two_ranks": two_ranks.measure,
    "prefill": prefill.measure,
    "decode": decode.measure,
    "kernels": kernels.measure,
    "sampling": sampling.measure,
    "throughput": throughput.measure,
    "predicted": predicted.measure,
    "stand_in": stand_in.measure,
}
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm")


def about(scale: Scale) -> dict[str, Any]:
    """What a reader must know to place the figures."""
    cuda = scale.device == "cuda"
    return timing.machine() | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": driver() if cuda else "none",
        "scale": f"{scale.name}, {scale.dtype}",
        "dry": scale is TINY,
        "versions": {name: timing.installed(name) for name in PACKAGES},
        "commit": timing.commit() if shutil.which("git") else "unknown",
    }


def run_part(name: str, scale: Scale) -> dict[str, Any]:
    """The part's figures as far as it came: also where it is interrupted, as by gpu.sh's time limit."""
    start_s, figures, failure = time.perf_counter(), list[Figure](), ""

    def say(figure: Figure) -> None:
        figures.append(figure)
        verdict = "" if scale is TINY else figure.verdict
        print(f"{name}: {figure.what}: {figure.value:.4g} {figure.unit} {verdict} {figure.note}", flush=True)

    try:
        PARTS[name](scale, say)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    return report.part_of(figures, failure, time.perf_counter() - start_s)


def failed(part: dict[str, Any]) -> bool:
    return bool(part["failure"]) or any(figure["verdict"] == "FAIL" for figure in part["figures"])


def main(arguments: Sequence[str] | None = None) -> int:
    name, form = "python -m perf.gpu", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, usage=f"{name} [options]", description=__doc__, formatter_class=form)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: perf/results")
    parser.add_argument(
        "--only",
        choices=PARTS,
        nargs="+",
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}; default: all",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: add --dry-run, or run this on a machine with a GPU")
    scale = TINY if options.dry_run else FULL
    facts = about(scale)
    stem = report.stem_of(options.output, facts)
    for name in options.only:
        part = run_part(name, scale)
        known = report.kept(stem) | {name: part}
        report.write(stem, facts, {each: known[each] for each in PARTS if each in known})
    print(f"written: {stem}.json and .md", flush=True)
    # a dry run measures nothing, so it cannot miss a goal
    measured = [report.kept(stem)[name] for name in options.only]
    return int(any(part["failure"] if options.dry_run else failed(part) for part in measured))


if __name__ == "__main__":
    sys.exit(main())
