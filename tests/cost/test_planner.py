"""The planner: pure, never worse than unsplit, cheap where nothing can be gained; and measurement before model."""

from __future__ import annotations

import functools
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave import LLM, SamplingParams
from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import decide, measured, predict
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.planner import Planner, expand, plan_of, rounded, summarise, trial, trial_rows
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.search import best_weave
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.engine.batch import Span
from tokenweave.weave.plan import MARGIN, StepTimes, plan_step

MODES = ("off", "fused", "weave")
SECONDS = st.floats(1e-4, 10)
CHUNKS = st.lists(st.tuples(st.integers(1, 700) | st.just(1), st.integers(0, 3000)), min_size=1, max_size=20)
SPANS = CHUNKS.map(lambda pairs: [span(*pair) for pair in pairs])
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)


def span(tokens, context=0, wanted=1):
    return Span((0,) * tokens, context, (), prompt_len=tokens, wanted=wanted)


@functools.cache
def cost(hardware="h100-sxm", world_size=8, model="Llama-3.1-8B"):
    return Cost(PUBLISHED[model], find_hardware(hardware), world_size, graph=True)


@functools.cache
def planner(overlap="auto", hardware="h100-sxm", world_size=8):
    return Planner(overlap, cost(hardware, world_size), most_rows=16384)


@st.composite
def step_times(draw):
    counts = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=5, unique=True))
    return StepTimes({mode: {rows: draw(SECONDS) for rows in counts} for mode in MODES})


# -- plans -------------------------------------------------------------------------------------------------------------


@given(spans=SPANS)
@PROPERTIES
def test_a_plan_fits_its_batch_and_is_never_predicted_slower_than_unsplit(spans):
    plan = planner().plan(spans)
    rows = sum(map(len, spans))
    assert plan.rows == rows
    assert [row for start, stop in plan.bounds for row in range(start, stop)] == list(range(rows))
    assert len(plan.bounds) == 1 or 0 < plan.cut < rows
    step = Step(cost(), Batch(expand(summarise(spans))))
    unsplit_s = min(step.seconds(Choice(mode)) for mode in ("off", "fused"))
    if plan.cut is not None:
        assert step.seconds(Choice("weave", plan.cut, plan.attention_sms, plan.mlp_sms)) <= unsplit_s


@given(spans=SPANS)
@PROPERTIES
def test_a_plan_does_not_depend_on_what_was_planned_before(spans):
    fresh = Planner("auto", cost(), most_rows=16384)
    assert fresh.plan(spans) == planner().plan(spans) == planner().plan(list(spans))


def test_long_batches_are_split_and_short_ones_are_not():
    assert planner().plan([span(4096)]).cut is not None
    assert planner().plan([span(16)]).cut is None
    assert planner().plan([span(1, 500) for _ in range(8)]).cut is None


def test_steps_that_are_captured_are_planned_without_the_host_s_launches():
    """8B on eight H100s waits for the host up to some 4000 tokens, where its kernels are queued one by one."""
    eager = Cost(PUBLISHED["Llama-3.1-8B"], find_hardware("h100-sxm"), 8)
    ours = Planner("auto", eager, most_rows=8192, captured=cost(), captured_tokens=2048)
    alone = Planner("auto", eager, most_rows=8192)
    for spans in ([span(1024)], [span(2048)], [span(1, 500)] * 512):
        assert ours.plan(spans) == planner().plan(spans)
    assert planner().plan([span(1024)]).cut is not None
    assert alone.plan([span(1024)]).cut is None
    assert ours.under("weave").plan([span(1024)]).cut == planner("weave").plan([span(1024)]).cut
    assert ours.plan([span(6000)]) == alone.plan([span(6000)])
    short = Planner("auto", eager, most_rows=8192, captured=cost(), captured_tokens=256)
    assert short.plan([span(1, 500)] * 512) == planner().plan([span(1, 500)] * 512)  # what decodes is captured, anyway
    assert short.plan([span(1024)]).cut is None


def test_a_carve_out_is_of_woven_plans_alone():
    ours = Planner("auto", cost(), most_rows=16384, carve_out=True)
    for spans, woven in (([span(4096)], True), ([span(16)], False), ([span(1, 500)] * 8, False)):
        plan = ours.plan(spans)
        assert (plan.carve_out, plan.cut is not None) == (woven, woven)
        assert plan == replace(planner().plan(spans), carve_out=woven)
    assert ours.under("weave").plan([span(4096)]).carve_out
    assert not Planner("weave").plan([span(4096)]).carve_out


