"""The fused kernel of one rank of W that is alone on its GPU: its loads and stores stay in the GPU's own memory, and
its blocks stay on their SMs until the wire, which is simulated, would have been done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from perf.overlap.silent import SilentTransport
from tokenweave.comm.transport import ring_all_reduce_bytes
from tokenweave.kernels.function import Function
from tokenweave.kernels.fused import (
    NAME,
    Geometry,
    Launch,
    Variant,
    geometry,
    headers,
    shape,
    shared_bytes_of,
    without_norm,
)
from tokenweave.kernels.jit import arch_of, cubin

PLAIN_SMS = 16  # of the all-reduce without a norm: nothing runs beside it


class Held(ctypes.Structure):
    """As in stand_in.cuh."""

    _fields_ = (("launch", Launch), ("wire_ns", ctypes.c_uint64))


def held_source(variant: Variant, layout: Geometry) -> str:
    """The translation unit."""
    return f"""#include "kernel.cuh"
{Path(__file__).with_name("stand_in.cuh").read_text()}
using namespace tokenweave;
using Fused = Shape<{shape(variant, layout)}>;
static_assert(sizeof(Held) == {ctypes.sizeof(Held)}, "as stand_in_kernel.py has it");
extern "C" __global__ void __launch_bounds__(Fused::THREADS, 1) {NAME}(const __grid_constant__ Held held) {{
  held_to_wire<Fused>(held);
}}
"""


class Device(Protocol):
    """What runs a launch that is to last `wire_ns` at least."""

    def geometry(self, variant: Variant) -> Geometry: ...

    def run(self, variant: Variant, held: Held, num_sms: int) -> None: ...


class CudaDevice:
    """This GPU, on the current stream."""

    def __init__(self, device: torch.device):
        capability = torch.cuda.get_device_capability(device)
        self.device, self.arch, self.shared_bytes = device, arch_of(capability), shared_bytes_of(capability)
        self._functions: dict[Variant, Function] = {}

    def geometry(self, variant: Variant) -> Geometry:
        return geometry(variant, self.shared_bytes)

    def run(self, variant: Variant, held: Held, num_sms: int) -> None:
        layout = self.geometry(variant)
        function = self._functions.get(variant) or self._load(variant, layout)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        function.launch((num_sms, 1, 1), (layout.threads, 1, 1), layout.shared_bytes(variant), stream, held)

    def _load(self, variant: Variant, layout: Geometry) -> Function:
        binary = cubin(held_source(variant, layout), self.arch, headers())
        self._functions[variant] = function = Function(binary, NAME, layout.shared_bytes(variant))
        return function


@dataclass(frozen=True)
class Wire:
    """Seconds of a sum of so many rows by the wire alone: `plain` an all-reduce, `fused` with residual and norm."""

    plain_s: Callable[[int], float]
    fused_s: Callable[[int], float]


class StandInKernels:
    """Launches the fused kernel as rank 0 of W would, alone (tokenweave.comm.fused.Kernels)."""

    def __init__(self, device: Device, wire: Wire):
        self.device, self.wire = device, wire
        self.launches = 0

    def geometry(self, variant: Variant) -> Geometry:
        return self.device.geometry(variant)

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        seconds = self.wire.fused_s(launch.first_row[variant.world_size])
        self.run(variant, launch, num_sms, seconds)

    def run(self, variant: Variant, launch: Launch, num_sms: int, seconds: float) -> None:
        self.launches += 1
        self.device.run(variant, Held(alone(launch, variant), round(seconds * 1e9)), num_sms)


def alone(launch: Launch, variant: Variant) -> Launch:
    """The launch of rank 0, all of whose peers are itself. Changed in place, and returned.

    Peers' partials, and the hidden states that they get, are this rank's own rows one shard further on: so all rows of
    both are read and written once, as peers' reads and writes do on a real machine. The signal for peer p goes to where
    this rank waits for p's.
    """
    shard_bytes = launch.first_row[1] * variant.hidden_size * variant.dtype.itemsize  # rank 0 has the largest shard
    for peer in range(1, variant.world_size):
        launch.partial[peer] = launch.partial[0] + peer * shard_bytes
        launch.hidden[peer] = launch.hidden[0] + peer * shard_bytes
        launch.place.pad[peer] = launch.place.pad[0] + peer * ctypes.sizeof(ctypes.c_uint64)
        launch.place.abort[peer] = launch.place.abort[0]
    return launch


class StandInTransport(SilentTransport):
    """The plain all-reduce of mode "off": the same kernel without residual and norm, held to its wire's time. What it
    sums goes to `scratch` [rows, hidden]; gathers take no time."""

    def __init__(self, world_size: int, kernels: StandInKernels, lasting: Launch, scratch: Tensor):
        super().__init__(0, world_size)
        self.kernels, self.lasting, self.scratch = kernels, lasting, scratch

    def all_reduce(self, total: Tensor) -> int:
        rows, hidden_size = total.shape
        full = Variant(total.dtype, hidden_size, self.world_size, "two_shot")
        launch = Launch.from_buffer_copy(self.lasting)
        launch.partial[0], launch.hidden[0] = total.data_ptr(), self.scratch.data_ptr()
        for rank in range(self.world_size + 1):
            launch.first_row[rank] = bound(rows, self.world_size, rank)
        self.kernels.run(without_norm(full), launch, PLAIN_SMS, self.kernels.wire.plain_s(rows))
        return ring_all_reduce_bytes(total, self.world_size)


def bound(rows: int, world_size: int, rank: int) -> int:
    """Where rank's rows begin; of rank W, where all end."""
    return min(rank, rows % world_size) + rank * (rows // world_size)
