"""Triton kernels compiled ahead of time, as a call of their wrapper would on a GPU that is not there.

    for launch in launches(lambda: gated(torch.empty(8, 64, dtype=torch.bfloat16, device="meta"), "silu")):
        built = compiled(launch, 90)                           # capability 9.0
        assert not built.resources.uses_local_memory

Not for processes in which Triton interprets its kernels (TRITON_INTERPRET).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tokenweave.kernels.inspect_cubin import Resources, resources

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block, by CUDA's programming guide
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch that a wrapper asked for: a kernel, what it passed for each parameter, and how to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """shared_bytes: per block, dynamic shared memory. asm: by kind, such as "ttgir" and "ptx"."""

    cubin: bytes
    asm: dict[str, Any]
    shared_bytes: int
    resources: Resources

    def complaints(self, capability: int) -> list[str]:
        """What would make it slow or refuse to start."""
        found = []
        if self.resources.uses_local_memory:
            found.append(f"{self.resources.stack_bytes} bytes a thread are spilled")
        if self.shared_bytes > SHARED_LIMIT_BYTES[capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT_BYTES[capability]}")
        return found


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` makes. Nothing runs, so tensors on the device "meta" will do."""
    from triton.runtime import JITFunction

    seen: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        seen.append(Launch(kernel, tuple(grid(given) if callable(grid) else grid), given, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        call()
    return seen


def compiled(launch: Launch, capability: int) -> Compiled:
    """For compute capability `capability` / 10, specialised as Triton's launcher does: on pointers and integers that
    are multiples of 16, and on integers that are 1. Takes seconds, unless Triton's cache has it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = type_name(value)
        if special and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = built.asm["cubin"]
    return Compiled(cubin, dict(built.asm), built.metadata.shared, resources(cubin))


def type_name(value: Any) -> str:
    """Triton's name for the type of a runtime argument."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel's argument is {value!r}, expected a tensor, an int, a float or None")
