"""Times of streams, on events whose times the test sets: what a GPU would say of work that is done later."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tokenweave import LLM, SamplingParams
from tokenweave.engine.messages import collect_spans
from tokenweave.trace.observe import TraceObserver, observed
from tokenweave.trace.overlap import summary
from tokenweave.trace.stream_recorder import StreamRecorder
from tokenweave.weave.streams import COMM, COMPUTE, StreamLane
from tokenweave.weave.weave import weave


class Device:
    """Two streams, each with the time at which all that is queued on it is done."""

    def __init__(self):
        self.end_ms = {COMPUTE: 0.0, COMM: 0.0}
        self.current = COMPUTE
        self.now_ms = float("inf")  # for the host

    def run(self, ms: float) -> None:
        self.end_ms[self.current] += ms

    # -- as CudaStreams

    def record(self, stream):
        return self.end_ms[stream]

    def wait(self, stream, event):
        self.end_ms[stream] = max(self.end_ms[stream], event)

    @contextmanager
    def comm(self):
        self.current = COMM
        yield
        self.current = COMPUTE


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self):
        self.ms = self.device.end_ms[self.device.current]

    def query(self):
        return self.ms <= self.device.now_ms

    def elapsed_time(self, end_event):
        return end_event.ms - self.ms


class Sum:
    """A request of a strand."""

    def __init__(self, device: Device, ms: float, half: int):
        self.site, self.device, self.ms, self.half = "attn", device, ms, half

    def submit(self, lane: StreamLane):
        return lane.submit(lambda: self.device.run(self.ms), site=self.site, half=self.half, rows=4)


def strand(device: Device, half: int, compute_ms: float, sum_ms: float):
    for _ in range(2):
        device.run(compute_ms)
        yield Sum(device, sum_ms, half)
    device.run(compute_ms)


def recorder_of(device: Device) -> StreamRecorder:
    return StreamRecorder(0, lambda: Event(device))


def woven_step(device: Device, recorder: StreamRecorder, compute_ms: float, sum_ms: float) -> None:
    lane = StreamLane(device, (TraceObserver(recorder),))
    recorder.begin_step("prefill")
    strands = [observed(strand(device, half, compute_ms, sum_ms), half, recorder) for half in (0, 1)]
    weave(strands, [lane, lane])


def times(recorder: StreamRecorder) -> list[tuple[str, str, int, float, float]]:
    """(lane, kind, half, start, end in ms since the recorder began), without what took no time."""
    recorder.export()
    origin_ns = recorder._origin_of_test_ns
    spans = [(s.lane, s.kind, s.half, s.start_ns - origin_ns, s.end_ns - origin_ns) for s in recorder.spans]
    return [(*words, start / 1e6, end / 1e6) for *words, start, end in spans if end > start]


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def recorder(device):
    recorder = recorder_of(device)
    recorder._origin_of_test_ns = recorder._base_ns
    return recorder


def test_a_woven_step_is_seen_as_the_streams_ran_it(device, recorder):
    """A's segments take 2 ms and its sums 3: half B's segment hides two thirds of each but the last."""
    woven_step(device, recorder, compute_ms=2, sum_ms=3)
    assert times(recorder) == [
        ("compute", "segment", 0, 0, 2),
        ("comm", "sum", 0, 2, 5),
        ("compute", "segment", 1, 2, 4),
        ("comm", "sum", 1, 5, 8),
        ("compute", "wait", 0, 4, 5),
        ("compute", "segment", 0, 5, 7),
        ("comm", "sum", 0, 8, 11),
        ("compute", "wait", 1, 7, 8),
        ("compute", "segment", 1, 8, 10),
        ("comm", "sum", 1, 11, 14),
        ("compute", "wait", 0, 10, 11),
        ("compute", "segment", 0, 11, 13),
        ("compute", "wait", 1, 13, 14),
        ("compute", "segment", 1, 14, 16),
    ]
    found = summary(recorder.spans)
    assert found.communication_s == pytest.approx(12e-3)
    assert found.exposed_s == pytest.approx(4e-3)


def test_what_is_not_done_is_read_later(device, recorder):
    device.now_ms = 4.5
    woven_step(device, recorder, compute_ms=2, sum_ms=3)
    assert times(recorder) == [("compute", "segment", 0, 0, 2)]  # a later one waits for the sum before it
    device.now_ms = 100
    assert len(times(recorder)) == 14


def test_events_are_let_go_of_as_steps_come(device, recorder):
    woven_step(device, recorder, compute_ms=2, sum_ms=3)
    recorder.begin_step("decode")
    assert len(recorder._open) == 1


def test_a_timeline_is_read_when_the_device_is_done():
    order: list[str] = []
    recorder = SimpleNamespace(export=lambda: order.append("read") or [])
    runner = SimpleNamespace(recorder=recorder, synchronize=lambda: order.append("wait"))
    assert collect_spans(runner, SimpleNamespace(gather=lambda spans: [spans])) == []
    assert order == ["wait", "read"]


def test_times_of_later_steps_count_on_from_the_first(device, recorder):
    woven_step(device, recorder, compute_ms=2, sum_ms=3)
    woven_step(device, recorder, compute_ms=1, sum_ms=0.5)
    second = [span for span in recorder.export() if span.step == 2]
    first = [span for span in recorder.export() if span.step == 1]
    assert (second[0].start_ns - first[0].start_ns) / 1e6 == 16
    assert {span.phase for span in second} == {"prefill"}


def test_what_is_cleared_is_gone_and_time_goes_on(device, recorder):
    woven_step(device, recorder, compute_ms=2, sum_ms=3)
    recorder.clear()
    woven_step(device, recorder, compute_ms=1, sum_ms=0.5)
    assert times(recorder)[0] == ("compute", "segment", 0, 16, 17)
    assert {span.step for span in recorder.spans} == {2}


def test_a_device_that_never_gets_to_the_first_event_is_an_error(device, monkeypatch):
    monkeypatch.setattr("tokenweave.trace.stream_recorder.START_S", 0.01)
    device.now_ms = -1.0
    with pytest.raises(TimeoutError, match="an event on an idle stream"):
        recorder_of(device)


@pytest.mark.gpu
def test_a_timeline_of_a_gpu(checkpoint, tmp_path):
    """Every kernel of a step lies between the call and its return, and both streams are seen."""
    path, start_ns = tmp_path / "trace.json", time.time_ns()
    options = {"device": "cuda", "overlap": "weave", "trace": str(path), "progress": False, "max_model_len": 256}
    with LLM(checkpoint("llama"), num_kv_blocks=64, **options) as llm:
        llm.generate([[5] * 100, [6] * 30], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        spans = llm.spans
    assert json.loads(path.read_text())["traceEvents"]
    assert path.with_suffix(".png").stat().st_size > 0
    assert {(span.lane, span.kind) for span in spans} >= {("compute", "segment"), ("compute", "wait"), ("comm", "sum")}
    assert all(start_ns - 1e6 <= span.start_ns <= span.end_ns <= time.time_ns() + 1e6 for span in spans)
    assert any(span.end_ns > span.start_ns for span in spans)
