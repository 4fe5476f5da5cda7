"""What the fused kernel should reach, computed from its cubin. Predictions, not measurements; needs no GPU.

Usage: python -m perf.kernel_throughput [--arch sm_90a] [--reference FOLDER] [--output FOLDER] [--json]; the reference
FOLDER holds TokenWeave's published CSV files, from which the latency under load, the practical rate of the links and
the time of launch and barriers are derived. Without it there are no predicted times, only resources.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from tokenweave.kernels import fused, jit
from tokenweave.kernels.compiler import nvrtc_version
from tokenweave.kernels.fused import Geometry, Variant
from tokenweave.kernels.inspect_cubin import Instruction, instructions, resources, row_loop

REPORT = "kernel-throughput.md"
ARCHS = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
HIDDEN_SIZE = 8192
WAYS = (("multimem", 8), ("two_shot", 2), ("two_shot", 4), ("two_shot", 8))
ROWS = (256, 1024, 8192, 32768)
CTAS = (2, 4, 8, 16)
TARGETS_US = {(8192, 4): 530.0, (8192, 2): 800.0, (256, None): 24.0}  # by (rows, CTAs); None: the best count

LINK_BYTES_PER_S = 450e9  # NVLink 4, one direction
CLOCK_HZ = 1.7e9
SCHEDULERS = 4  # of an SM, each issues one instruction a clock
NEAR_WAIT_CLOCKS = 33  # assumed: one wait for shared memory, L1 or a shuffle
SM_REGISTERS, SM_SHARED_BYTES = 65536, 228 << 10
FIGURE_ROW_BYTES = 8192 * 2  # of the published figures
FIGURE_WORLD_SIZE = 8


@dataclass(frozen=True)
class Kernel:
    """One variant as compiled. Clocks are those of one round, in which each group of threads does one row."""

    sum: str
    world_size: int
    registers: int
    threads: int
    shared_bytes: int
    rows_per_block: int
    blocks_per_sm: int
    bytes_in_flight: int
    instructions: int
    issue_clocks: float
    refill_clocks: float

    @property
    def row_bytes(self) -> int:
        return HIDDEN_SIZE * 2

    @property
    def sources(self) -> int:
        return 1 if self.sum == "multimem" else self.world_size


@dataclass(frozen=True)
class Published:
    """Derived from TokenWeave's figures: 8x H100, rows of 16 KB."""

    fused_us: Mapping[int, Mapping[int, float]]  # by rows and CTAs
    fused_row_us: float  # of one row in one CTA: one row in flight, two block-wide syncs
    plain_row_us: float  # the same without norm, residual and syncs
    link_row_us: float  # of one row at the best rate seen
    fixed_us: float  # launch, barriers and the events around them


@dataclass(frozen=True)
class Prediction:
    rows: int
    ctas: int
    floor_us: float
    link_us: float
    issue_us: float
    flight_us: float
    fast_flight_us: float
    slow_us: float
    fast_us: float
    tokenweave_us: float | None


# -- from the machine code --------------------------------------------------------------------------------------------


