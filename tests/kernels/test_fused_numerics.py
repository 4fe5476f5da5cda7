"""The fused kernel as threads, in all its variants, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.scenarios import GEMMA, NORM, Run, problem, scenario
from tests.kernels.twin import Scenario, compile_twin, in_background, run_twin, twin_folder, wrong
from tests.pairwise import pairwise
from tokenweave.kernels.fused import Geometry, Variant, divisors, geometry

FLAGS: dict[str, dict[str, bool]] = {
    "sum": {"keep": False},
    "norm": {"norm": True, "bias": True},
    "residual": NORM,
    "post_norm": {"post_norm": True, "norm": True, "keep": False},
    "gemma": GEMMA,
    "last": {**NORM, "listed": True, "keep": False},
    "listed": {"residual": True, "listed": True, "bias": True, "post_norm": True},
}
AXES = {
    "hidden_size": (2048, 64, 104, 264, 520),  # 8 to 512 vectors: fewer than threads, with tails, many for each thread
    "sum": ("two_shot", "one_shot", "multimem"),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "world_size": (4, 2, 3, 8, 1),
    "layout": ((32, 2), (64, 1), (96, 1)),
    "ahead": ("some", "one", "all"),  # of a thread's vectors, in flight
    "rows": ("many", "ragged", "few", "one"),
    "flags": tuple(FLAGS),
}
CASES = pairwise(AXES, lambda case: True)
BLOCKS = [[2], [1], [3]]  # of repeated launches on one signal pad
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# As the real kernel is laid out.
REAL = {
    "two_shot-5-ranks": (Variant(BF16, 4096, 5, "two_shot", **NORM), 23),
    "one_shot-6-ranks": (Variant(BF16, 5120, 6, "one_shot", **NORM), 5),
    "multimem-7-ranks": (Variant(BF16, 8192, 7, "multimem", **GEMMA), 16),
    "widest": (Variant(F32, 16384, 2, "two_shot", **NORM), 3),
    "narrowest": (Variant(F16, 64, 4, "multimem", **NORM), 100),
}


def scenario_of(case: dict[str, Any]) -> Scenario:
    ranks = case["world_size"]
    rows = {"one": 1, "few": max(1, ranks - 1), "ragged": 2 * ranks + 1, "many": 7 * ranks + 3}[case["rows"]]
    variant = Variant(case["dtype"], case["hidden_size"], ranks, case["sum"], **FLAGS[case["flags"]])
    layout = Geometry(*case["layout"])
    ahead = divisors(layout.vectors(variant))
    some = {"one": ahead[0], "some": ahead[len(ahead) // 2], "all": ahead[-1]}[case["ahead"]]
    return scenario(variant, replace(layout, ahead=some), rows, BLOCKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def programs(folder: Path) -> Iterator[list[Future[Path]]]:
    """The program of each case."""
    scenarios = [scenario_of(case) for case in CASES]
    with in_background(partial(compile_twin, each.variant, each.layout, folder) for each in scenarios) as futures:
        yield futures


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_rows_are_right_and_bitwise_equal_on_all_ranks(number: int, programs: list[Future[Path]], folder: Path) -> None:
    given = scenario_of(CASES[number])
    outcome = run_twin(programs[number].result(), given, folder)
    assert wrong(given, outcome) is None
    perturb(given)
    assert "is off by" in (wrong(given, outcome) or "nothing is off"), "one percent more or less is not seen"


def perturb(given: Scenario) -> None:
    """Half the values of one row of one rank are one percent larger than what the kernel was given."""
    given.partials = given.partials.double()
    given.partials[-1, -1, -1, given.rows // 2, ::2] *= 1.01


@pytest.mark.parametrize("name", REAL)
def test_the_layout_that_is_launched_is_right(name: str, folder: Path) -> None:
    variant, rows = REAL[name]
    assert problem(Run(lambda: scenario(variant, geometry(variant), rows, [[2], [1]])), folder) is None


@pytest.mark.parametrize("sum_by", ["two_shot", "one_shot"])
def test_two_channels_in_flight_at_once(sum_by: str, folder: Path) -> None:
    variant = Variant(BF16, 136, 3, sum_by, **GEMMA)
    run = Run(lambda: scenario(variant, Geometry(32, 2), 17, [[2], [1], [3], [1]], channels=2))
    assert problem(run, folder) is None


@pytest.mark.parametrize("sum_by", ["two_shot", "one_shot", "multimem"])
def test_a_launch_without_rows_is_a_barrier(sum_by: str, folder: Path) -> None:
    variant = Variant(BF16, 64, 2, sum_by, **NORM)
    assert problem(Run(lambda: scenario(variant, Geometry(32, 1), 0, [[2], [1]])), folder) is None


def test_a_hundred_launches_on_one_signal_pad(folder: Path) -> None:
    variant = Variant(F32, 64, 2, "two_shot")
    blocks = [[1 + number % 3] for number in range(100)]
    assert problem(Run(lambda: scenario(variant, Geometry(32, 1), 5, blocks)), folder) is None
