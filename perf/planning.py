"""The plan against exhaustive search under the same model, and what a plan costs. Needs no GPU.

Random batches of the published models that fit: one prompt, prompts, a chunk after a context, decode rows, mixtures; 2
to 65536 rows; 2, 4 and 8 ranks of five GPUs. Exhaustive search takes every pair of SM counts at every tile's edge from
either end of the batch, at 256 even parts of it, and at every row of a batch of up to 1024. Off the best: the time of
what `decide` takes over the least of all ways, unsplit ones included. CPU time: of a plan for a batch that the planner
has not seen, of one like an earlier one, and of one too small to split; this thread's, so that other work on the
machine counts less.

Usage: python -m perf.planning [--batches 1000] [--seed 0] [--write]; --write puts the table into
perf/results/planning.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import UNSPLIT, decide
from tokenweave.cost.hardware import KNOWN, find_hardware
from tokenweave.cost.planner import Planner
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.sizing import shares
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk

REPORT = Path(__file__).parent / "results" / "planning.md"
GPUS = [known.name for known in KNOWN if known.tiles]
WORLD_SIZES = (2, 4, 8)
MOST_ROWS = 65536
EDGE, PARTS, FEW = 64, 256, 1024
AT_ONCE = 256  # cuts of one evaluation
GOAL = 0.01
TIMED = {"Llama-3.3-70B": 8, "Qwen3-32B": 4, "Gemma-2-27B": 8, "OLMo-2-13B": 4, "Mixtral-8x7B": 4}  # W by model
STEP_ROWS = 8192  # of a timed planner's largest step
FRESH, AGAIN = 400, 200


@dataclass(frozen=True)
class Span:
    """What a planner sees of a sequence in a batch."""

    tokens: int
    context: int
    wanted: int = 1

    def __len__(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Case:
    """One batch: how far what was taken is from the best (a share of its time), whether the best is split, and how many
    choices each search looked at."""

    model: str
    gpu: str
    world_size: int
    kind: str
    rows: int
    excess: float
    splits: bool
    looked: int
    exhaustive: int


# -- batches -----------------------------------------------------------------------------------------------------------


def prompt(random: Random, rows: int) -> list[Chunk]:
    return [Chunk(rows)]


def chunk(random: Random, rows: int) -> list[Chunk]:
    return [Chunk(rows, random.randint(1, 60000), random.randint(0, 1))]


def prompts(random: Random, rows: int) -> list[Chunk]:
    ends = sorted({*(random.randint(1, rows) for _ in range(random.randint(1, 7))), rows})
    return [
        Chunk(stop - start, random.choice((0, 0, random.randint(0, 5000)))) for start, stop in zip([0, *ends], ends)
    ]


def decode(random: Random, rows: int) -> list[Chunk]:
    return [Chunk(1, random.randint(10, 8000)) for _ in range(min(rows, 512))]


def mixture(random: Random, rows: int) -> list[Chunk]:
    return [*decode(random, random.randint(1, 256)), *prompts(random, rows)]


KINDS: dict[str, Callable[[Random, int], list[Chunk]]] = {
    "one prompt": prompt,
    "a chunk after a context": chunk,
    "prompts": prompts,
    "decode rows": decode,
    "decode rows and prompts": mixture,
}


def some_rows(random: Random, most: int) -> int:
    """As likely from 2 to 4 as from 32768 to 65536; half of them a power of two or three halves of one."""
    rows = int(2 ** random.uniform(1, np.log2(most)))
    power = 2 ** (rows.bit_length() - 1)
    return min(most, random.choice((rows, power, power * 3 // 2)))


@functools.cache
def cost_of(model: str, gpu: str, world_size: int) -> Cost:
    return Cost(PUBLISHED[model], find_hardware(gpu), world_size, graph=False)


# -- how near ----------------------------------------------------------------------------------------------------------


def compare(random: Random) -> Case | None:
    """One random batch; None where the model's heads cannot be shared."""
    model, gpu, world_size = random.choice(list(PUBLISHED)), random.choice(GPUS), random.choice(WORLD_SIZES)
    kind = random.choice(list(KINDS))
    chunks = KINDS[kind](random, some_rows(random, MOST_ROWS))
    if not shares(PUBLISHED[model], world_size):
        return None
    step = Step(cost_of(model, gpu, world_size), Batch(chunks))
    decision = decide(step)
    unsplit_s, (woven_s, looked) = min(map(step.seconds, map(Choice, UNSPLIT))), exhaustive(step)
    best_s = min(unsplit_s, woven_s)
    excess = step.seconds(decision.choice) / best_s - 1.0
    rows = step.batch.rows
    return Case(model, gpu, world_size, kind, rows, excess, woven_s < unsplit_s, decision.candidates, looked)


def exhaustive(step: Step) -> tuple[float, int]:
    """(seconds of the best of all cuts and pairs of SM counts, how many those are)."""
    cuts, counts = every_cut(step.batch.rows), step.cost.hardware.communication_sms
    if step.batch.rows < 2:
        return float("inf"), 0
    parts = [cuts[at : at + AT_ONCE] for at in range(0, len(cuts), AT_ONCE)]
    device_s = min(float(step.woven(part, counts).best_s().min()) for part in parts)
    return step.cost.hardware.step_s + max(device_s, step.cost.host_s(2)), len(cuts) * len(counts) ** 2


