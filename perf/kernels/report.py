"""What a run leaves behind: CSV, JSON, plots, and a page to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.kernels.figures import (
    FIGURE_4,
    FIGURE_10,
    PER_ROW,
    Measured,
    figure_4,
    figure_10,
    floor_us,
    read_csv,
    write_csv,
)
from perf.kernels.ours import KERNELS
from perf.kernels.peers import PEERS
from perf.kernels.plots import Panel, draw, lines_of
from perf.kernels.problem import Problem
from perf.kernels.verdict import Judgement
from tokenweave.cost.collectives import FUSED_SMS, MEASURED_ROW_BYTES, MEASURED_WORLD_SIZE

DRY = "dry run, not a measurement"
LABELS_4 = {"fused_arln_us": "fused, best CTA count", **{peer.column: peer.label for peer in PEERS}}
LABELS_10 = {PER_ROW: "one CTA per row", **{f"fused_arln_us_ctas_{ctas}": f"{ctas} CTAs" for ctas in FUSED_SMS}}


@dataclass(frozen=True)
class Run:
    """All there is to report. about: machine, versions, date. missing: why, by what could not be run."""

    about: dict[str, Any]
    problem: Problem
    world_size: int
    headline: str
    checked: dict[str, int]
    measured: Measured
    missing: dict[str, str]
    judgements: list[Judgement]
    verdict: str
    dry: bool

    @property
    def note(self) -> str:
        return DRY if self.dry else ""

    def floors(self) -> dict[int, float]:
        size = self.problem.hidden_size
        return {rows: floor_us(rows, size, self.problem.dtype, self.world_size) for rows in self.measured.times}


def read_reference(folder: Path) -> dict[str, list[dict[str, float]]]:
    return {number: read_csv(folder / f"tokenweave_figure_{number}.csv") for number in ("4", "10")}


def write(run: Run, folder: Path, reference: Mapping[str, Sequence[Mapping[str, float]]] | None) -> None:
    """Every file into `folder`, which exists."""
    of_4 = figure_4(run.measured, run.headline, run.problem.hidden_size)
    of_10 = figure_10(run.measured, run.headline, run.problem.hidden_size)
    write_csv(folder / f"{stem(run)}_4.csv", FIGURE_4, of_4, run.note)
    write_csv(folder / f"{stem(run)}_10.csv", FIGURE_10, of_10, run.note)
    write_csv(folder / "peers.csv", ["BL", "hidden_size", *LABELS_4], of_4, run.note)
    for name in KERNELS:
        if name != run.headline and (rows := figure_10(run.measured, name, run.problem.hidden_size)):
            write_csv(folder / f"figure_10_{name.replace(' ', '_')}.csv", FIGURE_10, rows, run.note)
    (folder / "kernel.json").write_text(json.dumps(as_json(run), indent=1) + "\n", encoding="utf-8")
    (folder / "kernel.md").write_text(page(run), encoding="utf-8")
    published = reference or {}
    plot(run, folder / "figure_10.png", "num_tokens", LABELS_10, of_10, published.get("10"))
    plot(run, folder / "figure_4.png", "BL", LABELS_4, of_4, published.get("4"))


def stem(run: Run) -> str:
    """Of CSV files: the published names, which `collectives` reads, only where they mean the same ranks and rows."""
    row_bytes = run.problem.hidden_size * run.problem.dtype.itemsize
    if run.dry or (run.world_size, row_bytes) == (MEASURED_WORLD_SIZE, MEASURED_ROW_BYTES):
        return "tokenweave_figure"
    return f"figure_of_{run.world_size}_ranks"


def plot(
    run: Run,
    path: Path,
    tokens: str,
    labels: Mapping[str, str],
    rows: Sequence[Mapping[str, float]],
    published: Sequence[Mapping[str, float]] | None,
) -> None:
    panels = [Panel(f"{run.headline}, {run.world_size} ranks", lines_of(rows, tokens, labels))]
    if published is not None:
        panels.append(Panel("published by TokenWeave, 8x H100", lines_of(published, tokens, labels)))
    number = path.stem.replace("_", " ")
    draw(path, f"{number}{': ' + run.note if run.dry else ''}", panels, run.floors())


def as_json(run: Run) -> dict[str, Any]:
    return {
        "note": run.note,
        "about": run.about,
        "world_size": run.world_size,
        "hidden_size": run.problem.hidden_size,
        "dtype": str(run.problem.dtype),
        "headline": run.headline,
        "checked_cases": run.checked,
        "missing": run.missing,
        "times": {
            rows: {name: asdict(time) for name, time in times.items()} for rows, times in run.measured.times.items()
        },
        "blocks_launched": run.measured.blocks,
        "sources": {peer.column: peer.source for peer in PEERS},
        "floor_us": run.floors(),
        "goals": [{"goal": str(each.goal), "measured_us": each.measured_us} for each in run.judgements],
        "verdict": run.verdict,
    }


def page(run: Run) -> str:
    """Markdown: tables of medians in microseconds, what was missing, the verdict."""
    size, floors = run.problem.hidden_size, run.floors()
    by_ctas = table(figure_10(run.measured, run.headline, size), "num_tokens", LABELS_10, floors)
    beside = table(figure_4(run.measured, run.headline, size), "BL", LABELS_4, floors)
    marked = f": {run.note}" if run.dry else ""
    judged = [] if run.verdict.startswith("not judged") else [f"- {each}" for each in run.judgements]
    parts = [
        f"# The fused kernel on {run.world_size} ranks{marked}",
        summary(run),
        f"## Figure 10: {run.headline}, by CTA count",
        by_ctas,
        "## Figure 4, and peers",
        beside,
        "## Verdict",
        "\n".join([*judged, f"**{run.verdict}**"]),
    ]
    return "\n\n".join(parts) + "\n"


def summary(run: Run) -> str:
    about = run.about
    lines = [
        f"{about['date']}, {about['device']}, torch {about['versions']['torch']}, CUDA {about['cuda']}, "
        f"NCCL {about['nccl']}, commit {about['commit']}; hidden {run.problem.hidden_size}, {run.problem.dtype}.",
        f"Median microseconds of {about['rounds']} rounds, the slowest rank of each; {about['timer']}.",
        f"Results checked: {', '.join(f'{name} ({count} cases)' for name, count in run.checked.items())}.",
    ]
    lines += [f"Missing: {name}, since {why}." for name, why in run.missing.items()]
    return "  \n".join(lines)


def table(
    rows: Sequence[Mapping[str, float]], tokens: str, labels: Mapping[str, str], floors: Mapping[int, float]
) -> str:
    """Columns that nothing was measured for are left out."""
    measured = {column: label for column, label in labels.items() if any(column in row for row in rows)}
    lines = [
        "| tokens | line rate | " + " | ".join(measured.values()) + " |",
        "|" + "---|" * (len(measured) + 2),
    ]
    for row in rows:
        cells = [f"{row[column]:.1f}" if column in row else "" for column in measured]
        lines.append(f"| {row[tokens]} | {floors[int(row[tokens])]:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
