"""Runs of the fused kernel that between them use all its ways: small enough for a sanitizer, for faults to be planted in.

Each has repeated launches on one signal pad, with a number of blocks that changes, and several rows for each group.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.kernels.twin import Scenario
from tokenweave.kernels.fused import Geometry, Variant

BLOCKS = [[2], [1], [2]]
NORM = {"residual": True, "norm": True}
GEMMA = {"residual": True, "bias": True, "post_norm": True, "norm": True}
BF16, F32 = torch.bfloat16, torch.float32


def scenario(variant: Variant, layout: Geometry, rows: int, blocks: list[list[int]], **words: Any) -> Scenario:
    """Of a listed variant, with a list of some rows; of a post-normed one, with norms as Gemma has them."""
    if variant.listed:
        listed = sorted(random.Random(rows).sample(range(3 * rows), rows))
        words = {"residual_rows": 3 * rows, "listed": tuple(listed), **words}
    offset = 1.0 if variant.post_norm else 0.0
    return Scenario(variant, layout, rows, blocks, offset=offset, post_offset=offset, **words)


def scenario_named(name: str) -> Scenario:
    return {
        "two_shot": lambda: scenario(Variant(BF16, 136, 4, "two_shot", **NORM), Geometry(32, 2), 37, BLOCKS),
        "one_shot": lambda: scenario(Variant(F32, 136, 4, "one_shot", **NORM), Geometry(32, 2), 11, BLOCKS),
        "multimem": lambda: scenario(Variant(BF16, 520, 4, "multimem", **NORM), Geometry(32, 2), 37, BLOCKS),
        # eight vectors for each thread, of which four are in flight, and two warps for a row
        "post_norm": lambda: scenario(Variant(F32, 2040, 4, "two_shot", **GEMMA), Geometry(64, 1), 27, BLOCKS),
        "listed": lambda: scenario(Variant(BF16, 136, 4, "two_shot", listed=True, **NORM), Geometry(64, 1), 19, BLOCKS),
        # ranks that soon give up
        "impatient": lambda: scenario(
            Variant(BF16, 64, 4, "two_shot", **NORM), Geometry(32, 2), 9, [[2]] * 4, timeout_ms=1000
        ),
    }[name]()


NAMES = ("two_shot", "one_shot", "multimem", "post_norm", "listed")
