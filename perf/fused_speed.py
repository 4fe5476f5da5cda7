"""The fused kernel's time by rows and CTAs on one GPU, W virtual ranks at a time, beside what else does the same work.

All contestants read W partials and a residual of cold memory: launches walk through buffers far larger than L2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from perf.gpu_timing import Contestant, copy_bytes_per_s, interleaved_us
from perf.naive import NaiveLauncher
from perf.virtual import VirtualRanks, bounds_of
from tokenweave.comm.symmetric import Layout
from tokenweave.kernels.fused import Variant, without_norm

HIDDEN_SIZE = 8192
DTYPE = torch.bfloat16
ROW_BYTES = HIDDEN_SIZE * DTYPE.itemsize
ROWS = (64, 256, 1024, 4096, 16384)
CTAS = (1, 2, 4, 8, 16, 32)  # of one rank
WORLD_SIZE = 8
FEWER_RANKS = (2, 4)
FEWER_RANKS_ROWS = (256, 4096)
COLD_BYTES = 400 << 20  # moved between two uses of a buffer, at least: several times the L2 cache
MOST_LAUNCHES = 100
ROUNDS = 5
TIMEOUT_S = 20.0
EPS = 1e-5
JUDGED_ROWS = 4096
COMPILED_ROWS = (JUDGED_ROWS, 256)
PLAIN_GOAL, NAIVE_GOAL, NAIVE_CTAS = 0.9, 1.8, 4


@dataclass(frozen=True)
class Point:
    """One time. ctas: of each rank; 0: as many as the library takes. bytes: what must go through memory once."""

    what: str  # "fused" | "plain" | "naive" | "torch" | "torch.compile"
    world_size: int
    rows: int
    ctas: int
    us: float
    least_us: float
    most_us: float
    bytes: int

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.us / 1e3


def variant_of(world_size: int) -> Variant:
    return Variant(DTYPE, HIDDEN_SIZE, world_size, "two_shot", residual=True, norm=True)


def moved_bytes(what: str, world_size: int, rows: int) -> int:
    """W reads and W writes of each row; the residual is read and written by its owner."""
    return rows * ROW_BYTES * 2 * (world_size + (what != "plain"))


def launches_of(world_size: int, rows: int) -> int:
    """Enough that a buffer has left the cache before it is used again, and no more than have buffers of their own."""
    wanted = -(-COLD_BYTES // moved_bytes("plain", world_size, rows))
    return max(2, min(wanted, MOST_LAUNCHES, max(ROWS) // rows))


class Bench:
    """Buffers of `world_size` virtual ranks with room for the most rows."""

    def __init__(self, world_size: int, device: torch.device):
        self.world_size = world_size
        self.device = device
        most = max(ROWS)
        self.ranks = VirtualRanks(world_size, Layout(most, HIDDEN_SIZE, DTYPE), device, TIMEOUT_S, most // world_size)
        for values in (*self.ranks.partial[0], *self.ranks.residual_in[0]):
            values.normal_()
        self.residual = torch.randn(most, HIDDEN_SIZE, dtype=DTYPE, device=device)  # and hidden: what torch works on
        self.hidden = torch.empty_like(self.ranks.hidden[0], memory_format=torch.contiguous_format)
        self.weight = torch.rand(HIDDEN_SIZE, dtype=DTYPE, device=device) + 0.5
        self.naive = NaiveLauncher(device)

    def fused(self, rows: int, ctas: int, variant: Variant) -> Contestant:
        return self._contestant(rows, lambda launch: self.ranks.launch(variant, launch, ctas))

    def naively(self, rows: int, ctas: int) -> Contestant:
        variant = variant_of(self.world_size)
        return self._contestant(rows, lambda launch: self.naive.launch(variant, launch, ctas, self.world_size))

    def in_torch(self, rows: int, function: Callable[..., Any]) -> Contestant:
        """The same work on whole tensors, on as many SMs as torch takes."""

        def run(i: int) -> None:
            part = slice(i % (max(ROWS) // rows) * rows, None)
            partial, hidden, residual = self.ranks.partial[0], self.hidden, self.residual
            function(partial[:, part][:, :rows], residual[part][:rows], self.weight, hidden[:, part][:, :rows])

        return Contestant(run, launches_of(self.world_size, rows))

    def _contestant(self, rows: int, launch: Callable[[Any], None]) -> Contestant:
        arguments = [self._arguments(rows, slot) for slot in range(launches_of(self.world_size, rows))]
        slots = min(len(arguments), max(ROWS) // rows)
        return Contestant(lambda i: launch(arguments[i % slots]), len(arguments))

    def _arguments(self, rows: int, slot: int) -> Any:
        slot %= max(ROWS) // rows
        kept = slot * (rows // self.world_size)  # rows are a multiple of the ranks
        launch = self.ranks.arguments(0, bounds_of(rows, self.world_size), slot * rows, kept)
        launch.weight, launch.eps = self.weight.data_ptr(), EPS
        return launch


def sum_and_norm(partials: Tensor, residual: Tensor, weight: Tensor, hiddens: Tensor) -> None:
    """partials, hiddens: [ranks, rows, hidden]; residual: [rows, hidden], updated."""
    residual.add_(partials.sum(0))
    hiddens.copy_(functional.rms_norm(residual, residual.shape[-1:], weight, EPS))


def disagreements(bench: Bench, rows: int = 64) -> list[str]:
    """Which contestants do not compute what torch does, in its rounding."""
    ranks, world_size = bench.ranks, bench.world_size
    before = ranks.residual_in[0, :, : rows // world_size].clone()
    expected = torch.empty(world_size, rows, HIDDEN_SIZE, dtype=DTYPE, device=bench.device)
    sum_and_norm(ranks.partial[0][:, :rows], before.flatten(0, 1).clone(), bench.weight, expected)
    found = []
    for name, contestant in {
        "fused": bench.fused(rows, 2, variant_of(world_size)),
        "naive": bench.naively(rows, 2),
    }.items():
        ranks.residual_in[0, :, : rows // world_size] = before
        ranks.hidden[0][:, :rows].fill_(torch.nan)
        contestant.run(0)
        torch.cuda.synchronize()
        far = float((ranks.hidden[0][:, :rows].float() - expected.float()).abs().max().nan_to_num(nan=torch.inf))
        if far > 0.2:  # hidden states are about 1, a few of them 5; torch rounds twice more
            found.append(f"W={world_size}: {name} is off by {far:.3g}")
    return found


def measure(device: torch.device, say: Callable[[str], None], found: dict[str, Any]) -> None:
    """Everything of this file, into `found` as it comes. Raises AssertionError where a contestant is wrong."""
    found |= {"copy_gb_per_s": copy_bytes_per_s(device) / 1e9, "points": []}
    say(f"copy: {found['copy_gb_per_s']:.0f} GB/s, read and written")
    for world_size in (*FEWER_RANKS, WORLD_SIZE):
        bench = Bench(world_size, device)
        wrong = disagreements(bench)
        assert not wrong, "; ".join(wrong)
        for rows in ROWS if world_size == WORLD_SIZE else FEWER_RANKS_ROWS:
            add(found, measure_rows(bench, rows, device), say)
        if world_size == WORLD_SIZE:
            measure_torch(bench, say, found)
        reports = [report.reason for report in bench.ranks.reported()]
        assert not any(reports), f"a rank gave up: {reports}"
        del bench
        torch.cuda.empty_cache()


def add(found: dict[str, Any], points: Sequence[Point], say: Callable[[str], None]) -> None:
    found["points"] += [asdict(point) | {"gb_per_s": point.gb_per_s} for point in points]
    head = f"W={points[0].world_size}, {points[0].rows} rows: "
    say(head + ", ".join(f"{point.what}@{point.ctas or 'all'} {point.us:.1f} us" for point in points))


def measure_rows(bench: Bench, rows: int, device: torch.device) -> list[Point]:
    found = []
    for ctas in fitting_ctas(bench.world_size, torch.cuda.get_device_properties(device).multi_processor_count):
        fused = variant_of(bench.world_size)
        contestants = {
            "fused": bench.fused(rows, ctas, fused),
            "plain": bench.fused(rows, ctas, without_norm(fused)),
            "naive": bench.naively(rows, ctas),
        }
        found += points_of(contestants, bench.world_size, rows, ctas)
    return found


def measure_torch(bench: Bench, say: Callable[[str], None], found: dict[str, Any]) -> None:
    """torch.compile last, and for few sizes: each takes it many seconds."""
    compiled = torch.compile(sum_and_norm, dynamic=False)
    runs = [("torch", rows, sum_and_norm) for rows in ROWS] + [("torch.compile", n, compiled) for n in COMPILED_ROWS]
    for what, rows, function in runs:
        add(found, points_of({what: bench.in_torch(rows, function)}, bench.world_size, rows, 0), say)


def points_of(contestants: dict[str, Contestant], world_size: int, rows: int, ctas: int) -> list[Point]:
    return [
        Point(
            what, world_size, rows, ctas, statistics.median(us), min(us), max(us), moved_bytes(what, world_size, rows)
        )
        for what, us in interleaved_us(contestants, ROUNDS).items()
    ]


def fitting_ctas(world_size: int, sms: int) -> list[int]:
    """CTAs of a rank, of all of which one fits on each SM."""
    return [ctas for ctas in CTAS if ctas * world_size <= sms]


# -- the report -------------------------------------------------------------------------------------------------------


def goals(points: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, value, goal) of each goal that was measured: at least the goal is a pass."""
    us = {(p["what"], p["world_size"], p["rows"], p["ctas"]): p["us"] for p in points}
    found = []
    for world_size in sorted({p["world_size"] for p in points}):
        where = f"W={world_size}, {JUDGED_ROWS} rows"
        for ctas in CTAS:
            fused, plain, naive = (
                us.get((what, world_size, JUDGED_ROWS, ctas)) for what in ("fused", "plain", "naive")
            )
            if fused and plain:
                more_bytes = moved_bytes("fused", world_size, 1) / moved_bytes("plain", world_size, 1)
                what = f"{where}, {ctas} CTAs: of the bytes/s of our all-reduce without the norm (of its time"
                found.append((f"{what}: {plain / fused:.2f})", more_bytes * plain / fused, PLAIN_GOAL))
            if fused and naive and ctas == NAIVE_CTAS:
                found.append((f"{where}, {ctas} CTAs: times as fast as the naive kernel", naive / fused, NAIVE_GOAL))
    return found


