"""The table of `tokenweave bench`, for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tokenweave.cli.bench_report import Report, Result, Spread
from tokenweave.cli.cells import Cells, aligned, duration
from tokenweave.cli.setup import Row
from tokenweave.cli.table import lines

COLUMNS = ("overlap", "TTFT mean", "p50", "p99", "TPOT mean", "p50", "p99", "prefill tok/s", "decode tok/s")
NOTES = """\
TTFT, TPOT: of all requests of all rounds. The rest: the median of the rounds. prefill: prompt tokens over the time to
the last first token; decode: later tokens over the time from the earliest first token on; output: generated tokens over
all of it.
"""


def table(report: Report) -> str:
    first = report.results[0].overlap
    rows: list[Cells] = [
        (*COLUMNS, "output tok/s", "time", f"{first} / this"),
        *(cells(result) for result in report.results),
    ]
    if len(report.results) == 1:  # nothing to compare with
        rows = [row[:-1] for row in rows]
    figures = "\n".join(aligned(rows))
    return f"{lines(about(report))}\n{figures}\n\n{NOTES}"


def about(report: Report) -> Iterator[Row]:
    config = report.setup.config
    yield "model", config.model + (", random weights" if config.load_format == "dummy" else "")
    yield "machine", f"{report.setup.machine}, torch {torch.__version__}"
    yield "workload", str(report.load)
    yield from report.setup.rows()
    if preemptions := sum(result.preemptions for result in report.results):
        yield "preemptions", f"{preemptions}, for lack of KV blocks (--num-kv-blocks)"


def cells(result: Result) -> Cells:
    rates = (result.prefill_tokens_per_s, result.decode_tokens_per_s, result.tokens_per_s)
    return (
        result.overlap,
        *times(result.ttft_s),
        *times(result.tpot_s),
        *("-" if rate is None else f"{rate:.1f}" for rate in rates),
        duration(result.seconds),
        f"{result.gain:.2f}",
    )


def times(of: Spread | None) -> Iterable[str]:
    return ("-",) * 3 if of is None else map(duration, (of.mean, of.p50, of.p99))
