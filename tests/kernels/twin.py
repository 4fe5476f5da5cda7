"""The fused kernel as threads of a C++ program (csrc/.../host_twin.h), and fp64 torch to hold it against."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenweave.kernels.fused import Geometry, Report, Variant, headers, shape
from tokenweave.shard import shards

HARNESS = Path(__file__).parents[1] / "csrc" / "twin.cpp"
COMPILER = shutil.which("g++")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers")


def compile_twin(
    variant: Variant, layout: Geometry, folder: Path, *flags: str, source: Path | None = None, shared: bool = False
) -> Path:
    """The program (or shared library) that runs `variant`; compiled once for each folder. flags: g++'s."""
    source = source or headers()
    words = [f"-DTOKENWEAVE_SHAPE={shape(variant, layout)}", *flags, *(["-shared", "-fPIC"] if shared else [])]
    key = hashlib.sha256(" ".join([*words, str(source)]).encode()).hexdigest()[:16]
    program = folder / f"twin-{key}"
    if not program.exists():
        command = [COMPILER, "-std=c++20", "-O1", "-pthread", "-DTOKENWEAVE_HOST", f"-I{source}", *WARNINGS, *words]
        unfinished = Path(tempfile.mkdtemp(dir=folder)) / "twin"
        done = subprocess.run([*command, HARNESS, "-o", unfinished], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        unfinished.rename(program)
    return program


@dataclass
class Scenario:
    """What one run of the program is given. Tensors are made from `seed`."""

    variant: Variant
    layout: Geometry
    rows: int
    blocks: list[list[int]] = field(default_factory=lambda: [[2]])  # of each launch, on each rank (or one for all)
    channels: int = 1
    listed: tuple[int, ...] | None = None  # rows of a residual of `residual_rows` rows; `rows` is then their number
    residual_rows: int | None = None
    eps: float = 1e-5
    offset: float = 0.0
    post_offset: float = 0.0
    dead_rank: int = -1
    dead_from: int = 0  # the launch at which the dead rank stays away
    absent_ms: int = 0  # how long it is late before
    timeout_ms: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        v, generator = self.variant, torch.Generator().manual_seed(self.seed)
        self.residual_rows = self.residual_rows or self.rows
        self.blocks = [each * v.world_size if len(each) == 1 else each for each in self.blocks]
        self.launches = len(self.blocks)

        def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale + shift).to(v.dtype)

        self.partials = normal(self.channels, self.launches, v.world_size, self.rows, v.hidden_size)
        self.residuals = normal(self.channels, self.residual_rows, v.hidden_size, scale=2.0)
        self.weight, self.post_weight = (normal(v.hidden_size, scale=0.3, shift=1.0) for _ in range(2))
        self.bias = normal(v.hidden_size)
        self.owned = shards(self.residual_rows, v.world_size)  # of the residual that comes in
        self.owners = self.owned
        if self.listed is not None:
            bounds = [sum(row < owned.start for row in self.listed) for owned in self.owned] + [len(self.listed)]
            self.owners = [range(a, b) for a, b in zip(bounds, bounds[1:])]

    def write(self, path: Path) -> None:
        first = [owned.start for owned in self.owners] + [self.rows]
        one_shot = self.variant.sum == "one_shot"
        head = (self.rows, self.residual_rows, self.channels, self.launches)
        words = [*head, self.dead_rank, self.dead_from, self.timeout_ms, self.absent_ms]
        after = [*(b for each in self.blocks for b in each), *first]
        after += [0 if one_shot else owned.start for owned in self.owned]
        after += self.listed if self.listed is not None else range(self.rows)
        floats = [self.eps, self.offset, self.eps, self.post_offset]
        tensors = (self.weight, self.post_weight, self.bias, self.partials, self.residuals)
        with path.open("wb") as file:
            for part in (np.array(words, np.int32), np.array(floats, np.float32), np.array(after, np.int32)):
                file.write(part.tobytes())
            for tensor in tensors:
                file.write(raw(tensor))

    def expected(self) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of every channel and launch, [channels, launches, rows, hidden] fp64, in plain torch."""
        v = self.variant
        hiddens, residuals = [], []
        for channel in range(self.channels):
            residual = self.residuals[channel].double()
            if self.listed is not None:
                residual = residual[list(self.listed)]
            for launch in range(self.launches):
                total = self.partials[channel, launch].double().sum(0)
                if v.bias:
                    total = total + self.bias.double()
                if v.post_norm:
                    total = normed(total, self.post_weight, self.post_offset, self.eps)
                new = total + residual if v.residual else total
                hiddens.append(normed(new, self.weight, self.offset, self.eps) if v.norm else new)
                residuals.append(new)
                residual = new.to(v.dtype).double()
        size = (self.channels, self.launches, self.rows, v.hidden_size)
        return torch.stack(hiddens).view(size), torch.stack(residuals).view(size)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def normed(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight.double())


@dataclass
class Outcome:
    """hidden[channel][rank][launch]: [rows, hidden]; residual: the same of each rank's shard; reports[rank]."""

    hidden: list[list[list[Tensor]]]
    residual: list[list[list[Tensor]]]
    reports: list[Report]
    returncode: int
    stderr: str


