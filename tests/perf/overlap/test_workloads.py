"""Lengths from stated percentiles, Poisson arrivals, and mixes that are the same for every mode."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.overlap.figures import percentile
from perf.overlap.workloads import (
    CHAT_OUTPUT,
    CHAT_PROMPT,
    MIXES,
    Mix,
    fixed,
    length_at,
    mix_of,
    poisson_arrivals,
)


@pytest.mark.parametrize("stated", [CHAT_PROMPT, CHAT_OUTPUT])
def test_stated_percentiles_come_out(stated):
    for percent, tokens in stated.items():
        assert length_at(stated, percent) == pytest.approx(tokens)
    draw = random.Random(0)
    lengths = [length_at(stated, 100 * draw.random()) for _ in range(20_000)]
    for percent in (25, 50, 75, 90):
        assert percentile(lengths, percent) == pytest.approx(stated[percent], rel=0.1)


@pytest.mark.parametrize(("stated", "published"), [(CHAT_PROMPT, 136), (CHAT_OUTPUT, 472)])
def test_chat_means_are_near_the_published_ones(stated, published):
    assert statistics.mean(length_at(stated, p / 10) for p in range(1001)) == pytest.approx(published, rel=0.05)


@given(st.floats(0, 100), st.floats(0, 100))
def test_lengths_ascend(a, b):
    low, high = sorted((a, b))
    assert length_at(CHAT_PROMPT, low) <= length_at(CHAT_PROMPT, high) * (1 + 1e-12)


@pytest.mark.parametrize(("stated", "percent"), [({50: 1}, 50), ({0: 1, 50: 2}, 10), (CHAT_PROMPT, 101)])
def test_bad_percentiles(stated, percent):
    with pytest.raises(ValueError, match="must"):
        length_at(stated, percent)


def test_poisson_arrivals():
    times = poisson_arrivals(20_000, 4.0, random.Random(0))
    gaps = [b - a for a, b in zip([0.0, *times], times)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)  # exponential: as large as the mean
    assert poisson_arrivals(3, 0, random.Random(0)) == [0.0, 0.0, 0.0]


def test_a_mix_is_the_same_each_time():
    mix = MIXES["chat"]
    assert mix.arrivals() == mix.arrivals() != mix.arrivals(seed=1)
    assert len(mix.arrivals()) == mix.requests
    assert all(one.prompt >= 1 and one.output >= 1 for one in mix.arrivals())


def test_a_mix_of_any_size():
    assert len(mix_of("sharegpt").arrivals()) == 1000
    assert mix_of("sharegpt", 7).arrivals() == mix_of("sharegpt").arrivals()[:7]


def test_a_fixed_mix():
    mix = Mix(3, fixed(256), fixed(32), scale=0.5)
    assert {(one.prompt, one.output, one.at_s) for one in mix.arrivals()} == {(128, 16, 0.0)}
    assert mix.words == "3 requests, all at once; prompt tokens 128 each; output tokens 16 each"
