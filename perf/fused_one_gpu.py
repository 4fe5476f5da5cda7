"""The fused kernel measured on one GPU: speed by rows and CTAs, and what GEMMs lose to it.

Usage: python -m perf.fused_one_gpu [--output FOLDER] [--only speed|gemms] [--dry-run]. perf/gpu.sh runs the tests
before. Writes fused-one-gpu-<date>-<gpu>.md, .json and .csv. --dry-run needs no GPU: it compiles every kernel for
sm_90a, and says what would be measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from perf import fused_speed, gemm_loss, naive, timing
from tokenweave.kernels import fused
from tokenweave.kernels.compiler import nvrtc_version
from tokenweave.kernels.jit import cubin

RESULTS = Path(__file__).parent / "results"
PARTS = {"speed": fused_speed, "gemms": gemm_loss}
DRY_CAPABILITY, DRY_ARCH = (9, 0), "sm_90a"


def about() -> dict[str, Any]:
    """What a reader must know to place the figures."""
    names = ("torch", "triton", "cuda-bindings", "nvidia-cublas")
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "nvrtc": "{}.{}".format(*nvrtc_version()),
        "python": sys.version.split()[0],
        "versions": {name: timing.installed(name) for name in names},
        "commit": timing.commit() if shutil.which("git") else "unknown",
    }


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.partition("\n")[0].strip()


def sources() -> dict[str, str]:
    """Every kernel that is measured, by a name."""
    found = {}
    for world_size in (fused_speed.WORLD_SIZE, *fused_speed.FEWER_RANKS):
        variant = fused_speed.variant_of(world_size)
        shared_bytes = fused.shared_bytes_of(DRY_CAPABILITY)
        for name, each in {"fused": variant, "plain": fused.without_norm(variant)}.items():
            found[f"{name}, W={world_size}"] = fused.source(each, fused.geometry(each, shared_bytes))
        found[f"naive, W={world_size}"] = naive.naive_source(variant)
    return found


def dry_run(say: Callable[[str], None]) -> None:
    """Says what would be measured, and compiles for DRY_ARCH."""
    for world_size in (fused_speed.WORLD_SIZE, *fused_speed.FEWER_RANKS):
        rows = fused_speed.ROWS if world_size == fused_speed.WORLD_SIZE else fused_speed.FEWER_RANKS_ROWS
        launches = [fused_speed.launches_of(world_size, each) for each in rows]
        ctas = fused_speed.fitting_ctas(world_size, sms=132)
        say(f"speed: W={world_size}, rows {rows}, CTAs {ctas} on 132 SMs, launches in a round {launches}")
    for shape in gemm_loss.shapes():
        say(f"gemms: {shape.name}, [{shape.tokens}, {shape.k}] x [{shape.k}, {shape.n}], k = {gemm_loss.SMS} SMs")
    for name, source in sources().items():
        say(f"compiled for {DRY_ARCH}: {name}, {len(cubin(source, DRY_ARCH, fused.headers()))} bytes")


def run_part(name: str, device: torch.device, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """(figures as far as it came, what went wrong or ""): also where it is interrupted, as by gpu.sh's time limit."""
    start_s, found = time.perf_counter(), dict[str, Any]()
    try:
        PARTS[name].measure(device, lambda line: say(f"{name}: {line}"), found)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        return found, f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        say(f"{name}: {time.perf_counter() - start_s:.0f} s")
    return found, ""


def verdicts(figures: dict[str, Any]) -> list[str]:
    """A line for each goal that was measured: pass or FAIL."""
    speed, gemms = (figures.get(name) for name in ("speed", "gemms"))
    at_least = fused_speed.goals(speed["points"]) if speed else []
    at_most = gemm_loss.goals(gemms) if gemms else []
    return [verdict(*each, passed=each[1] >= each[2]) for each in at_least] + [
        verdict(*each, passed=each[1] <= each[2]) for each in at_most
    ]


def verdict(what: str, value: float, goal: float, passed: bool) -> str:
    return f"{'pass' if passed else 'FAIL'}: {what}: {value:.3f} (goal {goal:.3f})"


def report(facts: dict[str, Any], figures: dict[str, Any], failures: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [
        f"# The fused kernel on one GPU, {facts['date']}",
        "",
        f"{facts['gpu']} ({facts['sms']} SMs), driver {facts['driver']}, CUDA {facts['cuda']}, NVRTC {facts['nvrtc']}, "
        f"{versions}, Python {facts['python']}, commit {facts['commit']}.",
        "CUDA events, medians over rounds in which the contestants take turns. Made by `bash perf/gpu.sh`.",
        "",
        "## Goals",
        "",
        *(f"- {line}" for line in verdicts(figures)),
        *(f"- incomplete: {name}: {why}" for name, why in failures.items()),
    ]
    for name, figure in figures.items():
        if figure:
            lines += ["", f"## {name.capitalize()}", "", PARTS[name].tables(figure)]
    return "\n".join(lines) + "\n"


def stem_of(folder: Path, facts: dict[str, Any]) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower().removeprefix("nvidia ")).strip("-")
    return folder / f"fused-one-gpu-{facts['date']}-{gpu}"


def kept(stem: Path, measured: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures and failures of the same day's report, but of the parts that are measured again."""
    if not stem.with_suffix(".json").exists():
        return {}, {}
    before = json.loads(stem.with_suffix(".json").read_text())
    figures, failures = ({k: v for k, v in before[key].items() if k not in measured} for key in ("parts", "failures"))
    return figures, failures


def write(stem: Path, facts: dict[str, Any], figures: dict[str, Any], failures: dict[str, str]) -> None:
    """All three files, with what there is."""
    figures = {name: figures[name] for name in PARTS if name in figures}
    stem.with_suffix(".md").write_text(report(facts, figures, failures))
    stem.with_suffix(".json").write_text(json.dumps(facts | {"failures": failures, "parts": figures}, indent=1) + "\n")
    points = figures.get("speed", {}).get("points", [])
    if points:
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(points[0]))
            writer.writeheader()
            writer.writerows(points)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="compile, and say what would be measured; needs no GPU")
    options = parser.parse_args(arguments)
    start_s = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start_s:5.0f} s] {line}", flush=True)

    if options.dry_run:
        dry_run(say)
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: add --dry-run, or run this on a machine with a GPU")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    options.output.mkdir(parents=True, exist_ok=True)
    facts, parts = about(), [options.only] if options.only else list(PARTS)
    stem = stem_of(options.output, facts)
    figures, failures = kept(stem, parts)
    for name in parts:
        figures[name], why = run_part(name, device, say)
        failures |= {name: why} if why else {}
        write(stem, facts, figures, failures)
    print(stem.with_suffix(".md").read_text(), flush=True)
    return 1 if any(name in failures for name in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
