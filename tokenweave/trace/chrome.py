"""Chrome trace: spans as JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenweave.trace.spans import LANES, Span, half_name

# Reserved colour names of the trace format, by half. chrome://tracing honours them; Perfetto colours by event name,
# which is one more reason for the half to be in the name.
HALF_COLOURS = ("thread_state_running", "rail_animation", "rail_response", "rail_idle")
WAIT_COLOUR = "terrible"
FIRST_TID = 1  # Perfetto takes thread 0 for the idle task


def write(spans: Iterable[Span], path: str | Path) -> None:
    """Write the trace: a process per rank, a thread per lane, times in us since the first span began."""
    text = ",\n".join(json.dumps(event) for event in events(list(spans)))
    Path(path).write_text(f'{{"displayTimeUnit": "ms", "traceEvents": [\n{text}\n]}}\n', encoding="utf-8")


def events(spans: list[Span]) -> list[dict[str, Any]]:
    """Metadata events first, then one complete event ("X") per span, in order of time."""
    origin_ns = min((span.start_ns for span in spans), default=0)
    ranks = sorted({span.rank for span in spans})
    spans = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    return [event for rank in ranks for event in names(rank)] + [complete(span, origin_ns) for span in spans]


def names(rank: int) -> list[dict[str, Any]]:
    """What the viewer calls a rank and its lanes, and the order in which it shows them."""
    named = [
        metadata("process_name", rank, {"name": f"rank {rank}"}),
        metadata("process_sort_index", rank, {"sort_index": rank}),
    ]
    for tid, lane in enumerate(LANES, start=FIRST_TID):
        named.append(metadata("thread_name", rank, {"name": lane}, tid))
        named.append(metadata("thread_sort_index", rank, {"sort_index": tid}, tid))
    return named


def metadata(name: str, rank: int, args: dict[str, Any], tid: int = FIRST_TID) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": rank, "tid": tid, "args": args}


def complete(span: Span, origin_ns: int) -> dict[str, Any]:
    """One span. Times are relative: absolute wall-clock us would not fit a double to the ns."""
    half = half_name(span.half)
    duration_us = (span.end_ns - span.start_ns) / 1000
    verb = "" if span.kind == "segment" else f" {span.kind}"
    return {
        "ph": "X",
        "name": f"{half}.{span.name}{verb}",
        "cat": f"{span.kind},half {half}",
        "cname": WAIT_COLOUR if span.kind == "wait" else HALF_COLOURS[span.half % len(HALF_COLOURS)],
        "pid": span.rank,
        "tid": FIRST_TID + LANES.index(span.lane),
        "ts": (span.start_ns - origin_ns) / 1000,
        "dur": duration_us,
        "args": {
            "half": half,
            "step": span.step,
            "phase": span.phase,
            "tokens": span.tokens,
            "bytes": span.bytes,
            "duration_us": duration_us,
        },
    }
