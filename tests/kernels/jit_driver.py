"""Triton's launch path without a GPU: `kernel[grid](...)` binds, specialises, compiles and caches as on a GPU that is
not there, and what would be launched is recorded.

    with gpu() as driver:
        gated(torch.empty(8, 64, dtype=torch.bfloat16, device="meta"), "silu")
    assert driver.built == {"gated_kernel": 1}             # how often each kernel was compiled
    assert driver.launched[0].grid == (8, 1, 1)

Not for processes in which Triton interprets its kernels (TRITON_INTERPRET).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest

from tests.kernels.triton_aot import SHARED_LIMIT_BYTES
from tokenweave.kernels.inspect_cubin import resources

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of each dimension of a grid
REGISTERS = 64 << 10  # of an SM
STREAM = 7


@dataclass(frozen=True)
class Launched:
    """shared_bytes: per block, of dynamic shared memory; 0 where nothing was compiled."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    arguments: dict[str, Any]


class GpuDriver:
    """What Triton asks of a driver, and of its `utils`. The device is its own, so that what is compiled for it is found
    on no device of this machine."""

    def __init__(self, capability: int):
        self.capability = capability
        self.device = object()
        self.utils = self
        self.launched: list[Launched] = []
        self.built: Counter[str] = Counter()
        self.spilled: set[str] = set()
        self.kernels: set[Any] = set()

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        assert device is self.device
        return STREAM

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT_BYTES[self.capability]}

    def load_binary(self, name: str, cubin: bytes, shared_bytes: int, device: object) -> tuple[Any, ...]:
        """(module, function, registers, spilled registers, most threads)"""
        taken = resources(cubin)
        if taken.uses_local_memory:
            self.spilled.add(name)
        per_warp = -(-taken.registers * 32 // 256) * 256
        return name, name, taken.registers, taken.stack_bytes // 4, min(REGISTERS // per_warp // 4 * 128, 1024)

    def unload_module(self, module: str) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        """Asked for once by each kernel that was compiled."""
        self.built[source.fn.__name__] += 1
        self.kernels.add(source.fn)
        return Launcher(self, source, metadata)

    def forget(self) -> None:
        """While this driver is still there to unload what was compiled."""
        for kernel in self.kernels:
            kernel.device_caches.pop(self.device)


class Launcher:
    """Takes what CUDA's launcher does, from Triton 3.6 to 3.9, and refuses what it would."""

    def __init__(self, driver: GpuDriver, source: Any, metadata: Any):
        self.driver = driver
        self.signature = dict(source.signature)
        self.kernel = source.fn.__name__
        self.num_warps = metadata.num_warps
        self.shared_bytes = getattr(metadata, "shared", 0)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _, _, _, _, *values = rest  # metadata of the kernel and of the launch, hooks before and after
        given = dict(zip(self.signature, values, strict=True))
        wrong = [
            f"{name}={given[name]!r}, {kind}" for name, kind in self.signature.items() if not fits(given[name], kind)
        ]
        wrong += [f"grid {x, y, z}"] * (any(map(int.__gt__, (x, y, z), MOST_PROGRAMS)) or prod((x, y, z)) >= 2**31)
        assert not wrong, f"{self.kernel} cannot be launched: {', '.join(wrong)}"
        assert stream == STREAM
        self.driver.launched.append(Launched(self.kernel, (x, y, z), self.num_warps, self.shared_bytes, given))


def fits(value: Any, kind: str) -> bool:
    """Whether an argument is of the type that was compiled in."""
    if kind == "constexpr":
        return True
    if kind.startswith("*"):
        return value.data_ptr() % value.element_size() == 0
    if kind.startswith("fp"):
        return isinstance(value, float)
    bits = int(kind[1:])
    return isinstance(value, int) and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


@contextmanager
def gpu(capability: int = 90, compiles: bool = True) -> Iterator[GpuDriver]:
    """Inside, Triton launches on a GPU of that compute capability. compiles=False: what would be compiled is counted
    alone, which takes no time."""
    from triton.runtime import JITFunction, driver

    fake = GpuDriver(capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", fake)
        if not compiles:
            patch.setattr(JITFunction, "_do_compile", counted)
        try:
            yield fake
        finally:
            fake.forget()


def counted(
    kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, _: bool
) -> Any:
    """As JITFunction._do_compile, with a kernel that is not there."""
    from triton.runtime import driver

    built = Uncompiled(driver.active.launcher_cls(kernel.ASTSource(kernel, signature, constants, attrs), options))
    kernel.device_caches[device][0][key] = built
    return built


@dataclass(frozen=True)
class Uncompiled:
    """What JITFunction.run asks of a CompiledKernel."""

    run: Launcher
    function: None = None
    packed_metadata: None = None

    def launch_metadata(self, *launch: Any) -> None: ...
