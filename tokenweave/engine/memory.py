"""Memory: what a rank's device holds, what is left of it for the KV cache, and what to say when it is full."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

CPU_CACHE_SHARE = 0.25  # of the memory that is free, for the KV cache, over all ranks of this host
MOST_GRAPHS = 128  # held at a time
LEAST_GRAPHS = 8  # held, whatever they take: decoding needs about as many
GRAPHS_SHARE = 0.02  # of a GPU's memory, that more graphs than these may take


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

    def restart(self) -> Reading:
        """Let go of what nobody uses, and count the peak from here on. As `read` after that."""


class CudaMeter:
    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> Reading:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        counters = (torch.cuda.memory_reserved, torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)
        return Reading(total_bytes, free_bytes, *(count(self.device) for count in counters))

    def restart(self) -> Reading:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return self.read()


def open_meter(device: torch.device) -> Meter | None:
    """None on a CPU, where memory is the host's."""
    return CudaMeter(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Memory:
    """What a rank's memory is for. total: the GPU's, or what was free on the host. activations: at most, in the largest
    step, with what was opened for communication; None where that was not run, on a CPU. others: what is not torch's:
    the CUDA context, communication, other processes. graphs: CUDA graphs that are held at most, in graphs_bytes."""

    total_bytes: int
    weights_bytes: int
    activations_bytes: int | None
    others_bytes: int
    block_bytes: int  # of one KV block
    block_size: int  # tokens of one KV block
    blocks: int
    graphs: int = 0
    graphs_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.blocks * self.block_bytes

    def __str__(self) -> str:
        free = " free" if self.activations_bytes is None else ""
        activations = "" if self.activations_bytes is None else f"activations {size(self.activations_bytes)}, "
        graphs = f", up to {self.graphs} CUDA graphs {size(self.graphs_bytes)}" if self.graphs else ""
        others = f", others {size(self.others_bytes)}" if self.others_bytes else ""
        tokens = f"{self.blocks:,} blocks = {self.blocks * self.block_size:,} tokens"
        return (
            f"{size(self.total_bytes)}{free}: weights {size(self.weights_bytes)}, {activations}"
            f"KV cache {size(self.cache_bytes)} = {tokens}{graphs}{others}"
        )


def room_for_graphs(taken_bytes: Sequence[int], total_bytes: int) -> tuple[int, int]:
    """(how many CUDA graphs may be held, what they take then). taken: by a few graphs, one after the other; the first
    with the memory that all share."""
    first, *others = taken_bytes
    each_bytes = max(0, sum(others) // max(1, len(others)))
    count = min(MOST_GRAPHS, max(LEAST_GRAPHS, int(total_bytes * GRAPHS_SHARE) // max(1, each_bytes)))
    return count, max(0, first) + (count - 1) * each_bytes


def check_claim(start: Reading, utilization: float) -> None:
    """Raises ValueError where less is free before anything is loaded than gpu_memory_utilization claims."""
    claim_bytes = int(start.total_bytes * utilization)
    if start.free_bytes < claim_bytes:
        raise ValueError(
            f"gpu_memory_utilization={utilization:g} asks for {size(claim_bytes)} of this GPU's "
            f"{size(start.total_bytes)}, of which {size(start.free_bytes)} are free; free memory on it, or lower "
            "gpu_memory_utilization"
        )


def cache_bytes_left(start: Reading, now: Reading, utilization: float, graphs_bytes: int) -> int:
    """What a GPU has for the KV cache; below 0 where it has less than nothing.

    start: before anything was loaded. now: after the largest step, with nothing kept unused. utilization: the share of
    the GPU's memory that may be used on top of what was in use at the start; so much was free (check_claim).
    """
    grown_bytes = max(0, now.others_bytes - start.others_bytes)
    taken_bytes = now.peak_bytes - start.allocated_bytes + grown_bytes
    return int(now.total_bytes * utilization) - taken_bytes - graphs_bytes


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
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reading = "" if meter is None else f" ({meter.read()})"
        raise kind(f"there is not enough GPU memory for {task}{reading}; {advice}") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Of torch's allocator, or of CUDA itself, as what the driver keeps for a graph; also where the end of a capture
    failed behind it."""
    if error is None:
        return False
    cuda = isinstance(error, torch.AcceleratorError) and "out of memory" in str(error)
    return cuda or isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error.__context__)


def size(count_bytes: int) -> str:
    """In the largest binary unit of which there is one."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count_bytes) >= 1 << shift:
            return f"{count_bytes / (1 << shift):.1f} {unit}"
    return f"{count_bytes} bytes"
