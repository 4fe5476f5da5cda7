"""What GEMMs and the fused kernel cost each other on one GPU: each alone, then both at once on two streams.

The kernel runs as two virtual ranks of k / 2 CTAs, launch after launch, on a stream of high priority: it takes k SMs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perf.gpu_timing import Contestant, sleep
from perf.virtual import VirtualRanks, bounds_of
from tokenweave.comm.symmetric import Layout
from tokenweave.kernels.fused import Variant
from tokenweave.kernels.gemm_sms import leave_free

WORLD_SIZE = 2
HIDDEN_SIZE = 8192
DTYPE = torch.bfloat16
SMS = (2, 4, 8, 16)
TOKENS = (2048, 4096)
ROWS, SLOTS = 1024, 8  # of a launch; slots of rows that launches take in turn, so that the L2 cache holds none
ROUNDS = 3
TIMEOUT_S = 20.0
EPS = 1e-5
GEMMS_S = 2e-3  # of GEMMs, or launches, that are timed together
LAUNCHES = 400  # at most at a time: the GPU's queue of launches has some 1000 places
NEAR = 0.05  # a GEMM's slow-down is near k / SMs if it is not more than this above it
MODELS = {"8B": (4096, 14336, 32, 8, 128, 1), "70B/8": (8192, 28672, 64, 8, 128, 8)}  # ..., head size, ranks
MODES = ("cublas", "cublas, told", "cublaslt, carve-out")  # torch 2.11 heeds its carve-out in cuBLASLt alone


@dataclass(frozen=True)
class Shape:
    """x [tokens, k] @ weight [n, k] transposed."""

    name: str
    tokens: int
    n: int
    k: int


def shapes() -> list[Shape]:
    """Every GEMM of a layer of each model, on one rank of its group."""
    found = []
    for model, (hidden, ffn, heads, kv_heads, head_size, ranks) in MODELS.items():
        sizes = {
            "qkv": ((heads + 2 * kv_heads) * head_size // ranks, hidden),
            "o": (hidden, heads * head_size // ranks),
            "gate_up": (2 * ffn // ranks, hidden),
            "down": (hidden, ffn // ranks),
        }
        found += [Shape(f"{model} {name}", tokens, n, k) for tokens in TOKENS for name, (n, k) in sizes.items()]
    return found


@dataclass(frozen=True)
class Loss:
    """Microseconds of a GEMM and of a launch of the kernel on `sms` SMs: alone, and beside the other.

    None where the other had ended before, so that the time says nothing. gemm_alone_us is cuBLAS's, with all SMs.
    """

    shape: str
    tokens: int
    sms: int
    mode: str
    gemm_alone_us: float
    gemm_us: float | None
    fused_alone_us: float
    fused_us: float | None

    @property
    def gemm_loss(self) -> float | None:
        return None if self.gemm_us is None else self.gemm_us / self.gemm_alone_us - 1

    @property
    def fused_loss(self) -> float | None:
        return None if self.fused_us is None else self.fused_us / self.fused_alone_us - 1


@contextmanager
def gemm_mode(mode: str, sms: int, device: torch.device) -> Iterator[None]:
    """Which library multiplies, and whether it is told to leave `sms` SMs free; "told" is what the runtime can do."""
    before = torch.backends.cuda.preferred_blas_library()
    library, _, told = mode.partition(", ")
    torch.backends.cuda.preferred_blas_library(library)
    try:
        with leave_free(sms if told else 0, device, biases=library == "cublaslt"):
            yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class Gemm:
    def __init__(self, shape: Shape, device: torch.device):
        self.x = torch.randn(shape.tokens, shape.k, dtype=DTYPE, device=device)
        self.weight = torch.randn(shape.n, shape.k, dtype=DTYPE, device=device).T
        self.out = torch.empty(shape.tokens, shape.n, dtype=DTYPE, device=device)

    def __call__(self, i: int) -> None:
        torch.mm(self.x, self.weight, out=self.out)


class Fused:
    """The kernel on `sms` SMs."""

    def __init__(self, ranks: VirtualRanks, weight: torch.Tensor, sms: int):
        self.ranks, self.ctas = ranks, sms // WORLD_SIZE
        self.variant = Variant(DTYPE, HIDDEN_SIZE, WORLD_SIZE, "two_shot", residual=True, norm=True)
        bounds, kept = bounds_of(ROWS, WORLD_SIZE), ROWS // WORLD_SIZE
        self.arguments = [ranks.arguments(0, bounds, slot * ROWS, slot * kept) for slot in range(SLOTS)]
        for launch in self.arguments:
            launch.weight, launch.eps = weight.data_ptr(), EPS

    def __call__(self, i: int) -> None:
        self.ranks.launch(self.variant, self.arguments[i % SLOTS], self.ctas)


@dataclass
class Side:
    """Work on a stream of its own, and its time alone."""

    run: Callable[[int], object]
    stream: torch.cuda.Stream
    alone_us: float = 0.0
    host_us: float = 0.0  # of queueing one

    def measure_alone(self) -> None:
        contestant = Contestant(self.run, launches=8)
        with torch.cuda.stream(self.stream):
            contestant.warm_up()
            self.alone_us = statistics.median(contestant.microseconds() for _ in range(ROUNDS))
        self.host_us = 1e6 * contestant.host_s / contestant.launches

    def count(self, seconds: float) -> int:
        return max(2, min(int(1e6 * seconds / self.alone_us) + 1, LAUNCHES))


def beside_us(timed: Side, other: Side) -> float | None:
    """Microseconds of one of `timed` while `other` runs all the time; None if `other` did not last."""
    few = timed.count(GEMMS_S)
    many = other.count(2.5e-6 * few * timed.alone_us) + 2
    start, end, over = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    gate = torch.cuda.Event()
    sleep(3e-6 * (few * timed.host_us + many * other.host_us))  # cuBLASLt's part is longer than cuBLAS's, measured
    gate.record()
    with torch.cuda.stream(other.stream):
        other.stream.wait_event(gate)
        for i in range(many):
            other.run(i)
        over.record()
    with torch.cuda.stream(timed.stream):
        timed.stream.wait_event(gate)
        torch.cuda._sleep(100_000)  # some 50 us, in which `other` takes its SMs
        start.record()
        for i in range(few):
            timed.run(i)
        end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / few if end.elapsed_time(over) > 0 else None


def median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def measure(device: torch.device, say: Callable[[str], None], found: dict[str, Any]) -> None:
    """Every shape, with the kernel on each number of SMs, in every mode; into `found` as it comes."""
    found |= {"sms": torch.cuda.get_device_properties(device).multi_processor_count, "losses": []}
    ranks = VirtualRanks(WORLD_SIZE, Layout(ROWS * SLOTS, HIDDEN_SIZE, DTYPE), device, TIMEOUT_S, ROWS * SLOTS // 2)
    for values in (*ranks.partial[0], *ranks.residual_in[0]):
        values.normal_()
    weight = torch.ones(HIDDEN_SIZE, dtype=DTYPE, device=device)
    high, low = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
    fused = {sms: Side(Fused(ranks, weight, sms), high) for sms in SMS}
    torch.cuda.synchronize()
    for side in fused.values():
        side.measure_alone()
    for shape in shapes():
        gemm = Side(Gemm(shape, device), low)
        torch.cuda.synchronize()
        gemm.measure_alone()
        losses = [losses_of(shape, gemm, fused[sms], sms, mode) for sms in SMS for mode in MODES]
        say(f"{shape.name}, {shape.tokens} tokens, {gemm.alone_us:.0f} us alone: " + said(losses))
        found["losses"] += [
            asdict(each) | {"gemm_loss": each.gemm_loss, "fused_loss": each.fused_loss} for each in losses
        ]
    reports = [report.reason for report in ranks.reported()]
    assert not any(reports), f"a rank gave up: {reports}"


def losses_of(shape: Shape, gemm: Side, fused: Side, sms: int, mode: str) -> Loss:
    with gemm_mode(mode, sms, gemm.stream.device):
        gemm.run(0)
        torch.cuda.synchronize()
        gemm_us = median_or_none([beside_us(gemm, fused) for _ in range(ROUNDS)])
        fused_us = median_or_none([beside_us(fused, gemm) for _ in range(ROUNDS)])
    return Loss(shape.name, shape.tokens, sms, mode, gemm.alone_us, gemm_us, fused.alone_us, fused_us)


def said(losses: list[Loss]) -> str:
    best = {sms: [loss.gemm_loss for loss in losses if loss.sms == sms] for sms in SMS}
    return ", ".join(f"{sms} SMs " + "/".join(percent(each) for each in found) for sms, found in best.items())


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:+.0f} %"


# -- the report -------------------------------------------------------------------------------------------------------


def medians(measured: dict[str, Any]) -> list[tuple[str, int, float | None, float | None]]:
    """(mode, SMs, GEMM's loss, kernel's loss): medians over all shapes."""
    found = []
    for mode in MODES:
        for sms in SMS:
            of = [loss for loss in measured["losses"] if (loss["mode"], loss["sms"]) == (mode, sms)]
            gemm, fused = (median_or_none([loss[key] for loss in of]) for key in ("gemm_loss", "fused_loss"))
            found.append((mode, sms, gemm, fused))
    return found


def goals(measured: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, value, goal): of the best mode for each number of SMs; at most the goal is a pass."""
    found = []
    for sms in SMS:
        best = [(loss, mode) for mode, k, loss, _ in medians(measured) if k == sms and loss is not None]
        if best:
            loss, mode = min(best)
            share = sms / measured["sms"]
            found.append((f"GEMMs lose to {sms} of {measured['sms']} SMs ({share:.3f}), {mode}", loss, share + NEAR))
    return found


