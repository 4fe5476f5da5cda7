"""Launcher: the fused kernel's variants on this rank's GPU, compiled at first use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from tokenweave.kernels.function import Function
from tokenweave.kernels.fused import NAME, Geometry, Launch, Variant, geometry, headers, shared_bytes_of, source
from tokenweave.kernels.jit import arch_of, cubin


class Launcher:
    """together: Ranks.together. All ranks compile a variant at the same time, and go on when all have: no rank's kernel
    waits, with its clock running, for one that still compiles, and a failure of one is every rank's.

    shared_bytes: what a block may have on every rank's GPU, so that all divide a block alike; None: on this one.
    """

    def __init__(
        self,
        device: torch.device,
        together: Callable[[str], AbstractContextManager[None]],
        shared_bytes: int | None = None,
    ):
        capability = torch.cuda.get_device_capability(device)
        self.device = device
        self.arch = arch_of(capability)
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.shared_bytes = shared_bytes_of(capability) if shared_bytes is None else shared_bytes
        self.together = together
        self._functions: dict[Variant, Function] = {}

    def geometry(self, variant: Variant) -> Geometry:
        return geometry(variant, self.shared_bytes)

    def launch(self, variant: Variant, launch: Launch, num_sms: int, virtual_ranks: int = 1) -> None:
        """Queue one launch of `num_sms` blocks on the current stream. Raises DriverError, and CompileError at first.

        virtual_ranks: this one GPU plays so many ranks, from launch.place.rank on, each by `num_sms` blocks and with a
        residual and a report of its own. Refused unless all blocks, which wait for each other, are resident at a time.
        """
        if not 1 <= num_sms <= self.sms:
            raise ValueError(f"num_sms must be 1 to {self.sms}, the SMs of this GPU, got {num_sms}")
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
        with self.together("compiling the fused kernel"):
            binary = cubin(source(variant, layout), self.arch, headers())
            self._functions[variant] = Function(binary, NAME, layout.shared_bytes(variant))
        return self._functions[variant]
