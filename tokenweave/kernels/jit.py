"""CUDA C++ to a cubin at first use: NVRTC behind a cache on disk. Knows no kernel; needs neither a GPU nor nvcc."""

from __future__ import annotations

from pathlib import Path

from tokenweave.kernels.cache import CubinCache, cache_folder, content_key
from tokenweave.kernels.compiler import CompileError, CompilerMissing, arch_of, compile_cubin, nvrtc_version

__all__ = ["CompileError", "CompilerMissing", "arch_of", "cubin"]


def cubin(source: str, arch: str, include: Path | None, options: tuple[str, ...] = ()) -> bytes:
    """The cubin of `source` for `arch` ("sm_80", "sm_90a", "sm_100a", ...), from the cache where it has it.

    source: CUDA C++ text; its kernels are `extern "C"`. include: the folder of its headers, all of whose files count
    for the cache. options: NVRTC's own, such as "--define-macro=HIDDEN=8192". Ranks may call this at the same time.
    Raises CompileError, which has NVRTC's log, and CompilerMissing where NVRTC or cuda-python is not installed.
    """
    key = content_key(source, arch, include, options, nvrtc_version())
    cache = CubinCache(cache_folder())
    found = cache.load(key)
    if found is None:
        found = compile_cubin(source, arch, include, options)
        cache.store(key, found)
    return found
