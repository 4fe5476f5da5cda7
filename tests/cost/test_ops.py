"""Operators: waves, memory, experts, attention; and GenZ's arithmetic with our terms off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost.hardware import Efficiency, Tile, find_hardware
from tokenweave.cost.ops import Attention, Gemm, visible_pairs

H100 = find_hardware("h100-sxm")
PLAIN = replace(H100, tiles=(Tile(128, 256, 1.0),), efficiency=replace(H100.efficiency, gemm=1.0, memory=1.0))
ROWS = st.integers(1, 20000)


def ready(*arguments, rows=8192, **more):
    """A GEMM that may be asked for so many rows."""
    gemm = Gemm(*arguments, **more)
    gemm.reach(rows)
    return gemm


def test_genz_arithmetic_is_ours_without_waves():
    """github abhibambhaniya/GenZ-LLM-Analyzer: QKV GEMM 1024 x 4096 x 12288 at 80 % of 300 TFLOP/s and 1200 GiB/s."""
    machine = replace(
        H100,
        flops={"bfloat16": 300e12},
        memory_bandwidth=1200 * 2**30,
        tiles=(),
        efficiency=Efficiency(gemm=0.8, memory=0.8),
    )
    gemm = ready(12288, 4096, machine, "bfloat16")
    assert gemm.compute_s(1024, machine.sms) * 1e3 == pytest.approx(0.4294967, abs=5e-8)
    assert gemm.memory_s(1024) * 1e3 == pytest.approx(0.1302083, abs=5e-8)
    assert gemm.seconds(1024, machine.sms) == gemm.compute_s(1024, machine.sms)


def test_waves_are_counted_over_the_sms_that_are_left():
    gemm = ready(256 * 66, 500, PLAIN, "bfloat16")  # too short to be split; 66 tiles beside each other
    tile_s = 2 * 128 * 256 * 500 / (989.4e12 / 132)
    assert gemm.compute_s(256, 132) == pytest.approx(tile_s)  # 132 tiles: one wave
    assert gemm.compute_s(257, 132) == pytest.approx(2 * tile_s)  # 198: two
    assert gemm.compute_s(256, 131) == pytest.approx(2 * tile_s)  # one SM less: the last tile is a wave of its own
    assert gemm.compute_s(256, 66) == pytest.approx(2 * tile_s)


def test_the_tile_stays_the_one_that_is_best_on_all_sms():
    two = replace(PLAIN, tiles=(Tile(128, 256, 1.0), Tile(128, 128, 0.9)))
    gemm = ready(256 * 66, 500, two, "bfloat16")
    tile_s = 2 * 128 * 256 * 500 / (989.4e12 / 132)
    assert gemm.compute_s(256, 131) == pytest.approx(2 * tile_s)  # the small tile would take 3 / 2 / 0.9 of a wave


def test_a_long_narrow_gemm_is_split():
    whole = ready(256, 511, PLAIN, "bfloat16").compute_s(128, 132)
    split = ready(256, 8 * 512, PLAIN, "bfloat16").compute_s(128, 132)
    assert split < 3 * whole  # eight times the work on eight SMs, and the merge


def test_memory_bounds_a_few_rows_and_is_shared():
    gemm = ready(8192, 8192, H100, "bfloat16")
    weights_s = 8192 * 8192 * 2 / (3.35e12 * 0.9)
    assert gemm.seconds(1, 132) == pytest.approx(weights_s, rel=1e-3)
    assert gemm.seconds(1, 132, crowding=2.0) == pytest.approx(2 * weights_s, rel=1e-3)


def test_experts_read_only_the_weights_that_rows_reach():
    dense, experts = ready(512, 512, H100, "bfloat16"), ready(512, 512, H100, "bfloat16", experts=64, top_k=2)
    assert experts.busy_experts(1) == pytest.approx(2)
    assert experts.memory_s(1) == pytest.approx(2 * dense.memory_s(1))
    assert experts.busy_experts(100000) == pytest.approx(64)
    assert experts.compute_s(4096, 132) > dense.compute_s(8192, 132)  # half a tile an expert is wasted


@given(rows=ROWS, more=st.integers(0, 5000), n=st.integers(1, 9000), k=st.integers(1, 9000), experts=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_gemm_takes_no_less_for_more_rows(rows, more, n, k, experts):
    gemm = ready(n, k, H100, "bfloat16", *((8, 2) if experts else ()), rows=rows + more)
    seconds = gemm.seconds(rows, 132)
    assert 0 < seconds <= gemm.seconds(rows + more, 132) * (1 + 1e-12)
    flops = 2 * rows * n * k * (2 if experts else 1)
    assert seconds >= flops / (H100.peak("bfloat16") * H100.efficiency.gemm) * (1 - 1e-12)
    assert gemm.compute_s(rows, 100) >= gemm.compute_s(rows, 132)


@given(
    tokens=st.integers(0, 60), context=st.integers(0, 60), window=st.none() | st.integers(1, 80), cut=st.integers(0, 60)
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_visible_pairs_are_counted_one_by_one(tokens, context, window, cut):
    counted = sum(min(context + i + 1, window or math.inf) for i in range(tokens))
    assert visible_pairs(tokens, context, window) == counted
    cut = min(cut, tokens)
    parts = visible_pairs(cut, context, window) + visible_pairs(tokens - cut, context + cut, window)
    assert parts == counted


def test_attention_of_a_long_prompt_is_computing_and_of_a_token_is_reading():
    attention = Attention(8, 1, 128, None, H100, "bfloat16")
    prompt, token = attention.chunk(8192, 0), attention.chunk(1, 8191)
    flops = 4 * 8 * 128 * 8192 * 8193 / 2
    assert prompt.compute_s == pytest.approx(flops / (989.4e12 * H100.efficiency.attention))
    assert prompt.memory_s == 0
    assert token.memory_s == pytest.approx(2 * 128 * 2 * 8192 / (3.35e12 * 0.9))
    assert token.compute_s == 0
    assert attention.chunk(0, 100).seconds(1.0, 0.0) == 0


def test_a_window_bounds_what_is_read_and_computed():
    wide, narrow = (Attention(8, 1, 128, window, H100, "bfloat16") for window in (None, 1024))
    assert narrow.chunk(1, 32767).memory_s == pytest.approx(wide.chunk(1, 1023).memory_s)
    assert narrow.chunk(16384, 0).compute_s < wide.chunk(16384, 0).compute_s / 7
    assert narrow.chunk(512, 0) == wide.chunk(512, 0)


def test_a_short_prompt_is_as_slow_as_its_longest_block():
    """8 heads x 8 blocks of 128 queries cannot fill 132 SMs: the last block sees all 1024 keys."""
    time = Attention(8, 1, 128, None, H100, "bfloat16").chunk(1024, 0)
    assert time.longest_s > time.compute_s
    assert time.seconds(1.0, 0.0) == time.longest_s
