"""Real compiles with NVRTC, and the cache on disk: hits, changed headers, races, damaged files, bad folders."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from tokenweave.kernels import cache, compiler, jit
from tokenweave.kernels.cache import CubinCache, cache_folder, content_key
from tokenweave.kernels.jit import CompileError, CompilerMissing, arch_of, cubin

SOURCE = """
#include "nested/scale.cuh"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] = scaled(x[threadIdx.x]) + EXTRA; }
"""
OPTIONS = ("--define-macro=EXTRA=1",)
HEADER = "__device__ inline float scaled(float x) { return 2 * x; }"
PLAIN = 'extern "C" __global__ void plain(float* x) { x[threadIdx.x] = 1; }'
VERSION = (13, 0)


@pytest.fixture
def include(tmp_path: Path) -> Path:
    folder = tmp_path / "include"
    (folder / "nested").mkdir(parents=True)
    (folder / "nested" / "scale.cuh").write_text(HEADER)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archs of all real compiles, in order."""
    archs: list[str] = []

    def counted(source, arch, include, options):
        archs.append(arch)
        return compiler.compile_cubin(source, arch, include, options)

    monkeypatch.setattr(jit, "compile_cubin", counted)
    return archs


# -- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_compiles_with_headers_and_options(arch, nvrtc, include, kernel_cache):
    found = cubin(SOURCE, arch, include, OPTIONS)
    assert found.startswith(b"\x7fELF")
    assert arch.encode() in found  # the cubin names what it is for


def test_a_compile_error_has_the_log_and_the_arch(nvrtc, kernel_cache):
    with pytest.raises(
        CompileError, match=r"(?s)sm_90a.*kernel\.cu\(1\).*identifier \"missing\" is undefined"
    ) as error:
        cubin('extern "C" __global__ void k() { missing(); }', "sm_90a", None)
    assert "\0" not in str(error.value)
    assert not list(kernel_cache.glob("*"))


def test_an_option_that_nvrtc_does_not_know_is_named(nvrtc, kernel_cache):
    with pytest.raises(CompileError, match=r"NVRTC_ERROR_INVALID_OPTION(?s:.*)--no-such-option"):
        cubin(PLAIN, "sm_80", None, ("--no-such-option",))


@pytest.mark.parametrize("arch", ["sm_999", "sm_20", "compute_90", "90a", "sm_90a --foo", ""])
def test_an_unknown_arch_is_refused_with_the_known_ones(arch, nvrtc, kernel_cache):
    with pytest.raises(CompileError, match=r"knows no arch '.*', only .*sm_80.*sm_90"):
        cubin(PLAIN, arch, None)


def test_a_missing_include_folder_is_named(nvrtc, tmp_path, kernel_cache):
    with pytest.raises(FileNotFoundError, match=f"include folder {tmp_path / 'none'} does not exist"):
        cubin(PLAIN, "sm_80", tmp_path / "none")


def test_without_cuda_python_the_error_says_what_to_install(monkeypatch, kernel_cache):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompilerMissing, match=r"^[^\n]*pip install tokenweave\[cuda\][^\n]*$"):
        cubin(PLAIN, "sm_80", None)


def test_without_the_library_the_error_says_what_to_install(nvrtc, monkeypatch, kernel_cache):
    from cuda.bindings import nvrtc as bindings

    def not_found() -> None:
        raise RuntimeError("libnvrtc.so.13 was not found\nin these 20 places")

    monkeypatch.setattr(bindings, "nvrtcVersion", not_found)
    with pytest.raises(CompilerMissing, match=r"^[^\n]*CUDA build of torch[^\n]*libnvrtc.so.13 was not found\)$"):
        cubin(PLAIN, "sm_80", None)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((10, 3), "sm_103a"),
        ((12, 0), "sm_120a"),
        ((12, 1), "sm_121a"),
    ],
)
def test_arch_of(capability, arch):
    assert arch_of(capability) == arch


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_call_compiles_nothing(nvrtc, include, kernel_cache, compiled):
    first = cubin(SOURCE, "sm_90a", include, OPTIONS)
    assert cubin(SOURCE, "sm_90a", include, OPTIONS) == first
    assert cubin(SOURCE, "sm_80", include, OPTIONS) != first
    assert compiled == ["sm_90a", "sm_80"]


