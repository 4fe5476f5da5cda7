"""Every CPU measurement of this folder, one after the other, and the report: perf/results/cpu-<date>.md and .json.

Usage: python -m perf.cpu [--shape llama-512x8] [--rounds 7] [--threads N]; takes minutes: leave the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from perf.shapes import SHAPES, model_folder
from perf.timing import machine

RESULTS = Path(__file__).parent / "results"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PARTS = {
    "one rank": (sys.executable, "-m", "perf.against_transformers"),
    "two ranks": (*TORCHRUN, "-m", "perf.against_transformers"),
    "weaving": (*TORCHRUN, "-m", "perf.paced"),
}
PART_TIMEOUT_S = 1800


def run_part(name: str, arguments: list[str], threads: int) -> tuple[str, Any]:
    """(the table that the part prints, its figures). One rank gets all threads, two ranks half of them each."""
    share = threads if name == "one rank" else max(1, threads // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [*PARTS[name], *arguments, "--json", str(path)]
        print(f"-- {name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PART_TIMEOUT_S,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(share)},
        )
        print(done.stdout, flush=True)
        return done.stdout.strip(), json.loads(path.read_text())


def report(tables: dict[str, str], about: dict[str, Any], shape: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# CPU measurements, {about['date']}",
        "",
        f"{about['cpu']}, {os.cpu_count()} cores, {versions}, Python {about['python']}, commit {about['commit']}.",
        "fp32. Medians over interleaved rounds (A B A B); the ratio is the median of the rounds' own ratios.",
        f"Made by `python -m perf.cpu --shape {shape}`.",
    ]
    return "\n".join([*head, *(f"\n## {name.capitalize()}\n\n{table}" for name, table in tables.items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-512x8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of all ranks together")
    parser.add_argument("--only", choices=PARTS, help="measure this part again, and keep the others of today's report")
    options = parser.parse_args()
    model_folder(options.shape)  # made before two ranks could race to make it
    arguments = ["--shape", options.shape, "--rounds", str(options.rounds)]
    about = machine() | {"threads": options.threads, "shape": options.shape}
    stem = RESULTS / f"cpu-{about['date']}-{options.shape}"
    kept = json.loads(stem.with_suffix(".json").read_text())["parts"] if options.only else {}
    for name in [options.only] if options.only else PARTS:
        kept[name] = run_part(name, arguments, options.threads)
    parts = {name: kept[name] for name in PARTS if name in kept}
    stem.with_suffix(".md").write_text(report({name: part[0] for name, part in parts.items()}, about, options.shape))
    stem.with_suffix(".json").write_text(json.dumps(about | {"parts": parts}, indent=1) + "\n")
    print(f"written: {stem}.md and .json")


if __name__ == "__main__":
    main()
