"""Capturer: what turns queued work into a graph that is launched as one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch


class Capturer(Protocol):
    """Where work is queued while it is recorded instead of run."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does on each call, on the memory that `run` used, what `run` queued when it was called here, once."""


class CudaCapturer:
    """CUDA graphs that share one pool of memory: one is launched at a time, all on the same stream.

    Nothing runs on `stream` outside a capture. So cuBLAS's workspace of that stream, which torch keeps, lies in the
    pool: torch from 2.12 on drops it when any of the graphs goes, and elsewhere others would then be given its memory
    while the other graphs still write to it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if not self.graphs:  # torch takes a pool of which all graphs are gone for dead, and refuses to use it again
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self.device)  # where torch does not come back to if a capture cannot end
        # Other threads may go on using the device: NCCL's watchdog does.
        with (
            torch.cuda.stream(here),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            run()
        self.graphs.add(graph)
        return graph.replay
