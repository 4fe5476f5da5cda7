"""Figures 10 and 4 of the paper: what is measured for them, and their CSV files in the published form."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from perf.kernels.ours import SITE, Ours
from perf.kernels.peers import Bench, Peer
from perf.kernels.problem import Problem, drawn
from perf.kernels.timers import Contestant, Time, Timer, measure
from tokenweave.comm.norm import Norm
from tokenweave.cost.collectives import FUSED_SMS
from tokenweave.engine.fetch import Fetch
from tokenweave.kernels.fused import MAX_BLOCKS
from tokenweave.weave.request import Reduce

ROWS = tuple(64 << power for power in range(10))  # 64 to 32768
LINE_BYTES_PER_S = 450e9  # NVLink 4, one GPU, each way
PER_ROW = "num_tokens_per_gpu"  # so the published files call the time with one CTA for each row of a rank
FIGURE_10 = ("num_tokens", "hidden_size", PER_ROW, *(f"fused_arln_us_ctas_{ctas}" for ctas in FUSED_SMS))
FIGURE_4 = (
    "BL",
    "hidden_size",
    "full_rms_norm_us",
    "partial_rms_norm_us",
    "torch_all_reduce_us",
    "multimem_all_reduce_us",
    "fused_arln_us",
    "simple_fusion_arln_us",
    "multimem_rs_us",
    "multimem_ag_us",
)


@dataclass
class Measured:
    """times[rows][contestant]; blocks[rows][contestant]: as launched, since there are never more than rows for them."""

    times: dict[int, dict[str, Time]] = field(default_factory=dict)
    blocks: dict[int, dict[str, int]] = field(default_factory=dict)

    def by_column(self, name: str) -> dict[int, dict[str, float]]:
        """Microseconds of an implementation by rows and column of Figure 10."""
        found = {
            rows: {column: times[key(name, column)].median_us for column in FIGURE_10 if key(name, column) in times}
            for rows, times in self.times.items()
        }
        return {rows: times for rows, times in found.items() if times}

    def by_ctas(self, name: str) -> dict[int, dict[int, float]]:
        """The same by rows and CTAs."""
        return {
            rows: {ctas: times[column_of(ctas)] for ctas in FUSED_SMS if column_of(ctas) in times}
            for rows, times in self.by_column(name).items()
        }


def key(name: str, column: str) -> str:
    """What an implementation is called as a contestant; peers are called by their column alone."""
    return f"{name}: {column}"


def column_of(ctas: int) -> str:
    return f"fused_arln_us_ctas_{ctas}"


@dataclass(frozen=True)
class Sweep:
    """What is measured at each row count. most_sms: of a GPU."""

    ours: Sequence[Ours]
    peers: Sequence[Peer]
    bench: Bench
    timer: Timer
    rounds: int
    most_sms: int

    def measure(self, rows: int, measured: Measured) -> None:
        """Collective: all contestants at one row count, interleaved, into `measured`."""
        measured.blocks[rows] = {}
        contestants = {peer.column: peer.prepare(self.bench, rows) for peer in self.peers}
        for ours in (each for each in self.ours if rows <= each.most_rows):
            for column, ctas in cta_counts(rows, self.bench.ranks.world_size, self.most_sms).items():
                contestants[key(ours.name, column)] = fused(ours, rows, ctas, self.bench.problem)
                measured.blocks[rows][key(ours.name, column)] = ours.kernels.blocks if ours.kernels else 0
        measured.times[rows] = measure(contestants, self.timer, self.rounds, self.bench.ranks)
        ranks = self.bench.ranks
        for ours in self.ours:
            Fetch((), ranks.device, ours.communicator.check, 2 * ranks.timeout_s).wait()


def cta_counts(rows: int, world_size: int, most_sms: int) -> dict[str, int]:
    """CTAs by column of Figure 10."""
    per_row = max(1, min(-(-rows // world_size), most_sms, MAX_BLOCKS))
    return {PER_ROW: per_row, **{column_of(ctas): ctas for ctas in FUSED_SMS if ctas <= most_sms}}


def fused(ours: Ours, rows: int, ctas: int, problem: Problem) -> Contestant:
    """Sum + residual + norm by `ctas` CTAs. The first, which makes the residual, is done here."""
    channel = ours.open(rows, ctas)
    partial_ = channel.partial(rows)
    partial_.copy_(drawn(problem, "partial of a row").mul(0.01).expand(rows, -1))
    request = Reduce(partial_, norm=Norm(drawn(problem, "norm weight"), problem.eps), site=SITE)

    def run() -> None:
        request.submit(channel).wait()

    run()
    run()  # the variant with a residual is now compiled as well, and its blocks are known
    return Contestant(run)


def floor_us(rows: int, hidden_size: int, dtype: torch.dtype, world_size: int) -> float:
    """What the line rate allows: each row crosses a GPU's link once, and a rank's own rows' sums once more."""
    return rows * hidden_size * dtype.itemsize * (1 + 1 / world_size) / LINE_BYTES_PER_S * 1e6


# -- rows of the CSV files --------------------------------------------------------------------------------------------


def figure_10(measured: Measured, name: str, hidden_size: int) -> list[dict[str, float]]:
    return [
        {"num_tokens": rows, "hidden_size": hidden_size} | times for rows, times in measured.by_column(name).items()
    ]


def figure_4(measured: Measured, name: str, hidden_size: int) -> list[dict[str, float]]:
    """With the columns of all peers; `fused_arln_us` is that of the best CTA count."""
    best = {rows: min(times.values()) for rows, times in measured.by_ctas(name).items()}
    return [
        {"BL": rows, "hidden_size": hidden_size, "fused_arln_us": best[rows]}
        | {column: time.median_us for column, time in times.items() if ": " not in column}
        for rows, times in measured.times.items()
    ]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float]], note: str = "") -> None:
    """note: a first line, `# note`, by which cost/ refuses the file as measured curves. What was not measured is
    left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if note:
            file.write(f"# {note}\n")
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, float]]:
    """A published figure: numbers by column. Raises FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"--reference: {path} does not exist; give the folder with the published CSV files")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{column: float(value) for column, value in line.items()} for line in csv.DictReader(file)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"--reference: {path} is not a CSV file of numbers: {error}") from error
