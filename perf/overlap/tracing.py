"""Tracing: the spans of a step or two, recorded after the measuring so that it costs the measurements nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perf.overlap.modes import MODES, Bench
from tokenweave.engine.batch import Batch
from tokenweave.trace.observe import TraceObserver
from tokenweave.trace.spans import Recorder

TRACED = ("off", "weave")
STEPS = 3  # the last of which is kept: the others warm up


def timeline(bench: Bench, batch: Batch) -> dict[str, Any]:
    """Every rank's spans of one step by mode, as lists."""
    return {"spans": {name: traced(bench, name, batch) for name in TRACED}}


def traced(bench: Bench, name: str, batch: Batch) -> list[list[Any]]:
    ranks = bench.rank.ranks
    plan = bench.plan(MODES[name], batch)
    for _ in range(STEPS):
        ranks.gather(None)  # all ranks start together
        with recorded(bench) as recorder:
            bench.step(MODES[name], batch, plan)
    return [list(span) for spans in ranks.gather(recorder.export()) for span in spans]


@contextmanager
def recorded(bench: Bench) -> Iterator[Recorder]:
    """The runner with a recorder on both lanes, for as long as the block runs."""
    runner = bench.rank.runner
    recorder = Recorder(bench.rank.ranks.rank)
    before = runner.recorder, runner.inline.observers, runner.lane.observers
    watching = (TraceObserver(recorder),)
    runner.recorder, runner.inline.observers, runner.lane.observers = recorder, watching, watching
    try:
        yield recorder
    finally:
        runner.recorder, runner.inline.observers, runner.lane.observers = before
