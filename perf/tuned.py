"""A tuned plan against auto's own on this machine: one prefill step at W=2 over a simulated link, really run.

The plan is tuned within a budget, then both run in turn (A B A B). Writes nothing but the table: with --write into
perf/results/tuned-cpu.md. Usage: python -m perf.tuned [--shape ...] [--rows N] [--link-gbit-per-s X] [--budget S]
[--rounds N] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from perf.shapes import SHAPES, model_folder
from perf.timing import compare, machine, table
from tokenweave.comm.link import Link
from tokenweave.config import EngineConfig
from tokenweave.cost.planner import plan_of
from tokenweave.cost.session import Session, describe
from tokenweave.engine.at_hand import cost_of
from tokenweave.engine.stepper import Stepper
from tokenweave.weave.plan import Plan, plan_step

REPORT = Path(__file__).parent / "results" / "tuned-cpu.md"


def measure(stepper: Stepper, options: argparse.Namespace) -> str:
    """The report: what each side chose, and their times."""
    auto = plan_step("auto", options.rows, stepper.rank.times)
    session = Session(
        cost_of(stepper.rank.runner),
        [options.rows],
        stepper.seconds,
        time.monotonic,
        options.budget,
    )
    (step,), _ = session.run()
    tuned = plan_of(step.choice, options.rows, "tuned")
    ours, theirs = [], []
    for _ in range(options.rounds):
        theirs.append(stepper.plan_seconds(auto))
        ours.append(stepper.plan_seconds(tuned))
    rows = table([compare(f"prefill of {options.rows} tokens, tuned against auto", ours, theirs, goal=1.0)], "auto")
    chose = f"auto chose: {words(auto)}. Tuned, in {len(session.measured)} measurements: {describe(step.choice)}."
    off_s = statistics.median(m.seconds for m in session.measured if m.choice.mode == "off")
    if (tuned.bounds, tuned.form) == (auto.bounds, auto.form):
        chose += " Both are the same plan, so that the ratio shows the noise alone."
    return f"{chose} Unsplit with all-reduce (off) took {off_s:.4f} s.\n\n{rows}"


def words(plan: Plan) -> str:
    if plan.cut is not None:
        return f"weave at {plan.cut}"
    return "off" if plan.form == "reference" else "fused"


def report(body: str, options: argparse.Namespace) -> str:
    about = machine()
    head = (
        f"{options.shape} (random weights, fp32), W=2, simulated link of {options.link_gbit_per_s:g} Gbit/s; "
        f"{about['cpu']}, {about['date']}, commit {about['commit']}; the machine was "
        f"{'shared with other work' if options.shared else 'left alone'}. {options.rounds} interleaved rounds; the "
        "ratio is the median of the rounds' own ratios (auto / tuned: above 1, tuned is faster)."
    )
    return f"# A tuned plan against auto's own, on a CPU\n\n{head}\n\n{body}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-512x8")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--link-gbit-per-s", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds to tune in")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shared", action="store_true", help="say in the report that other work was running")
    parser.add_argument("--write", action="store_true", help=f"write perf/results/{REPORT.name}")
    options = parser.parse_args()
    link = Link(options.link_gbit_per_s * 1e9 / 8)
    folder = str(model_folder(options.shape))
    config = EngineConfig(folder, overlap="auto", tensor_parallel_size=2, num_kv_blocks=256, link=link, progress=False)
    stepper = Stepper(config)
    failed = True
    try:
        text = report(measure(stepper, options), options)
        failed = False
    finally:
        stepper.close(failed)
    print(text)
    if options.write:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
