"""Calibrate: measure this machine, and fit a hardware record's figures to it.

The CPU path is tested; the CUDA path runs the same code, with events and a graph where CUDA needs them, and has not
been run yet.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenweave.comm.group import Ranks
from tokenweave.comm.transport import CollectiveTransport, GlooTransport, Transport
from tokenweave.cost.collectives import MEASURED_WORLD_SIZE, all_reduce_s
from tokenweave.cost.hardware import Hardware, as_json, find_hardware, parse_hardware
from tokenweave.cost.machine import calibrated, calibration_path, data_sheet, machine_name
from tokenweave.cost.ops import Attention, Gemm
from tokenweave.cost.store import write_json
from tokenweave.models.layers import linear

POINT_S = 0.25  # of repeats of one point, at most; each is run LEAST times in any case
LEAST, MOST = 3, 50
TOO_LONG_S = 1.0  # larger points than one that takes so long are left out
SIZES = {
    "cpu": {
        "rows": (16, 128, 512, 1024),
        "gemms": ((1024, 512), (1024, 1024), (2816, 1024)),
        "prompts": (128, 512, 1024),
        "heads": (8, 4, 64),
        "copy_bytes": (1 << 26, 1 << 28),  # more than caches hold
        "sum_bytes": (1 << 14, 1 << 17, 1 << 20, 1 << 22),
    },
    "cuda": {
        "rows": (16, 256, 1024, 2048, 4096, 8192),
        "gemms": ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)),
        "prompts": (1024, 4096, 16384),
        "heads": (32, 8, 128),
        "copy_bytes": (1 << 28, 1 << 30),
        "sum_bytes": (1 << 17, 1 << 20, 1 << 23, 1 << 26, 1 << 28),
    },
}
HIDDEN = 1024  # elements of a row of the sums
POOR = 2.0  # a point that the fitted model is off by more than this factor, either way, is a poor fit


@dataclass(frozen=True)
class Point:
    """One measurement. what: "gemm" (rows, n, k) | "attention" (tokens) | "copy" (bytes) | "launch" () | "all_reduce",
    "sharded_sum" (bytes). amount: FLOP, bytes or launches, which make a rate."""

    what: str
    size: tuple[int, ...]
    dtype: str
    seconds: float
    amount: float


@dataclass(frozen=True)
class Calibration:
    """The fitted record, and by point what the model now says of it, seconds."""

    hardware: Hardware
    points: tuple[Point, ...]
    predicted_s: tuple[float | None, ...]
    world_size: int = 1

    @property
    def sum_s(self) -> float:
        """The fixed part of one sum of these ranks: what it takes of no bytes."""
        kind = "nccl" if sum_kind(self.hardware) == "all_reduce" else "sharded"
        return all_reduce_s(kind, 1e-9, self.world_size, self.hardware)

    @property
    def poor(self) -> list[tuple[Point, float]]:
        """(point, predicted over measured) of those that the model is off by more than POOR, the worst first."""
        known = [(p, s / p.seconds) for p, s in zip(self.points, self.predicted_s, strict=True) if s is not None]
        return sorted((one for one in known if off_by(one[1]) > POOR), key=lambda one: -off_by(one[1]))


def off_by(ratio: float) -> float:
    """The factor, either way."""
    return max(ratio, 1.0 / ratio)


def calibrate(ranks: Ranks, report: Callable[[Point], None] = lambda point: None) -> Calibration:
    """Measure, alone and with the other ranks if there are any. Collective: rank 0's figures are the group's."""
    points = []
    for point in measure(ranks):
        points.append(point)
        report(point)
    points = ranks.gather(points)[0]
    hardware = fit(base_record(ranks.device), points, ranks.world_size)
    hardware = replace(hardware, name=machine_name(ranks.device))
    predicted = tuple(predict(hardware, point, ranks.world_size) for point in points)
    return Calibration(hardware, tuple(points), predicted, ranks.world_size)


def store(calibration: Calibration, device: torch.device, path: Path | None = None) -> Path:
    """Write the record where `calibrated` finds it, or to `path`; find_hardware reads it as well."""
    path = path or calibration_path(device)
    values = as_json(calibration.hardware)
    parse_hardware(json.loads(json.dumps(values)))  # nothing is written that could not be read
    write_json(path, values)
    return path


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(ranks: Ranks) -> Iterator[Point]:
    """Every point, one after the other."""
    device = ranks.device
    sizes: dict[str, Any] = SIZES[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    yield from gemms(sizes, dtype, device)
    if device.type == "cpu":
        yield from gemms({"rows": (256,), "gemms": ((1024, 512),)}, torch.bfloat16, device)
    yield from attentions(sizes, dtype, device)
    yield from copies(sizes, device)
    yield from launches(device)
    if ranks.world_size > 1:
        yield from sums(sizes, dtype, ranks)


def gemms(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Iterator[Point]:
    for n, k in sizes["gemms"]:
        weight = torch.randn(n, k, dtype=dtype, device=device)
        for rows in sizes["rows"]:
            x, out = torch.randn(rows, k, dtype=dtype, device=device), weight.new_empty(rows, n)
            seconds = timed(partial(linear, x, weight, out=out), device)
            yield Point("gemm", (rows, n, k), name_of(dtype), seconds, 2.0 * rows * n * k)
            if seconds > TOO_LONG_S:
                break


def attentions(sizes: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Iterator[Point]:
    heads, kv_heads, head_dim = sizes["heads"]
    for tokens in sizes["prompts"]:
        q, k, v = (torch.randn(1, n, tokens, head_dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads))
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        seconds = timed(attend, device)
        yield Point(
            "attention", (tokens, heads, kv_heads, head_dim), name_of(dtype), seconds, pairs(tokens, heads, head_dim)
        )
        if seconds > TOO_LONG_S:
            break


def pairs(tokens: int, heads: int, head_dim: int) -> float:
    """FLOP of causal attention."""
    return 4.0 * heads * head_dim * tokens * (tokens + 1) / 2


def copies(sizes: dict[str, Any], device: torch.device) -> Iterator[Point]:
    for size in sizes["copy_bytes"]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        yield Point("copy", (size,), "uint8", timed(partial(target.copy_, source), device), 2.0 * size)


def launches(device: torch.device, count: int = 200) -> Iterator[Point]:
    """Small dependent operators: what one costs, and on CUDA also what the host needs for it, and one in a graph."""
    x = torch.zeros(16, device=device)

    def run() -> None:
        for _ in range(count):
            x.add_(1.0)

    yield Point("launch", (), "", timed(run, device) / count, 1.0)
    if device.type == "cuda":
        start_s = time.perf_counter()
        run()
        yield Point("host_launch", (), "", (time.perf_counter() - start_s) / count, 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        yield Point("graph_launch", (), "", timed(graph.replay, device) / count, 1.0)


def sums(sizes: dict[str, Any], dtype: torch.dtype, ranks: Ranks) -> Iterator[Point]:
    """Both ways that the runtime sums without a kernel of its own: all-reduce, and reduce-scatter with all-gather."""
    transport: Transport = (GlooTransport if ranks.device.type == "cpu" else CollectiveTransport)(
        ranks.rank, ranks.world_size, ranks.comm
    )
    for size in sizes["sum_bytes"]:
        rows = max(ranks.world_size, size // (HIDDEN * dtype.itemsize))
        addend = torch.zeros(rows, HIDDEN, dtype=dtype, device=ranks.device)
        for what, run in (("all_reduce", plain), ("sharded_sum", sharded)):
            seconds = timed(partial(run, transport, ranks, addend), ranks.device, ranks)
            yield Point(what, (addend.nbytes,), name_of(dtype), seconds, float(addend.nbytes))
    transport.close()


def plain(transport: Transport, ranks: Ranks, addend: Tensor) -> None:
    transport.all_reduce(addend)


def sharded(transport: Transport, ranks: Ranks, addend: Tensor) -> None:
    owners = shares(len(addend), ranks.world_size)
    mine = owners[ranks.rank]
    total = torch.empty(len(mine), addend.shape[1], dtype=torch.float32, device=addend.device)

    def finish(rows: range) -> None:
        addend[mine.start + rows.start : mine.start + rows.stop] = total[rows.start : rows.stop]

    transport.sum_rows(addend, owners, total, finish, addend)


def shares(rows: int, world_size: int) -> list[range]:
    ends = [rows * (rank + 1) // world_size for rank in range(world_size)]
    return [range(start, stop) for start, stop in zip([0, *ends], ends)]


def timed(run: Callable[[], Any], device: torch.device, ranks: Ranks | None = None) -> float:
    """Seconds of one run, after one to warm up: the lower quartile, since other work on the machine only adds. With
    ranks: all run as often as rank 0 says."""
    first_s = once(run, device, ranks)
    first_s = min(first_s, once(run, device, ranks))
    repeats = min(MOST, max(LEAST, int(POINT_S / max(first_s, 1e-7))))
    if ranks is not None:
        repeats = ranks.gather(repeats)[0]
    return sorted(once(run, device, ranks) for _ in range(repeats))[repeats // 4]


def once(run: Callable[[], Any], device: torch.device, ranks: Ranks | None) -> float:
    if ranks is not None:
        ranks.gather(None)  # all start together
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- fitting -----------------------------------------------------------------------------------------------------------


def base_record(device: torch.device) -> Hardware:
    """Where the figures come from that are not measured: an earlier calibration, else the data sheet, else (a GPU that
    nobody knows) the A100's, with this GPU's own counts."""
    known = calibrated(device) or data_sheet(device)
    if device.type == "cpu":
        assert known is not None
        return replace(
            known,
            sms=torch.get_num_threads(),
            memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        )
    properties = torch.cuda.get_device_properties(device)
    base = known or replace(find_hardware("a100"), flops={})
    return replace(
        base,
        sms=properties.multi_processor_count,
        memory_bytes=float(properties.total_memory),
        l2_bytes=float(getattr(properties, "L2_cache_size", base.l2_bytes)),
    )


def fit(base: Hardware, points: Sequence[Point], world_size: int) -> Hardware:
    """The record whose predictions match the points in the median, kind by kind. Pure."""
    hardware = fit_peaks(base, points)
    hardware = fit_memory(hardware, points)
    hardware = fit_shares(hardware, points)
    launch = {point.what: point.seconds for point in points if point.what.endswith("launch")}
    hardware = replace(
        hardware,
        kernel_s=launch.get("launch", hardware.kernel_s),
        host_launch_s=launch.get("host_launch", hardware.host_launch_s),
        graph_kernel_s=launch.get("graph_launch", launch.get("launch", hardware.graph_kernel_s)),
    )
    return fit_link(hardware, points, world_size)


def fit_peaks(hardware: Hardware, points: Sequence[Point]) -> Hardware:
    """A data sheet's peak stays; of a CPU, and where there is none, the best rate that was measured is the peak."""
    best: dict[str, float] = {}
    for point in points:
        if point.what == "gemm":
            best[point.dtype] = max(best.get(point.dtype, 0.0), point.amount / point.seconds)
    if hardware.tiles:
        return replace(hardware, flops={**best, **hardware.flops})
    best.setdefault("float32", hardware.peak("float32"))
    return replace(hardware, flops={"float16": best.get("bfloat16", best["float32"]), **best})


