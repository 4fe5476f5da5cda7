import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trace.simulator import Step, simulate
from tokenweave.trace.overlap import exposed, in_flight, intersection, length, summary, union
from tokenweave.trace.spans import COMMUNICATION, Span

GRID = 60  # ns
WORK = [("compute", "segment"), ("compute", "wait"), ("compute", "sum"), ("comm", "sum"), ("comm", "gather")]


def span(work, start_ns, end_ns, rank=0, step=0, half=0, phase=""):
    return Span(rank, step, *work, half, "attn", start_ns, end_ns, phase=phase)


SEGMENT, WAIT, INLINE, SUM, GATHER = WORK
intervals = st.tuples(st.integers(0, GRID), st.integers(0, GRID)).map(sorted).map(tuple)
any_spans = st.lists(
    st.builds(
        lambda work, interval, rank, phase: span(work, *interval, rank=rank, phase=phase),
        st.sampled_from(WORK),
        intervals,
        st.integers(0, 2),
        st.sampled_from(["prefill", "decode"]),
    ),
    max_size=25,
)


def covered(intervals):
    """The same as a mask with one entry per ns: the plain reference."""
    mask = np.zeros(GRID, dtype=bool)
    for start, end in intervals:
        mask[start:end] = True
    return mask


def masks(spans):
    """(communication, compute lane standing, compute) as masks."""
    communication = covered(s[6:8] for s in spans if s.kind in COMMUNICATION)
    waits = covered(s[6:8] for s in spans if s.kind == "wait")
    inline = covered(s[6:8] for s in spans if s.kind in COMMUNICATION and s.lane == "compute")
    return communication, waits | inline, covered(s[6:8] for s in spans if s.kind == "segment")


def nanoseconds(seconds):
    return pytest.approx(seconds * 1e-9, abs=1e-15)


@given(any_spans)
def test_every_rank_equals_the_reference_on_a_grid(spans):
    got = summary(spans).by_rank
    assert list(got) == sorted({s.rank for s in spans})
    for rank, overlap in got.items():
        communication, standing, compute = masks([s for s in spans if s.rank == rank])
        assert overlap.communication_s == nanoseconds(communication.sum())
        assert overlap.exposed_s == nanoseconds((communication & standing).sum())
        assert overlap.hidden_s == nanoseconds((communication & ~standing).sum())
        assert overlap.idle_s == nanoseconds((standing & ~communication).sum())
        assert overlap.compute_s == nanoseconds(compute.sum())


@given(any_spans)
def test_hidden_and_exposed_make_up_the_communication(spans):
    total = summary(spans)
    for overlap in [total, *total.by_rank.values(), *total.by_phase.values()]:
        assert overlap.hidden_s + overlap.exposed_s == pytest.approx(overlap.communication_s, abs=1e-15)
        assert (overlap.hidden_share is None) == (overlap.communication_s == 0)
        assert overlap.hidden_share is None or 0 <= overlap.hidden_share <= 1


@given(any_spans, st.integers(-(10**6), 10**18), st.randoms())
def test_neither_order_nor_the_clock_matters(spans, shift_ns, random):
    moved = [s._replace(start_ns=s.start_ns + shift_ns, end_ns=s.end_ns + shift_ns) for s in spans]
    random.shuffle(moved)
    assert summary(moved) == summary(spans)


@given(any_spans)
def test_the_mean_is_over_ranks(spans):
    total = summary(spans)
    for name in ("communication_s", "exposed_s", "hidden_s", "idle_s", "compute_s"):
        values = [getattr(overlap, name) for overlap in total.by_rank.values()]
        assert getattr(total, name) == pytest.approx(np.mean(values) if values else 0, abs=1e-15)


@given(st.lists(intervals, max_size=12), st.lists(intervals, max_size=12))
def test_unions_and_intersections_equal_masks(left, right):
    both = intersection(union(left), union(right))
    assert np.array_equal(covered(both), covered(left) & covered(right))
    assert all(start < end for start, end in both)
    for result in (union(left), both):
        assert result == sorted(result)
        assert length(result) == covered(result).sum()


