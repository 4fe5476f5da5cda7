"""Percentiles, ideal, hidden share and the other figures: by hand, and by numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.overlap import figures
from perf.overlap.figures import Spread

SECONDS = {
    "off": [10.0, 12.0, 11.0],
    "weave": [7.0, 7.0, 11.0],
    "nocomm": [6.0, 6.0, 6.0],
    "communication alone": [4.0, 7.0, 4.0],
    "off, sleeps only": [8.0, 8.0, 8.0],
    "weave, sleeps only": [6.0, 4.0, 8.0],
}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match="percentile needs"):
        figures.percentile(values, percent)


def test_ideal_is_the_longer_of_the_two_in_each_round():
    assert figures.with_ideal(SECONDS)["ideal"] == [6.0, 7.0, 6.0]
    assert "ideal" not in figures.with_ideal({"off": [1.0], "nocomm": [1.0]})


@pytest.mark.parametrize(
    ("off", "mode", "ideal", "share"),
    [(10.0, 10.0, 6.0, 0.0), (10.0, 6.0, 6.0, 1.0), (10.0, 7.0, 6.0, 0.75), (10.0, 12.0, 6.0, -0.5)],
)
def test_hidden_share(off, mode, ideal, share):
    assert figures.hidden_share(off, mode, ideal) == pytest.approx(share)


def test_hidden_share_of_nothing():
    assert figures.hidden_share(6.0, 5.0, 6.0) is None
    assert figures.hidden({"off": [6.0], "weave": [6.0], "ideal": [6.0]}, "weave") is None
    assert figures.hidden({"off": [6.0], "weave": [6.0]}, "weave") is None


def test_figures_pair_the_rounds():
    seconds = figures.with_ideal(SECONDS)
    assert figures.hidden(seconds, "weave") == Spread(0.8, 0.0, 1.0)
    assert figures.gain(seconds, "weave") == Spread(10 / 7, 1.0, 12 / 7)
    assert figures.exposed(seconds, "weave") == Spread(1.0, 1.0, 5.0)
    assert figures.exposed({"off": [1.0]}, "off") is None


def test_off_is_the_fastest_of_its_baselines():
    measured = {
        "off": [3.0, 3.0, 3.0],
        "off, NCCL": [2.0, 2.0, 9.0],
        "off, multimem": [2.5, 2.5, 2.5],
        "weave": [1.0] * 3,
    }
    found = figures.with_ideal(measured)
    assert figures.fastest_off(measured) == "off, NCCL"
    assert found["off"] == found["off, NCCL"] == [2.0, 2.0, 9.0]
    assert found["off, runtime"] == [3.0, 3.0, 3.0]
    assert figures.gain(found, "weave").median == 2.0
    controls = {"off": [3.0], "off, sleeps only": [1.0]}
    assert figures.with_ideal(controls) == controls


def test_a_control_is_compared_with_off_on_its_own_wire():
    assert figures.gain(SECONDS, "weave, sleeps only") == Spread(8 / 6, 1.0, 2.0)


@pytest.mark.parametrize(
    ("weave", "fine"),
    [([10.0, 12.0, 11.0], True), ([10.5, 11.9, 11.2], True), ([10.1, 12.1, 11.1], False), ([14.0] * 3, False)],
)
def test_never_slower_than_off_by_more_than_the_spread(weave, fine):
    """Round by round, as a machine that changes its speed slows both."""
    assert figures.never_slower({"off": [10.0, 12.0, 11.0], "weave": weave}, "weave") is fine


def test_a_spread_is_written_with_one_format():
    assert f"{Spread(0.5, 0.25, 1.0):.0%}" == "50% (25%-100%)"