def fit_memory(hardware: Hardware, points: Sequence[Point]) -> Hardware:
    rates = [point.amount / point.seconds for point in points if point.what == "copy"]
    if not rates:
        return hardware
    if hardware.tiles:
        share = rates[-1] / hardware.memory_bandwidth
        return replace(hardware, efficiency=replace(hardware.efficiency, memory=share))
    return replace(hardware, memory_bandwidth=rates[-1], efficiency=replace(hardware.efficiency, memory=1.0))


def fit_shares(hardware: Hardware, points: Sequence[Point]) -> Hardware:
    """What GEMMs and attention reach of the peak, by the points that computing bounds."""
    ideal = replace(hardware, efficiency=replace(hardware.efficiency, gemm=1.0, attention=1.0))
    main = "float32" if not hardware.tiles else "bfloat16"
    found: dict[str, list[float]] = {"gemm": [], "attention": []}
    for point in points:
        if point.what in found and point.dtype == main and computing_bounds(ideal, point):
            predicted_s = predict(ideal, point, 1)
            assert predicted_s is not None
            found[point.what].append(predicted_s / point.seconds)
    medians = {name: statistics.median(ratios) for name, ratios in found.items() if ratios}
    hardware = replace(hardware, efficiency=replace(hardware.efficiency, **medians))
    return hardware if hardware.tiles else fit_other_peaks(hardware, points, main)