def test_a_woven_pair_by_hand():
    spans = [
        span(SEGMENT, 0, 10),
        span(SUM, 10, 30),
        span(SEGMENT, 10, 22, half=1),
        span(WAIT, 22, 34),  # 8 for the sum, then 4 until the thread has handed over
        span(SEGMENT, 34, 40),
    ]
    total = summary(spans)
    assert (total.communication_s, total.exposed_s, total.idle_s, total.compute_s) == (20e-9, 8e-9, 4e-9, 28e-9)
    assert total.hidden_share == pytest.approx(0.6)
    assert exposed(spans) == [(22, 30)]


def test_inline_sums_are_exposed_entirely():
    total = summary([span(SEGMENT, 0, 10), span(INLINE, 10, 17), span(SEGMENT, 17, 20)])
    assert (total.communication_s, total.exposed_s, total.hidden_share) == (7e-9, 7e-9, 0)


def test_without_communication_there_is_no_share():
    total = summary([span(SEGMENT, 0, 10), span(WAIT, 10, 12)])
    assert (total.hidden_share, total.communication_s, total.idle_s) == (None, 0, 2e-9)
    assert summary([]).hidden_share is None
    assert summary([]).by_rank == {}


def test_a_rank_that_communicates_more_weighs_more():
    hidden = [span(SUM, 0, 30, rank=0)]
    shown = [span(SUM, 0, 10, rank=1), span(WAIT, 0, 10, rank=1)]
    total = summary(hidden + shown)
    assert [overlap.hidden_share for overlap in total.by_rank.values()] == [1, 0]
    assert total.hidden_share == pytest.approx(0.75)


def test_phases_are_told_apart():
    prefill = [span(SUM, 0, 10, phase="prefill")]
    decode = [span(SUM, 20, 24, step=1, phase="decode"), span(WAIT, 20, 24, step=1, phase="decode")]
    by_phase = summary(prefill + decode).by_phase
    assert list(by_phase) == ["decode", "prefill"]
    assert (by_phase["prefill"].hidden_share, by_phase["decode"].hidden_share) == (1, 0)
    assert by_phase["prefill"].communication_s == 10e-9


def test_a_woven_step_hides_more_than_one_strand():
    woven, plain = summary(simulate([Step((512, 512))])), summary(simulate([Step((1024,))]))
    inline = summary(simulate([Step((1024,), inline=True)]))
    assert plain.hidden_share == inline.hidden_share == 0
    assert woven.hidden_share > 0.8
    assert plain.idle_s > 0
    assert inline.idle_s == 0


def test_time_before_the_last_rank_comes_is_not_in_flight():
    early = [span(SUM, 10, 50, rank=0), span(WAIT, 20, 50, rank=0)]
    late = [span(SEGMENT, 0, 40, rank=1), span(SUM, 40, 50, rank=1)]
    plain, cut = summary(early + late).by_rank[0], summary(in_flight(early + late)).by_rank[0]
    assert (plain.communication_s, plain.exposed_s, plain.idle_s) == (40e-9, 30e-9, 0)
    assert (cut.communication_s, cut.exposed_s, cut.idle_s) == (10e-9, 10e-9, 20e-9)


def test_only_the_start_of_sums_is_cut():
    spans = simulate([Step((64, 60)), Step((3, 2), "decode")], world_size=3, layers=2)
    cut = in_flight(spans)
    assert sorted(s._replace(start_ns=0) for s in cut) == sorted(s._replace(start_ns=0) for s in spans)
    assert {s for s in spans if s.kind not in COMMUNICATION} <= set(cut)
    sums = [s for s in cut if s.kind in COMMUNICATION]
    assert len({(s.step, s.half, s.start_ns) for s in sums}) * 3 == len(sums)  # all three start together
    assert set(in_flight([s for s in spans if s.rank == 0])) == {s for s in spans if s.rank == 0}


def test_clocks_that_disagree_leave_no_negative_time():
    assert in_flight([span(SUM, 0, 10), span(SUM, 90, 95, rank=1)]) == [span(SUM, 10, 10), span(SUM, 90, 95, rank=1)]


def test_a_missing_rank_is_an_error():
    with pytest.raises(ValueError, match="half 0 of step 0 has a sum with spans of 1 ranks, expected all 2"):
        in_flight([span(SUM, 0, 1), span(SUM, 2, 3), span(SUM, 0, 1, rank=1)])
