"""What the order of work allows, on schedules drawn by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.overlap.schedule import Strands, most_hidden, woven_s

seconds = st.floats(0.01, 10)


def even(layers: int, segment_s: float, sum_s: float) -> Strands:
    segments = [[segment_s] * layers + [0.0]] * 2
    return Strands(segments, [[sum_s] * layers] * 2, 2 * layers * segment_s)


def test_balanced_lanes_expose_one_sum_and_one_segment():
    # compute A B A B A B     6 x 1 s
    # comm     A B A B A B    starts one segment later
    assert woven_s(even(3, 1.0, 1.0)) == pytest.approx(7.0)
    assert most_hidden(even(3, 1.0, 1.0)) == pytest.approx((12 - 7) / (12 - 6))


def test_short_sums_hide_but_for_the_last():
    assert woven_s(even(3, 1.0, 0.25)) == pytest.approx(6.25)


def test_a_short_segment_beside_a_long_sum_is_waited_for():
    segments, sums = [[1.0, 3.0, 0.0]] * 2, [[2.0, 2.0]] * 2
    # compute A1 B1 .. A3.... B3.... ..       A's first sum ends at 3, its second begins at 6
    assert woven_s(Strands(segments, sums, 8.0)) == pytest.approx(11.0)


def test_halves_of_unequal_length():
    assert woven_s(Strands([[1.0], [1.0, 1.0]], [[], [0.5]], 3.0)) == pytest.approx(3.5)


@given(st.lists(st.tuples(seconds, seconds, seconds, seconds), min_size=1, max_size=6))
def test_between_the_longer_lane_and_one_after_the_other(layers):
    a, x, b, y = (list(column) for column in zip(*layers))
    strands = Strands([[*a, 0.0], [*b, 0.0]], [x, y], sum(a) + sum(b))
    longest, shortest = strands.compute_s + strands.communication_s, max(strands.compute_s, strands.communication_s)
    assert shortest * (1 - 1e-9) <= woven_s(strands) <= longest * (1 + 1e-9)
    assert 0 <= round(most_hidden(strands), 9) <= 1


def test_nothing_to_hide():
    assert most_hidden(Strands([[1.0], [1.0]], [[], []], 2.0)) is None
