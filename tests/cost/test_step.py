"""Steps of any mix, in every mode: sane, monotone, and as their parts say."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig, MixtralConfig, Olmo2Config

from tokenweave.cost.breakdown import break_down
from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import KNOWN, find_hardware
from tokenweave.cost.ops import AttentionTime
from tokenweave.cost.search import best_weave
from tokenweave.cost.shape import read_shape
from tokenweave.cost.step import Step, segments_s
from tokenweave.cost.work import Batch, BatchAttention, Chunk

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=32, vocab_size=128256),
    "mixtral": MixtralConfig(**SIZES, num_hidden_layers=8, sliding_window=4096),
    "gemma2": Gemma2Config(**SIZES, num_hidden_layers=6, head_dim=128, sliding_window=1024),
    "olmo2": Olmo2Config(**SIZES, num_hidden_layers=4),
}
MODES = st.sampled_from(["off", "fused", "nocomm"])
CHUNKS = st.lists(st.builds(Chunk, st.integers(1, 3000) | st.just(1), st.integers(0, 5000)), min_size=1, max_size=6)
COSTS = st.builds(
    lambda *key: cost(*key),
    st.sampled_from(list(CONFIGS)),
    st.sampled_from([known.name for known in KNOWN]),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.booleans(),
)


@functools.cache
def cost(model="llama", hardware="h100-sxm", world_size=8, drops_rows=True, graph=False):
    shape = read_shape(CONFIGS[model], "bfloat16")
    return Cost(shape, find_hardware(hardware), world_size, drops_rows=drops_rows, graph=graph)


def seconds(cost, chunks, choice):
    return Step(cost, Batch(chunks)).seconds(choice)


@given(cost=COSTS, chunks=CHUNKS, mode=MODES)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_more_work_takes_no_less(cost, chunks, mode):
    least = cost.hardware.step_s
    now = seconds(cost, chunks, Choice(mode))
    longer = [replace(chunks[0], tokens=chunks[0].tokens + 70), *chunks[1:]]
    for more in ([*chunks, Chunk(1, 500)], longer, [*chunks[:-1], replace(chunks[-1], context=9000)]):
        assert least < now <= seconds(cost, more, Choice(mode)) * (1 + 1e-12)


@given(cost=COSTS, chunks=CHUNKS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_communication_costs_and_one_rank_has_none(cost, chunks):
    off, fused, nocomm = (seconds(cost, chunks, Choice(mode)) for mode in ("off", "fused", "nocomm"))
    if cost.world_size == 1:
        assert off == fused == nocomm
        assert best_weave(Step(cost, Batch(chunks))) is None
    else:
        assert off >= nocomm
    bits = break_down(Step(cost, Batch(chunks)), "off")
    assert bits.communication_s == 0 if cost.world_size == 1 else bits.communication_s > 0


@given(cost=COSTS, chunks=CHUNKS, share=st.floats(0, 1), sms=st.tuples(*[st.sampled_from([2, 4, 8, 16])] * 2))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_woven_step_is_bounded_by_its_lanes(cost, chunks, share, sms):
    """No faster than either lane, no slower than both one after the other."""
    step = Step(cost, Batch(chunks))
    if step.batch.rows < 2:
        return
    cut = min(step.batch.rows - 1, max(1, int(share * step.batch.rows)))
    woven = step.woven([cut], sms)
    device_s = woven.device_s(0, 0, 1)
    assert segments_s(cost, woven.work).sum() <= device_s * (1 + 1e-9)
    assert 0 <= woven.hidden_s(0, 0, 1) <= device_s
    assert step.seconds(Choice("weave", cut, *sms)) >= cost.hardware.step_s + device_s


@given(cost=COSTS, chunks=CHUNKS, mode=MODES)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_breakdown_adds_up(cost, chunks, mode):
    step = Step(cost, Batch(chunks))
    parts = break_down(step, mode)
    figures = list(vars(parts).values())
    assert min(figures) >= 0
    assert sum(figures) == pytest.approx(step.seconds(Choice(mode)))
    assert parts.bound in ("compute", "memory", "link", "launch")


@given(chunks=CHUNKS, window=st.none() | st.integers(1, 4000), share=st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_attention_of_halves_is_that_of_their_chunks(chunks, window, share):
    batch, attention = Batch(chunks), cost().parts.attention(window)
    cut = int(share * batch.rows)
    halves = BatchAttention(batch, attention).halves(np.array([cut]))
    for i, (start, stop) in enumerate(((0, cut), (cut, batch.rows))):
        half = AttentionTime(*(each[i, 0] for each in halves))
        alone = BatchAttention(Batch(narrow(chunks, start, stop)), attention).whole()
        assert half.compute_s == pytest.approx(alone.compute_s, abs=1e-15)
        assert half.memory_s == pytest.approx(alone.memory_s, abs=1e-15)
        assert half.longest_s == pytest.approx(alone.longest_s)


@given(chunks=CHUNKS, share=st.floats(0, 1))
@settings(deadline=None, derandomize=True)
def test_rows_that_make_logits_are_shared_out(chunks, share):
    batch = Batch(chunks)
    cut = int(share * batch.rows)
    assert batch.wanted_from(0) == batch.wanted
    assert batch.wanted_from(cut) == sum(chunk.wanted for chunk in narrow(chunks, cut, batch.rows) if chunk.wanted)
    assert batch.wanted_from(batch.rows) == 0


def narrow(chunks, start, stop):
    """Rows start..stop, chunk by chunk."""
    kept, at = [], 0
    for chunk in chunks:
        first, last = max(start - at, 0), min(stop - at, chunk.tokens)
        if first < last:
            wanted = max(0, last - max(first, chunk.tokens - chunk.wanted))
            kept.append(Chunk(last - first, chunk.context + first, wanted))
        at += chunk.tokens
    return kept


def test_an_empty_batch_takes_nothing():
    assert seconds(cost(), [], Choice("off")) == 0
    assert seconds(cost(), [Chunk(0)], Choice("weave", 1, 4, 4)) == 0
    assert best_weave(Step(cost(), Batch([Chunk(1)]))) is None


def test_a_half_without_logits_computes_no_last_mlp():
    """The whole prompt's one wanted row is in the second half: the first sends nothing after the last attention."""
    dropping, all_rows = (Step(cost(drops_rows=drops), Batch([Chunk(4096)])) for drops in (True, False))
    layer_s = (all_rows.device_s(Choice("nocomm")) - dropping.device_s(Choice("nocomm"))) / all_rows.device_s(Choice())
    assert 0.01 < layer_s < 1 / 32
    last_mlp = dropping.cost.parts.blocks[-2].parts[-1]
    assert dropping.cost.segment_s(last_mlp, dropping.halves(np.array([2048])), 132)[0, 0] == 0