def tables(measured: dict[str, Any]) -> str:
    """Markdown."""
    copy, points = measured["copy_gb_per_s"], measured["points"]
    head = [
        f"hidden {HIDDEN_SIZE}, bf16, two-shot `peer`. Microseconds of a launch, all ranks played by the one GPU, on",
        f"W x CTAs SMs. Cold L2: {COLD_BYTES >> 20} MiB or more go by before a buffer is used again. Brackets: bytes",
        f"that must go through memory once, as a share of what torch's copy moves ({copy:.0f} GB/s).",
    ]
    for world_size in sorted({p["world_size"] for p in points}, reverse=True):
        head += ["", f"### W = {world_size}", "", *table_of([p for p in points if p["world_size"] == world_size], copy)]
    return "\n".join(head)


def table_of(points: list[dict[str, Any]], copy: float) -> list[str]:
    rows = sorted({p["rows"] for p in points})
    lines = ["| | CTAs | " + " | ".join(f"{r} rows" for r in rows) + " |", "|---|---|" + "---|" * len(rows)]
    for what, ctas in dict.fromkeys((p["what"], p["ctas"]) for p in points):
        cells = {
            p["rows"]: f"{p['us']:.1f} ({100 * p['gb_per_s'] / copy:.0f} %)"
            for p in points
            if (p["what"], p["ctas"]) == (what, ctas)
        }
        lines.append(f"| {what} | {ctas or 'all'} | " + " | ".join(cells.get(r, "") for r in rows) + " |")
    return lines
