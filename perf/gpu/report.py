"""The report of a day and a GPU: figures by part, as JSON and as Markdown. A part that runs again replaces its own."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perf.gpu.figure import Figure

Parts = dict[str, dict[str, Any]]  # name -> {"figures": [...], "failure": "" or why, "seconds": ...}


def stem_of(folder: Path, facts: dict[str, Any]) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower().removeprefix("nvidia ")).strip("-")
    return folder / f"runtime-one-gpu-{facts['date']}-{gpu}"


def kept(stem: Path) -> Parts:
    """What is known of that day and GPU already."""
    path = stem.with_suffix(".json")
    return json.loads(path.read_text())["parts"] if path.exists() else {}


def write(stem: Path, facts: dict[str, Any], parts: Parts) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(facts | {"parts": parts}, indent=1, allow_nan=True) + "\n")
    stem.with_suffix(".md").write_text(markdown(facts, parts))


def part_of(figures: list[Figure], failure: str, seconds: float) -> dict[str, Any]:
    return {
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
        "failure": failure,
        "seconds": round(seconds, 1),
    }


def markdown(facts: dict[str, Any], parts: Parts) -> str:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    lines = [
        f"# The runtime on one GPU, {facts['date']}",
        "",
        f"{facts['device']}, {facts['scale']}, {versions}, driver {facts['driver']}, Python {facts['python']}, commit "
        f"{facts['commit']}.",
        "Random weights. Wall time of whole calls, the host's part included (of the stand-in: the device's time);",
        "medians, and in brackets all rounds' least and most. Made by `bash perf/gpu.sh`.",
    ]
    if facts["dry"]:
        lines += ["", "**A dry run on a CPU with tiny sizes: it shows that everything runs, and measures nothing.**"]
    for name, part in parts.items():
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", ""]
        if part["failure"]:
            lines += [f"incomplete: {part['failure']}", ""]
        if part["figures"]:
            rows = [row(figure | {"verdict": ""} if facts["dry"] else figure) for figure in part["figures"]]
            lines += ["| what | value | goal | | |", "|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def row(figure: dict[str, Any]) -> str:
    value = "-" if math.isnan(figure["value"]) else f"{number(figure['value'])} {figure['unit']}".strip()
    if figure["least"] is not None and figure["least"] != figure["most"]:
        value += f" ({number(figure['least'])} - {number(figure['most'])})"
    goal = "" if figure["goal"] is None else f"{'<=' if figure['at_most'] else '>='} {figure['goal']:g}"
    return f"| {figure['what']} | {value} | {goal} | {figure['verdict']} | {figure['note']} |"


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
