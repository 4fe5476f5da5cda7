"""What stands in for torch.cuda. torch.cuda.stream and torch.cuda.graph are the real ones, on what stands in for the
rest. A function takes the arguments that the real one takes, and no others."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.capture import Recording
from tests.emulated.device import CUDA, Device, Generator, OnlyGpu
from tests.emulated.launches import launches_on
from tests.emulated.memory import Memory
from tests.emulated.queue import DEFAULT, Queue, Recorded

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "uuid": "00000000-0000-0000-0000-000000000000",
    "L2_cache_size": 50 << 20,
}
DEVICE_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@dataclass(frozen=True)
class Gpu:
    device: Device
    queue: Queue
    memory: Memory


@contextlib.contextmanager
def emulated_gpu(total_bytes: int = 1 << 30, others_bytes: int = 10 << 20, kernels: str = "torch") -> Iterator[Gpu]:
    """kernels: what computes Triton's, "torch", "interpreter" or "both"."""
    queue, memory = Queue(), Memory(total_bytes, others_bytes)
    gpu = Gpu(Device(queue, memory), queue, memory)
    launches = launches_on(gpu.device, kernels)
    with pytest.MonkeyPatch.context() as patch, no_device_guard(), launches, OnlyGpu(), gpu.device:
        install(patch, gpu)
        yield gpu


@contextlib.contextmanager
def no_device_guard() -> Iterator[None]:
    """Torch looks up how to make a GPU the current one, which its build for CPUs has not. Here: as for a CPU."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, DEVICE_GUARDS)
    kept, guards[1] = guards[1], guards[0]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a CPU's, and copies it
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        guards[1] = kept


def install(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    for name, fake in functions_of(gpu).items():
        patch.setattr(torch.cuda, name, strict(getattr(torch.cuda, name), fake))
    for kind in (Stream, Event, CUDAGraph):
        patch.setattr(torch.cuda, kind.__name__, type(kind.__name__, (kind,), {"queue": gpu.queue}))
    torch.cuda.Stream()  # the default
    for name in ("_exchange_device", "_maybe_exchange_device"):
        patch.setattr(torch.cuda, name, lambda device: 0)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    patch.setattr(torch._C._distributed_c10d._SymmetricMemory, "has_multicast_support", lambda *_: False)
    patch.setattr(torch, "tensor", tensor_of(gpu.device, torch.tensor))
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(threading.Thread, "run", with_gpu(threading.Thread.run, gpu))


def functions_of(gpu: Gpu) -> dict[str, Callable[..., Any]]:
    """Of torch.cuda, by name."""
    queue, memory = gpu.queue, gpu.memory
    properties = SimpleNamespace(**H100, total_memory=memory.total_bytes)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (memory.free_bytes, memory.total_bytes),
        "memory_allocated": lambda device=None: memory.allocated_bytes,
        "memory_reserved": lambda device=None: memory.reserved_bytes,
        "max_memory_allocated": lambda device=None: memory.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: memory.restart_peak(),
        "empty_cache": memory.empty_cache,
        "synchronize": lambda device=None: queue.host_waits("torch.cuda.synchronize"),
        "set_sync_debug_mode": lambda debug_mode: setattr(queue, "sync_debug_mode", debug_mode),
        "current_stream": lambda device=None: queue.streams[queue.stream],
        "default_stream": lambda device=None: queue.streams[DEFAULT],
        "set_stream": lambda stream: setattr(queue, "stream", stream.name),
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: queue.capture is not None and queue.stream in queue.capture.last,
    }


def tensor_of(device: Device, tensor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor, which asks CUDA for pinned memory by a way of its own."""

    def make(data: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = tensor(data, **options)
        return device.pinned_copy(made) if pin_memory else made

    return make


def with_gpu(run: Callable[..., None], gpu: Gpu) -> Callable[..., None]:
    """Threads see the same GPU."""

    def run_with_gpu(thread: threading.Thread) -> None:
        with OnlyGpu(), Device(gpu.queue, gpu.memory):
            run(thread)

    return run_with_gpu


def strict(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, for arguments that the real one takes."""
    signature = inspect.signature(real)

    @functools.wraps(fake)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return fake(*args, **kwargs)

    return call


class Stream:
    """torch.cuda.Stream. The first one is the default."""

    queue: Queue
    device = CUDA

    def __init__(self, device: Any = None, priority: int = 0):
        self.priority = priority
        self.cuda_stream = len(self.queue.streams)
        self.name = f"stream {self.cuda_stream}"
        self.queue.streams[self.name] = self

    def wait_event(self, event: Event) -> None:
        self.queue.stream_waits(self.name, event, event.recorded)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = torch.cuda.Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.queue.host_waits("Stream.synchronize")


class Event:
    """torch.cuda.Event. The host's first look finds it not done."""

    queue: Queue
    job = 0  # of tests.weave.streams
    order = itertools.count()  # in which events are recorded, a microsecond apart

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ):
        self.enable_timing = enable_timing
        self.recorded: Recorded | None = None

    def record(self, stream: Stream | None = None) -> None:
        name = self.queue.stream if stream is None else stream.name
        self.recorded, self.recorded_us = self.queue.record(name, self), next(self.order)

    def wait(self, stream: Stream | None = None) -> None:
        name = self.queue.stream if stream is None else stream.name
        self.queue.stream_waits(name, self, self.recorded)

    def query(self) -> bool:
        if self.recorded is None:
            return True
        if self.recorded.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted on an event last recorded in a capturing stream")
        self.recorded.looks += 1
        if self.recorded.looks == 1:
            return False
        for copy in self.recorded.copies:
            copy.arrive()
        self.queue.host_saw(self)
        return True

    def synchronize(self) -> None:
        self.queue.host_waits("Event.synchronize")

    def elapsed_time(self, end_event: Event) -> float:
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("both events should have enable_timing=True")
        return (end_event.recorded_us - self.recorded_us) / 1e3


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    queue: Queue

    def __init__(self, keep_graph: bool = False):
        self.recording: Recording | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
        self.queue.begin_capture()

    def capture_end(self) -> None:
        self.recording = self.queue.end_capture()

    def replay(self) -> None:
        assert self.recording is not None, "a graph that was not captured"
        self.recording.replay()
