"""Collectives: what a sum over W ranks takes, from data sheet figures or from measured curves."""

from __future__ import annotations

import csv
import functools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenweave.cost.hardware import Hardware
from tokenweave.cost.ops import Numbers

SHARPNESS = 3  # how abruptly "limited by SMs" goes over into "limited by the link": Figures 7 and 10 bend like this
MEASURED_WORLD_SIZE = 8
MEASURED_ROW_BYTES = 8192 * 2
MEASURED_ROWS = 32768


class Collectives(Protocol):
    """Seconds of the sums of [rows, hidden], `rows` > 0, one count or an array. `plain`: an all-reduce. `fused`: with
    residual and norm on 1/W of the rows, by a kernel of `sms` SMs, None = the best count. Without the factor of
    Efficiency.all_reduce."""

    def plain_s(self, rows: Numbers) -> Numbers: ...

    def fused_s(self, rows: Numbers, sms: int | None) -> Numbers: ...


def link_passes(implementation: str, world_size: int) -> float:
    """How often an all-reduce's bytes cross one rank's link in the busier direction.

    nccl (ring), sharded (reduce-scatter, all-gather) and peer (two-shot) 2 (W - 1) / W; multimem, where the switch sums
    and broadcasts, 1 + 1 / W; one-shot, where everyone reads everything, W - 1. 0 for a single rank.
    """
    passes = {
        "nccl": 2 * (world_size - 1) / world_size,
        "sharded": 2 * (world_size - 1) / world_size,
        "peer": 2 * (world_size - 1) / world_size,
        "multimem": 1 + 1 / world_size,
        "one-shot": float(world_size - 1),
    }
    if implementation not in passes:
        raise ValueError(f"unknown all-reduce {implementation!r}; known: {', '.join(passes)}")
    return passes[implementation] if world_size > 1 else 0.0


def all_reduce_s(
    implementation: str,
    size_bytes: float,
    world_size: int,
    hardware: Hardware,
    sms: int | None = None,
    fused: bool = False,
) -> float:
    """Seconds to sum `size_bytes` over the ranks with `sms` SMs (None = as many as help).

    A fixed part, then what the link takes; few SMs cannot keep the link busy: each moves its share of the rank's
    1/W of the rows at its own rate.
    """
    if world_size == 1 or size_bytes == 0:
        return 0.0
    ring = implementation in ("nccl", "sharded")
    share = hardware.efficiency.ring_link if ring else hardware.efficiency.link
    link_s = size_bytes * link_passes(implementation, world_size) / (hardware.link_bandwidth * share)
    fixed_s = _ring_s(implementation, world_size, hardware) if ring else hardware.collective_s
    if sms is None or ring:
        return fixed_s + link_s
    sm_bandwidth = hardware.fused_sm_link_bandwidth if fused else hardware.sm_link_bandwidth
    return fixed_s + join(link_s, size_bytes / (sms * sm_bandwidth) * MEASURED_WORLD_SIZE / world_size)


def join(link_s: Numbers, sm_s: Numbers) -> Numbers:
    """Both limits together: about the larger, and somewhat more where they are near each other."""
    return (link_s**SHARPNESS + sm_s**SHARPNESS) ** (1 / SHARPNESS)


def gather_s(size_bytes: Numbers, world_size: int, hardware: Hardware) -> Numbers:
    """Seconds until every rank has all ranks' parts, `size_bytes` > 0 together."""
    if world_size == 1:
        return 0.0
    crossing = size_bytes * (world_size - 1) / world_size
    return hardware.collective_s + crossing / (hardware.link_bandwidth * hardware.efficiency.ring_link)


def _ring_s(implementation: str, world_size: int, hardware: Hardware) -> float:
    launches = 2 if implementation == "sharded" else 1
    return launches * hardware.ring_s * (world_size - 1) / (MEASURED_WORLD_SIZE - 1)


def best_implementation(hardware: Hardware, world_size: int) -> tuple[str, str]:
    """(plain, fused) as the runtime would choose: in-switch sums where there are such, for more than two ranks."""
    if hardware.multicast and world_size > 2:
        return "multimem", "multimem"
    return ("nccl", "peer") if hardware.tiles else ("sharded", "sharded")


@dataclass(frozen=True)
class AnalyticCollectives:
    """By data sheet figures. `row_bytes`: hidden size times the element's size."""

    hardware: Hardware
    world_size: int
    row_bytes: int

    def plain_s(self, rows: Numbers) -> Numbers:
        return self._seconds(rows, None, False)

    def fused_s(self, rows: Numbers, sms: int | None) -> Numbers:
        return self._seconds(rows, sms, True)

    def _seconds(self, rows: Numbers, sms: int | None, fused: bool) -> Numbers:
        line = self._lines.get((sms, fused))
        if line is None:
            line = self._lines[sms, fused] = self._line(sms, fused)
        return line[0] + rows * line[1]

    @functools.cached_property
    def _lines(self) -> dict[tuple[int | None, bool], tuple[float, float]]:
        """(fixed seconds, seconds a row) by SMs and kernel: both limits, and so their joint, grow with the bytes."""
        return {}

    def _line(self, sms: int | None, fused: bool) -> tuple[float, float]:
        implementation = best_implementation(self.hardware, self.world_size)[fused]
        one_s, two_s = (
            all_reduce_s(implementation, rows * self.row_bytes, self.world_size, self.hardware, sms, fused)
            for rows in (1, 1 + MEASURED_ROWS)
        )
        row_s = (two_s - one_s) / MEASURED_ROWS
        return one_s - row_s, row_s


