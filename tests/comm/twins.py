"""The fused communicator on CPU ranks: symmetric memory is files that every rank maps, kernels are the host twins."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.kernels.twin import compile_twin
from tokenweave.comm.fused import FusedCommunicator, Wiring, report_memory
from tokenweave.comm.symmetric import Layout, SymmetricMemory
from tokenweave.comm.transport import GlooTransport
from tokenweave.engine import runner
from tokenweave.kernels.fused import Geometry, Launch, Variant

GEOMETRY = Geometry(32, 2)  # a thread of the kernel is one of the system


class TwinKernels:
    """Rank 0 compiles what is new; the others wait for it."""

    def __init__(self, folder: Path, memory: SymmetricMemory):
        self.folder = folder
        self.memory = memory
        self.launches: list[tuple[Variant, int]] = []
        self._libraries: dict[Variant, Any] = {}

    def geometry(self, variant: Variant) -> Geometry:
        return GEOMETRY

    def launch(self, variant: Variant, launch: Launch, num_sms: int) -> None:
        self.launches.append((variant, num_sms))
        library = self._libraries.get(variant) or self._load(variant)
        library.tokenweave_launch(ctypes.byref(launch), num_sms)

    def _load(self, variant: Variant) -> Any:
        if dist.get_rank() == 0:
            compile_twin(variant, GEOMETRY, self.folder, shared=True)
        dist.barrier()
        library = ctypes.CDLL(str(compile_twin(variant, GEOMETRY, self.folder, shared=True)))
        addresses = (ctypes.c_void_p * len(self.memory.addresses))(*self.memory.addresses)
        size = self.memory.local.numel()
        library.tokenweave_multicast(ctypes.c_void_p(self.memory.multicast), ctypes.c_uint64(size), addresses)
        self._libraries[variant] = library
        return library


def open_twin(
    kind: str, folder: Path, layout: Layout, one_shot_rows: int = 0, timeout_s: float = 60.0
) -> FusedCommunicator:
    """Collective, on ranks of a pool. kind: "peer" | "multimem"."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = [f"memory-{len(list(folder.glob('memory-*')))}"]
    dist.broadcast_object_list(name, src=0)
    files = [folder / f"{name[0]}-{peer}" for peer in range(world_size)]
    with files[rank].open("wb") as file:
        file.truncate(layout.total_bytes)
    dist.barrier()
    maps = [torch.from_file(str(file), shared=True, size=layout.total_bytes, dtype=torch.uint8) for file in files]
    fake = mmap.mmap(-1, layout.total_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)  # addresses that nothing else has
    multicast = torch.frombuffer(fake, dtype=torch.uint8)
    addresses = tuple(part.data_ptr() for part in maps)
    memory = SymmetricMemory(maps[rank], addresses, multicast.data_ptr() if kind == "multimem" else 0)
    kernels = TwinKernels(folder, memory)
    kernels.keep = (maps, fake, multicast)  # type: ignore[attr-defined]
    report = report_memory(torch.device("cpu"))
    wiring = Wiring(kind, rank, layout, memory, report, kernels, timeout_s, one_shot_rows)
    return FusedCommunicator(GlooTransport(rank, world_size, None), wiring)


@contextlib.contextmanager
def twins_in_the_runtime(kind: str, folder: Path, one_shot_rows: int) -> Iterator[list[FusedCommunicator]]:
    """Every LLM that starts inside sums by twins; yields their communicators."""
    opened: list[FusedCommunicator] = []

    def open_communicator(config: Any, ranks: Any, transport: Any, dtype: torch.dtype, hidden_size: int) -> Any:
        layout = Layout(config.max_num_batched_tokens, hidden_size, dtype)
        communicator = open_twin(kind, folder, layout, one_shot_rows, ranks.timeout_s)
        communicator.transport = transport
        opened.append(communicator)
        return communicator

    with mock.patch.object(runner, "open_communicator", open_communicator):
        yield opened