def fit_other_peaks(hardware: Hardware, points: Sequence[Point], main: str) -> Hardware:
    """The shares are `main`'s; the peaks of others are such that the same share of them is what was measured."""
    peaks = dict(hardware.flops)
    for dtype in {point.dtype for point in points if point.what == "gemm"} - {main}:
        rates = [point.amount / point.seconds for point in points if (point.what, point.dtype) == ("gemm", dtype)]
        peaks[dtype] = statistics.median(rates) / hardware.efficiency.gemm
    return replace(hardware, flops={**peaks, "float16": peaks.get("bfloat16", peaks[main])})


def computing_bounds(hardware: Hardware, point: Point) -> bool:
    if point.what == "attention":
        return attention_time(hardware, point).memory_s == 0.0
    rows, gemm = point.size[0], gemm_of(hardware, point)
    return bool(gemm.compute_s(rows, hardware.sms) >= gemm.memory_s(rows))


def fit_link(hardware: Hardware, points: Sequence[Point], world_size: int) -> Hardware:
    """A fixed part and a bandwidth, by the kind of sum that the model takes for this machine."""
    what = sum_kind(hardware)
    mine = [point for point in points if point.what == what]
    if world_size == 1 or len(mine) < 2:
        return hardware
    fixed_s, byte_s = fit_line([point.amount for point in mine], [point.seconds for point in mine])
    passes, launches = 2 * (world_size - 1) / world_size, 2 if what == "sharded_sum" else 1
    ring_s = fixed_s / launches * (MEASURED_WORLD_SIZE - 1) / (world_size - 1)
    bandwidth = passes / byte_s
    if hardware.tiles:  # a data sheet's bandwidth stays
        share = bandwidth / hardware.link_bandwidth
        return replace(hardware, ring_s=ring_s, efficiency=replace(hardware.efficiency, ring_link=share))
    efficiency = replace(hardware.efficiency, ring_link=1.0, all_reduce=1.0)
    return replace(hardware, ring_s=ring_s, collective_s=ring_s, link_bandwidth=bandwidth, efficiency=efficiency)