@dataclass(frozen=True)
class Curve:
    """Measured seconds by row count. Linear between rows; below the first the first's, past the last on with the slope
    of the last two (bandwidth alone counts there)."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: Numbers) -> Numbers:
        last_row_s = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return np.interp(rows, self.rows, self.seconds) + np.maximum(0, rows - self.rows[-1]) * last_row_s


@dataclass(frozen=True)
class MeasuredCollectives:
    """By curves of 8 ranks and rows of 8192 bf16, scaled to other sizes by bytes and to another W by what limits.

    The link's part scales with its byte floor, (1 + 1/W); what few SMs add scales with the rows a rank owns, 1/W.
    """

    plain: Curve
    best_fused: Curve
    fused_by_sms: Mapping[int, Curve]
    world_size: int
    row_bytes: int

    def plain_s(self, rows: Numbers) -> Numbers:
        return self._scaled(self.plain(self._as_measured(rows)))

    def fused_s(self, rows: Numbers, sms: int | None) -> Numbers:
        at = self._as_measured(rows)
        link_s = self.best_fused(at)
        if sms is None:
            return self._scaled(link_s)
        with_sms_s = self._with_sms_s(at, sms)
        sm_s = np.maximum(0.0, with_sms_s**SHARPNESS - link_s**SHARPNESS) ** (1 / SHARPNESS)
        return join(self._scaled(link_s), sm_s * MEASURED_WORLD_SIZE / self.world_size)

    def _with_sms_s(self, rows: Numbers, sms: int) -> Numbers:
        """Between measured counts linear in their logarithm; outside them, the nearest one's."""
        counts = list(self.fused_by_sms)
        i = min(max(bisect_left(counts, sms), 1), len(counts) - 1)
        lower, upper = counts[i - 1], counts[i]
        share = min(1.0, max(0.0, math.log(sms / lower) / math.log(upper / lower)))
        lower_s = self.fused_by_sms[lower](rows) if share < 1.0 else 0.0
        upper_s = self.fused_by_sms[upper](rows) if share > 0.0 else 0.0
        return (1.0 - share) * lower_s + share * upper_s

    def _as_measured(self, rows: Numbers) -> Numbers:
        return rows * self.row_bytes / MEASURED_ROW_BYTES

    def _scaled(self, seconds: Numbers) -> Numbers:
        return seconds * (1 + 1 / self.world_size) / (1 + 1 / MEASURED_WORLD_SIZE)


def read_collectives(folder: str | Path, world_size: int, row_bytes: int) -> MeasuredCollectives:
    """Curves from a folder with tokenweave_figure_4.csv and tokenweave_figure_10.csv, microseconds.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    plain = _read(Path(folder) / "tokenweave_figure_4.csv", "BL", ["multimem_all_reduce_us"])
    names = [f"fused_arln_us_ctas_{sms}" for sms in FUSED_SMS]
    fused = _read(Path(folder) / "tokenweave_figure_10.csv", "num_tokens", names)
    by_sms = dict(zip(FUSED_SMS, fused, strict=True))
    best = Curve(fused[0].rows, tuple(map(min, zip(*(curve.seconds for curve in fused), strict=True))))
    return MeasuredCollectives(plain[0], best, by_sms, world_size, row_bytes)


FUSED_SMS = (2, 4, 8, 16, 32, 64, 128)


def _read(path: Path, rows_column: str, columns: Sequence[str]) -> list[Curve]:
    if not path.is_file():
        raise FileNotFoundError(f"the measured curves {path} do not exist; give a folder that holds them")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        rows = tuple(int(line[rows_column]) for line in lines)
        curves = [Curve(rows, tuple(float(line[column]) * 1e-6 for line in lines)) for column in columns]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the measured curves {path} cannot be used: {type(error).__name__}: {error}") from error
    _check(path, rows, curves)
    return curves


def _check(path: Path, rows: tuple[int, ...], curves: Sequence[Curve]) -> None:
    if len(rows) < 2 or rows[0] < 1 or any(a >= b for a, b in pairwise(rows)):
        raise ValueError(f"the measured curves {path} cannot be used: expected two or more ascending row counts")
    if not all(0 < seconds < math.inf for curve in curves for seconds in curve.seconds):
        raise ValueError(f"the measured curves {path} cannot be used: every time must be a number > 0")
