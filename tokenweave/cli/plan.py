"""`tokenweave plan`: what a model needs and does on so many GPUs, predicted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TextIO

from tokenweave.cli.parser import Parser
from tokenweave.cli.plan_model import find_shape
from tokenweave.cli.plan_parser import make_parser
from tokenweave.cli.plan_report import Report, make_report, record
from tokenweave.cli.plan_table import table
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.sizing import Sizer
from tokenweave.cost.workload import Workload


def parser() -> Parser:
    return make_parser()


def run(options: argparse.Namespace, out: TextIO) -> None:
    if options.plot is not None:
        check_plot(options.plot)
    report = report_of(options)
    if options.plot is not None:
        from tokenweave.cli.plan_plot import draw  # here, because matplotlib takes a second to import

        draw(report, options.plot)
    out.write(json.dumps(record(report)) + "\n" if options.json else table(report, options.plot))


def report_of(options: argparse.Namespace) -> Report:
    """Raises ValueError or FileNotFoundError for what cannot be."""
    workload = Workload(
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        batch_size=options.batch_size,
        request_rate=options.request_rate,
        step_tokens=options.step_tokens,
        ttft_target_s=seconds(options.ttft_ms),
        tpot_target_s=seconds(options.tpot_ms),
    )
    name, shape = find_shape(options.model, options.dtype)
    hardware = find_hardware(options.hardware)
    hardware.peak(shape.dtype)
    sizer = Sizer(shape, hardware, options.collectives)
    return make_report(name, sizer, workload, options.world_size, options.what_if, options.explain)


def seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * 1e-3


def check_plot(path: Path) -> None:
    if path.suffix != ".png":
        raise ValueError(f"--plot must name a .png file, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {str(path)!r} cannot be written: its folder does not exist; make it first")
