"""Launcher: the fused kernel's variants on this rank's GPU, compiled at first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenweave.kernels.function import Function
from tokenweave.kernels.fused import NAME, Geometry, Launch, Variant, geometry, headers, shared_bytes_of, source
from tokenweave.kernels.jit import arch_of, cubin


class Launcher:
    """meet: comes back once every rank has called it. It follows each compilation, so that no rank's kernel waits, with
    its clock running, for a rank that still compiles."""

    def __init__(self, device: torch.device, meet: Callable[[], Any]):
        capability = torch.cuda.get_device_capability(device)
        self.device = device
        self.arch = arch_of(capability)
        self.shared_bytes = shared_bytes_of(capability)
        self.meet = meet
        self._functions: dict[Variant, Function] = {}

    def geometry(self, variant: Variant) -> Geometry:
        return geometry(variant, self.shared_bytes)

    def launch(self, variant: Variant, launch: Launch, num_sms: int, virtual_ranks: int = 1) -> None:
        """Queue one launch of `num_sms` blocks on the current stream. Raises DriverError, and CompileError at first.

        virtual_ranks: this one GPU plays so many ranks, from launch.place.rank on, each by `num_sms` blocks and with a
        residual and a report of its own. Refused unless all blocks, which wait for each other, are resident at a time.
        """
        function = self._functions.get(variant) or self.load(variant)
        layout = self.geometry(variant)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        blocks, threads = (num_sms, virtual_ranks, 1), (layout.threads, 1, 1)
        function.launch(blocks, threads, layout.shared_bytes(variant), stream, launch, cooperative=virtual_ranks > 1)

    def load(self, variant: Variant) -> Function:
        """Compile, or find in the cache, and load. Collective. Raises RuntimeError while a CUDA graph is captured."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a CUDA graph cannot capture the first use of {variant}; run it once before")
        layout = self.geometry(variant)
        binary = cubin(source(variant, layout), self.arch, headers())
        self._functions[variant] = function = Function(binary, NAME, layout.shared_bytes(variant))
        self.meet()
        return function
