"""What a step does is decided by a pure function."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.weave.plan import Plan, StepTimes, plan_step

MODES = ("off", "fused", "weave")
FORMS = {"off": "reference", "fused": "sharded", "weave": "sharded"}
SECONDS = st.floats(1e-6, 10)
ROWS = st.integers(1, 5000)


@st.composite
def step_times(draw):
    counts = draw(st.lists(ROWS, min_size=1, max_size=5, unique=True))
    return StepTimes({mode: {rows: draw(SECONDS) for rows in counts} for mode in MODES})


def mode_of(plan: Plan) -> str:
    if plan.cut is not None:
        return "weave"
    return "off" if plan.form == "reference" else "fused"


# -- obeyed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 2048])
def test_what_was_asked_for_is_done(mode, rows):
    plan = plan_step(mode, rows, None)
    assert plan.form == FORMS[mode]
    assert (plan.cut is not None) == (mode == "weave" and rows >= 2)
    assert plan.reason == f"overlap={mode}"


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [(0, [(0, 0)]), (1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (3, [(0, 2), (2, 3)]), (700, [(0, 350), (350, 700)])],
)
def test_the_halves_of_a_woven_step(rows, bounds):
    assert plan_step("weave", rows, None).bounds == bounds


@given(mode=st.sampled_from([*MODES, "auto"]), rows=st.integers(0, 5000), times=st.none() | step_times())
@settings(deadline=None, derandomize=True)
def test_halves_cover_every_row_once_and_none_is_empty(mode, rows, times):
    bounds = plan_step(mode, rows, times).bounds
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
    assert len(bounds) == 1 or all(stop > start for start, stop in bounds)


# -- auto --------------------------------------------------------------------------------------------------------------


@given(rows=st.integers(0, 5000))
@settings(deadline=None, derandomize=True)
def test_one_rank_has_nothing_to_hide(rows):
    plan = plan_step("auto", rows, None)
    assert mode_of(plan) == "off"
    assert "one rank" in plan.reason


@given(rows=ROWS, times=step_times())
@settings(deadline=None, derandomize=True)
def test_auto_is_never_predicted_slower_than_off(rows, times):
    mode = mode_of(plan_step("auto", rows, times))
    assert times.predict(mode, rows) <= times.predict("off", rows)


@given(rows=ROWS, times=step_times())
@settings(deadline=None, derandomize=True)
def test_auto_takes_what_is_much_faster(rows, times):
    """A gain of more than a few percent is not left lying."""
    predicted = {mode: times.predict(mode, rows) for mode in MODES if mode != "weave" or rows >= 2}
    mode = mode_of(plan_step("auto", rows, times))
    assert predicted[mode] * 0.9 <= min(predicted.values())


@given(rows=ROWS, times=step_times(), data=st.data())
@settings(deadline=None, derandomize=True)
def test_a_plan_is_a_pure_function(rows, times, data):
    mode = data.draw(st.sampled_from([*MODES, "auto"]))
    copy = pickle.loads(pickle.dumps(times))
    assert plan_step(mode, rows, times) == plan_step(mode, rows, copy) == plan_step(mode, rows, times)
    assert times == copy


@pytest.mark.parametrize(
    ("fused", "weave", "expected"), [(9, 6, "weave"), (6, 9, "fused"), (9.9, 9.8, "off"), (11, 12, "off")]
)
def test_the_least_time_wins_by_a_margin(fused, weave, expected):
    times = StepTimes({"off": {64: 10.0}, "fused": {64: fused}, "weave": {64: weave}})
    assert mode_of(plan_step("auto", 64, times)) == expected


def test_the_reason_names_what_was_predicted():
    times = StepTimes({"off": {1: 0.010}, "fused": {1: 0.008}, "weave": {1: 0.0005}})
    assert plan_step("auto", 8, times).reason == "predicted off 10.00 ms, fused 8.00 ms, weave 0.50 ms"


def test_one_row_cannot_be_woven_whatever_was_measured():
    times = StepTimes({"off": {1: 1.0}, "fused": {1: 2.0}, "weave": {1: 0.5}})
    assert mode_of(plan_step("auto", 1, times)) == "off"


def test_another_choice_for_few_rows_than_for_many():
    times = StepTimes(
        {"off": {1: 1.0, 512: 10.0}, "fused": {1: 2.0, 512: 9.0}, "weave": {1: 3.0, 512: 5.0}},
    )
    assert mode_of(plan_step("auto", 4, times)) == "off"
    assert mode_of(plan_step("auto", 512, times)) == "weave"
    assert mode_of(plan_step("auto", 2048, times)) == "weave"


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "seconds"), [(0, 1), (1, 1), (16, 4), (72, 7), (128, 10), (240, 16), (1024, 58)])
def test_between_measured_counts_and_beyond_them_time_is_linear(rows, seconds):
    times = StepTimes({"off": {128: 10.0, 1: 1.0, 16: 4.0}})
    assert times.predict("off", rows) == pytest.approx(seconds)


def test_one_measured_count_serves_for_all():
    assert StepTimes({"off": {16: 4.0}}).predict("off", 1000) == 4.0


@given(times=step_times(), rows=ROWS, mode=st.sampled_from(MODES))
@settings(deadline=None, derandomize=True)
def test_noise_never_predicts_less_than_was_ever_measured(times, rows, mode):
    """A smaller time at more rows is noise, and must not be carried on until nothing or less is left."""
    assert times.predict(mode, rows) >= min(times.seconds[mode].values()) * (1 - 1e-9)