def test_nothing_is_searched_below_the_rows_from_which_on_splitting_can_pay(monkeypatch):
    ours = Planner("auto", cost(), most_rows=8192)
    assert ours.pays_from[False] is not None
    assert 2 <= ours.pays_from[False] < 2048
    monkeypatch.setattr("tokenweave.cost.decide.best_weave", None)  # which nobody may call
    monkeypatch.setattr("tokenweave.cost.planner.summarise", None)
    first = ours.plan([span(ours.pays_from[False] - 1)])
    assert first.cut is None
    assert ours.plan([span(1, 100)] * 4).cut is None
    assert ours._by_rows.cache_info().currsize == 2


def test_a_batch_like_one_seen_before_is_not_planned_again(monkeypatch):
    ours = Planner("auto", cost(), most_rows=8192)
    plan = ours.plan([span(4096, 1000), *[span(1, 3000 + i) for i in range(9)]])
    monkeypatch.setattr("tokenweave.cost.planner.decide", None)
    assert ours.plan([span(4096, 1010), *[span(1, 3003 + i) for i in range(9)]]) is plan


@pytest.mark.parametrize("rows", [1, 2, 100, 4096])
def test_one_rank_never_splits(rows):
    alone = Planner("auto", cost(world_size=1))
    assert alone.plan([span(rows)]).cut is None
    assert "one rank" in alone.plan([span(rows)]).reason


@pytest.mark.parametrize("overlap", MODES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 700])
def test_what_was_asked_for_is_done(overlap, rows):
    spans = [span(rows)] if rows else []
    for ours in (Planner(overlap), planner(overlap), planner(overlap, "cpu", 2)):
        plan, plain = ours.plan(spans), plan_step(overlap, rows, None)
        assert (plan.rows, plan.form, plan.reason, len(plan.bounds)) == (
            rows,
            plain.form,
            plain.reason,
            len(plain.bounds),
        )


def test_a_forced_weave_takes_the_models_cut_and_sms_where_there_are_tiles():
    found = best_weave(Step(cost(), Batch([Chunk(4096)]))).choice
    plan = planner("weave").plan([span(4096)])
    assert (plan.cut, plan.attention_sms, plan.mlp_sms) == (found.cut, found.attention_sms, found.mlp_sms)


def test_on_a_cpu_the_halves_of_a_prompt_take_as_long():
    """The later half attends to more keys, the more so after a short prompt. Rows that decode are all alike."""
    shares = [planner("weave", "cpu", 2).plan([span(8192, context)]).cut / 8192 for context in (0, 8192, 1 << 17)]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 <= shares[2] < 0.51 < shares[0] < 0.6
    decoding = [Span((1,), 300, tuple(range(20)), prompt_len=300, wanted=1)] * 64
    assert planner("weave", "cpu", 2).plan(decoding).cut == 32


@pytest.mark.parametrize(("choice", "form"), [(Choice(), "reference"), (Choice("fused"), "sharded")])
def test_the_plan_of_a_choice(choice, form):
    assert (plan_of(choice, 9, "why").form, plan_of(choice, 9, "why").bounds) == (form, [(0, 9)])
    woven = plan_of(Choice("weave", 4, 8, 2), 9, "why")
    assert (woven.bounds, woven.sms, woven.reason) == ([(0, 4), (4, 9)], {"attn": 8, "mlp": 2}, "why")
    with pytest.raises(ValueError, match="can be predicted, not run"):
        plan_of(Choice("nocomm"), 9, "why")


# -- measured times ----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 5000), times=step_times())
@PROPERTIES
def test_on_a_cpu_a_fresh_prompt_is_decided_by_what_was_measured_alone(rows, times):
    """As plan_step decides by rows; the model only says what context changes, and where to cut."""
    ours = Planner("auto", cost("cpu", 2), times, most_rows=8192)
    theirs = plan_step("auto", rows, times)
    plan = ours._plan_summary(((1, Chunk(rows)),))
    assert (len(plan.bounds), plan.form, plan.sms) == (len(theirs.bounds), theirs.form, theirs.sms)


@given(spans=SPANS, times=step_times(), hardware=st.sampled_from(["cpu", "h100-sxm"]))
@PROPERTIES
def test_by_measured_times_nothing_is_taken_for_little(spans, times, hardware):
    step = Step(cost(hardware, 2), Batch(expand(summarise(spans))))
    decision = decide(step, times)
    off_s = decision.predicted_s["off"]
    assert decision.choice.mode == "off" or decision.predicted_s[decision.choice.mode] <= MARGIN * off_s
    assert decision == decide(Step(cost(hardware, 2), step.batch), pickle.loads(pickle.dumps(times)))


