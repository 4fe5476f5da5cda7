import pickle
import threading
import time

import pytest

from tokenweave.trace.spans import Recorder, Span, half_name


def test_a_span_carries_rank_step_and_phase_of_its_recorder():
    recorder = Recorder(rank=3)
    recorder.step = 7
    recorder.phases[7] = "decode"
    recorder.record("comm", "sum", 1, "attn", 10, 25, tokens=5, bytes=4096)
    assert recorder.spans == [Span(3, 7, "comm", "sum", 1, "attn", 10, 25, 5, 4096, "decode")]


def test_a_step_without_a_phase_has_an_empty_one():
    recorder = Recorder(rank=0)
    recorder.phases[0] = "prefill"
    recorder.step = 1
    recorder.record("compute", "segment", 0, "mlp", 1, 2)
    assert recorder.spans[0].phase == ""


def test_export_moves_spans_to_the_wall_clock_and_keeps_durations():
    recorder = Recorder(rank=0)
    before_ns, start_ns = time.time_ns(), time.perf_counter_ns()
    recorder.record("compute", "segment", 0, "mlp", start_ns, start_ns + 123)
    (span,) = recorder.export()
    assert span.end_ns - span.start_ns == 123
    assert (
        abs(span.start_ns - before_ns) < 10**9
    )  # the two clocks are read at different times; a wrong one is years off
    assert recorder.spans[0].start_ns == start_ns


def test_export_puts_recorders_of_different_clocks_on_one_axis():
    one, other = Recorder(0), Recorder(1)
    other.origin_ns = one.origin_ns + 1000  # this host's perf_counter started 1000 ns later
    one.record("compute", "segment", 0, "mlp", 5000, 6000)
    other.record("compute", "segment", 0, "mlp", 4000, 5000)
    assert one.export()[0][6:8] == other.export()[0][6:8]


def test_both_lanes_may_record_at_once():
    recorder = Recorder(rank=0)

    def work(lane, kind):
        for i in range(2000):
            recorder.record(lane, kind, 0, "attn", i, i + 1)

    threads = [threading.Thread(target=work, args=pair) for pair in [("compute", "segment"), ("comm", "sum")]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for lane in ("compute", "comm"):
        assert [span.start_ns for span in recorder.spans if span.lane == lane] == list(range(2000))


@pytest.mark.parametrize(
    ("lane", "kind", "start_ns", "end_ns"),
    [("gpu", "sum", 0, 1), ("comm", "reduce", 0, 1), ("comm", "sum", 2, 1)],
)
def test_a_span_that_cannot_be_is_refused(lane, kind, start_ns, end_ns):
    recorder = Recorder(rank=0)
    with pytest.raises(ValueError, match="a span needs a lane of") as caught:
        recorder.record(lane, kind, 0, "attn", start_ns, end_ns)
    assert "\n" not in str(caught.value)
    assert recorder.spans == []


def test_clear_forgets_spans_but_not_the_clock():
    recorder = Recorder(rank=0)
    origin_ns, recorder.step = recorder.origin_ns, 4
    recorder.record("comm", "sum", 0, "attn", 0, 1)
    recorder.clear()
    assert (recorder.spans, recorder.step, recorder.origin_ns) == ([], 4, origin_ns)


def test_spans_travel_between_ranks():
    span = Span(0, 1, "comm", "gather", 0, "head", 10, 20, 3, 4, "prefill")
    assert pickle.loads(pickle.dumps([span])) == [span]


def test_a_span_cannot_be_changed():
    span = Span(0, 1, "comm", "gather", 0, "head", 10, 20)
    with pytest.raises(AttributeError):
        span.end_ns = 30


def test_halves_are_called_by_letters():
    assert [half_name(half) for half in range(3)] == ["A", "B", "C"]
