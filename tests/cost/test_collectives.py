"""Collectives: byte floors, SM limits, measured curves and how they are carried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenweave.cost.collectives import (
    AnalyticCollectives,
    Curve,
    all_reduce_s,
    best_implementation,
    link_passes,
    read_collectives,
)
from tokenweave.cost.hardware import find_hardware

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
H100 = find_hardware("h100-sxm")
ROW_BYTES = 8192 * 2
needs_curves = pytest.mark.skipif(
    not (REFERENCE / "tokenweave_figure_10.csv").is_file(), reason=f"the published curves are not at {REFERENCE}"
)


def test_bytes_on_the_busier_direction_of_a_link():
    assert link_passes("multimem", 8) == 1.125
    assert link_passes("nccl", 8) == link_passes("peer", 8) == link_passes("sharded", 8) == 1.75
    assert link_passes("one-shot", 8) == 7
    assert {link_passes(name, 1) for name in ("nccl", "peer", "multimem", "one-shot", "sharded")} == {0}
    with pytest.raises(ValueError, match="unknown all-reduce 'magic'; known: nccl, "):
        link_passes("magic", 2)


def test_the_implementation_follows_the_machine():
    assert best_implementation(H100, 8) == ("multimem", "multimem")
    assert best_implementation(H100, 2) == ("nccl", "peer")  # the switch helps more than two ranks only
    assert best_implementation(find_hardware("a100"), 8) == ("nccl", "peer")
    assert best_implementation(find_hardware("cpu"), 2) == ("sharded", "sharded")


@given(
    name=st.sampled_from(["nccl", "sharded", "peer", "multimem", "one-shot"]),
    rows=st.integers(1, 65536),
    world_size=st.sampled_from([1, 2, 4, 8]),
    sms=st.none() | st.sampled_from([2, 4, 8, 16]),
    fused=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_time_grows_with_bytes_and_shrinks_with_sms(name, rows, world_size, sms, fused):
    def seconds(rows, sms):
        return all_reduce_s(name, rows * ROW_BYTES, world_size, H100, sms, fused)

    if world_size == 1:
        assert seconds(rows, sms) == 0
        return
    assert 0 < seconds(rows, sms) < seconds(rows + 1, sms)
    assert seconds(rows, sms) >= seconds(rows, None)
    if sms is not None:
        assert seconds(rows, sms) >= seconds(rows, sms * 2)


def test_a_curve_is_linear_and_goes_on_with_its_last_slope():
    curve = Curve((10, 20, 40), (1.0, 2.0, 6.0))
    assert [curve(rows) for rows in (1, 10, 15, 20, 30, 40, 50, 140)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 26.0]


@needs_curves
@pytest.mark.parametrize("rows", [64, 1024, 32768])
def test_measured_curves_are_given_back(rows):
    curves = read_collectives(REFERENCE, 8, ROW_BYTES)
    plain_us = {64: 16.544, 1024: 74.784, 32768: 1956.608}[rows]  # Figure 4
    fused_us = {64: 18.656, 1024: 128.032, 32768: 3558.400}[rows]  # Figure 10, 4 CTAs
    assert curves.plain_s(rows) * 1e6 == pytest.approx(plain_us, rel=1e-4)
    assert curves.fused_s(rows, 4) * 1e6 == pytest.approx(fused_us, rel=1e-4)
    assert curves.fused_s(rows, None) == pytest.approx(min(curves.fused_s(rows, 2**i) for i in range(1, 8)))


@needs_curves
def test_between_measured_sm_counts_and_outside_them():
    curves = read_collectives(REFERENCE, 8, ROW_BYTES)
    assert curves.fused_s(8192, 4) > curves.fused_s(8192, 6) > curves.fused_s(8192, 8)
    assert curves.fused_s(8192, 1) == curves.fused_s(8192, 2)
    assert curves.fused_s(8192, 500) == curves.fused_s(8192, 128)


@needs_curves
def test_other_sizes_and_world_sizes_scale_with_their_bytes():
    eight, four, narrow = (read_collectives(REFERENCE, *key) for key in ((8, ROW_BYTES), (4, ROW_BYTES), (8, 8192)))
    assert four.plain_s(4096) / eight.plain_s(4096) == pytest.approx(1.25 / 1.125)
    assert four.fused_s(4096, None) / eight.fused_s(4096, None) == pytest.approx(1.25 / 1.125)
    assert 1.9 < four.fused_s(4096, 2) / eight.fused_s(4096, 2) < 2.0  # a rank owns twice the rows, on 2 SMs
    assert narrow.plain_s(4096) == eight.plain_s(2048)


@needs_curves
@pytest.mark.parametrize("rows", [1024, 8192, 32768])
@pytest.mark.parametrize("sms", [None, 2, 4, 8, 16])
def test_the_data_sheet_model_is_near_the_measured_curves(rows, sms):
    analytic, curves = AnalyticCollectives(H100, 8, ROW_BYTES), read_collectives(REFERENCE, 8, ROW_BYTES)
    assert analytic.plain_s(rows) == pytest.approx(curves.plain_s(rows), rel=0.05)
    assert analytic.fused_s(rows, sms) == pytest.approx(curves.fused_s(rows, sms), rel=0.16)


def test_broken_curves_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenweave_figure_4\.csv do not exist"):
        read_collectives(tmp_path, 8, ROW_BYTES)
    path = tmp_path / "tokenweave_figure_4.csv"
    for text, message in (
        ("BL,other\n64,1\n", "KeyError: 'multimem_all_reduce_us'"),
        ("BL,multimem_all_reduce_us\n64,fast\n", "ValueError"),
        ("BL,multimem_all_reduce_us\n64\n", "TypeError"),
        ("BL,multimem_all_reduce_us\n64,1\n", "two or more ascending row counts"),
        ("BL,multimem_all_reduce_us\n64,1\n32,2\n", "two or more ascending row counts"),
        ("BL,multimem_all_reduce_us\n64,1\n128,nan\n", "every time must be a number > 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_collectives(tmp_path, 8, ROW_BYTES)
        assert str(path) in str(caught.value)
