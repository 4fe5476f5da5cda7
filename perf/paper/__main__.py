"""python -m perf.paper, which launch/figures.sh runs: measure what is not done yet, then write the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from perf.overlap import driver
from perf.overlap.journal import Journal
from perf.overlap.points import Point, Setting
from perf.overlap.sessions import SessionFailed
from perf.paper.cells import cells
from perf.paper.kernel import KernelFailed, measure_kernel
from perf.paper.options import parse, scale_of, settings
from perf.paper.plan import KERNEL_FIGURES, points
from perf.paper.published import published
from perf.paper.report import Run, write
from perf.shapes import check, find_config


def main(argv: list[str]) -> int:
    options = parse(argv, torch.cuda.device_count())
    try:
        known = published(options.reference)
        for setting in settings(options):
            check(setting.shape, setting.ranks, 0)
        driver.unwind_when_told_to_end()
        options.out.mkdir(parents=True, exist_ok=True)
        run = measure(options, argv, known)
    except (SessionFailed, ValueError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("figures: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(write(run, options.out))
    return 1 if run.lacking else 0


def measure(options: argparse.Namespace, argv: list[str], known: dict[Any, float]) -> Run:
    """Figures 4 and 10 first, which need no model, then every model."""
    chosen, scale = settings(options), scale_of(options)
    facts = driver.about("launch/figures.sh", argv, chosen[0].threads, chosen[0].device)
    code = driver.code_of(facts)
    kernel, lacking = kernel_of(options, chosen[0], code)
    wanted = {
        point.key(code): point
        for at, setting in enumerate(chosen)
        for point in points(
            setting, scale, options.figures, find_config(setting.shape).max_position_embeddings, at == 0
        )
    }
    journal = Journal(options.out / "journal.jsonl")
    driver.measure(wanted, journal, code, options.timeout_s, options.without)
    results: list[tuple[Point, dict[str, Any]]] = [(point, journal.read()[key]) for key, point in wanted.items()]
    found = cells(results, kernel, known, options.figures, scale, chosen[0].shape)
    folder = kernel_folder(options) if kernel else None
    return Run(facts, results, found, known, options.figures, options.dry_run, folder, lacking)


def kernel_folder(options: argparse.Namespace) -> Path:
    return Path(options.out / "kernel")


def kernel_of(options: argparse.Namespace, setting: Setting, code: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """(the kernel's measurement, why figures of it are missing)."""
    asked = [figure for figure in KERNEL_FIGURES if figure in options.figures]
    if not asked:
        return None, {}
    print("figures 4 and 10: checking and measuring the kernel", file=sys.stderr, flush=True)
    flags = (["--dry-run"] if options.dry_run else []) + (["--quick"] if options.quick else [])
    kernel_folder(options).mkdir(exist_ok=True)
    try:
        return measure_kernel(setting, kernel_folder(options), code, flags, options.timeout_s), {}
    except KernelFailed as error:
        return None, dict.fromkeys(asked, str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