def tables(measured: dict[str, Any]) -> str:
    """Markdown."""
    head = [
        "GEMMs of one layer at 2048 and 4096 tokens, bf16, their operands as warm as L2 keeps them. How much longer a",
        f"GEMM takes beside the kernel on k SMs than by cuBLAS alone on all {measured['sms']}, and a launch of the",
        "kernel beside GEMMs: medians over shapes, then each shape's GEMMs.",
        "",
        "| GEMMs by | k | k / SMs | GEMM | kernel |",
        "|---|---|---|---|---|",
    ]
    for mode, sms, gemm, fused in medians(measured):
        head.append(f"| {mode} | {sms} | {percent(sms / measured['sms'])} | {percent(gemm)} | {percent(fused)} |")
    head += ["", "| GEMM | tokens | alone, us | " + " | ".join(f"{mode}: k = {SMS}" for mode in MODES) + " |"]
    head += ["|---|---|---|" + "---|" * len(MODES)]
    for shape, tokens in dict.fromkeys((loss["shape"], loss["tokens"]) for loss in measured["losses"]):
        of = [loss for loss in measured["losses"] if (loss["shape"], loss["tokens"]) == (shape, tokens)]
        cells = [" ".join(percent(loss["gemm_loss"]) for loss in of if loss["mode"] == mode) for mode in MODES]
        head.append(f"| {shape} | {tokens} | {of[0]['gemm_alone_us']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(head)
