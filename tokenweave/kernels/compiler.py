"""NVRTC, which compiles CUDA C++ text to a cubin.

Through cuda.bindings rather than cuda.core.Program. Both compile without a driver, but ProgramOptions takes no plain
option strings, and the version and the archs of NVRTC, which are needed as well, are in the bindings alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


class CompileError(RuntimeError):
    """NVRTC cannot compile this source, with these options, for this arch. The message has its log."""


class CompilerMissing(ImportError):
    """NVRTC or cuda-python is not installed."""


def arch_of(capability: tuple[int, int]) -> str:
    """The arch to compile for, from what torch.cuda.get_device_capability() gives: (9, 0) -> "sm_90a".

    From 9.0 on the arch-specific one, the only one that has all of the GPU's instructions.
    """
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def nvrtc_version() -> tuple[int, int]:
    """The CUDA version of the NVRTC in use, such as (13, 0). Raises CompilerMissing."""
    nvrtc = load_nvrtc()
    major, minor = call(nvrtc.nvrtcVersion)
    return major, minor


def nvrtc_archs() -> list[int]:
    """The archs that this NVRTC compiles for, such as 90 for sm_90 and sm_90a. Raises CompilerMissing."""
    return list(call(load_nvrtc().nvrtcGetSupportedArchs))


def compile_cubin(source: str, arch: str, include: Path | None, options: tuple[str, ...] = ()) -> bytes:
    """Compiles, whatever the cache holds. Arguments and errors as for jit.cubin."""
    nvrtc = load_nvrtc()
    check_arch(arch, nvrtc_archs(), nvrtc_version())
    include_path = [f"--include-path={include}"] if include else []
    flags = [f"--gpu-architecture={arch}", *include_path, *options]
    program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"kernel.cu", 0, None, None)
    try:
        return build(nvrtc, program, flags)
    finally:
        call(nvrtc.nvrtcDestroyProgram, program)


def build(nvrtc: Any, program: Any, flags: list[str]) -> bytes:
    (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if result:
        log = filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0\n").decode()
        version = "{}.{}".format(*nvrtc_version())
        raise CompileError(f"NVRTC {version} cannot compile with {' '.join(flags)} ({result.name}):\n{log}")
    return filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)


def check_arch(arch: str, numbers: list[int], version: tuple[int, int]) -> None:
    """Raises CompileError unless `arch` is one of `numbers`, those that this NVRTC compiles for."""
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if match is None or int(match[1]) not in numbers:
        known = ", ".join(f"sm_{number}" for number in numbers)
        raise CompileError(
            f"NVRTC {version[0]}.{version[1]} knows no arch {arch!r}, only {known}: for a newer GPU install a newer "
            "CUDA build of torch, which brings its NVRTC along"
        )


def load_nvrtc() -> Any:
    """The module cuda.bindings.nvrtc, with its library loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # only the first call looks for the library
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CompilerMissing(
            "compiling CUDA kernels needs cuda-python, and NVRTC as a CUDA build of torch brings it: "
            f"pip install tokenweave[cuda] ({reason})"
        ) from error
    return nvrtc


def call(entry: Any, *arguments: Any) -> Any:
    """What an NVRTC function returns beside its status, or CompileError."""
    result, *values = entry(*arguments)
    if result:
        raise CompileError(f"{entry.__name__} failed: {result.name}")
    return values[0] if len(values) == 1 else values


def filled(size_of: Any, fill: Any, program: Any) -> bytes:
    buffer = bytearray(call(size_of, program))
    call(fill, program, buffer)
    return bytes(buffer)
