"""Capturer: what turns queued work into a graph that is launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Capturer(Protocol):
    """Where work is queued while it is recorded instead of run."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does on each call, on the memory that `run` used, what `run` queued when it was called here, once."""


class CudaCapturer:
    """CUDA graphs that share one pool of memory: one is launched at a time, all on the same stream."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        return graph.replay
