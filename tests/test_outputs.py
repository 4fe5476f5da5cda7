import dataclasses
import pickle

import pytest

from tokenweave.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def request_output() -> RequestOutput:
    logprobs = [{5: Logprob(-0.5, 1, " a"), 7: Logprob(-1.5, 2, "b")}]
    completion = CompletionOutput(0, " a", [5], -0.5, logprobs, "stop", "\n")
    return RequestOutput("0", "x", [1, 2], [completion], True, RequestMetrics(1.0, 1.5, 2.0, 4.0))


def test_survives_a_broadcast():
    assert pickle.loads(pickle.dumps(request_output())) == request_output()


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_output().finished = False  # type: ignore[misc]


def test_times_are_since_arrival():
    metrics = request_output().metrics
    assert metrics is not None
    assert (metrics.ttft_s, metrics.latency_s) == (1.0, 3.0)


def test_times_of_what_has_not_happened_are_none():
    metrics = RequestMetrics(1.0)
    assert (metrics.ttft_s, metrics.latency_s) == (None, None)
