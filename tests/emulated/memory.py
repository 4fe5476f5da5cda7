"""A GPU's memory: what tensors take of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class Memory:
    """others: what is not torch's. storages: those that were counted. pinned: of the host."""

    total_bytes: int
    others_bytes: int
    allocated_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    storages: set[int] = field(default_factory=set)
    pinned: set[StorageWeakRef] = field(default_factory=set)

    def note(self, tensors: Sequence[Tensor]) -> None:
        """Take what tensors hold that were just made. Raises torch.OutOfMemoryError."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.take(storage.nbytes())
                self.storages.add(storage._cdata)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def take(self, size_bytes: int) -> None:
        if self.allocated_bytes + size_bytes > self.total_bytes - self.others_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size_bytes} bytes.")
        self.allocated_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        self.reserved_bytes = max(self.reserved_bytes, self.allocated_bytes)

    def release(self, storage: int, size_bytes: int) -> None:
        self.storages.discard(storage)
        self.allocated_bytes -= size_bytes

    def empty_cache(self) -> None:
        self.reserved_bytes = self.allocated_bytes

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.reserved_bytes

    def restart_peak(self) -> None:
        self.peak_bytes = self.allocated_bytes
