"""Plots: time by tokens, ours beside the published figures, and the line rate's floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Lines = Mapping[str, Mapping[int, float]]  # microseconds by label and tokens


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Lines


def draw(path: Path, title: str, panels: Sequence[Panel], floor: Mapping[int, float]) -> None:
    """Writes a PNG: the panels beside each other on the same axes, a label's line of the same colour in each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for each, panel in zip(axes, panels):
        draw_panel(each, panel, {label: f"C{number}" for number, label in enumerate(labels)}, floor)
    axes[0].set_ylabel("microseconds")
    figure.savefig(path, dpi=120)


def draw_panel(axes: Any, panel: Panel, colours: Mapping[str, str], floor: Mapping[int, float]) -> None:
    for label, line in panel.lines.items():
        axes.plot(list(line), list(line.values()), marker="o", markersize=3, color=colours[label], label=label)
    axes.plot(list(floor), list(floor.values()), color="black", linestyle=":", label="line rate")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_title(panel.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def lines_of(rows: Sequence[Mapping[str, float]], tokens: str, columns: Mapping[str, str]) -> Lines:
    """The lines of a CSV file's rows. columns: labels by column; those without a number are left out."""
    lines = {
        label: {int(row[tokens]): row[column] for row in rows if column in row} for column, label in columns.items()
    }
    return {label: line for label, line in lines.items() if line}
