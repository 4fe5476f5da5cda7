"""The search for a split: near the best there is, cheap, and sane for every published model."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import decide
from tokenweave.cost.hardware import KNOWN, find_hardware
from tokenweave.cost.memory import weights_bytes
from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.search import EVEN_CUTS, FINALISTS, MOST_EDGES, all_cuts, best_weave, middle, shortlist
from tokenweave.cost.sizing import shares
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk

H100 = find_hardware("h100-sxm")
PARAMETERS = {  # billions, as the models' pages on the hub state them
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-405B": 405.85,
    "Llama-3.2-1B": 1.24,
    "Mistral-Nemo-12B": 12.25,
    "Qwen2.5-72B": 72.7,
    "Qwen3-32B": 32.76,
    "OLMo-2-13B": 13.7,
    "Gemma-2-9B": 9.24,
    "Mixtral-8x7B": 46.7,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.1,
}
MODELS = st.sampled_from(list(PUBLISHED))
WORLD_SIZES = st.sampled_from([1, 2, 4, 8])
MACHINES = st.sampled_from([known.name for known in KNOWN if known.tiles])
CHUNKS = st.lists(
    st.builds(Chunk, st.integers(1, 4000) | st.just(1), st.integers(0, 8000)), min_size=1, max_size=8
) | st.builds(lambda rows, context: [Chunk(rows, context)], st.integers(1, 65536), st.integers(0, 2000))
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=150)


@functools.cache
def cost(model="Llama-3.3-70B", world_size=8, hardware="h100-sxm"):
    return Cost(PUBLISHED[model], find_hardware(hardware), world_size)


def step_of(model, world_size, chunks, hardware="h100-sxm"):
    if not shares(PUBLISHED[model], world_size):
        return None
    return Step(cost(model, world_size, hardware), Batch(chunks))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_sizes(name):
    assert weights_bytes(PUBLISHED[name], 1) / 2e9 == pytest.approx(PARAMETERS[name], rel=0.005)


# -- the properties of a plan ------------------------------------------------------------------------------------------


@given(model=MODELS, world_size=WORLD_SIZES, hardware=MACHINES, chunks=CHUNKS)
@PROPERTIES
def test_a_plan_is_sane(model, world_size, hardware, chunks):
    """Never predicted slower than an unsplit step, never faster than computing alone; one rank never splits."""
    step = step_of(model, world_size, chunks, hardware)
    if step is None:
        return
    decision = decide(step)
    unsplit_s = min(step.seconds(Choice(mode)) for mode in ("off", "fused"))
    taken_s = step.seconds(decision.choice)
    assert 0 < taken_s <= unsplit_s
    if world_size == 1:
        assert decision.choice == Choice()
        return
    if decision.choice.mode == "weave":
        choice = decision.choice
        assert 0 < choice.cut < step.batch.rows
        assert {choice.attention_sms, choice.mlp_sms} <= set(step.cost.hardware.communication_sms)
    # the halves compute at least what the whole does without its norms, but for tiles that fit them better
    assert taken_s > 0.5 * step.device_s(Choice("nocomm"))


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_published_model_from_1_to_65536_rows(model, world_size):
    """More rows take no less time, whatever the plan; a mixed batch no less than its prompt alone."""
    if not shares(PUBLISHED[model], world_size):
        pytest.skip("its heads cannot be shared")
    before_s = 0.0
    decoding = [Chunk(1, 100 * i) for i in range(1, 33)]
    for rows in (1, 64, 1000, 4096, 16384, 65536):
        prompt, mixed = (step_of(model, world_size, [Chunk(rows), *more]) for more in ((), decoding))
        seconds = prompt.seconds(decide(prompt).choice)
        assert before_s < seconds * 1.02  # a whole wave less to waste can outweigh a few rows
        assert mixed.seconds(decide(mixed).choice) >= 0.99 * seconds
        before_s = seconds
    assert decide(step_of(model, world_size, [Chunk(1)])).choice.mode != "weave"


def test_without_sums_that_take_time_there_is_no_gain():
    """On a link and a switch that cost nothing a split only adds kernels."""
    free = replace(
        H100, link_bandwidth=1e18, collective_s=0.0, ring_s=0.0, sm_link_bandwidth=1e18, fused_sm_link_bandwidth=1e18
    )
    for rows in (512, 2048, 8192):
        step = Step(Cost(PUBLISHED["Llama-3.1-8B"], free, 8), Batch([Chunk(rows)]))
        assert decide(step).choice.mode != "weave"


# -- how near to the best ----------------------------------------------------------------------------------------------


def exhaustive_s(step):
    """Every pair of SM counts at cuts all over the batch and at every tile's edge of a small one."""
    rows = step.batch.rows
    grain = max(1, rows // 40) if rows < 2560 else max(64, rows // 2560 * 64)
    cuts = {*range(grain, rows, grain), *(range(64, rows, 64) if rows < 2560 else ())}
    counts = step.cost.hardware.communication_sms
    return min(step.all_seconds(Choice("weave", cut, a, m) for cut in cuts for a in counts for m in counts))


BATCHES = {
    "a short prompt": [Chunk(900)],
    "a prompt": [Chunk(4096)],
    "a long prompt": [Chunk(24000)],
    "a chunk after a long context": [Chunk(2048, 30000)],
    "prompts": [Chunk(700), Chunk(1900, 300), Chunk(2500)],
    "a chunk and decode rows": [Chunk(1, 40 * i) for i in range(100)] + [Chunk(1948)],
    "decode rows": [Chunk(1, 37 * i) for i in range(256)],
}
CASES = [
    ("Llama-3.3-70B", 8, "h100-sxm"),
    ("Llama-3.1-8B", 2, "h100-sxm"),
    ("Qwen3-32B", 4, "a100"),
    ("Gemma-2-27B", 8, "h200"),
    ("Mixtral-8x7B", 4, "b200"),
    ("Mistral-Nemo-12B", 2, "l40s"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_plan_is_near_exhaustive_search(case):
    """Within 1 % of the best of thousands of choices, having looked at a few dozen cuts."""
    for name, chunks in BATCHES.items():
        step = step_of(*case[:2], chunks, case[2])
        found = best_weave(step)
        unsplit_s = min(step.seconds(Choice(mode)) for mode in ("off", "fused"))
        best_s = min(unsplit_s, exhaustive_s(step))
        assert min(unsplit_s, found.seconds) <= 1.01 * best_s, name
        assert found.candidates <= 4 * len(all_cuts(step.batch.rows)) + 25 * FINALISTS
        assert found.seconds == step.seconds(found.choice)


@given(rows=st.integers(2, 100000))
@PROPERTIES
def test_cuts_are_not_many_and_lie_inside_the_batch(rows):
    cuts = all_cuts(rows)
    assert 0 < cuts[0] <= cuts[-1] < rows
    assert len(cuts) == len(set(cuts)) <= 2 * MOST_EDGES + EVEN_CUTS
    assert middle(rows) in cuts
    assert len(cuts) == rows - 1 or rows > EVEN_CUTS


@given(model=MODELS, chunks=CHUNKS, hardware=MACHINES)
@PROPERTIES
def test_a_shortlist_is_short(model, chunks, hardware):
    step = step_of(model, 2, chunks, hardware)
    if step is None or step.batch.rows < 2:
        return
    kept = shortlist(step.cost, step.halves(all_cuts(step.batch.rows)))
    assert len(set(kept)) == len(kept) == min(FINALISTS, len(all_cuts(step.batch.rows)))


@given(model=MODELS, chunks=CHUNKS, hardware=MACHINES)
@PROPERTIES
def test_a_choice_takes_as_long_whatever_was_asked_before(model, chunks, hardware):
    """To the last bit: a plan must not depend on what else was looked at beside it."""
    step, fresh = (step_of(model, 4, chunks, hardware) for _ in range(2))
    if step is None or step.batch.rows < 2:
        return
    found = best_weave(step)
    assert found.seconds == fresh.seconds(found.choice)
    assert all(not isinstance(value, np.integer) for value in vars(found.choice).values())


def test_reaching_further_changes_nothing_but_time():
    short, far = (Cost(PUBLISHED["Llama-3.1-8B"], H100, 2) for _ in range(2))
    far.reach(30000)
    steps = [Step(cost, Batch([Chunk(2900)])) for cost in (short, far)]
    assert best_weave(steps[0]) == best_weave(steps[1])
    assert steps[0].seconds(Choice()) == steps[1].seconds(Choice())
