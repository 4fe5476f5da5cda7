"""Picture: a timeline of lanes as a PNG that a person reads at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from tokenweave.trace import overlap
from tokenweave.trace.overlap import Interval, Overlap
from tokenweave.trace.panel import EXPOSED, EXPOSED_HATCH, GREY, IDLE, Panel, choose_scale, half_colours, paint, text_points
from tokenweave.trace.spans import Span, half_name
from tokenweave.trace.window import clip, extent, half_tokens, telling_step, zoom

DPI = 150
WIDTH_IN = 12.0
LEFT_IN, RIGHT_IN = 1.25, 0.25
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
    add_header(fig, shown, title)
    axes = [add_axes(fig, panels, i) for i in range(len(panels))]
    scale = choose_scale(panels[0])
    for panel, ax in zip(panels, axes):
        paint(ax, panel, clip(shown, panel.window), scale)
    if len(panels) == 2:
        connect(fig, axes[0], axes[1])
    add_legend(fig, shown)
    return fig


def in_window(spans: Sequence[Span], window: Interval | None) -> list[Span]:
    if not spans:
        raise ValueError("there are no spans to draw, expected those of at least one step; run a step with tracing on")
    if window is None:
        step = telling_step(spans)
        return [span for span in spans if span.step == step]
    shown = clip(spans, window)
    if not shown:
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
    """Panels stand one below the other; the ticks of a small one stand above it, so that nothing parts it from the next."""
    above_in = sum(panel.height_in + TICKS_IN for panel in panels[:i]) + GAP_IN * i
    top_in = HEADER_IN + above_in + (TICKS_IN if panels[i].small else 0)
    height_in = fig.get_figheight()
    bottom = 1 - (top_in + panels[i].height_in) / height_in
    width = (WIDTH_IN - LEFT_IN - RIGHT_IN) / WIDTH_IN
    return fig.add_axes((LEFT_IN / WIDTH_IN, bottom, width, panels[i].height_in / height_in))


def connect(fig: Figure, whole: Axes, close: Axes) -> None:
    """Frame in the overview what the zoom shows, and lead the eye from one to the other."""
    left, right = close.get_xlim()
    whole.axvspan(left, right, facecolor="none", edgecolor="black", linewidth=1.2, zorder=5, clip_on=False)
    to_figure = whole.transData + fig.transFigure.inverted()
    bottom = whole.get_ylim()[0]
    box = close.get_position()
    corners = [to_figure.transform((left, bottom)), to_figure.transform((right, bottom)), (box.x1, box.y1), (box.x0, box.y1)]
    beam = Polygon(corners, closed=True, facecolor="#ececec", edgecolor="none", transform=fig.transFigure, zorder=-1)
    fig.add_artist(beam)


def add_header(fig: Figure, shown: Sequence[Span], title: str) -> None:
    """On the left what is shown, on the right the one number it is shown for."""
    mean = overlap.summary(shown)
    head = title or "Timeline of one step"
    add_text(fig, LEFT_IN * 0.1, 0.3, head, 14, weight="bold", room_in=WIDTH_IN - 3.0)
    add_text(fig, LEFT_IN * 0.1, 0.55, describe_steps(shown), 10)
    add_text(fig, LEFT_IN * 0.1, 0.77, describe_times(mean), 10, color=GREY)
    number, words = headline(mean)
    add_text(fig, WIDTH_IN - RIGHT_IN, 0.42, number, 22, weight="bold", ha="right")
    add_text(fig, WIDTH_IN - RIGHT_IN, 0.65, words, 10, ha="right")


def add_text(fig: Figure, x_in: float, y_in: float, text: str, points: float, room_in: float = 99, **look: str) -> None:
    """A line of the header, y from the top; shrunk where it would not fit into `room_in`."""
    points *= min(1, room_in * 72 / (1.15 * text_points(text, points)))  # bold is wider than what was measured
    fig.text(x_in / WIDTH_IN, 1 - y_in / fig.get_figheight(), text, fontsize=points, va="baseline", **look)


def headline(mean: Overlap) -> tuple[str, str]:
    if mean.hidden_share is None:
        return "no", "communication"
    return f"{mean.hidden_share:.0%}", "of communication hidden"


def describe_steps(shown: Sequence[Span]) -> str:
    """For example "step 3 (prefill): 1024 tokens in two halves (512 + 512), 24.3 ms, 2 ranks"."""
    steps = sorted({span.step for span in shown})
    tokens = [half_tokens(span for span in shown if span.step == step) for step in steps]
    start_ns, end_ns = extent(shown)
    phases = ", ".join(sorted({span.phase for span in shown if span.phase}))
    name = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    ranks = len({span.rank for span in shown})
    parts = [
        f"{name} ({phases})" if phases else name,
        f"{plural(sum(map(sum, tokens)), 'token')}{describe_halves(tokens)}",
        plural(ranks, "rank"),
        duration((end_ns - start_ns) / 1e9),
    ]
    return "  ·  ".join(parts)


def describe_halves(tokens: Sequence[Sequence[int]]) -> str:
    if max(map(len, tokens)) == 1:
        return ", not split"
    return f" in {len(tokens[0])} halves ({' + '.join(map(str, tokens[0]))})" if len(tokens) == 1 else ", split"


def describe_times(mean: Overlap) -> str:
    """The times of the mean rank."""
    return "  ·  ".join(
        f"{name} {duration(seconds)}"
        for name, seconds in [
            ("compute", mean.compute_s),
            ("communication", mean.communication_s),
            ("hidden", mean.hidden_s),
            ("exposed", mean.exposed_s),
            ("idle", mean.idle_s),
        ]
    )


def duration(seconds: float) -> str:
    """Three digits, in the unit that keeps the number short."""
    for unit_s, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit_s:
            return f"{seconds / unit_s:#.3g}".rstrip(".") + f" {unit}"
    return "0" if seconds == 0 else f"{seconds * 1e9:.0f} ns"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def add_legend(fig: Figure, shown: Sequence[Span]) -> None:
    """Only what occurs, in one line under the panels."""
    patches = []
    for half in sorted({span.half for span in shown}):
        kinds = {(span.lane, span.kind) for span in shown if span.half == half}
        if ("compute", "segment") in kinds:
            patches.append(Patch(color=half_colours(half).compute, label=f"half {half_name(half)} compute"))
        if any(lane == "comm" for lane, _ in kinds):
            patches.append(Patch(color=half_colours(half).communication, label=f"half {half_name(half)} communication"))
    patches.append(Patch(facecolor=EXPOSED, edgecolor="white", linewidth=0, hatch=EXPOSED_HATCH, label="exposed communication"))
    if any(span.kind == "wait" for span in shown):
        patches.append(Patch(color=IDLE, label="idle, nothing in flight"))
    height_in = fig.get_figheight()
    fig.legend(
        handles=patches, loc="lower right", bbox_to_anchor=(1 - RIGHT_IN / WIDTH_IN, 0.06 / height_in), borderaxespad=0,
        ncols=len(patches), frameon=False, fontsize=9, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
