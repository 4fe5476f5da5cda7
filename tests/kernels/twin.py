"""The fused kernel as threads of a C++ program (csrc/.../host_twin.h), and fp64 torch to hold it against."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenweave.kernels.fused import REASONS, Geometry, Report, Variant, headers, shape
from tokenweave.shard import shards

HARNESS = Path(__file__).parents[1] / "csrc" / "twin.cpp"
COMPILER = shutil.which("g++")
THREAD = ("-g1", "-fsanitize=thread")
ADDRESS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZER_OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers")


def twin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's compiled programs are kept. Skips the test where there is no g++."""
    if COMPILER is None:
        pytest.skip("needs g++ to run the kernel as threads, this machine has none")
    folder = tmp_path_factory.getbasetemp() / "twins"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def prefix(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The command that a program compiled with `flags` is to be started by.

    ThreadSanitizer of old compilers stands no random addresses. Skips the test where a sanitizer does not run at all.
    """
    if not flags:
        return ()
    with tempfile.TemporaryDirectory() as place:
        source, program = Path(place) / "empty.cpp", Path(place) / "empty"
        source.write_text("int main() {}\n")
        errors = failure([COMPILER, *flags, source, "-o", program])
        for words in (("setarch", "-R"), ()) if errors is None else ():
            errors = failure([*words, program])
            if errors is None:
                return words
    pytest.skip(f"a program compiled with {' '.join(flags)} does not run here: {errors}")


def failure(command: Sequence[str | Path]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


@contextmanager
def in_background(jobs: Iterable[Callable[[], Path]]) -> Iterator[list[Future[Path]]]:
    """Compiles two programs at a time, while tests run."""
    pool = ThreadPoolExecutor(2)
    try:
        yield [pool.submit(job) for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)


def compile_twin(
    variant: Variant, layout: Geometry, folder: Path, *flags: str, source: Path | None = None, shared: bool = False
) -> Path:
    """The program (or shared library) that runs `variant`; compiled once for each folder. flags: g++'s."""
    source = source or headers()
    words = [
        f"-DTOKENWEAVE_SHAPE={shape(variant, layout)}",
        *flags,
        *(["-shared", "-fPIC", "-fno-gnu-unique"] if shared else []),
    ]
    key = hashlib.sha256(" ".join([*words, str(source)]).encode()).hexdigest()[:16]
    program = folder / f"twin-{key}"
    if not program.exists():
        command = [COMPILER, "-std=c++17", "-O1", "-pthread", "-DTOKENWEAVE_HOST", f"-I{source}", *WARNINGS, *words]
        unfinished = Path(tempfile.mkdtemp(dir=folder)) / "twin"
        done = subprocess.run([*command, HARNESS, "-o", unfinished], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        unfinished.rename(program)
    return program


@dataclass
class Scenario:
    """What one run of the program is given. Tensors are made from `seed`.

    Every rank writes its partial, launches, uses its hidden rows and overwrites its partial, for each of the launches.
    The residual of a launch is what the launch before has kept, or the same for all where it is listed or not kept.
    """

    variant: Variant
    layout: Geometry
    rows: int
    blocks: list[list[int]] = field(default_factory=lambda: [[2]])  # of each launch, on each rank (or one for all)
    channels: int = 1
    listed: tuple[int, ...] | None = None  # rows of a residual of `residual_rows` rows; `rows` is then their number
    residual_rows: int | None = None
    claimed_rows: tuple[int, ...] | None = None  # what each rank takes for the row count
    eps: float = 0.125  # large enough to be seen
    post_eps: float = 0.5
    offset: float = 0.0
    post_offset: float = 0.0
    dead_rank: int = -1
    dead_from: int = 0  # the launch at which the dead rank stays away
    absent_ms: int = 0  # how long it is late before
    asked_rank: int = -1  # whose host asks its kernels to give up
    asked_ms: int = 0  # so long after the start
    timeout_ms: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        v, generator = self.variant, torch.Generator().manual_seed(self.seed)
        assert v.listed == (self.listed is not None), "a variant that is listed needs a list of rows"
        self.claimed_rows = self.claimed_rows or (self.rows,) * v.world_size
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
            self.owners = [range(a, b) for a, b in itertools.pairwise(bounds)]

    def write(self, path: Path) -> None:
        first = [owned.start for owned in self.owners] + [self.rows]
        one_shot = self.variant.sum == "one_shot"
        head = (self.rows, self.residual_rows, self.channels, self.launches)
        words = [*head, self.dead_rank, self.dead_from, self.timeout_ms, self.absent_ms]
        words += [self.asked_rank, self.asked_ms]
        after = [*(b for each in self.blocks for b in each), *self.claimed_rows, *first]
        after += [0 if one_shot else owned.start for owned in self.owned]
        after += self.listed if self.listed is not None else range(self.rows)
        floats = [self.eps, self.offset, self.post_eps, self.post_offset]
        tensors = (self.weight, self.post_weight, self.bias, self.partials, self.residuals)
        with path.open("wb") as file:
            for part in (np.array(words, np.int32), np.array(floats, np.float32), np.array(after, np.int32)):
                file.write(part.tobytes())
            for tensor in tensors:
                file.write(raw(tensor))

    def expected(self) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of every channel and launch, [channels, launches, rows, hidden] fp64.

        In fp64, but rounded to the dtype wherever the kernel rounds.
        """
        hiddens, residuals = [], []
        for channel in range(self.channels):
            residual = self.residuals[channel].double()
            if self.listed is not None:
                residual = residual[list(self.listed)]
            for launch in range(self.launches):
                hidden, new = self.fused(self.partials[channel, launch].double(), residual)
                hiddens.append(hidden)
                residuals.append(new)
                if self.variant.keep and self.listed is None:
                    residual = new
        size = (self.channels, self.launches, self.rows, self.variant.hidden_size)
        return torch.stack(hiddens).view(size), torch.stack(residuals).view(size)

    def fused(self, partials: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, residual) of one launch, from [ranks, rows, hidden] and [rows, hidden]."""
        v = self.variant
        total = partials.sum(0)
        if v.sum == "multimem":  # the switch rounds its sum
            total = self.rounded(total)
        if v.bias:
            total = total + self.bias.double()
        if v.post_norm:
            total = normed(self.rounded(total), total, self.post_weight, self.post_offset, self.post_eps)
        if v.residual:
            total = total + residual
        kept = self.rounded(total)
        hidden = normed(kept, total, self.weight, self.offset, self.eps) if v.norm else kept
        return self.rounded(hidden), kept

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.variant.dtype).double()


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def normed(x: Tensor, exact: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """RMSNorm of `x`, by the mean square of what `x` was before it was rounded."""
    return x * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * (offset + weight.double())


@dataclass
class Outcome:
    """hidden[channel][rank][launch]: [rows, hidden]; residual: the same of each rank's shard; reports[rank]."""

    hidden: list[list[list[Tensor]]]
    residual: list[list[list[Tensor]]]
    reports: list[Report]
    returncode: int
    stderr: str


def run_twin(
    program: Path, scenario: Scenario, folder: Path, prefix: tuple[str, ...] = (), timeout_s: float = 120.0
) -> Outcome:
    """Raises subprocess.TimeoutExpired when the ranks hang."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        given, results = Path(place) / "scenario", Path(place) / "results"
        scenario.write(given)
        command, environment = [*prefix, program, given, results], {**os.environ, **SANITIZER_OPTIONS}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
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


# Of a row, in roundings of the dtype, as the root mean square of its errors. Where a half type is rounded as it should
# be, nearly all values are exactly what fp64 says; one value of a hundred lay halfway, and is off by one rounding.
TOLERANCE = {torch.float32: 4.0, torch.bfloat16: 0.12, torch.float16: 0.12}


def wrong(scenario: Scenario, outcome: Outcome) -> str | None:
    """What is wrong with the outcome of a run in which no rank was dead, or None."""
    if outcome.returncode:
        return f"exit code {outcome.returncode}: {outcome.stderr[-6000:]}"
    for report in outcome.reports:
        if report.reason:
            return f"rank {report.rank} gave up on rank {report.peer}: {REASONS[report.reason]}"
    return wrong_numbers(scenario, outcome, scenario.launches)


def wrong_numbers(scenario: Scenario, outcome: Outcome, launches: int) -> str | None:
    """What is wrong with the numbers of the first launches, or None."""
    hidden, residual = scenario.expected()
    for channel in range(scenario.channels):
        for launch in range(launches):
            for rank in range(scenario.variant.world_size):
                where = f"channel {channel}, launch {launch}, rank {rank}"
                mine = outcome.hidden[channel][rank][launch]
                if not torch.equal(mine.view(torch.uint8), outcome.hidden[channel][0][launch].view(torch.uint8)):
                    return f"{where}: not bitwise what rank 0 holds"
                if (far := distance(mine, hidden[channel, launch], scenario)) is not None:
                    return f"{where}: hidden is off by {far:.3g} roundings"
                if scenario.variant.keep and (
                    far := shard_distance(scenario, outcome, residual, channel, launch, rank)
                ):
                    return f"{where}: residual is off by {far:.3g} roundings"
    return None


def shard_distance(
    scenario: Scenario, outcome: Outcome, residual: Tensor, channel: int, launch: int, rank: int
) -> float | None:
    owned = range(scenario.rows) if scenario.variant.sum == "one_shot" else scenario.owners[rank]
    return distance(outcome.residual[channel][rank][launch], residual[channel, launch][list(owned)], scenario)


def distance(value: Tensor, expected: Tensor, scenario: Scenario) -> float | None:
    """The error of the worst row, in roundings, if it is beyond the tolerance."""
    if not value.numel():
        return None
    worst = float(row_errors(value, expected).max())
    return None if worst <= TOLERANCE[value.dtype] else worst


def row_errors(value: Tensor, expected: Tensor) -> Tensor:
    """[rows]: root mean square of the errors, in spacings of the dtype at the value, or at the row's size if larger."""
    row = expected.square().mean(-1, keepdim=True).sqrt()
    spacing = torch.finfo(value.dtype).eps * torch.exp2(torch.maximum(expected.abs(), row).log2().floor())
    errors = ((value.double() - expected) / spacing).square().mean(-1).sqrt()
    return errors.nan_to_num(nan=torch.inf)