def test_a_changed_header_is_compiled_anew(nvrtc, include, kernel_cache, compiled):
    before = cubin(SOURCE, "sm_90a", include, OPTIONS)
    (include / "nested" / "scale.cuh").write_text(HEADER.replace("2 * x", "3 * x"))
    assert cubin(SOURCE, "sm_90a", include, OPTIONS) != before
    assert len(compiled) == 2


def test_the_key_is_of_content_alone(include, tmp_path):
    moved = include.rename(tmp_path / "moved")
    key = content_key(SOURCE, "sm_90a", moved, OPTIONS, VERSION)
    assert key == content_key(SOURCE, "sm_90a", moved.rename(include), OPTIONS, VERSION)


def test_all_that_decides_a_cubin_is_in_the_key(include):
    def key(source=SOURCE, arch="sm_90a", folder=include, options=OPTIONS, version=VERSION) -> str:
        return content_key(source, arch, folder, options, version)

    keys = [key(), key(source=SOURCE + " "), key(arch="sm_80"), key(folder=None), key(options=()), key(version=(13, 1))]
    keys += [key(options=("a", "b")), key(options=("ab",)), key(arch="s"), key(source=SOURCE + "s", arch="")]
    (include / "new.cuh").write_text("")
    keys.append(key())
    (include / "new.cuh").rename(include / "nested" / "new.cuh")
    keys.append(key())
    (include / "nested" / "scale.cuh").write_text(HEADER + " ")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "other text", "digest of nothing"])
def test_a_damaged_file_is_compiled_again_and_mended(damage, nvrtc, kernel_cache, compiled):
    sound = cubin(PLAIN, "sm_80", None)
    (file,) = kernel_cache.iterdir()
    stored = file.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": stored[: len(stored) // 2],
        "one bit": stored[:100] + bytes([stored[100] ^ 1]) + stored[101:],
        "other text": b"not a cubin",
        "digest of nothing": hashlib.sha256(b"").digest(),
    }
    file.write_bytes(damaged[damage])
    assert [cubin(PLAIN, "sm_80", None), cubin(PLAIN, "sm_80", None)] == [sound, sound]
    assert compiled == ["sm_80", "sm_80"]
    assert file.read_bytes() == stored


def test_ranks_that_race_on_a_cold_cache_get_the_same_cubins(ranks, nvrtc, kernel_cache):
    results = ranks(4).run(race, str(kernel_cache.parent))
    assert all(result == results[0] for result in results)
    kept = sorted(
        hashlib.sha256(file.read_bytes()[: -cache.DIGEST_BYTES]).hexdigest() for file in kernel_cache.iterdir()
    )
    assert kept == sorted(results[0])  # and nothing else: no file half-written or left behind


def race(folder: str) -> list[str]:
    """Digests of the same cubins, that all ranks ask for at the same moment."""
    os.environ["TOKENWEAVE_CACHE"] = folder
    try:
        digests = []
        for number in range(6):
            dist.barrier()
            found = cubin(PLAIN.replace("1;", f"{number};"), "sm_90a", None)
            digests.append(hashlib.sha256(found).hexdigest())
        return digests
    finally:
        del os.environ["TOKENWEAVE_CACHE"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    kept = CubinCache(tmp_path)
    kept.store("key", b"old")
    monkeypatch.setattr(cache.os, "replace", no_space)
    with pytest.warns(UserWarning, match="No space left"):
        kept.store("key", b"new")
    assert kept.load("key") == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["key.cubin"]


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_folder_that_cannot_be_written_is_named_once_and_done_without(nvrtc, tmp_path, monkeypatch, compiled):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOKENWEAVE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set TOKENWEAVE_CACHE") as seen:
        first = cubin(PLAIN, "sm_80", None)
    assert str(tmp_path / "file" / "kernels") in str(seen[0].message)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin(PLAIN, "sm_80", None) == first
    assert compiled == ["sm_80", "sm_80"]


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TOKENWEAVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as good as unset, says its specification
    assert cache_folder() == Path("/home/someone/.cache/tokenweave/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/fast/tokenweave/kernels")
    monkeypatch.setenv("TOKENWEAVE_CACHE", "/here")
    assert cache_folder() == Path("/here/kernels")
