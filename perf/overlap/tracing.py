"""Tracing: the spans of a step or two, recorded after the measuring so that it costs the measurements nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from perf.overlap.modes import MODES, Bench, Mode
from perf.overlap.schedule import Strands
from tokenweave.engine.batch import Batch
from tokenweave.engine.runner import open_recorder
from tokenweave.trace.observe import TraceObserver
from tokenweave.trace.spans import Recorder, Span

TRACED = ("off", "weave")
STEPS = 5  # of which the first warms up


def timeline(bench: Bench, batch: Batch) -> dict[str, Any]:
    """Every rank's spans of one step by mode, as lists; and what the schedule is made of, where there is a wire."""
    spans = {name: traced(bench, MODES[name], batch)[-1] for name in TRACED}
    strands = asdict(measure_strands(bench, batch)) if bench.setting.mbit_per_s else None
    return {"spans": {name: list(map(list, own)) for name, own in spans.items()}, "strands": strands}


def traced(bench: Bench, mode: Mode, batch: Batch) -> list[list[Span]]:
    """All ranks' spans of each of several steps."""
    ranks = bench.rank.ranks
    plan = bench.plan(mode, batch)
    steps = []
    for _ in range(STEPS):
        ranks.gather(None)  # all ranks start together
        with recorded(bench) as recorder:
            bench.step(mode, batch, plan)
        steps.append([span for spans in ranks.gather(recorder.export()) for span in spans])
    return steps


def measure_strands(bench: Bench, batch: Batch) -> Strands:
    """Segments as they are when nothing is sent, at their fastest in some steps; sums at the link's rate."""
    plain = traced(bench, Mode("off", "silent"), batch)[1:]
    woven = traced(bench, Mode("weave", "silent"), batch)[1:]
    halves = sorted({span.half for span in woven[0]})
    sums = [[sum_s(bench, span.tokens) for span in of(woven[0], half, "sum")] for half in halves]
    return Strands([segments(woven, half) for half in halves], sums, sum(segments(plain, 0)))


def segments(steps: list[list[Span]], half: int) -> list[float]:
    """Seconds of each of a half's segments on rank 0, the least over steps: other work on the machine only adds."""
    listed = [[(span.end_ns - span.start_ns) / 1e9 for span in of(step, half, "segment")] for step in steps]
    return [min(values) for values in zip(*listed)]


def of(spans: list[Span], half: int, kind: str) -> list[Span]:
    """Rank 0's, in order of time."""
    return sorted((s for s in spans if (s.rank, s.half, s.kind) == (0, half, kind)), key=lambda span: span.start_ns)


def sum_s(bench: Bench, rows: int) -> float:
    """Of a sum of so many rows at line rate: every element crosses 2 (W - 1) / W times."""
    runner, world_size = bench.rank.runner, bench.setting.ranks
    sent_bytes = rows * runner.spec.hidden_size * runner.dtype.itemsize * 2 * (world_size - 1) / world_size
    return sent_bytes * 8 / (bench.setting.mbit_per_s * 1e6)


@contextmanager
def recorded(bench: Bench) -> Iterator[Recorder]:
    """The runner with a recorder on both lanes, for as long as the block runs."""
    runner = bench.rank.runner
    recorder = open_recorder(bench.rank.ranks)
    before = runner.recorder, runner.inline.observers, runner.lane.observers
    watching = (TraceObserver(recorder),)
    runner.recorder, runner.inline.observers, runner.lane.observers = recorder, watching, watching
    try:
        yield recorder
    finally:
        runner.recorder, runner.inline.observers, runner.lane.observers = before
