"""Cells: each figure's values, ours beside the published. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perf.overlap.figures import Spread, spread, with_ideal
from perf.overlap.points import Point
from perf.paper.plan import Scale, figures_of
from perf.paper.published import Key

MODES = ("off", "fused", "weave", "auto", "nocomm")
UNITS = {"1": "of off", "4": "us", "10": "us", "11": "ms", "12": "tokens/s", "13": "tokens/s"}
COLUMNS = ("figure", "model", "ranks", "x", "chunk_tokens", "mode", "unit", "median", "min", "max", "published")


@dataclass(frozen=True)
class Cell:
    """published: None where the paper gives no such value, or it is not at hand."""

    key: Key
    value: Spread
    published: float | None

    @property
    def row(self) -> tuple[Any, ...]:
        """By COLUMNS."""
        k, v = self.key, self.value
        place = (k.figure, k.model, k.ranks, k.x, k.chunk_tokens or "", k.mode, UNITS[k.figure])
        return (*place, v.median, v.min, v.max, "" if self.published is None else self.published)


def cells(
    results: Sequence[tuple[Point, dict[str, Any]]],
    kernel: Mapping[str, Any] | None,
    known: Mapping[Key, float],
    figures: Sequence[str],
    scale: Scale,
    first: str,
) -> list[Cell]:
    """Of all figures, in their order. kernel: what the kernel's measurement wrote as JSON. first: the first model."""
    values = [
        pair
        for point, result in results
        for figure in figures_of(point, figures, scale, point.setting.shape == first)
        for pair in of_point(figure, point, result)
    ]
    values += [pair for pair in of_kernel(kernel) if pair[0].figure in figures] if kernel else []
    ordered = sorted(values, key=lambda pair: int(pair[0].figure))
    return [Cell(key, value, known.get(key)) for key, value in ordered]


def of_point(figure: str, point: Point, result: dict[str, Any]) -> Iterator[tuple[Key, Spread]]:
    model, ranks = point.setting.name, point.setting.ranks
    if figure == "1":
        seconds = with_ideal(result["seconds"])
        shares = [1 - none / off for none, off in zip(seconds["nocomm"], seconds["off"], strict=True)]
        yield Key(figure, model, ranks, point.x, "off"), spread(shares)
        return
    chunk = point.chunk_tokens if point.measure == "mix" else 0
    for mode, values in by_mode(point, result).items():
        yield Key(figure, model, ranks, point.x, mode, chunk), spread(values)


def by_mode(point: Point, result: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of a step, or tokens/s with the prompts, of the modes first and then of everybody else."""
    if point.measure == "prefill":
        measured = {mode: [1e3 * one for one in values] for mode, values in with_ideal(result["seconds"]).items()}
    else:
        measured = {mode: figures["total tokens/s"] for mode, figures in result["figures"].items()}
    return {mode: measured[mode] for mode in (*MODES, *measured) if mode in measured}


def of_kernel(kernel: Mapping[str, Any]) -> Iterator[tuple[Key, Spread]]:
    """Figure 4: peers, and the kernel by its best count of CTAs. Figure 10: the kernel by CTAs."""
    ranks, own = int(kernel["world_size"]), f"{kernel['headline']}: "
    for rows, times in kernel["times"].items():
        ours = {name.removeprefix(own): spread_us(time) for name, time in times.items() if name.startswith(own)}
        by_ctas = {column: time for column, time in ours.items() if "_ctas_" in column}
        for column, time in by_ctas.items():
            yield Key("10", "", ranks, int(rows), column), time
        if by_ctas:
            yield Key("4", "", ranks, int(rows), "fused_arln_us"), min(by_ctas.values(), key=lambda time: time.median)
        for name, time in times.items():
            if ": " not in name:
                yield Key("4", "", ranks, int(rows), name), spread_us(time)


def spread_us(time: Mapping[str, float]) -> Spread:
    return Spread(time["median_us"], time["min_us"], time["max_us"])