def compile_kernel(sum_: str, world_size: int, arch: str) -> Kernel:
    variant = Variant(torch.bfloat16, HIDDEN_SIZE, world_size, sum_, residual=True, norm=True)
    layout = fused.geometry(variant, fused.shared_bytes_of(ARCHS[arch]))
    cubin = jit.cubin(fused.source(variant, layout), arch, fused.headers())
    code, used = instructions(cubin), resources(cubin)
    loop = row_loop(code)
    before = [each for each in code if each.address < loop[0].address]
    shared = layout.shared_bytes(variant)
    return Kernel(
        sum_,
        world_size,
        used.registers,
        layout.threads,
        shared,
        layout.rows_per_block,
        blocks_per_sm(used.registers, layout.threads, shared),
        bytes_in_flight(before, variant, layout),
        len(loop),
        issue_clocks(loop, layout.threads // 32),
        refill_clocks(loop, layout.threads // 32),
    )


def bytes_in_flight(before: Sequence[Instruction], variant: Variant, layout: Geometry) -> int:
    """Counted: the loads of partials that precede the row loop. Raises RuntimeError if the layout has another count."""
    wanted = "LDGMC" if variant.sum == "multimem" else "LDGSTS"
    loads = sum(each.opcode.startswith(wanted) for each in before)
    if variant.sum != "multimem":
        loads -= layout.vectors_ahead(variant)  # the residual's
    share = variant.row_vectors / (layout.vectors(variant) * layout.threads_per_row)
    counted = int(16 * layout.threads * loads * share)
    if counted != layout.bytes_in_flight(variant):
        raise RuntimeError(
            f"{counted} bytes in flight in the cubin, {layout.bytes_in_flight(variant)} planned: {variant}"
        )
    return counted


def issue_clocks(loop: Sequence[Instruction], warps: int) -> float:
    """The least for a round: the schedulers' instructions, or one warp's own stalls and near waits if they are more."""
    waits = sum(bool(each.waits_for) for each in loop)
    one_warp = sum(each.stall_clocks for each in loop) + NEAR_WAIT_CLOCKS * waits
    return max(len(loop) * warps / SCHEDULERS, one_warp)


def refill_clocks(loop: Sequence[Instruction], warps: int) -> float:
    """From the moment that the switch's loads are there to the last load of the next row.

    They share a scoreboard, so all of a row's loads are waited for before the next row's first one is issued. Copies of
    peers are waited for one by one: 0.
    """
    last = max((k for k, each in enumerate(loop) if each.opcode.startswith("LDGMC")), default=-1)
    return issue_clocks(loop[: last + 1], warps) if last >= 0 else 0.0


def blocks_per_sm(registers: int, threads: int, shared_bytes: int) -> int:
    by_registers = SM_REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SM_SHARED_BYTES // (shared_bytes + 1024))


# -- from the published figures ---------------------------------------------------------------------------------------


def read_published(folder: Path) -> Published:
    fused_us = read_curves(folder / "tokenweave_figure_10.csv", "fused_arln_us_ctas_")
    plain_us = read_curves(folder / "tokenweave_figure_7.csv", "multimem_ar_us_ctas_")
    link_row_us = min(row_us(plain_us, ctas) for ctas in plain_us[min(plain_us)])
    rows = min(fused_us)
    return Published(
        fused_us,
        2 * FIGURE_WORLD_SIZE * row_us(fused_us, 2),
        2 * FIGURE_WORLD_SIZE * row_us(plain_us, 2),
        link_row_us,
        min(fused_us[rows].values()) - rows * link_row_us,
    )


def read_curves(path: Path, prefix: str) -> dict[int, dict[int, float]]:
    """Microseconds by rows and CTAs."""
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    row_name = next(iter(records[0]))
    return {
        int(each[row_name]): {int(key.removeprefix(prefix)): float(each[key]) for key in each if key.startswith(prefix)}
        for each in records
    }


def row_us(curves: Mapping[int, Mapping[int, float]], ctas: int, first: int = 8192) -> float:
    """What one more row costs: the slope between `first` rows and the most rows."""
    last = max(curves)
    return (curves[last][ctas] - curves[first][ctas]) / (last - first)


# -- the prediction ---------------------------------------------------------------------------------------------------


def link_bytes(kernel: Kernel, rows: int) -> float:
    """What a rank receives, or sends: the larger. The switch: its partials, and its share of the results."""
    world_size, whole = kernel.world_size, rows * kernel.row_bytes
    if kernel.sum == "multimem":
        return whole * (1 + 1 / world_size)
    return whole * 2 * (world_size - 1) / world_size


def floor_us(kernel: Kernel, rows: int) -> float:
    return link_bytes(kernel, rows) / LINK_BYTES_PER_S * 1e6


def flight_us(kernel: Kernel, rows: int, ctas: int, latency_us: float) -> float:
    """Little's law: a CTA has bytes_in_flight under way, and the same again a latency and a refill later."""
    round_us = latency_us + kernel.refill_clocks / CLOCK_HZ * 1e6
    needed = rows / kernel.world_size * kernel.row_bytes * kernel.sources
    return needed / (ctas * kernel.bytes_in_flight) * round_us


def issue_us(kernel: Kernel, rows: int, ctas: int) -> float:
    rounds = rows / kernel.world_size / (ctas * kernel.rows_per_block)
    return rounds * kernel.issue_clocks / CLOCK_HZ * 1e6


def predict(kernel: Kernel, rows: int, ctas: int, known: Published) -> Prediction:
    """The slowest of link, flight and issue, and the fixed part on top."""
    floor, issue = floor_us(kernel, rows), issue_us(kernel, rows, ctas)
    line_rate_row_us = FIGURE_ROW_BYTES * (1 + 1 / FIGURE_WORLD_SIZE) / LINK_BYTES_PER_S * 1e6
    link = floor * known.link_row_us / line_rate_row_us
    slow, fast = (flight_us(kernel, rows, ctas, latency) for latency in (known.fused_row_us, known.plain_row_us))
    published = known.fused_us.get(rows, {}).get(ctas) if kernel.world_size == FIGURE_WORLD_SIZE else None
    return Prediction(
        rows,
        ctas,
        floor,
        link,
        issue,
        slow,
        fast,
        max(link, slow, issue) + known.fixed_us,
        max(link, fast, issue) + known.fixed_us,
        published,
    )


def verdicts(kernel: Kernel, known: Published) -> list[str]:
    """Of each target, whether it is predicted to be met."""
    lines = []
    for (rows, ctas), target_us in TARGETS_US.items():
        found = min(
            (predict(kernel, rows, n, known) for n in ([ctas] if ctas else CTAS)), key=lambda each: each.slow_us
        )
        met = (
            "met"
            if found.slow_us <= target_us
            else "met only at the fast latency"
            if found.fast_us <= target_us
            else "missed"
        )
        lines.append(
            f"{rows} rows, {found.ctas} CTAs: {found.fast_us:.0f} to {found.slow_us:.0f} us predicted, target "
            f"{target_us:.0f} us: **{met}** (at line rate {floor_us(kernel, rows) + known.fixed_us:.0f} us)"
        )
    return lines


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def resource_table(kernels: Sequence[Kernel]) -> str:
    header = ["sum", "W", "registers", "threads", "shared bytes", "blocks per SM", "rows at a time", "KB in flight"]
    header += ["instructions a row", "clocks to issue a round", "of them until the next loads are out"]
    return markdown(
        header,
        [
            (
                *(each.sum, each.world_size, each.registers, each.threads, each.shared_bytes, each.blocks_per_sm),
                *(each.rows_per_block, each.bytes_in_flight >> 10, each.instructions),
                *(round(each.issue_clocks), round(each.refill_clocks)),
            )
            for each in kernels
        ],
    )


def time_table(kernel: Kernel, known: Published) -> str:
    header = ["rows", "CTAs", "floor us", "links us", "issue us", "flight us, fast", "flight us, slow"]
    header += ["predicted us, fast", "predicted us, slow", "TokenWeave us"]
    lines = []
    for each in (predict(kernel, rows, ctas, known) for rows in ROWS for ctas in CTAS):
        parts = (
            each.floor_us,
            each.link_us,
            each.issue_us,
            each.fast_flight_us,
            each.flight_us,
            each.fast_us,
            each.slow_us,
        )
        published = f"{each.tokenweave_us:.1f}" if each.tokenweave_us else "-"
        lines.append((each.rows, each.ctas, *(f"{part:.1f}" for part in parts), published))
    return markdown(header, lines)


NOTES = """
- **Slow** takes {fused_row_us:.2f} us for the latency of a load under load: what one more row costs a CTA of
  TokenWeave's kernel at 2 CTAs (Figure 10, from 8192 to 32768 rows), which has one 16 KB row in flight. An upper bound:
  two block-wide syncs, the residual and the norm are in it. **Fast** takes {plain_row_us:.2f} us, the same slope of the
  plain multimem all-reduce (Figure 7), if it has one row in flight too: 1024 threads, one 16-byte load each.
- Both are multicast loads on a loaded NVSwitch; nothing is published for loads from peers, which are given the same.
- Flight: rows / W x row bytes x sources / (CTAs x bytes in flight) x (latency + refill). Refill: loads through the
  switch can only be waited for all at once, and the next row's last one is issued when this row is summed.
- Floor: tokens x row bytes x (1 + 1/W) through the switch, 2 (W - 1) / W from and to peers, at 450 GB/s. Links: the
  same at the best rate that any published multimem all-reduce reached ({link_share:.0%} of it).
- Launch, barriers and events: {fixed_us:.1f} us, TokenWeave's best time for 64 rows less 64 rows at that rate.
- Issue: SASS instructions of the row loop x warps / 4 a clock, or one warp's stalls and {near} clocks (assumed) for
  each of its waits, if that is more; {clock_ghz} GHz. Loads that miss L1 are not in it.
- Predicted: the slowest of links, issue and flight, and launch and barriers on top.
"""


def notes(known: Published) -> str:
    line_rate_row_us = FIGURE_ROW_BYTES * (1 + 1 / FIGURE_WORLD_SIZE) / LINK_BYTES_PER_S * 1e6
    return NOTES.format(
        fused_row_us=known.fused_row_us,
        plain_row_us=known.plain_row_us,
        link_share=line_rate_row_us / known.link_row_us,
        fixed_us=known.fixed_us,
        near=NEAR_WAIT_CLOCKS,
        clock_ghz=CLOCK_HZ / 1e9,
    )


def report(kernels: Sequence[Kernel], arch: str, known: Published | None) -> str:
    parts = [
        f"# The fused kernel's throughput, predicted for {arch}\n\n**Predictions, not measurements**: from "
        f"the compiled kernels' registers, shared memory and SASS, hidden {HIDDEN_SIZE}, bf16, residual and norm.\n"
        f"Command: `python -m perf.kernel_throughput --arch {arch} --reference FOLDER --output perf/results`; "
        f"NVRTC {'.'.join(map(str, nvrtc_version()))}, torch {torch.__version__}, triton {version('triton')}.\n",
        resource_table(kernels),
    ]
    if known is None:
        return "\n".join([*parts, "Without --reference there is no latency to predict times with.\n"])
    for kernel in kernels:
        targets = [f"- {line}" for line in verdicts(kernel, known)] if kernel.world_size == FIGURE_WORLD_SIZE else []
        parts += [f"## {kernel.sum}, {kernel.world_size} ranks\n", time_table(kernel, known), "\n".join(targets) + "\n"]
    return "\n".join([*parts, "## Where the figures come from", notes(known)])


def as_json(kernels: Sequence[Kernel], known: Published | None) -> str:
    records = []
    for kernel in kernels:
        times = [asdict(predict(kernel, rows, n, known)) for rows in ROWS for n in CTAS] if known else []
        records.append({**asdict(kernel), "predictions": times})
    return json.dumps(records, indent=2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["sm_90a", "sm_100a"], default="sm_90a")
    parser.add_argument("--reference", type=Path, help="the folder with TokenWeave's published CSV files")
    parser.add_argument("--output", type=Path, help=f"a folder: write {REPORT} into it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    options = parser.parse_args(arguments)
    try:
        known = read_published(options.reference) if options.reference else None
    except FileNotFoundError as error:
        parser.error(
            f"--reference {options.reference} has no {Path(error.filename).name}; give the folder that holds it"
        )
    kernels = [compile_kernel(sum_, world_size, options.arch) for sum_, world_size in WAYS]
    page = report(kernels, options.arch, known)
    print(as_json(kernels, known) if options.json else page)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / REPORT).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
