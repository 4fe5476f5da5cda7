"""Rows: results in long form, one figure of one mode at one point a row. What the CSV and the tables are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perf.overlap import figures
from perf.overlap.figures import COMMUNICATION, COMPUTE, Spread, with_ideal
from perf.overlap.points import Point

COLUMNS = (
    "shape", "link", "mbit_per_s", "ranks", "threads_per_rank", "device", "measure", "x", "chunk_tokens", "mode",
    "figure", "unit", "median", "min", "max", "rounds",
)  # fmt: skip

BOUNDS = (COMPUTE, COMMUNICATION, "ideal")  # not ways to run a step


@dataclass(frozen=True)
class Row:
    point: Point
    mode: str
    figure: str
    unit: str
    value: Spread

    @property
    def cells(self) -> tuple[Any, ...]:
        """By COLUMNS."""
        s, p, v = self.point.setting, self.point, self.value
        chunk_tokens = p.chunk_tokens if p.measure == "mix" else ""
        place = (s.name, s.link, s.mbit_per_s, s.ranks, s.threads, s.device, p.measure, p.x, chunk_tokens)
        return (*place, self.mode, self.figure, self.unit, v.median, v.min, v.max, p.rounds)


def rows(results: list[tuple[Point, dict[str, Any]]]) -> list[Row]:
    return [row for point, result in results for row in rows_of(point, result)]


def rows_of(point: Point, result: dict[str, Any]) -> Iterator[Row]:
    if point.measure in ("prefill", "decode"):
        seconds = with_ideal(result["seconds"])
        for mode, values in seconds.items():
            yield Row(point, mode, "latency", "s", figures.spread(values))
            if mode != COMMUNICATION:
                yield Row(point, mode, "gain over off", "x", figures.gain(seconds, mode))
            if mode not in BOUNDS and (exposed := figures.exposed(seconds, mode)) is not None:
                yield Row(point, mode, "exposed", "s", exposed)
            if mode not in BOUNDS and (hidden := figures.hidden(seconds, mode)) is not None:
                yield Row(point, mode, "hidden share", "", hidden)
        for mode, values in result.get("cpu_s", {}).items():
            yield Row(point, mode, "CPU of a rank", "s", figures.spread(values))
    if point.measure == "mix":
        for mode, values_by_figure in result["figures"].items():
            for name, values in values_by_figure.items():
                yield Row(point, mode, name, "tokens/s" if name.endswith("tokens/s") else "s", figures.spread(values))
