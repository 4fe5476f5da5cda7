"""How a grouped GEMM is cut: the number of tiles, and that half a batch costs no more than about half."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tokenweave.kernels.expert_tiles import TILE_ROWS, WEIGHT_ROWS, gemm_tile, most_tiles, tile_rows

MODELS = {"Mixtral-8x7B": (8, 2), "Qwen3-30B-A3B": (128, 8)}  # experts, top_k
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Work:
    """tiles: that are not empty. useful, computed: rows. touched: experts with any."""

    tiles: int
    useful: int
    computed: int
    touched: int

    @property
    def cost(self) -> int:
        """In rows of arithmetic, as tile_rows weighs them."""
        return self.computed + self.tiles * WEIGHT_ROWS


def counts(tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Rows of each expert, where every token draws top_k different ones at random."""
    random = np.random.default_rng(tokens)
    chosen = random.random((tokens, experts)).argsort(axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts)


def work(tokens: int, experts: int, top_k: int, rows: int | None = None) -> Work:
    rows = rows or tile_rows(tokens * top_k, experts)
    count = counts(tokens, experts, top_k)
    tiles = int((-(-count // rows)).sum())
    assert tiles <= most_tiles(tokens * top_k, experts, rows)
    return Work(tiles, tokens * top_k, tiles * rows, int((count > 0).sum()))


@pytest.mark.parametrize("model", MODELS)
def test_halves_do_not_collapse(model):
    """Two halves compute little more than the whole batch, once its experts have rows enough to fill tiles at all, and
    never look at weights more often than twice as often: half a batch still needs nearly all experts.
    """
    lines = [f"{model}: tokens | whole: rows of a tile, tiles, empty rows | two halves: the same | cost"]
    for tokens in TOKENS:
        whole, half = work(tokens, *MODELS[model]), work(tokens // 2, *MODELS[model])
        cost = 2 * half.cost / whole.cost
        lines.append(f"{tokens:5d} | {line(whole)} | {line(half, 2)} | {cost:.2f}")
        mean = whole.useful / MODELS[model][0]
        assert cost <= 2.05
        assert mean < 128 or cost <= 1.45
        assert mean < 512 or cost <= 1.15
        assert half.tiles <= max(1.1 * whole.tiles, 1.1 * half.touched)
    print("\n".join(lines))


def line(one: Work, times: int = 1) -> str:
    empty = times * (one.computed - one.useful)
    return f"{one.computed // one.tiles:3d} {times * one.tiles:5d} {empty:6d} ({1 - one.useful / one.computed:.0%})"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_no_other_size_is_much_cheaper(model, tokens):
    """The rule knows the mean alone; with the true counts at hand one could not choose much better."""
    best = min(work(tokens, *MODELS[model], rows).cost for rows in TILE_ROWS)
    assert work(tokens, *MODELS[model]).cost <= 1.2 * best


def test_one_size_for_all_would_collapse():
    """What the rule is for: with large tiles everywhere, few tokens cost many times what they have to."""
    assert work(64, 128, 8, 128).computed > 6 * work(64, 128, 8).computed


@pytest.mark.parametrize(("assignments", "experts", "rows"), [(1, 8, 16), (16, 8, 16), (128, 8, 16), (1000, 128, 64)])
def test_most_tiles_are_reached_and_not_passed(assignments, experts, rows):
    """One row in each expert, and the rest in one."""
    used = min(assignments, experts)
    most = (used - 1) + -(-(assignments - used + 1) // rows)
    assert most_tiles(assignments, experts, rows) in (most, most + 1)
    random = np.random.default_rng(0)
    for _ in range(50):
        count = random.multinomial(assignments, random.dirichlet(np.full(experts, 0.3)))
        assert (-(-count // rows)).sum() <= most_tiles(assignments, experts, rows)


@pytest.mark.parametrize("rows", TILE_ROWS)
@pytest.mark.parametrize("gated", [True, False])
def test_tiles_fit_tensor_cores(rows, gated):
    tile = gemm_tile(rows, gated, 2)
    assert tile.rows == rows
    assert tile.columns % 16 == 0
    assert tile.depth % 16 == 0
