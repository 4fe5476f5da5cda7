"""CudaCapturer on streams and graphs that are fakes, by torch's own torch.cuda.graph and torch.cuda.stream."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tokenweave.engine.capturer import CudaCapturer

DEVICE = torch.device("cuda", 0)


@dataclass(eq=False)
class Stream:
    device: torch.device = DEVICE


@dataclass
class Cuda:
    """pools: of the captures so far. failure: of the end of a capture."""

    current: Stream = field(default_factory=Stream)
    pools: list[Any] = field(default_factory=list)
    failure: Exception | None = None

    def graph(self) -> Graph:
        return Graph(self)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream


class Graph:
    def __init__(self, cuda: Cuda):
        self.cuda = cuda

    def capture_begin(self, pool: Any, **_: Any) -> None:
        self.cuda.pools.append(pool)

    def capture_end(self) -> None:
        if self.cuda.failure is not None:
            raise self.cuda.failure

    def replay(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake, handles = Cuda(), itertools.count()
    functions = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "Stream": lambda device: Stream(device),
        "CUDAGraph": fake.graph,
        "current_stream": lambda device=None: fake.current,
        "set_stream": fake.set_stream,
        "graph_pool_handle": lambda: (0, next(handles)),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return fake


def test_graphs_share_a_pool_as_long_as_one_is_held(cuda):
    """torch takes a pool of which all graphs are gone for dead: to capture in it again fails."""
    capturer = CudaCapturer(DEVICE)
    first = capturer.capture(lambda: None)
    second = capturer.capture(lambda: None)
    del first
    third = capturer.capture(lambda: None)
    assert cuda.pools == [(0, 0)] * 3
    del second, third
    kept = capturer.capture(lambda: None)
    assert cuda.pools[3:] == [(0, 1)]
    kept()


def test_work_is_captured_on_a_stream_of_its_own(cuda):
    here, streams = cuda.current, []
    capturer = CudaCapturer(DEVICE)
    capturer.capture(lambda: streams.append(cuda.current))
    assert streams == [capturer.stream]
    assert cuda.current is here


@pytest.mark.parametrize("where", ["work", "end", "both"])
def test_after_a_capture_that_fails_work_is_queued_where_it_was(cuda, where):
    """torch.cuda.graph leaves its stream the current one where a capture cannot end."""
    here = cuda.current
    cuda.failure = torch.AcceleratorError("CUDA error: capture invalidated") if where != "work" else None

    def run() -> None:
        if where != "end":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError) as caught:
        CudaCapturer(DEVICE).capture(run)
    assert cuda.current is here
    assert isinstance(caught.value, torch.OutOfMemoryError) == (where == "work")
