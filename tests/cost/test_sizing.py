"""Sizing: workloads in steps, steady states, and which W serves them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost import predict_decode
from tokenweave.cost.explain import explain
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.sizing import Sizer, advise, changed
from tokenweave.cost.work import Chunk
from tokenweave.cost.workload import Workload, prefill_steps

H100 = find_hardware("h100-sxm")
LLAMA_70B = PUBLISHED["Llama-3.3-70B"]


@pytest.fixture(scope="module")
def sizer():
    return Sizer(LLAMA_70B, H100)


@given(prompt_len=st.integers(1, 500), batch_size=st.integers(1, 12), step_tokens=st.integers(1, 700))
@settings(deadline=None, derandomize=True)
def test_prefill_steps_compute_every_prompt_once_in_full_steps(prompt_len, batch_size, step_tokens):
    steps = list(prefill_steps(prompt_len, batch_size, step_tokens))
    tokens = [sum(chunk.tokens for chunk in step) for step in steps]
    assert sum(tokens) == prompt_len * batch_size
    assert set(tokens[:-1]) <= {step_tokens}
    assert tokens[-1] <= step_tokens
    assert sum(chunk.wanted for step in steps for chunk in step) == batch_size
    assert all((chunk.context + chunk.tokens == prompt_len) == chunk.wanted for step in steps for chunk in step)


def test_a_batchs_times_are_those_of_its_steps(sizer):
    workload = Workload(prompt_len=3000, output_len=100, batch_size=4, step_tokens=6000)
    serving = sizer.serve(workload, 8, "off")
    step_s = sizer.seconds(8, (Chunk(3000),) * 2, "off")
    assert serving.ttft_s == pytest.approx(1.5 * step_s)  # two prompts a step
    assert serving.tpot_s == pytest.approx(
        predict_decode(LLAMA_70B, world_size=8, context_len=3050, batch_size=4, mode="off")
    )
    assert serving.tokens_per_s == pytest.approx(400 / (2 * step_s + 99 * serving.tpot_s))


def test_auto_is_the_best_of_all(sizer):
    for workload in (Workload(), Workload(batch_size=32), Workload(request_rate=3.0)):
        serving = sizer.size(workload, 8).serving
        assert serving["auto"].ttft_s <= min(one.ttft_s for one in serving.values())
        assert serving["auto"].tpot_s <= min(one.tpot_s for one in serving.values()) * (1 + 1e-9)
        assert serving["weave"].ttft_s < serving["fused"].ttft_s < serving["off"].ttft_s


def test_a_steady_state_holds_as_many_requests_as_come(sizer):
    workload = Workload(prompt_len=1000, output_len=300, request_rate=5.0)
    serving = sizer.serve(workload, 8, "off")
    by_littles_law = 5.0 * 300 * serving.tpot_s
    assert serving.concurrency - 1 < by_littles_law <= serving.concurrency
    assert serving.tokens_per_s == 1500
    busier = sizer.serve(Workload(prompt_len=1000, output_len=300, request_rate=8.0), 8, "off")
    assert busier.ttft_s > serving.ttft_s
    assert busier.tpot_s > serving.tpot_s
    most = sizer.most_requests_per_s(workload, 8)
    assert sizer.serve(Workload(prompt_len=1000, output_len=300, request_rate=1.05 * most), 8, "auto") is None
    assert sizer.serve(Workload(prompt_len=1000, output_len=300, request_rate=0.8 * most), 8, "auto") is not None


def test_what_does_not_fit_says_why(sizer):
    assert "weights and workspace need 141" in sizer.size(Workload(), 1).why_not
    assert "keys and values of 64 x 2304" in sizer.size(Workload(batch_size=64), 2).why_not
    assert "serves at most" in sizer.size(Workload(request_rate=50.0), 8).why_not
    assert sizer.size(Workload(), 8).why_not == ""


def test_advice(sizer):
    def advice(**options):
        workload = Workload(**options)
        return advise([sizer.size(workload, world_size) for world_size in sizer.world_sizes()], workload)

    assert (advice().fewest, advice().best_per_gpu, advice().fastest) == (2, 2, 8)
    assert advice(ttft_target_s=0.1).fewest == 8
    assert advice(batch_size=64).fewest == 4
    assert advice(tpot_target_s=1e-4).fewest is None


def test_world_sizes_share_the_heads():
    assert Sizer(PUBLISHED["Qwen2.5-7B"], H100).world_sizes() == [1, 2, 4]  # 28 heads
    assert Sizer(PUBLISHED["Qwen2.5-0.5B"], H100).world_sizes() == [1, 2]  # 14


def test_gains(sizer):
    gains = sizer.gains(8, (64, 512, 8192))
    assert [gain.plan.mode for gain in gains] == ["off", "fused", "weave"]
    assert [gain.planned for gain in gains] == [1.0, gains[1].fused, gains[2].weave]
    assert gains[0].weave < 1 < gains[2].fused < gains[2].weave
    alone = Sizer(PUBLISHED["Llama-3.1-8B"], H100).gains(1, (8192,))[0]
    assert alone.fused == alone.weave == alone.nocomm == alone.planned == 1.0


def test_a_changed_machine(sizer):
    faster = changed(H100, {"flops": 2.0, "link": 0.5})
    assert faster.peak("bfloat16") == 2 * H100.peak("bfloat16")
    assert (faster.link_bandwidth, faster.memory_bandwidth) == (0.5 * H100.link_bandwidth, H100.memory_bandwidth)
    for what, slower in (("flops", "ttft_s"), ("bandwidth", "tpot_s"), ("link", "ttft_s")):
        other = Sizer(LLAMA_70B, changed(H100, {what: 0.5})).serve(Workload(), 8, "auto")
        assert getattr(other, slower) > getattr(sizer.serve(Workload(), 8, "auto"), slower)


@pytest.mark.parametrize(
    "options", [{"prompt_len": 0}, {"batch_size": 1.5}, {"request_rate": 0.0}, {"ttft_target_s": float("nan")}]
)
def test_workloads_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Workload(**options)


# -- explaining a step -------------------------------------------------------------------------------------------------


def test_an_explanation_adds_up(sizer):
    one = explain(sizer.cost(8, False), (Chunk(8192),))
    woven = one.woven
    assert one.taken == woven.choice
    assert one.predicted_s["weave"] == woven.seconds
    exposed_s = woven.sums_s - woven.hidden_s
    total_s = sum(woven.halves_s) + woven.slowdown_s + exposed_s + H100.step_s
    assert woven.seconds == pytest.approx(total_s)
    assert 0 < woven.hidden_s <= woven.sums_s
    assert "split: " in one.reasons[-1]
    assert "are hidden" in " ".join(one.reasons)


def test_why_a_short_step_is_not_split(sizer):
    one = explain(sizer.cost(8, False), (Chunk(100),))
    assert one.taken.mode == "off"
    assert "the device waits for it" in " ".join(one.reasons)
    assert one.reasons[-1].startswith("not split: the best split is predicted")


def test_one_gpu_has_nothing_to_explain():
    one = explain(Sizer(PUBLISHED["Llama-3.1-8B"], H100).cost(1, False), (Chunk(100),))
    assert (one.taken.mode, one.woven, list(one.predicted_s)) == ("off", None, ["off"])
    assert "nothing to communicate" in one.reasons[0]
    with pytest.raises(ValueError, match="a batch without tokens"):
        explain(Sizer(PUBLISHED["Llama-3.1-8B"], H100).cost(1, False), ())
