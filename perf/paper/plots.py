"""Plots: a figure's cells, ours filled and solid, the published ones hatched and dashed. (4 and 10: perf/kernels.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf.overlap.plots import DPI, PEER_STYLE, STYLES
from perf.paper.cells import UNITS, Cell
from perf.paper.published import Key

Y_NAMES = {"1": "communication, % of off", "11": "prefill, ms", "12": "tokens/s", "13": "tokens/s"}
BARS = 0.8  # of the room of a group


def draw(figure: str, cells: Sequence[Cell], known: Mapping[Key, float], title: str, path: Path) -> None:
    """A panel a model, in figure 13 a panel a chunk. cells: of this figure."""
    panels = panels_of(cells)
    fig = Figure(figsize=(5.2 * len(panels), 4.2), dpi=DPI, layout="constrained")
    for ax, (name, mine) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        (lines if figure in ("1", "11") else bars)(ax, figure, mine, known)
        ax.set_title(name, fontsize=10)
        ax.set_ylabel(Y_NAMES[figure])
        ax.grid(alpha=0.3, axis="y")
        ax.legend(frameon=False, fontsize=7)
    fig.suptitle(title, fontweight="bold")
    FigureCanvasAgg(fig).print_png(str(path))


def panels_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        chunk = f", steps of {cell.key.chunk_tokens}" if cell.key.chunk_tokens else ""
        panels.setdefault(f"{cell.key.model}, W={cell.key.ranks}{chunk}", []).append(cell)
    return panels


def scale_of(figure: str) -> float:
    return 100.0 if UNITS[figure] == "of off" else 1.0


def lines(ax: Axes, figure: str, cells: Sequence[Cell], known: Mapping[Key, float]) -> None:
    """Over prompt tokens; the published points of the same model and ranks, at any length."""
    scale, first = scale_of(figure), cells[0].key
    for mode in dict.fromkeys(cell.key.mode for cell in cells):
        mine = [cell for cell in cells if cell.key.mode == mode]
        style = STYLES.get(mode, PEER_STYLE)
        xs = [int(cell.key.x) for cell in mine]
        ax.plot(xs, [cell.value.median * scale for cell in mine], label=mode, **style)
        place = (figure, first.model, first.ranks, mode)
        theirs = {int(k.x): v * scale for k, v in known.items() if (k.figure, k.model, k.ranks, k.mode) == place}
        if theirs:
            own: dict[str, Any] = {"color": style.get("color"), "linestyle": "--", "marker": "D"}
            ax.plot(*zip(*sorted(theirs.items())), label=f"{mode}, published", markerfacecolor="none", **own)
    ax.set_xscale("log", base=2)
    if figure == "11":
        ax.set_yscale("log")
    ax.set_xlabel("prompt, tokens")


def bars(ax: Axes, figure: str, cells: Sequence[Cell], known: Mapping[Key, float]) -> None:
    """A group a request mix, a bar a mode; the published value as a black line across it."""
    mixes = list(dict.fromkeys(cell.key.x for cell in cells))
    modes = list(dict.fromkeys(cell.key.mode for cell in cells))
    width = BARS / len(modes)
    for i, mode in enumerate(modes):
        mine = [cell for cell in cells if cell.key.mode == mode]
        at = [mixes.index(cell.key.x) + (i + 0.5) * width - BARS / 2 for cell in mine]
        color = STYLES.get(mode, PEER_STYLE).get("color")
        ax.bar(at, [cell.value.median for cell in mine], width * 0.9, label=mode, color=color, alpha=0.85)
        for x, cell in zip(at, mine, strict=True):
            if cell.published is not None:
                ax.hlines(cell.published, x - width / 2, x + width / 2, colors="red", linewidth=2)
    ax.set_xticks(range(len(mixes)), [str(mix) for mix in mixes])
    ax.set_xlabel("request mix (prompt-output tokens); red: published")
