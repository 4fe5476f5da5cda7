"""python -m perf.overlap: measure what is not in the journal yet, then write the report."""

from __future__ import annotations

import sys

import torch

from perf.overlap import driver, netns
from perf.overlap.journal import Journal
from perf.overlap.options import parse, points
from perf.overlap.report import write_report
from perf.overlap.sessions import SessionFailed
from perf.shapes import USER


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.link == "real":
        netns.become_root_of_a_user_namespace(argv, USER)
        if reason := netns.refusal(options.ranks):
            return refused(reason)
    if options.device == "cuda" and (reason := too_few(options.ranks, torch.cuda.device_count())):
        print(f"perf.overlap: {reason}", file=sys.stderr)
        return 2
    driver.unwind_when_told_to_end()
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "journal.jsonl")
    facts = driver.about("python -m perf.overlap", argv, options.threads, options.device)
    code = driver.code_of(facts)
    wanted = {point.key(code): point for point in points(options)}
    try:
        driver.measure(wanted, journal, code, options.timeout_s, options.without)
    except (SessionFailed, netns.NetworkRefused) as error:
        print(f"perf.overlap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perf.overlap: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    results = journal.read()
    print(write_report([(point, results[key]) for key, point in wanted.items()], facts, options.out))
    return 0


def too_few(ranks: int, gpus: int) -> str:
    """Why these ranks cannot be measured on so many GPUs; "" if they can."""
    if ranks <= gpus:
        return ""
    shared = "; ranks that share one say nothing of time: perf/gpu.sh runs two of them, for correctness" if gpus else ""
    return f"--device cuda --ranks {ranks} needs {ranks} GPUs, torch sees {gpus}{shared}"


def refused(reason: str) -> int:
    print(
        f"perf.overlap: a real link cannot be made here: {reason}. It takes root or user namespaces (unshare -Ur), "
        "with iproute2 and util-linux. Without them use --link paced, whose figures are labelled simulated",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
