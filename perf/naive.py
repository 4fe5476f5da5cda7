"""The naive kernel of naive.cuh: launched as the fused one is, with one row in flight for a block of 1024 threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from tokenweave.kernels.function import Function
from tokenweave.kernels.fused import Geometry, Launch, Variant, headers, shape
from tokenweave.kernels.jit import arch_of, cubin

NAME = "naive_allreduce_rmsnorm"
LAYOUT = Geometry(threads_per_row=1024, rows_per_block=1)
SHARED_BYTES = 4 * LAYOUT.threads // 32


def naive_source(variant: Variant) -> str:
    """The translation unit. Of `variant` only dtype, hidden size and world size may differ from the one measured."""
    return f"""#include "kernel.cuh"
{Path(__file__).with_name("naive.cuh").read_text()}
using namespace tokenweave;
static_assert(sizeof(Launch) == {ctypes.sizeof(Launch)}, "as kernels/fused.py has it");
extern "C" __global__ void __launch_bounds__({LAYOUT.threads}, 1) {NAME}(const __grid_constant__ Launch launch) {{
  naive_allreduce_rmsnorm<Shape<{shape(variant, LAYOUT)}>>(launch);
}}
"""


class NaiveLauncher:
    """Launches the naive kernel for virtual ranks, as kernels/launcher.py does the fused one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.arch = arch_of(torch.cuda.get_device_capability(device))
        self._functions: dict[Variant, Function] = {}

    def launch(self, variant: Variant, launch: Launch, num_sms: int, virtual_ranks: int) -> None:
        function = self._functions.get(variant) or self._load(variant)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        blocks, threads = (num_sms, virtual_ranks, 1), (LAYOUT.threads, 1, 1)
        function.launch(blocks, threads, SHARED_BYTES, stream, launch, cooperative=True)

    def _load(self, variant: Variant) -> Function:
        binary = cubin(naive_source(variant), self.arch, headers())
        self._functions[variant] = function = Function(binary, NAME, SHARED_BYTES)
        return function