def every_cut(rows: int) -> np.ndarray:
    edges = np.arange(EDGE, rows, EDGE)
    even = np.arange(1, PARTS) * rows // PARTS
    few = np.arange(1, rows if rows <= FEW else 1)
    cuts = np.unique(np.concatenate((edges, rows - edges, even, few)))
    return cuts[cuts > 0]


# -- what it costs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cpu:
    """Microseconds of CPU time a plan, by what was planned."""

    model: str
    gpu: str
    fresh_us: Sequence[float]
    seen_us: float
    small_us: float


def time_plans(model: str, gpu: str, seed: int) -> Cpu:
    """Of a planner of its own, on batches of up to STEP_ROWS rows that may be split."""
    random = Random(seed)
    planner = Planner("auto", Cost(PUBLISHED[model], find_hardware(gpu), TIMED[model]), most_rows=STEP_ROWS)
    batches = [batch for batch in some_batches(random) if rows_of(batch) >= (planner.pays_from[False] or STEP_ROWS)]
    fresh = [cpu_us(planner, batch) for batch in batches[:FRESH]]
    seen = statistics.median(cpu_us(planner, batch) for batch in batches[:AGAIN])
    small = [[Span(1, random.randint(1, 4000)) for _ in range(random.randint(1, 8))] for _ in range(AGAIN)]
    return Cpu(model, gpu, fresh, seen, statistics.median(cpu_us(planner, batch) for batch in small))


def some_batches(random: Random) -> Iterator[list[Span]]:
    for _ in range(4 * FRESH):
        chunks = random.choice(list(KINDS.values()))(random, some_rows(random, STEP_ROWS - 256))
        yield [Span(chunk.tokens, chunk.context, chunk.wanted) for chunk in chunks]


def rows_of(batch: Sequence[Span]) -> int:
    return sum(map(len, batch))


def cpu_us(planner: Planner, batch: Sequence[Span]) -> float:
    start_ns = time.thread_time_ns()
    planner.plan(batch)
    return (time.thread_time_ns() - start_ns) * 1e-3


# -- the tables --------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def table(cases: Sequence[Case]) -> str:
    lines = [
        "| batches | of them split | within 1 % | mean off the best | 99 % | worst | choices looked at: median | most "
        "| exhaustive: median |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        row("all", cases),
    ]
    for name, values in (("gpu", GPUS), ("kind", list(KINDS))):
        lines += [row(value, [case for case in cases if getattr(case, name) == value]) for value in values]
    return "\n".join(lines)


def row(name: str, cases: Sequence[Case]) -> str:
    off = [case.excess for case in cases]
    near = sum(excess <= GOAL for excess in off)
    looked = [case.looked for case in cases]
    cells = [name, f"{sum(case.splits for case in cases)} of {len(cases)}", f"{near} of {len(cases)}"]
    cells += [f"{statistics.mean(off):.3%}", f"{quantile(off, 0.99):.2%}", f"{max(off):.2%}"]
    cells += [f"{statistics.median(looked):g}", f"{max(looked)}"]
    cells += [f"{statistics.median(case.exhaustive for case in cases):g}"]
    return "| " + " | ".join(cells) + " |"


def cpu_table(timed: Sequence[Cpu]) -> str:
    lines = [
        "| model, GPUs | a batch not seen: median | 90 % | 99 % | most | like one seen | too small to split |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in timed:
        fresh = one.fresh_us
        us = [statistics.median(fresh), quantile(fresh, 0.9), quantile(fresh, 0.99), max(fresh)]
        cells = [f"{one.model}, {TIMED[one.model]} x {one.gpu}", *(f"{each:.0f} us" for each in us)]
        cells += [f"{one.seen_us:.1f} us", f"{one.small_us:.1f} us"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(cases: Sequence[Case], timed: Sequence[Cpu], options: argparse.Namespace) -> str:
    about = (__doc__ or "").split("\n\nUsage")[0]
    made = f"Made by `python -m perf.planning --batches {options.batches} --seed {options.seed} --write`."
    worst = sorted(cases, key=lambda case: -case.excess)[:3]
    listed = "\n".join(
        f"- {case.excess:.2%}: {case.model}, {case.world_size} x {case.gpu}, {case.kind}, {case.rows} rows"
        for case in worst
    )
    parts = [
        "# Planning: how near to the best, and what it costs",
        about,
        made,
        table(cases),
        f"The worst:\n\n{listed}",
    ]
    return "\n\n".join([*parts, "CPU time of one plan, in one thread:", cpu_table(timed)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write the report to perf/results/{REPORT.name}")
    options = parser.parse_args()
    random = Random(options.seed)
    found = (compare(random) for _ in range(2 * options.batches))
    cases = [case for case in found if case is not None][: options.batches]
    timed = [time_plans(model, gpu, options.seed) for model in TIMED for gpu in ("h100-sxm", "l40s")]
    text = report(cases, timed, options)
    print(text)
    if options.write:
        REPORT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
