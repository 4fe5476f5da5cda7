"""The fused kernel as threads, in all its variants, against fp64."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.twin import Scenario, compile_twin, problem, run_twin, twin_folder, wrong
from tests.pairwise import pairwise
from tokenweave.kernels.fused import Geometry, Variant, geometry

FLAGS = {
    "sum": {"keep": False},
    "norm": {"norm": True},
    "residual": {"residual": True, "norm": True},
    "post_norm": {"post_norm": True, "norm": True, "bias": True, "keep": False},
    "gemma": {"post_norm": True, "residual": True, "norm": True},
    "last": {"residual": True, "listed": True, "norm": True, "keep": False},
    "gemma-last": {"residual": True, "listed": True, "bias": True, "post_norm": True},
    "no-norm": {"residual": True, "bias": True, "post_norm": False},
}
AXES = {
    "world_size": range(1, 9),
    "hidden_size": (64, 104, 264, 520, 2048),  # rows of 8 to 512 vectors: fewer than threads, with tails, many for each
    "sum": ("two_shot", "one_shot", "multimem"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "layout": ((32, 2), (64, 2), (96, 1)),
    "flags": tuple(FLAGS),
    "rows": ("one", "few", "ragged", "many"),
}
CASES = pairwise(AXES, lambda case: True)
BLOCKS = [[2], [1], [3]]  # of repeated launches on one signal pad


def scenario_of(case: dict[str, Any]) -> Scenario:
    world_size = case["world_size"]
    rows = {"one": 1, "few": max(1, world_size - 1), "ragged": 2 * world_size + 1, "many": 7 * world_size + 3}
    variant = Variant(case["dtype"], case["hidden_size"], world_size, case["sum"], **FLAGS[case["flags"]])
    return scenario(variant, Geometry(*case["layout"]), rows[case["rows"]], BLOCKS)


def scenario(variant: Variant, layout: Geometry, rows: int, blocks: list[list[int]], **words: Any) -> Scenario:
    if variant.listed:
        words |= {"residual_rows": 3 * rows, "listed": tuple(sorted(random.Random(rows).sample(range(3 * rows), rows)))}
    offset = 1.0 if variant.post_norm else 0.0  # as Gemma has it
    return Scenario(variant, layout, rows, blocks, offset=offset, post_offset=offset, **words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin_folder(tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_variant_is_right_and_bitwise_equal_on_all_ranks(case: dict[str, Any], folder: Path) -> None:
    given = scenario_of(case)
    outcome = run_twin(compile_twin(given.variant, given.layout, folder), given, folder)
    assert wrong(given, outcome) is None
    perturb(given)
    assert "is off by" in (wrong(given, outcome) or "nothing is off")
def perturb(given: Scenario) -> None:
    """Some values of one row of one rank are not what the kernel was given, but for one percent."""
    given.partials = given.partials.double()
    given.partials[-1, -1, -1, given.rows // 2, ::2] *= 1.01
