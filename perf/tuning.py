"""How many measurements tuning needs, warm and cold, on machines that the cost model is wrong about.

The truth of a seed is the cost model with its constants (efficiencies, tiles, link, launches, interference) redrawn
within +-30 %, and 1 % of noise on every measurement. Counted is, for every search alike, how many measurements it takes
until the plan that it would answer with is truly within 1 % of the best of all candidates: for the first time, and for
good, that is, until it ends. Warm: `tokenweave tune`'s search, which starts from the model as it stands in the
repository, and may answer with a plan that it believes in and did not measure; and the same with the stored result of
half as many rows, from 16 measurements, which are not counted: they were made to tune those. Cold: candidates at
random, and coordinate search (cut, SMs after attention, SMs after the MLP, in turn, all values of each; from a random
candidate, or from the middle with 8 SMs), which answer with the fastest that they measured. A cold search ends after
256 measurements, or when it has measured all candidates; where one is never near, or not at its end, the ratio takes
256.

Usage: python -m perf.tuning [--seeds 50] [--write]; --write puts the table into perf/results/tuning.md. No GPU needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from transformers import LlamaConfig

from tokenweave.cost.belief import Belief, Case, believe
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.redraw import redraw_cost
from tokenweave.cost.shape import read_shape
from tokenweave.cost.step import Step
from tokenweave.cost.tune import MOST, Search, candidates, run_search
from tokenweave.cost.work import Batch, Chunk

REPORT = Path(__file__).parent / "results" / "tuning.md"
NOISE = 0.01  # relative, of one measurement
NEAR = 0.01  # of the best's time
GOAL = 15  # times fewer measurements, in the median
FIRST_TRUTH = 1000  # seeds of the truths: none that the belief is drawn from
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
STORED = 16  # measurements of half the rows, which a stored result of theirs brings along
COLD_MOST = 256  # measurements of a cold search
WARM = ("warm", "warm, half the rows stored")
COLD = ("random", "coordinate", "coordinate, from the middle")


@dataclass(frozen=True)
class Problem:
    """One step to tune."""

    name: str
    sizes: dict[str, int]
    hardware: str
    world_size: int
    rows: int
    spread: float = 0.3  # of the truth's constants

    def cost(self) -> Cost:
        config = LlamaConfig(num_key_value_heads=8, vocab_size=128256, **self.sizes)  # type: ignore[arg-type]
        return Cost(read_shape(config, "bfloat16"), find_hardware(self.hardware), self.world_size, graph=True)

    def cases(self, cost: Cost, rows: int) -> list[Case]:
        return [(rows, choice) for choice in candidates(rows, cost.hardware, self.world_size)]


PROBLEMS = (
    Problem("Llama-70B, 8x H100, 4096 rows", LLAMA_70B, "h100-sxm", 8, 4096),
    Problem("Llama-8B, 4x H100, 4096 rows", LLAMA_8B, "h100-sxm", 4, 4096),
    Problem("Llama-70B, 8x H100, 1024 rows", LLAMA_70B, "h100-sxm", 8, 1024),
    Problem("Llama-8B, 8x B200, 8192 rows", LLAMA_8B, "b200", 8, 8192),
    Problem("Llama-70B, 8x H100, 4096 rows, constants +-50 %", LLAMA_70B, "h100-sxm", 8, 4096, spread=0.5),
)


class Truth:
    """A machine: the true seconds of every case, and measurements of them, with noise."""

    def __init__(self, cost: Cost, cases: Sequence[Case], spread: float, seed: int):
        drawn = redraw_cost(cost, Random(FIRST_TRUTH + seed), spread)
        steps = {rows: Step(drawn, Batch([Chunk(rows)])) for rows in {rows for rows, _ in cases}}
        self.seconds = {(rows, choice): steps[rows].seconds(choice) for rows, choice in cases}
        self.best_s = {of: min(s for (rows, _), s in self.seconds.items() if rows == of) for of in steps}
        self.random = Random(seed)

    def excess(self, case: Case) -> float:
        """How far off the best of its row count, relative."""
        return self.seconds[case] / self.best_s[case[0]] - 1.0

    def measure(self, case: Case) -> float:
        return self.seconds[case] * math.exp(self.random.gauss(0.0, NOISE))

    def is_near(self, case: Case) -> bool:
        return self.excess(case) <= NEAR


# -- searches: each yields, after every measurement, the case that it would answer with --------------------------------


def warm(truth: Truth, cases: Sequence[Case], belief: Belief, stored: Sequence[Case] = ()) -> Iterator[Case]:
    """stored: the cases of another row count, which was tuned before, in STORED measurements."""
    known: list[tuple[Case, float]] = []
    if stored:
        other = Search(belief, stored, NOISE)
        list(run_search(other, truth.measure, STORED))
        known = other.measured
    search = Search(belief, cases, NOISE, known=known)
    for _ in run_search(search, truth.measure):
        yield search.best()


def at_random(truth: Truth, cases: Sequence[Case], random: Random) -> Iterator[Case]:
    """Every case once, in a random order; the fastest measured so far is the answer."""
    yield from fastest((case, truth.measure(case)) for case in random.sample(list(cases), len(cases)))


def coordinate(truth: Truth, cases: Sequence[Case], random: Random, start: Case | None = None) -> Iterator[Case]:
    """ "off" and "fused" first. Then from `start`, or a random woven case: all cuts with its SM counts, and on to the
    fastest of them; all SM counts after attention there, and on; all after the MLP, and on; round by round, until one
    changes nothing, and then anew from a random case. No case is measured twice. The answer is the fastest measured so
    far."""
    yield from fastest(descend(truth, cases, random, start))


def descend(truth: Truth, cases: Sequence[Case], random: Random, start: Case | None) -> Iterator[tuple[Case, float]]:
    """What `coordinate` measures."""
    measured: dict[Case, float] = {}
    for case in [case for case in cases if case[1].mode != "weave"]:
        measured[case] = truth.measure(case)
        yield case, measured[case]
    woven = [case for case in cases if case[1].mode == "weave"]
    while len(measured) < len(cases):
        at, before = start or random.choice(woven), None
        start = None
        while at != before:
            before = at
            for name in ("cut", "attention_sms", "mlp_sms"):
                line = [case for case in woven if replace_one(at, case, name) == case]
                for case in line:
                    if case not in measured:
                        measured[case] = truth.measure(case)
                        yield case, measured[case]
                at = min(line, key=lambda case: measured[case])


def fastest(measured: Iterable[tuple[Case, float]]) -> Iterator[Case]:
    """After each of (case, seconds), the fastest case so far."""
    best_s = math.inf
    for case, seconds in measured:
        if seconds < best_s:
            best, best_s = case, seconds
        yield best


def replace_one(case: Case, other: Case, name: str) -> Case:
    """`case` with one coordinate of `other`."""
    return case[0], replace(case[1], **{name: getattr(other[1], name)})


def needed(answers: Sequence[Case], truth: Truth) -> tuple[float, float]:
    """(measurements until the answer is near the best, until it is and stays so); infinity where it never is."""
    near = [truth.is_near(case) for case in answers]
    first = near.index(True) + 1 if True in near else math.inf
    if not near[-1]:
        return first, math.inf
    return first, next((count for count in range(len(near), 0, -1) if not near[count - 1]), 0) + 1


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Measurements needed, for the first time and for good, by seed; near: how many cases are near the best, share by
    seed; final: how far off the warm search's answer is once it ends by itself, and how many measurements that took."""

    problem: Problem
    cases: int
    needed: dict[str, list[float]]
    for_good: dict[str, list[float]]
    near: list[float]
    final: list[float]
    measured: list[int]

    def ratios(self, cold: str, warm: str, for_good: bool = False) -> list[float]:
        """cold / warm of the same truth, by seed: at least, where the cold search never comes near; 0 where the warm
        one does not."""
        counts = self.for_good if for_good else self.needed
        return [min(a, COLD_MOST) / b for a, b in zip(counts[cold], counts[warm], strict=True)]


