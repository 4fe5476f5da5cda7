"""Panel: one stretch of time with two rows a rank. Paints bars and names into matplotlib axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from matplotlib.axes import Axes
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from tokenweave.trace import overlap
from tokenweave.trace.overlap import Interval
from tokenweave.trace.spans import COMMUNICATION, LANES, Span

PANEL_WIDTH_IN = 10.4
ROW_IN, SMALL_ROW_IN = 0.34, 0.19
RANK_GAP, MARGIN = 0.3, 0.12  # rows left free between ranks, and above the first and below the last
BAR = 0.84  # of a row's height
NAME_POINTS = 9.0


@dataclass(frozen=True)
class HalfColours:
    compute: str
    text: str  # on compute
    communication: str


# Blue and yellow of Paul Tol's high-contrast scheme, safe for colour-blind readers and in grey; two for further halves.
HALVES = (
    HalfColours("#2a5f9e", "white", "#b3cbe5"),
    HalfColours("#ddaa33", "black", "#f5e4b5"),
    HalfColours("#009988", "white", "#a6dcd5"),
    HalfColours("#aa3377", "white", "#e3b8cf"),
)
EXPOSED = "#cc1122"
EXPOSED_HATCH = "////"
IDLE = "#c4c4c4"
EMPTY = "#f4f4f4"
GREY = "#666666"


@dataclass(frozen=True)
class Scale:
    """Clock times in ns to what the axis shows."""

    origin_ns: int
    unit_ns: float
    unit: str

    def at(self, time_ns: int) -> float:
        return (time_ns - self.origin_ns) / self.unit_ns

    def ranges(self, intervals: Iterable[Interval]) -> list[tuple[float, float]]:
        """(start, width) pairs, as broken bars take them."""
        return [(self.at(start), (end - start) / self.unit_ns) for start, end in intervals]


@dataclass(frozen=True)
class Panel:
    """A stretch of time. A small panel is an overview: thin rows, no names, its time axis above."""

    window: Interval
    ranks: tuple[int, ...]
    small: bool = False

    @property
    def rows(self) -> float:
        return len(self.ranks) * (len(LANES) + RANK_GAP) - RANK_GAP + 2 * MARGIN

    @property
    def height_in(self) -> float:
        return self.rows * (SMALL_ROW_IN if self.small else ROW_IN)

    def row(self, rank: int, lane: str) -> float:
        """The middle of a lane's row, counted in rows from the top."""
        return MARGIN + self.ranks.index(rank) * (len(LANES) + RANK_GAP) + LANES.index(lane) + 0.5


def half_colours(half: int) -> HalfColours:
    return HALVES[half % len(HALVES)]


def choose_scale(panel: Panel) -> Scale:
    """Time runs from the start of the (first) panel, in the unit that keeps numbers short."""
    start_ns, end_ns = panel.window
    return Scale(start_ns, 1e6, "ms") if end_ns - start_ns >= 2e6 else Scale(start_ns, 1e3, "µs")


def paint(ax: Axes, panel: Panel, spans: Sequence[Span], scale: Scale) -> None:
    """Draw a panel: spans must be clipped to its window."""
    paint_frame(ax, panel, scale)
    edge_points = 0.0 if panel.small else 0.8
    for rank in panel.ranks:
        mine = [span for span in spans if span.rank == rank]
        paint_bars(ax, panel, rank, mine, scale, edge_points)
        paint_exposed(ax, panel, rank, overlap.exposed(mine), scale)
    if not panel.small:
        paint_names(ax, panel, spans, scale)


