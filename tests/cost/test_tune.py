"""Tuning against synthetic truths: few measurements, deterministic, resumable, bounded."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from perf.tuning import COLD, PROBLEMS, Truth, fewer_by, solve
from tokenweave.cost.belief import (
    CPU_MISFIT,
    EFFECTIVE,
    Belief,
    Posterior,
    believe,
    expected_improvement,
    most_telling,
)
from tokenweave.cost.choice import Choice
from tokenweave.cost.chunk import best_chunk, prompt_s
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.journal import Journal
from tokenweave.cost.redraw import RedrawnCost, redraw_cost
from tokenweave.cost.session import OutOfTimeError, Session, describe, error_of_median, noise_of
from tokenweave.cost.step import Step
from tokenweave.cost.tune import MOST, Search, candidates, cuts, run_search
from tokenweave.cost.tuned import Tuned, TunedStep, make_key
from tokenweave.cost.work import Batch, Chunk

PROBLEM = PROBLEMS[2]
ROWS = (256, 1024)


@functools.cache
def cost(hardware="h100-sxm", world_size=8):
    return replace(PROBLEM, hardware=hardware, world_size=world_size).cost()


def seconds(cost, case):
    return Step(cost, Batch([Chunk(case[0])])).seconds(case[1])


def truth_of(seed, noise=0.0, of=None):
    """measure(case) of a machine that the model is wrong about."""
    drawn, random = redraw_cost(of or cost(), Random(seed)), Random(seed)
    return lambda case: seconds(drawn, case) * math.exp(random.gauss(0.0, noise))


# -- candidates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 100, 257, 1024, 5000, 65536])
@pytest.mark.parametrize("hardware", ["h100-sxm", "cpu"])
def test_candidates_can_be_run_and_hold_the_middle(rows, hardware):
    machine = find_hardware(hardware)
    listed = candidates(rows, machine, 2)
    assert listed[:2] == [Choice("off"), Choice("fused")]
    assert len(set(listed)) == len(listed) <= 2 + 40 * len(machine.communication_sms) ** 2
    assert all(0 < choice.cut < rows for choice in listed[2:])
    assert rows < 2 or (rows + 1) // 2 in cuts(rows, machine)
    assert candidates(rows, machine, 1) == [Choice("off")]


# -- redrawn constants -------------------------------------------------------------------------------------------------


def test_redrawn_machines_differ_within_bounds_and_are_the_same_for_a_seed():
    one, same, other = (redraw_cost(cost(), Random(seed)) for seed in (1, 1, 2))
    assert one.hardware == same.hardware != other.hardware
    base = cost().hardware
    for name in ("gemm", "link", "memory"):
        ratio = getattr(one.hardware.efficiency, name) / getattr(base.efficiency, name)
        assert 0.7 <= ratio <= 1.3
    assert len({tile.efficiency / b.efficiency for tile, b in zip(one.hardware.tiles, base.tiles)}) == len(base.tiles)


def test_interference_slows_what_runs_beside_a_sum_and_nothing_else():
    base = cost()
    crowded = RedrawnCost(base.shape, base.hardware, 8, sms_factor=3.0, taken_factor=1.0, graph=True)
    hungry = RedrawnCost(base.shape, base.hardware, 8, sms_factor=1.0, taken_factor=3.0, graph=True)
    same = RedrawnCost(base.shape, base.hardware, 8, sms_factor=1.0, taken_factor=1.0, graph=True)
    woven, off = (4096, Choice("weave", 2048, 16, 16)), (4096, Choice("off"))
    assert seconds(same, woven) == pytest.approx(seconds(base, woven))
    assert seconds(crowded, woven) > seconds(base, woven)
    assert seconds(hungry, woven) >= seconds(base, woven)
    assert seconds(crowded, off) == seconds(hungry, off) == seconds(base, off)


# -- belief ------------------------------------------------------------------------------------------------------------


def test_without_measurements_the_model_is_believed():
    cases = [(1024, choice) for choice in candidates(1024, cost().hardware, 8)]
    mean, deviation = believe(cost(), cases, seed=0).after([], 0.01)[:2]
    wrong = [mean[i] - math.log(seconds(cost(), case)) for i, case in enumerate(cases)]
    assert max(map(abs, wrong)) < 0.2
    assert deviation.min() > 0.02


def test_one_measurement_moves_what_hangs_on_the_same_constants():
    """A machine slower at one candidate is believed to be slow at all, and most surely at that one."""
    cases = [(rows, choice) for rows in ROWS for choice in candidates(rows, cost().hardware, 8)]
    belief = believe(cost(), cases, seed=0)
    before, wide = belief.after([], 0.01)[:2]
    seen = belief.index[1024, Choice("fused")]
    after, narrow = belief.after([(cases[seen], 1.2 * math.exp(before[seen]))], 0.01)[:2]
    assert after[seen] - before[seen] == pytest.approx(math.log(1.2), abs=0.01)
    assert np.all(after > before)
    assert narrow.mean() < wide.mean()
    assert narrow.argmin() == seen
    some = belief.after([(cases[seen], 1.2 * math.exp(before[seen]))], 0.01, cases[10:20])
    np.testing.assert_allclose((some.mean, some.deviation), (after[10:20], narrow[10:20]))


def test_a_machine_that_no_constants_explain_is_still_followed():
    """Ten times as slow: far from every draw."""
    cases = [(1024, choice) for choice in candidates(1024, cost().hardware, 8)]
    belief = believe(cost(), cases, seed=0)
    before = belief.after([], 0.01).mean
    measured = [(cases[i], 10 * math.exp(before[i])) for i in (0, 1, 2, 60)]
    posterior = belief.after(measured, 0.01)
    assert posterior.mean[[0, 1, 2, 60]] - before[[0, 1, 2, 60]] == pytest.approx(math.log(10), rel=0.05)
    assert np.all(posterior.mean - before > 1.5)
    assert np.all(np.isfinite(posterior.deviation))
    assert posterior.weights.sum() == pytest.approx(1.0)
    assert 1 / (posterior.weights**2).sum() >= EFFECTIVE


def test_draws_that_explain_the_measurements_count():
    cases = [(1024, choice) for choice in candidates(1024, cost().hardware, 8)]
    belief = believe(cost(), cases, seed=0)
    truth = belief.log_s[7]
    posterior = belief.after([(cases[i], math.exp(truth[i])) for i in range(0, len(cases), 20)], 0.01)
    assert posterior.weights.argmax() == 7
    assert np.abs(posterior.mean - truth).max() < 0.1


def test_the_most_telling_case_is_one_whose_time_tells_which_is_best():
    """Either of two is the best, and the time of a third one, slow itself, says which. The others tell nothing."""
    kind = np.array([0.0, 1.0] * 50)
    log_s = np.column_stack([0.1 * kind, 0.1 * (1 - kind), 1 + kind, np.full(100, 0.3)])
    uniform = np.full(100, 0.01)
    assert most_telling(Posterior(log_s.mean(axis=0), log_s.std(axis=0), uniform, log_s), 0.01) in (0, 1, 2)
    noisy = Posterior(log_s.mean(axis=0), log_s.std(axis=0), uniform, log_s)
    assert most_telling(noisy, 0.5) == 2  # through so much noise only the third one tells anything


def test_repeats_of_a_noisy_measurement_are_averaged():
    belief = Belief([(8, Choice("off"))], np.log([[0.5], [2.0]]), CPU_MISFIT)
    case = (8, Choice("off"))
    mean, deviation = belief.after([(case, 1.1), (case, 0.9)] * 20, 0.1)[:2]
    assert math.exp(mean[0]) == pytest.approx(1.0, abs=0.02)
    assert deviation[0] < 0.03


def test_expected_improvement_is_never_negative_and_grows_with_doubt():
    mean = np.array([1.0, 1.0, 2.0, 0.5])
    gains = expected_improvement(mean, np.array([0.1, 0.5, 0.1, 1e-6]), 1.0)
    assert np.all(gains >= 0)
    assert gains[1] > gains[0] > gains[2]
    assert gains[3] == pytest.approx(0.5)


# -- search ------------------------------------------------------------------------------------------------------------


def test_warm_needs_far_fewer_measurements_than_cold():
    outcome = solve(PROBLEM, seeds=8)
    for cold in COLD:
        for counts in (outcome.needed, outcome.for_good):
            assert statistics.median(counts["warm"]) < statistics.median(counts[cold])
    assert fewer_by([outcome], "random", "warm") >= 4
    assert fewer_by([outcome], "random", "warm, half the rows stored") >= 4
    assert max(outcome.final) < 0.05
    assert max(outcome.measured) <= 64


def search_once(seed, noise=0.01):
    cases = PROBLEM.cases(cost(), 1024)
    search = Search(believe(cost(), cases, seed, draws=24), cases, max(noise, 0.01))
    return list(run_search(search, truth_of(7, noise))), search.best()


def test_a_search_is_deterministic_for_a_seed():
    assert search_once(3) == search_once(3)
    assert search_once(3)[0] != search_once(4)[0]


def test_a_search_without_noise_ends_near_the_best():
    cases = PROBLEM.cases(cost(), 1024)
    truth = Truth(cost(), cases, 0.3, seed=5)
    belief = believe(cost(), cases, 0)
    search = Search(belief, cases, 0.01)
    assert sum(1 for _ in run_search(search, lambda case: truth.seconds[case])) <= MOST
    assert truth.excess(search.best()) < 0.02


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_measurement_that_cannot_be(bad):
    cases = [(64, Choice("off")), (64, Choice("fused"))]
    search = Search(believe(cost(), cases, 0, draws=4), cases, 0.01)
    with pytest.raises(ValueError, match="a measurement must be a number of seconds > 0"):
        next(run_search(search, lambda case: bad))


# -- a session ---------------------------------------------------------------------------------------------------------


def session(measure, of=None, rows=ROWS, budget_s=math.inf, clock=lambda: 0.0, **options):
    return Session(of or cost(), rows, measure, clock, budget_s, **options)


@functools.cache
def finished():
    one = session(truth_of(3, noise=0.005))
    return one, *one.run()


def test_a_session_finds_plans_that_are_not_slower_than_any_default():
    one, steps, limits = finished()
    exact = truth_of(3)
    assert [step.rows for step in steps] == list(ROWS)
    for step in steps:
        best = min(exact((step.rows, choice)) for choice in candidates(step.rows, cost().hardware, 8))
        found = exact((step.rows, step.choice))
        assert found <= 1.05 * best
        assert found <= 1.01 * min(exact((step.rows, Choice(mode))) for mode in ("off", "fused"))
        assert step.measured == tuple(m for m in one.measured if m.rows == step.rows)
        assert step.seconds <= step.unsplit_s
    assert limits.chunk_tokens in ROWS


def test_a_threshold_lies_between_what_is_better_unsplit_and_what_is_not():
    """Splitting pays from 700 rows on, whatever the model thinks."""

    def measure(case):
        rows, choice = case
        woven_s = 0.8 if rows >= 700 else 1.3
        return rows * {"off": 1.0, "fused": 0.95}.get(choice.mode, woven_s)

    _, limits = session(measure, rows=(128, 512, 1024, 2048)).run()
    assert 700 <= limits.split_threshold <= 700 + 128
    _, limits = session(lambda case: case[0] * (2.0 if case[1].mode == "weave" else 1.0)).run()
    assert limits.split_threshold is None


def test_a_narrower_session_keeps_what_is_known_of_other_row_counts():
    def measure(case):
        rows, choice = case
        return rows * (1.0 if choice.mode != "weave" else 0.8 if rows >= 700 else 1.3)

    steps, limits = session(measure, rows=(512, 1024)).run()
    stored = Tuned(make_key(cost().shape, 8, "here"), tuple(steps), limits)
    _, after = session(measure, rows=(16,), stored=stored, same_key=True).run()
    assert 700 <= after.split_threshold <= 1024
    assert after.chunk_tokens == limits.chunk_tokens


def test_one_rank_is_never_split():
    steps, limits = session(truth_of(1, of=cost(world_size=1)), of=cost(world_size=1)).run()
    assert {step.choice for step in steps} == {Choice("off")}
    assert limits.split_threshold is None


def test_a_session_is_deterministic():
    one, steps, limits = finished()
    again = session(truth_of(3, noise=0.005))
    assert again.run() == (steps, limits)
    assert again.measured == one.measured


def test_a_session_that_was_killed_goes_on_where_it_stood(tmp_path):
    one, steps, limits = finished()
    measured = [m.seconds for m in one.measured]
    for killed_after in (0, 10, len(measured) - 1):
        path = tmp_path / f"{killed_after}.jsonl"
        journal = Journal(path, {})
        left = iter(measured)

        def dies(case, left=left, count=itertools.count(), limit=killed_after):  # noqa: B008
            if next(count) == limit:
                raise KeyboardInterrupt
            return next(left)

        with pytest.raises(KeyboardInterrupt):
            session(lambda case, j=journal, d=dies: j.measured(*case, lambda: d(case))).run()
        journal.close()
        resumed = Journal(path, {})
        assert resumed.known == killed_after
        rest = iter(measured[killed_after:])
        again = session(lambda case, j=resumed, rest=rest: j.measured(*case, lambda: next(rest)))
        assert again.run() == (steps, limits)
        assert again.measured == one.measured
        assert list(rest) == []
        resumed.close()


@pytest.mark.parametrize("budget_s", [0.5, 10.0, 40.0])
def test_a_budget_is_kept(budget_s):
    """Each measurement takes a second on this clock; those that confirm a plan may come after the end."""
    now = [0.0]

    def measure(case):
        now[0] += 1.0
        return seconds(cost(), case)

    steps, limits = session(measure, budget_s=budget_s, clock=lambda: now[0]).run()
    confirming = 5 * 2 * 4 * len(steps)
    assert now[0] <= budget_s + 1 + confirming
    assert (limits is None) == (not steps)
    if budget_s == 0.5:
        assert steps == []
    if budget_s == 40.0:
        assert [step.rows for step in steps] == list(ROWS)


def test_stored_results_come_first_and_their_measurements_count():
    key = make_key(cost().shape, 8, "h100")
    _, steps, _ = finished()
    stored = Tuned(key, tuple(steps))
    again = session(truth_of(3, noise=0.005), stored=stored, same_key=True)
    again.run()
    assert len(again.measured) < len(finished()[0].measured)
    odd = Choice("weave", 512 + 33, 4, 8)
    other = Tuned(key, (TunedStep(1024, odd, 1.0, "off", 2.0),))
    first = session(truth_of(3), rows=(1024,), stored=other)
    first.run()
    assert odd in [m.choice for m in first.measured][:8]
    unusable = Tuned(key, (TunedStep(1024, Choice("weave", 512, 7, 7), 1.0, "off", 2.0),))
    session(truth_of(3), rows=(1024,), stored=unusable).run()


@pytest.mark.parametrize(("gain", "kept"), [(0.0, True), (0.01, True), (0.15, False)])
def test_an_older_result_stays_unless_a_new_one_is_better_beyond_the_spread(gain, kept):
    """Every measurement is off by up to 5 %."""
    older, newer = Choice("weave", 512, 4, 8), Choice("weave", 512, 4, 4)  # which is tried in any case
    random = Random(0)

    def measure(case):
        share = {older: 0.8, newer: 0.8 * (1.0 - gain)}.get(case[1], 1.0)
        return case[0] * share * random.uniform(0.95, 1.05)

    stored = Tuned(make_key(cost().shape, 8, "here"), (TunedStep(1024, older, 820.0, "off", 1024.0),))
    (step,), _ = session(measure, rows=(1024,), stored=stored, same_key=True).run()
    assert step.choice == (older if kept else newer)
    assert 0.01 < step.spread < 0.06


def test_the_error_of_a_median():
    assert error_of_median([1.0, 1.0, 1.0]) == 0.0
    assert error_of_median([0.9, 1.0, 1.1, 1.0, 1.0]) == pytest.approx(0.04 * math.pi / 2 / math.sqrt(5))


def test_the_noise_of_repeats():
    assert noise_of([1.0, 1.0, 1.0]) == 0.01
    assert noise_of([1.0, 1.1, 0.9]) == pytest.approx(0.1, rel=0.1)
    assert noise_of([1.0, 100.0]) == 0.3


def test_out_of_time_is_no_error_of_the_user():
    assert not issubclass(OutOfTimeError, ValueError)
    assert describe(Choice("weave", 64, 2, 4)) == "weave at 64, 2/4 SMs"


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_the_chunk_is_the_smallest_that_costs_no_more():
    def tuned(rows, per_token_s):
        return TunedStep(rows, Choice("off"), rows * per_token_s, "off", rows * per_token_s)

    cheap = Cost(cost().shape, cost().hardware, 8, graph=True)
    small, large = tuned(512, 1.2e-5), tuned(4096, 1e-5)
    assert best_chunk(cheap, [small, large]) == 4096
    assert best_chunk(cheap, [tuned(512, 0.7e-5), large]) == 512
    assert prompt_s(cheap, large, 4096) == pytest.approx(large.seconds)
    assert prompt_s(cheap, large, 8192) > 2 * large.seconds  # the second chunk attends to the first