def run_twin(program: Path, scenario: Scenario, folder: Path, timeout_s: float = 120.0) -> Outcome:
    """Raises subprocess.TimeoutExpired when the ranks hang."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        given, results = Path(place) / "scenario", Path(place) / "results"
        scenario.write(given)
        done = subprocess.run([program, given, results], capture_output=True, text=True, timeout=timeout_s)
        data = results.read_bytes() if results.exists() else b""
    if not data:
        return Outcome([], [], [], done.returncode or 1, done.stderr)
    return parse(scenario, data, done.returncode, done.stderr)


def parse(scenario: Scenario, data: bytes, returncode: int, stderr: str) -> Outcome:
    v, at = scenario.variant, 0
    hidden: list[list[list[Tensor]]] = []
    residual: list[list[list[Tensor]]] = []

    def take(rows: int) -> Tensor:
        nonlocal at
        size = rows * v.hidden_size * v.dtype.itemsize
        part = data[at : at + size]
        at += size
        return torch.frombuffer(bytearray(part), dtype=v.dtype).view(rows, v.hidden_size) if rows else torch.empty(0)

    for _ in range(scenario.channels):
        hidden.append([])
        residual.append([])
        for rank in range(v.world_size):
            launches = int.from_bytes(data[at : at + 4], "little")
            at += 4
            kept = scenario.rows if v.sum == "one_shot" else len(scenario.owners[rank])
            pairs = [(take(scenario.rows), take(kept)) for _ in range(launches)]
            hidden[-1].append([pair[0] for pair in pairs])
            residual[-1].append([pair[1] for pair in pairs])
    size = ctypes.sizeof(Report)
    reports = [Report.from_buffer_copy(data, at + rank * size) for rank in range(v.world_size)]
    return Outcome(hidden, residual, reports, returncode, stderr)


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative: a rounding, and a little


def wrong(scenario: Scenario, outcome: Outcome) -> str | None:
    """What is wrong with the outcome of a run in which no rank was dead, or None."""
    if outcome.returncode:
        return f"exit code {outcome.returncode}: {outcome.stderr[-2000:]}"
    for report in outcome.reports:
        if report.reason:
            return f"rank {report.rank} gave up on rank {report.peer}: reason {report.reason}"
    hidden, residual = scenario.expected()
    for channel in range(scenario.channels):
        for launch in range(scenario.launches):
            for rank in range(scenario.variant.world_size):
                where = f"channel {channel}, launch {launch}, rank {rank}"
                mine = outcome.hidden[channel][rank][launch]
                if not torch.equal(mine.view(torch.uint8), outcome.hidden[channel][0][launch].view(torch.uint8)):
                    return f"{where}: not bitwise what rank 0 holds"
                if (far := distance(mine, hidden[channel, launch], scenario)) is not None:
                    return f"{where}: hidden is off by {far}"
                if scenario.variant.keep and (far := shard_distance(scenario, outcome, residual, channel, launch, rank)):
                    return f"{where}: residual is off by {far}"
    return None


def shard_distance(
    scenario: Scenario, outcome: Outcome, residual: Tensor, channel: int, launch: int, rank: int
) -> float | None:
    owned = range(scenario.rows) if scenario.variant.sum == "one_shot" else scenario.owners[rank]
    if not len(owned):
        return None
    return distance(outcome.residual[channel][rank][launch], residual[channel, launch][list(owned)], scenario)


def distance(value: Tensor, expected: Tensor, scenario: Scenario) -> float | None:
    """The largest error if it is beyond the tolerance. What is added up grows, and with it what one rounding is.

    Where the switch adds, its sum is rounded before the residual is added; so is a total before its post_norm.
    """
    if not value.numel():
        return None
    roundings = 1 + (scenario.variant.sum == "multimem") + scenario.variant.post_norm + scenario.launches
    size = 3.0 * scenario.variant.world_size**0.5 + expected.abs()
    error = (value.double() - expected).abs() / size
    worst = float(error.nan_to_num(nan=torch.inf).max())
    return worst if worst > roundings * TOLERANCE[scenario.variant.dtype] else None

