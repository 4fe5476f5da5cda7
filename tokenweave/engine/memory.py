"""Memory: what a rank's device holds, what is left of it for the KV cache, and what to say when it is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

CPU_CACHE_SHARE = 0.25  # of the memory that is free, for the KV cache, over all ranks of this host


@dataclass(frozen=True)
class Reading:
    """What a GPU says of its memory, in bytes. allocated, peak: by tensors of this process, now and at most since the
    meter was restarted. reserved: what torch holds for tensors."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    peak_bytes: int

    @property
    def others_bytes(self) -> int:
        """What is not torch's: the CUDA context, communication, other processes."""
        return self.total_bytes - self.free_bytes - self.reserved_bytes

    def __str__(self) -> str:
        return (
            f"{size(self.total_bytes)} in all: tensors {size(self.allocated_bytes)}, kept for tensors "
            f"{size(self.reserved_bytes - self.allocated_bytes)}, others {size(self.others_bytes)}, "
            f"free {size(self.free_bytes)}"
        )


class Meter(Protocol):
    """Where readings come from."""

    def read(self) -> Reading: ...

    def restart(self) -> None:
        """Let go of what torch keeps unused, and count the peak from here on."""


class CudaMeter:
    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> Reading:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        counters = (torch.cuda.memory_reserved, torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)
        return Reading(total_bytes, free_bytes, *(count(self.device) for count in counters))

    def restart(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def open_meter(device: torch.device) -> Meter | None:
    """None on a CPU, where memory is the host's."""
    return CudaMeter(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Memory:
    """What a rank's memory is for. total: the GPU's, or what was free on the host. activations: at most, in the largest
    step, with what was opened for communication; None where that was not run, on a CPU. others: what is not this
    model's."""

    total_bytes: int
    weights_bytes: int
    activations_bytes: int | None
    others_bytes: int
    block_bytes: int  # of one KV block
    block_size: int  # tokens of one KV block
    blocks: int

    @property
    def cache_bytes(self) -> int:
        return self.blocks * self.block_bytes

    def __str__(self) -> str:
        free = " free" if self.activations_bytes is None else ""
        activations = "" if self.activations_bytes is None else f"activations {size(self.activations_bytes)}, "
        others = f", others {size(self.others_bytes)}" if self.others_bytes else ""
        tokens = f"{self.blocks:,} blocks = {self.blocks * self.block_size:,} tokens"
        return (
            f"{size(self.total_bytes)}{free}: weights {size(self.weights_bytes)}, {activations}"
            f"KV cache {size(self.cache_bytes)} = {tokens}{others}"
        )


def cache_bytes_left(total_bytes: int, utilization: float, peak_bytes: int, others_bytes: int) -> int:
    """What a GPU has for the KV cache; below 0 where it has less than nothing.

    utilization: the share of its memory that may be in use. peak: of tensors, weights among them, in the largest step.
    """
    return int(total_bytes * utilization) - peak_bytes - others_bytes


def host_cache_bytes() -> int:
    """Bytes a rank on a CPU may use for its KV cache."""
    return int(available_bytes() * CPU_CACHE_SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_bytes() -> int:
    """Memory of this host that can be had without swapping: Linux's own estimate, else all that is not in use."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        sizes_kib = dict(line.split()[:2] for line in meminfo.read_text().splitlines())
        return int(sizes_kib["MemAvailable:"]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def explained(task: str, advice: str, meter: Meter | None, kind: type[Exception] = MemoryError) -> Iterator[None]:
    """Where a GPU's memory runs out in this block, raise an error of this kind with the numbers and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reading = "" if meter is None else f" ({meter.read()})"
        raise kind(f"there is not enough GPU memory for {task}{reading}; {advice}") from error


def size(count_bytes: int) -> str:
    """In the largest binary unit of which there is one."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count_bytes) >= 1 << shift:
            return f"{count_bytes / (1 << shift):.1f} {unit}"
    return f"{count_bytes} bytes"