def solve(problem: Problem, seeds: int) -> Outcome:
    cost = problem.cost()
    cases, stored = problem.cases(cost, problem.rows), problem.cases(cost, problem.rows // 2)
    belief = believe(cost, [*cases, *stored], seed=0)
    middle = min(cases, key=lambda case: distance_from_default(case, problem.rows))
    first: dict[str, list[float]] = {name: [] for name in (*WARM, *COLD)}
    outcome = Outcome(problem, len(cases), first, {name: [] for name in first}, [], [], [])
    for seed in range(seeds):
        truth = Truth(cost, [*cases, *stored], problem.spread, seed)
        searches = {
            WARM[0]: warm(truth, cases, belief),
            WARM[1]: warm(truth, cases, belief, stored),
            COLD[0]: at_random(truth, cases, Random(seed)),
            COLD[1]: coordinate(truth, cases, Random(seed)),
            COLD[2]: coordinate(truth, cases, Random(seed), middle),
        }
        for name, search in searches.items():
            truth.random = Random(seed)  # the same noise for each
            answers = list(itertools.islice(search, COLD_MOST))
            for count, counted in zip(needed(answers, truth), (outcome.needed, outcome.for_good), strict=True):
                counted[name].append(count)
            if name == WARM[0]:
                outcome.final.append(truth.excess(answers[-1]))
                outcome.measured.append(len(answers))
        outcome.near.append(sum(map(truth.is_near, cases)) / len(cases))
    return outcome


def distance_from_default(case: Case, rows: int) -> tuple[float, float]:
    choice = case[1]
    if choice.mode != "weave":
        return math.inf, math.inf
    assert choice.cut is not None
    assert choice.attention_sms is not None
    assert choice.mlp_sms is not None
    return abs(choice.cut - rows / 2), abs(choice.attention_sms - 8) + abs(choice.mlp_sms - 8)


def table(outcomes: Sequence[Outcome], for_good: bool = False) -> str:
    lines = [
        "| step | candidates | within 1 % | search | median | 90 % of seeds | never | warm needs fewer by "
        "| with half the rows stored |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        share = f"{statistics.median(outcome.near):.1%}"
        for name in (*WARM, *COLD):
            counts = sorted((outcome.for_good if for_good else outcome.needed)[name])
            tenth = counts[math.ceil(0.9 * len(counts)) - 1]
            fewer = " | ".join(
                "" if name in WARM else f"{fewer_by([outcome], name, warm, for_good):.1f}x" for warm in WARM
            )
            never = sum(map(math.isinf, counts))
            head = f"| {outcome.problem.name} | {outcome.cases} | {share} " if name == WARM[0] else "| | | "
            lines.append(f"{head}| {name} | {statistics.median(counts):g} | {tenth:g} | {never} | {fewer} |")
    return "\n".join(lines)


def overall(outcomes: Sequence[Outcome], for_good: bool = False) -> str:
    """Medians over all steps and seeds together."""
    said = []
    for warm in WARM:
        listed = ", ".join(f"{fewer_by(outcomes, cold, warm, for_good):.1f}x ({cold})" for cold in COLD)
        said.append(f"{warm} needs fewer by {listed}")
    return f"Over all steps and seeds together, in the median: {'; '.join(said)}. The goal is {GOAL}x."


def bound(outcomes: Sequence[Outcome]) -> str:
    """What no search can exceed."""
    medians = (statistics.median(count for outcome in outcomes for count in outcome.needed[cold]) for cold in COLD)
    listed = ", ".join(f"{median:g} ({cold})" for cold, median in zip(COLD, medians, strict=True))
    return (
        f"The cold searches' own medians over all steps and seeds are {listed}: a warm search that were right after "
        "one measurement on every machine would need fewer by so much, and no more."
    )


def fewer_by(outcomes: Sequence[Outcome], cold: str, warm: str, for_good: bool = False) -> float:
    """Median over seeds."""
    return statistics.median(ratio for outcome in outcomes for ratio in outcome.ratios(cold, warm, for_good))


def endings(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| step | measurements until the search ends by itself | its answer off the best: median | worst seed |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        count = f"{statistics.median(outcome.measured):g} (at most {MOST})"
        lines.append(
            f"| {outcome.problem.name} | {count} | {statistics.median(outcome.final):.2%} | {max(outcome.final):.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--write", action="store_true", help=f"write the report to perf/results/{REPORT.name}")
    options = parser.parse_args()
    outcomes = [solve(problem, options.seeds) for problem in PROBLEMS]
    about = (__doc__ or "").split("\n\nUsage")[0]
    made = f"Made by `python -m perf.tuning --seeds {options.seeds} --write`. The last columns are medians over"
    made += " seeds of cold / warm on the same truth."
    parts = ["# Tuning: measurements needed", about, made]
    parts += ["## Near the best for the first time", table(outcomes), overall(outcomes), bound(outcomes)]
    parts += ["## For good", table(outcomes, True), overall(outcomes, True)]
    parts += ["## When the warm search ends", endings(outcomes)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.write:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
