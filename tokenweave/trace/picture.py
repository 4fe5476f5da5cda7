"""Picture: a timeline of lanes as a PNG that a person reads at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from tokenweave.trace import overlap
from tokenweave.trace.caption import describe_steps, describe_times, headline, title_line
from tokenweave.trace.overlap import Interval, Overlap
from tokenweave.trace.panel import (
    EXPOSED,
    EXPOSED_HATCH,
    GREY,
    IDLE,
    PANEL_WIDTH_IN,
    Panel,
    choose_scale,
    half_colours,
    paint,
    text_points,
)
from tokenweave.trace.spans import Span, half_name
from tokenweave.trace.window import clip, extent, telling_step, zoom

DPI = 150
LEFT_IN, RIGHT_IN = 1.25, 0.35
WIDTH_IN = LEFT_IN + PANEL_WIDTH_IN + RIGHT_IN
HEADER_IN, TICKS_IN, GAP_IN, LEGEND_IN = 0.95, 0.3, 0.35, 0.42
MAX_BARS_PER_RANK = 300  # more in one panel are too thin for names and hatches, which are slow to draw


def draw(spans: Sequence[Span], path: str | Path, title: str = "", window: Interval | None = None) -> None:
    """Write `figure` as a PNG, 1800 pixels wide; the height depends only on the number of ranks and panels."""
    FigureCanvasAgg(figure(spans, title, window)).print_png(str(path))


def figure(spans: Sequence[Span], title: str = "", window: Interval | None = None) -> Figure:
    """Draw `window` (start_ns, end_ns on the spans' clock), or the most telling step if None.

    A step of many layers gets two panels: the whole of it, and below some layers from its middle.
    Raises ValueError if there is nothing to draw.
    """
    shown = in_window(spans, window)
    panels = choose_panels(shown, window)
    fig = Figure(figsize=(WIDTH_IN, figure_height_in(panels)), dpi=DPI, facecolor="white")
    mean = overlap.summary(shown)
    add_header(fig, shown, mean, title)
    axes = [add_axes(fig, panels, i) for i in range(len(panels))]
    scale = choose_scale(panels[0])
    for panel, ax in zip(panels, axes):
        paint(ax, panel, clip(shown, panel.window), scale)
    if len(panels) == 2:
        connect(fig, axes[0], axes[1])
    add_legend(fig, shown, mean)
    return fig


def in_window(spans: Sequence[Span], window: Interval | None) -> list[Span]:
    if not spans:
        raise ValueError("there are no spans to draw, expected those of at least one step; run a step with tracing on")
    if window is None:
        step = telling_step(spans)
        return [span for span in spans if span.step == step]
    shown = clip(spans, window)
    if not shown or window[1] <= window[0]:
        raise ValueError(f"no span lies in the window {window}, expected a part of {extent(spans)} ns; choose another")
    return shown


def choose_panels(shown: Sequence[Span], window: Interval | None) -> list[Panel]:
    ranks = tuple(sorted({span.rank for span in shown}))
    close = zoom(shown) if window is None else None
    if close is None:
        crowded = len(shown) > MAX_BARS_PER_RANK * len(ranks)
        return [Panel(window or extent(shown), ranks, small=crowded)]
    return [Panel(extent(shown), ranks, small=True), Panel(close, ranks)]


def figure_height_in(panels: Sequence[Panel]) -> float:
    """Rounded to whole pixels, as the canvas would otherwise cut."""
    panels_in = sum(panel.height_in + TICKS_IN for panel in panels) + GAP_IN * (len(panels) - 1)
    return round((HEADER_IN + panels_in + LEGEND_IN) * DPI) / DPI


def add_axes(fig: Figure, panels: Sequence[Panel], i: int) -> Axes:
    """Panels stand one below the other. A small one has its ticks above, so that nothing parts it from the next."""
    above_in = sum(panel.height_in + TICKS_IN for panel in panels[:i]) + GAP_IN * i
    top_in = HEADER_IN + above_in + (TICKS_IN if panels[i].small else 0)
    height_in = fig.get_figheight()
    bottom = 1 - (top_in + panels[i].height_in) / height_in
    return fig.add_axes((LEFT_IN / WIDTH_IN, bottom, PANEL_WIDTH_IN / WIDTH_IN, panels[i].height_in / height_in))


def connect(fig: Figure, whole: Axes, close: Axes) -> None:
    """Frame in the overview what the zoom shows, and lead the eye from one to the other."""
    left, right = close.get_xlim()
    whole.axvspan(left, right, facecolor="none", edgecolor="black", linewidth=1.2, zorder=5, clip_on=False)
    to_figure = whole.transData + fig.transFigure.inverted()
    bottom = whole.get_ylim()[0]
    box = close.get_position()
    foot = to_figure.transform([(left, bottom), (right, bottom)])
    corners = np.array([*foot, (box.x1, box.y1), (box.x0, box.y1)])
    beam = Polygon(corners, closed=True, facecolor="#ececec", edgecolor="none", transform=fig.transFigure, zorder=-1)
    fig.add_artist(beam)


def add_header(fig: Figure, shown: Sequence[Span], mean: Overlap, title: str) -> None:
    """On the left what is shown, on the right the one number it is shown for."""
    add_text(fig, LEFT_IN * 0.1, 0.3, title_line(title), 14, weight="bold", room_in=WIDTH_IN - 3.0)
    add_text(fig, LEFT_IN * 0.1, 0.55, describe_steps(shown), 10)
    add_text(fig, LEFT_IN * 0.1, 0.77, describe_times(mean), 10, color=GREY)
    number, words = headline(mean)
    add_text(fig, WIDTH_IN - RIGHT_IN, 0.42, number, 22, weight="bold", ha="right")
    add_text(fig, WIDTH_IN - RIGHT_IN, 0.65, words, 10, ha="right")


def add_text(fig: Figure, x_in: float, y_in: float, text: str, points: float, room_in: float = 99, **look: Any) -> None:
    """A line of the header, y from the top; shrunk where it would not fit into `room_in`."""
    points *= min(1, room_in * 72 / (1.15 * text_points(text, points)))  # bold is wider than what was measured
    fig.text(x_in / WIDTH_IN, 1 - y_in / fig.get_figheight(), text, fontsize=points, va="baseline", **look)


def add_legend(fig: Figure, shown: Sequence[Span], mean: Overlap) -> None:
    """Only what occurs, in one line below the panels."""
    patches = []
    halves = sorted({span.half for span in shown})
    for half in halves:
        kinds = {(span.lane, span.kind) for span in shown if span.half == half}
        if ("compute", "segment") in kinds:
            patches.append(Patch(color=half_colours(half).compute, label=f"half {half_name(half)} compute"))
        if any(lane == "comm" for lane, _ in kinds) and len(halves) <= 2:  # more would not fit
            patches.append(Patch(color=half_colours(half).communication, label=f"half {half_name(half)} communication"))
    if mean.exposed_s:
        red = Patch(facecolor=EXPOSED, edgecolor="white", linewidth=0, hatch=EXPOSED_HATCH)
        red.set_label("exposed communication")
        patches.append(red)
    if mean.idle_s:
        patches.append(Patch(color=IDLE, label="idle, nothing in flight"))
    height_in = fig.get_figheight()
    fig.legend(
        handles=patches, loc="lower right", bbox_to_anchor=(1 - RIGHT_IN / WIDTH_IN, 0.06 / height_in), borderaxespad=0,
        ncols=len(patches), frameon=False, fontsize=9, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
