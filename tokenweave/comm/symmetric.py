"""Symmetric memory: one allocation of the same layout on every rank, which every rank's GPU can address."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.group import Ranks
from tokenweave.kernels.fused import Abort, Pad
from tokenweave.waiting import within

HALVES = 2
ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class SymmetricMemory:
    """local: uint8 [bytes], this rank's part. addresses: of each rank's part, as this rank's device sees it.
    multicast: the address that stands for all of them, or 0."""

    local: Tensor
    addresses: tuple[int, ...]
    multicast: int = 0


@dataclass(frozen=True)
class Layout:
    """Byte offsets into the allocation: the abort words of the rank, then for each half pads, partial and hidden."""

    max_rows: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def rows_bytes(self) -> int:
        return aligned(self.max_rows * self.hidden_size * self.dtype.itemsize)

    @property
    def half_bytes(self) -> int:
        return aligned(ctypes.sizeof(Pad)) + 2 * self.rows_bytes

    @property
    def abort(self) -> int:
        return 0

    def pad(self, half: int) -> int:
        return aligned(ctypes.sizeof(Abort)) + half * self.half_bytes

    def partial(self, half: int) -> int:
        return self.pad(half) + aligned(ctypes.sizeof(Pad))

    def hidden(self, half: int) -> int:
        return self.partial(half) + self.rows_bytes

    @property
    def total_bytes(self) -> int:
        return self.pad(HALVES)

    def rows(self, memory: Tensor, offset: int) -> Tensor:
        """[max_rows, hidden_size] at `offset` of a rank's memory."""
        size = self.max_rows * self.hidden_size * self.dtype.itemsize
        return memory[offset : offset + size].view(self.dtype).view(self.max_rows, self.hidden_size)

    def signals(self, memory: Tensor) -> list[Tensor]:
        """The parts that must be zero before the first launch: abort words, and the pads of every half."""
        starts = [(self.abort, ctypes.sizeof(Abort)), *((self.pad(half), ctypes.sizeof(Pad)) for half in range(HALVES))]
        return [memory[start : start + size] for start, size in starts]


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def allocate(size_bytes: int, device: torch.device) -> Tensor:
    """This rank's part, uint8 [size_bytes]. Raises RuntimeError where torch cannot."""
    from torch._C._distributed_c10d import _SymmetricMemory  # private, as all of torch's symmetric memory is

    # Not _symmetric_memory.empty: in newer torch it takes from a pool, and what it gives may start inside an
    # allocation. Then buffer_ptrs are those of the allocation, and whether multicast_ptr is depends on the version.
    return _SymmetricMemory.empty_strided_p2p((size_bytes,), (1,), torch.uint8, device)


def exchange(local: Tensor, ranks: Ranks) -> SymmetricMemory:
    """Collective: the addresses of every rank's part, all of one size. Raises RuntimeError where torch cannot, and
    TimeoutError where a rank stays away: they send each other file descriptors, and torch waits for those for ever."""
    from torch.distributed import _symmetric_memory as symmetric

    def meet() -> Any:
        with torch.cuda.device(local.device):
            return symmetric.rendezvous(local, ranks.control.group_name)

    handle = within(ranks.timeout_s, meet, "exchanging the addresses of symmetric memory")
    offset = int(getattr(handle, "offset", 0))
    if offset:
        raise RuntimeError(f"symmetric memory starts at byte {offset} of its allocation, expected 0; report this")
    return SymmetricMemory(local, tuple(handle.buffer_ptrs), int(handle.multicast_ptr or 0))