def sum_kind(hardware: Hardware) -> str:
    return "all_reduce" if hardware.tiles else "sharded_sum"


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds at zero, seconds a byte) with the least relative squares; neither below a millionth of what is there."""
    x, y = np.array(amounts), np.array(seconds)
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    least = float((y / x).min())
    return max(float(fixed), 1e-7), max(float(slope), 1e-2 * least)


# -- what the model says -----------------------------------------------------------------------------------------------


def predict(hardware: Hardware, point: Point, world_size: int) -> float | None:
    """Seconds of a point by the model; None for what it has no figure for."""
    if point.what == "gemm":
        rows = point.size[0]
        return float(gemm_of(hardware, point).seconds(rows, hardware.sms))
    if point.what == "attention":
        return float(attention_time(hardware, point).seconds())
    if point.what == "copy":
        return point.amount / (hardware.memory_bandwidth * hardware.efficiency.memory)
    if point.what == sum_kind(hardware) and world_size > 1:
        kind = "nccl" if point.what == "all_reduce" else "sharded"
        return all_reduce_s(kind, point.amount, world_size, hardware)
    return None


def gemm_of(hardware: Hardware, point: Point) -> Gemm:
    rows, n, k = point.size
    gemm = Gemm(n, k, hardware, point.dtype)
    gemm.reach(rows)
    return gemm


def attention_time(hardware: Hardware, point: Point) -> Any:
    tokens, heads, kv_heads, head_dim = point.size
    return Attention(heads, kv_heads, head_dim, None, hardware, point.dtype).chunk(tokens, 0)