def test_the_model_says_what_a_batch_differs_by_from_the_measured_prompt():
    times = StepTimes({mode: {1: 0.1, 2048: 0.3} for mode in MODES})
    prompt, later = (Step(cost(), Batch([Chunk(2048, context)])) for context in (0, 20000))
    for choice in (Choice(), Choice("fused"), measured(prompt)):
        assert predict(prompt, choice, times) == pytest.approx(0.3)
        ratio = later.seconds(choice) / prompt.seconds(choice)
        assert ratio > 1
        assert predict(later, choice, times) == pytest.approx(0.3 * ratio)
    best = best_weave(prompt).choice
    assert predict(prompt, best, times) <= 0.3  # at least as good as the middle, which was measured
    longer = Step(cost(), Batch([Chunk(8192)]))  # beyond the last measured step the model goes on
    assert predict(longer, Choice(), times) == pytest.approx(0.3 * longer.seconds(Choice()) / prompt.seconds(Choice()))


def test_measured_times_overrule_the_model():
    slow = StepTimes({"off": {4096: 1.0}, "fused": {4096: 1.1}, "weave": {4096: 3.0}})
    assert Planner("auto", cost(), slow, most_rows=8192).plan([span(4096)]).form == "reference"
    fast = StepTimes({"off": {4096: 1.0}, "fused": {4096: 1.1}, "weave": {4096: 0.7}})
    assert Planner("auto", cost(), fast, most_rows=8192).plan([span(4096)]).cut is not None


def test_one_measured_row_is_no_reason_to_fail():
    step = Step(cost(), Batch([Chunk(600)]))
    one = StepTimes({mode: {1: 0.1} for mode in MODES})
    assert all(seconds > 0 for seconds in decide(step, one).predicted_s.values())


def test_without_a_model_rows_and_times_decide():
    times = StepTimes({"off": {64: 10.0}, "fused": {64: 9.0}, "weave": {64: 6.0}})
    assert Planner("auto", None, times).plan([span(64)]) == plan_step("auto", 64, times)


# -- tuned plans -------------------------------------------------------------------------------------------------------


class FakeTuned:
    """Knows steps of 512 rows and more."""

    choice = Choice("weave", 200, 2, 16)

    def lookup(self, rows):
        return self.choice if rows >= 512 else None


def test_what_was_tuned_goes_before_model_and_measurement():
    times = StepTimes({"off": {1: 1.0}, "fused": {1: 2.0}, "weave": {1: 3.0}})
    for known in (None, times):
        ours = Planner("auto", cost(), known, FakeTuned())
        plan = ours.plan([span(600)])
        assert (plan.cut, plan.attention_sms, plan.mlp_sms) == (200, 2, 16)
        assert "tuned" in plan.reason
        assert "tuned" not in ours.plan([span(400)]).reason


# -- summaries ---------------------------------------------------------------------------------------------------------


def test_a_summary_rounds_contexts_and_joins_rows_that_decode():
    spans = [span(1, 1000), span(1, 1100), span(300, 77, wanted=0), span(1, 9), span(1, 0, wanted=0)]
    assert summarise(spans) == ((2, Chunk(1, 1024)), (1, Chunk(300, 64 + 8, 0)), (1, Chunk(1, 9)), (1, Chunk(1, 0, 0)))
    assert Batch(expand(summarise(spans))).rows == sum(map(len, spans))


@given(count=st.integers(0, 10**6))
def test_rounding_keeps_an_eighth(count):
    assert 7 / 8 * count < rounded(count) <= count or count == 0


def test_trial_batches():
    assert list(trial_rows(20)) == [2, 3, 4, 6, 8, 12, 16, 20]
    assert (trial(5, True, 9).rows, trial(5, True, 9).wanted, trial(5, False).wanted) == (5, 5, 1)


# -- on real ranks -----------------------------------------------------------------------------------------------------


def planned(folder):
    """Runs on every rank: the plans' reasons are those of the planner that rank 0 has."""
    with LLM(folder, progress=False, overlap="auto", num_kv_blocks=20) as llm:
        llm.generate([[1, 2, 3] * 10], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        ours = llm._rank.planner
        return ours.cost is not None, sorted(ours.pays_from), ours.plan([span(30)]).reason if ours.cost else ""


def test_rank_0_plans_with_a_model_of_this_machine(ranks, checkpoint):
    (knows, kinds, reason), (other_knows, _, _) = ranks(2).run(planned, checkpoint("llama"))
    assert (knows, kinds, other_knows) == (True, [False, True], False)
    assert "by measured steps" in reason
