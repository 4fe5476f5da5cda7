"""Plots: latency and gain by prompt length or batch, and the timeline of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf.overlap.figures import COMMUNICATION, SLEEPS
from perf.overlap.points import Point
from perf.overlap.rows import Row
from tokenweave.trace import picture
from tokenweave.trace.overlap import Interval
from tokenweave.trace.spans import Span
from tokenweave.trace.window import layer_starts

STYLES: dict[str, dict[str, Any]] = {
    "off": {"color": "#666666", "marker": "o"},
    "fused": {"color": "#ddaa33", "marker": "o"},
    "weave": {"color": "#2a5f9e", "marker": "o", "linewidth": 2.4},
    "auto": {"color": "#009988", "marker": "x", "linestyle": "-."},
    "nocomm": {"color": "black", "linestyle": ":"},
    "ideal": {"color": "black", "linestyle": "--"},
}
HIDDEN_NAMES = (COMMUNICATION, f"off{SLEEPS}")  # in the tables; lines of their own would crowd the plot
PEER_STYLE = {"marker": "s", "linestyle": "-", "linewidth": 1.0}
X_NAMES = {"prefill": "prompt, tokens", "decode": "sequences in the batch"}
DPI = 110


def curves(rows: Sequence[Row], measure: str, title: str, path: Path) -> None:
    """Two panels: latency and gain over off, a line a mode. rows: of one setting and measure."""
    fig = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    left, right = fig.subplots(1, 2)
    draw_lines(left, [row for row in rows if row.figure == "latency"], 1e3)
    draw_lines(right, [row for row in rows if row.figure == "gain over off"], 1.0)
    left.set(xlabel=X_NAMES[measure], ylabel=f"{measure}, ms", yscale="log")
    right.set(xlabel=X_NAMES[measure], ylabel="off / mode (above 1: faster)")
    right.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.suptitle(title, fontweight="bold")
    FigureCanvasAgg(fig).print_png(str(path))


def draw_lines(ax: Axes, rows: Sequence[Row], scale: float) -> None:
    """Medians, with the spread over rounds as bars."""
    for mode in dict.fromkeys(row.mode for row in rows if row.mode not in HIDDEN_NAMES):
        mine = [row for row in rows if row.mode == mode]
        middles = [row.value.median * scale for row in mine]
        down = [(row.value.median - row.value.min) * scale for row in mine]
        up = [(row.value.max - row.value.median) * scale for row in mine]
        xs = [int(row.point.x) for row in mine]
        ax.errorbar(xs, middles, [down, up], label=mode, capsize=2, **STYLES.get(mode, PEER_STYLE))
    ticks = sorted({int(row.point.x) for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(x) for x in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def timeline(point: Point, mode: str, spans: Sequence[Span], path: Path) -> None:
    """One layer from the middle of the step, both lanes of every rank."""
    title = f"{point.setting.title}, {point.x} tokens, {mode}"
    picture.draw(spans, path, title, window=one_layer(spans))


def one_layer(spans: Sequence[Span]) -> Interval | None:
    """From the start of the middle layer of half A on the first rank to that of the next; None: too few layers."""
    rank = min(span.rank for span in spans)
    starts_ns = layer_starts(s for s in spans if s.kind == "segment" and s.half == 0 and s.rank == rank)
    middle = len(starts_ns) // 2
    return (starts_ns[middle], starts_ns[middle + 1]) if middle + 1 < len(starts_ns) else None