@pytest.mark.parametrize("model", ["llama", "olmo2"])
def test_only_rows_that_make_logits_go_on_from_the_last_attention(model):
    last = cost(model).parts.blocks[-2]
    work = Step(cost(model), Batch([Chunk(4096)])).whole
    sites = [(part.site, work.coming(part), work.going(part)) for part in last.parts]
    assert sites[-2:] == [("attn", 4096, 1), ("mlp", 1, 1)]
    assert last.repeats == 1
    assert all(work.going(part) == 4096 for part in cost(model, drops_rows=False).parts.blocks[-2].parts)


def test_the_hosts_launches_are_counted():
    """Embedding 2; a layer 8: q k v, rotation, cache, attention, output; gate and up, activation, down; logits 1. And
    for each of 2 x 32 + 2 requests two launches, or three from each of two strands."""
    kernels, requests = 2 + 32 * 8 + 1, 2 * 32 + 2
    assert cost().host_s(1) == pytest.approx((kernels + 2 * requests) * 20e-6)
    assert cost().host_s(2) == pytest.approx(2 * (kernels + 3 * requests) * 20e-6)
    assert cost(graph=True).host_s(2) == 0


def test_long_prompts_gain_and_short_ones_do_not():
    long, short = (Step(cost(world_size=8), Batch([Chunk(tokens)])) for tokens in (8192, 64))
    assert best_weave(long)[1] < 0.85 * long.seconds(Choice("off"))
    assert best_weave(short)[1] > short.seconds(Choice("fused"))


def test_a_graph_spares_the_hosts_launches():
    eager, graph = (seconds(cost(graph=graph), [Chunk(1, 500)], Choice("off")) for graph in (False, True))
    assert eager > 2 * graph
    assert break_down(Step(cost(), Batch([Chunk(1, 500)])), "off").bound == "launch"


def test_what_bounds_a_step():
    prefill, decode = (Batch([Chunk(16384)]), Batch([Chunk(1, 500)] * 8))
    fast_link = cost(world_size=1, graph=True)
    assert break_down(Step(fast_link, prefill), "off").bound == "compute"
    assert break_down(Step(fast_link, decode), "off").bound == "memory"
    assert break_down(Step(cost(hardware="l40s"), prefill), "off").bound == "link"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "of"}, "mode must be one of off, fused, weave, nocomm, got 'of'"),
        ({"mode": "weave"}, "mode 'weave' needs cut, attention_sms and mlp_sms"),
        ({"mode": "weave", "cut": 3, "attention_sms": 4}, "mode 'weave' needs cut, attention_sms and mlp_sms"),
    ],
)
def test_a_choice_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Choice(**arguments)


@pytest.mark.parametrize("cut", [0, 100, -5])
def test_a_cut_leaves_rows_on_both_sides(cut):
    with pytest.raises(ValueError, match="between 1 and 99"):
        seconds(cost(), [Chunk(100)], Choice("weave", cut, 4, 4))


def test_the_search_is_near_the_best_of_all_cuts_and_counts():
    counts = find_hardware("h100-sxm").communication_sms
    for rows in (2304, 6000):
        step = Step(cost(), Batch([Chunk(rows)]))
        every = [Choice("weave", cut, a, m) for cut in range(256, rows, 256) for a in counts for m in counts]
        assert best_weave(step)[1] <= 1.01 * min(step.all_seconds(every))
