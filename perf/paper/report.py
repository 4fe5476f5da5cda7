"""Report: every figure as CSV, JSON, a plot, and one page of Markdown with ours beside the published."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perf.kernels.report import LABELS_4, LABELS_10
from perf.overlap.report import absent, markdown
from perf.overlap.workloads import mix_of
from perf.paper.cells import COLUMNS, UNITS, Cell
from perf.paper.plan import KERNEL_FIGURES
from perf.paper.plots import draw
from perf.paper.published import SOURCE, Key

TITLES = {
    "1": "Figure 1: what all-reduce takes of a prefill",
    "4": "Figure 4: collectives by size",
    "10": "Figure 10: the fused kernel by CTA count",
    "11": "Figure 11: prefill latency by prompt length",
    "12": "Figure 12: throughput by workload",
    "13": "Figure 13: throughput by tokens of a step",
}
GAIN = "gain of weave"
FORMATS = {"of off": ".1%", "us": ".1f", "ms": ".1f", "tokens/s": ".0f"}
DRY = "dry run, not a measurement"
TERMS = (
    "In [brackets]: published. Medians; `off` is the fastest of the all-reduces that are here, each with a fused "
    "residual and RMSNorm; `nocomm`: nothing is sent, each rank norms all rows; `weave` stands beside the paper's "
    "TokenWeave. Gain: off / weave of times, weave / off of throughputs."
)


@dataclass(frozen=True)
class Run:
    """All there is to report. kernel: the folder of figures 4 and 10, where they were measured; lacking: what was
    asked for and could not be, and why."""

    about: dict[str, Any]
    results: list[tuple[Any, dict[str, Any]]]
    cells: list[Cell]
    known: dict[Key, float]
    figures: Sequence[str]
    dry: bool
    kernel: Path | None = None
    lacking: dict[str, str] = field(default_factory=dict)

    def of(self, figure: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.key.figure == figure]


def write(run: Run, folder: Path) -> str:
    """figures.csv, figures.json, figure_<n>.csv and .png, report.md. Returns what to tell the user."""
    write_csv(folder / "figures.csv", run.cells, run.dry)
    for figure in run.figures:
        if mine := run.of(figure):
            write_csv(folder / f"figure_{figure}.csv", mine, run.dry)
            if figure not in KERNEL_FIGURES:
                title = f"{TITLES[figure]}{f' ({DRY})' if run.dry else ''}"
                draw(figure, mine, run.known, title, folder / f"figure_{figure}.png")
    (folder / "figures.json").write_text(json.dumps(as_json(run), indent=1) + "\n")
    (folder / "report.md").write_text("\n\n".join(page(run, folder)) + "\n")
    said = f"written: {folder / 'report.md'}"
    return said + "".join(f"\nfigure {figure} is missing: {why}" for figure, why in run.lacking.items())


def write_csv(path: Path, cells: Sequence[Cell], dry: bool) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if dry:
            file.write(f"# {DRY}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(cell.row for cell in cells)


def as_json(run: Run) -> dict[str, Any]:
    return {
        "note": DRY if run.dry else "",
        "about": run.about,
        "source of published": SOURCE,
        "missing": run.lacking,
        "points": [asdict(point) | result for point, result in run.results],
        "figures": [dict(zip(COLUMNS, cell.row, strict=True)) for cell in run.cells],
    }


def page(run: Run, folder: Path) -> Iterator[str]:
    about = run.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"# TokenWeave's figures, {about['date']}{f': {DRY}' if run.dry else ''}"
    yield f"{about['gpus'] or about['cpu']}; {versions}; {about['kernel']}; commit {about['commit']}."
    yield f"Made by `{about['command']}`. Published: {SOURCE}."
    yield TERMS
    yield from absent(run.results)
    for figure in run.figures:
        yield f"## {TITLES[figure]}, {UNITS[figure]}"
        yield from section(run, figure, folder)


def section(run: Run, figure: str, folder: Path) -> Iterator[str]:
    mine = run.of(figure)
    if not mine:
        yield f"Missing: {run.lacking.get(figure, 'nothing was measured')}."
    else:
        place = f"{relative(run, folder)}/" if figure in KERNEL_FIGURES else ""
        yield f"![{TITLES[figure]}]({place}figure_{figure}.png)"
        yield table(mine)
    if figure in ("12", "13") and mine:
        mixes = dict.fromkeys(str(cell.key.x) for cell in mine)
        yield "\n".join(f"- {mix}: {words(run, mix)}" for mix in mixes)
    if theirs := unmatched(run, figure):
        yield f"Published, and not measured here:\n\n{theirs}"


def relative(run: Run, folder: Path) -> str:
    return run.kernel.relative_to(folder).as_posix() if run.kernel else "."


def words(run: Run, mix: str) -> str:
    requests = next(point.requests for point, _ in run.results if point.x == mix)
    return mix_of(mix, requests).words


def table(cells: Sequence[Cell]) -> str:
    """A line a point, a column a mode, the gain last."""
    figure = cells[0].key.figure
    ours = {cell.key: cell.value.median for cell in cells}
    theirs = {cell.key: cell.published for cell in cells if cell.published is not None}
    gained = joined(gains(ours, figure), gains(theirs, figure))
    return lines_of({cell.key: shown(cell) for cell in cells} | gained, figure)


def unmatched(run: Run, figure: str) -> str:
    """The published values of a figure that no cell of ours stands beside."""
    here = {cell.key for cell in run.of(figure)}
    theirs = {key: value for key, value in run.known.items() if key.figure == figure and key not in here}
    values = {key: f"[{text(value, figure)}]" for key, value in theirs.items()}
    return lines_of(values | joined({}, gains(theirs, figure)), figure) if theirs else ""


def gains(values: Mapping[Key, float], figure: str) -> dict[Key, float]:
    """What weave gains over off, by a key of the mode GAIN; of figures that have both."""
    found: dict[Key, float] = {}
    for key, weave in values.items():
        off = values.get(replace(key, mode="off"))
        if key.mode == "weave" and off is not None:
            found[replace(key, mode=GAIN)] = weave / off if UNITS[figure] == "tokens/s" else off / weave
    return found


def joined(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> dict[Key, str]:
    """Such as 1.27 [1.21]."""
    said = {key: f"{value:.2f}" for key, value in ours.items()}
    return said | {key: f"{said.get(key, '')} [{value:.2f}]".strip() for key, value in theirs.items()}


def lines_of(values: Mapping[Key, str], figure: str) -> str:
    modes = sorted(dict.fromkeys(key.mode for key in values), key=lambda mode: mode == GAIN)
    places = list(dict.fromkeys((key.model, key.ranks, key.x, key.chunk_tokens) for key in values))
    lines = [
        [model or "-", str(ranks), str(x), str(chunk or "-")]
        + [values.get(Key(figure, model, ranks, x, mode, chunk), "") for mode in modes]
        for model, ranks, x, chunk in places
    ]
    labels = LABELS_4 | LABELS_10
    return markdown(["model", "W", "tokens or mix", "step", *(labels.get(mode, mode) for mode in modes)], lines)


def shown(cell: Cell) -> str:
    theirs = "" if cell.published is None else f" [{text(cell.published, cell.key.figure)}]"
    return text(cell.value.median, cell.key.figure) + theirs


def text(value: float, figure: str) -> str:
    return f"{value:{FORMATS[UNITS[figure]]}}"