def paint_frame(ax: Axes, panel: Panel, scale: Scale) -> None:
    """The time axis, the rows' labels and their pale background."""
    lanes = [(rank, lane) for rank in panel.ranks for lane in LANES]
    ax.set_xlim(*map(scale.at, panel.window))
    ax.set_ylim(panel.rows, 0)
    ax.set_yticks([panel.row(*lane) for lane in lanes], [f"rank {rank} {lane}" for rank, lane in lanes])
    for lane in lanes:
        top = panel.row(*lane) - BAR / 2
        ax.axhspan(top, top + BAR, facecolor=EMPTY, linewidth=0, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(12))
    ax.xaxis.set_major_formatter(lambda time, _: f"{time:g} {scale.unit}")
    ax.tick_params(length=2.5, labelsize=7 if panel.small else 8.5, color=GREY, labelcolor=GREY)
    ax.tick_params(axis="y", length=0, labelcolor="black")
    ax.tick_params(axis="x", top=panel.small, labeltop=panel.small, bottom=not panel.small, labelbottom=not panel.small)
    ax.spines[:].set_visible(False)
    ax.set_facecolor("none")


def paint_bars(ax: Axes, panel: Panel, rank: int, spans: Sequence[Span], scale: Scale, edge_points: float) -> None:
    """One collection per row and colour, so that thousands of spans stay cheap."""
    groups: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.lane, bar_colour(span)), []).append(span)
    for (lane, colour), group in groups.items():
        ranges = scale.ranges(map(overlap.interval, group))
        box = (panel.row(rank, lane) - BAR / 2, BAR)
        bars = ax.broken_barh(ranges, box, facecolor=colour, edgecolor="white", linewidth=edge_points, zorder=2)
        bars.set_snap(not panel.small)  # thin bars snapped to pixels would leave gaps, or vanish
        bars.set_gid(f"rank {rank} {lane} {colour}")


def bar_colour(span: Span) -> str:
    if span.kind == "wait":
        return IDLE  # what of it is exposed communication is painted over
    colours = half_colours(span.half)
    return colours.communication if span.kind in COMMUNICATION else colours.compute


def paint_exposed(ax: Axes, panel: Panel, rank: int, exposed: Sequence[Interval], scale: Scale) -> None:
    """Mark what the compute lane loses: red, hatched where there is room. An outline would make short waits long."""
    if not exposed:
        return
    box = (panel.row(rank, "compute") - BAR / 2, BAR)
    bars = ax.broken_barh(scale.ranges(exposed), box, facecolor=EXPOSED, edgecolor="white", linewidth=0, zorder=3)
    bars.set_hatch("" if panel.small else EXPOSED_HATCH)
    bars.set_snap(not panel.small)
    bars.set_gid(f"rank {rank} exposed")


def paint_names(ax: Axes, panel: Panel, spans: Sequence[Span], scale: Scale) -> None:
    """Write names into the bars that are wide enough."""
    points_per_ns = PANEL_WIDTH_IN * 72 / (panel.window[1] - panel.window[0])
    measured_points = cache(text_points)  # of the few names there are; measuring is slow
    for span in spans:
        room_points = (span.end_ns - span.start_ns) * points_per_ns - 8
        name = next((name for name in names(span) if measured_points(name, NAME_POINTS) <= room_points), None)
        if name is not None:
            paint_name(ax, panel, span, name, scale)


def text_points(text: str, size: float) -> float:
    """How wide a text is, in points."""
    return TextPath((0, 0), text, size=size).get_extents().width


def names(span: Span) -> list[str]:
    """What may stand in a bar, the fullest first."""
    if span.kind == "wait" or not span.name:
        return []
    if span.kind == "segment":
        return [span.name]
    return [f"{span.name} {span.kind}", span.kind]


def paint_name(ax: Axes, panel: Panel, span: Span, name: str, scale: Scale) -> None:
    colour = half_colours(span.half).text if span.kind == "segment" else "black"
    middle = scale.at((span.start_ns + span.end_ns) // 2)
    text = ax.text(
        middle, panel.row(span.rank, span.lane), name,
        fontsize=NAME_POINTS, color=colour, ha="center", va="center_baseline", zorder=4,
    )  # fmt: skip
    if span.lane == "compute" and span.kind in COMMUNICATION:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.2})  # over the hatch
