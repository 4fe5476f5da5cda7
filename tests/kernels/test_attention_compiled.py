"""The attention kernels as compiled for GPUs that are not there: no spills, shared memory that every GPU has."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.kernels.triton_aot import CAPABILITIES, Launch, compiled, launches

HEAD_DIMS = (64, 96, 128, 256)
SHARED_BYTES = 100 << 10


@pytest.fixture(autouse=True)
def triton():
    return pytest.importorskip("triton")


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    heads: int = 32,
    kv_heads: int = 8,
    window: int | None = None,
    softcap: float | None = None,
    spans: int = 9,
    blocks: int = 4097,
) -> list[Launch]:
    """The launches of a step with prompts and decoding, over a cache of 80 layers."""
    from tokenweave.kernels.attention import Pages, paged_attention
    from tokenweave.kernels.attention_sizes import Gpu

    cache = meta(1000, 80, 2, 16, kv_heads, head_dim, dtype=dtype)
    q = meta(2048, heads, head_dim, dtype=dtype)
    pages = Pages(meta(spans + 1), meta(spans), meta(spans, blocks), shortest=1, longest=2048)
    keys, values, gpu = cache[:, 1, 0], cache[:, 1, 1], Gpu(132, capability)
    return launches(lambda: paged_attention(q, keys, values, pages, 0.1, window, softcap, gpu))


def check(capability: int, *args: Any, **kwargs: Any) -> None:
    found = {launch.kernel.__name__: launch for launch in attention(capability, *args, **kwargs)}
    assert list(found) == ["prefill", "decode", "join"]
    for name, launch in found.items():
        built = compiled(launch, capability)
        assert not built.complaints(capability), name
        assert built.shared_bytes < SHARED_BYTES, name
        ahead = built.asm["ptx"].count("cp.async.cg.shared.global")
        assert name == "join" or ahead >= 8, f"{name} does not load keys ahead, 16 bytes at a time"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bfloat16(capability, head_dim):
    check(capability, torch.bfloat16, head_dim)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_window_and_soft_cap(capability):
    check(capability, torch.bfloat16, 256, 16, 8, window=4096, softcap=50.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_that_are_smaller_than_what_a_dot_product_takes(dtype):
    """Those of the tests' models: an interpreter takes them as they are, a compiler does not."""
    for launch in attention(90, dtype, 8, heads=8, kv_heads=4):
        assert not compiled(launch, 90).complaints(90), launch.kernel.__name__


@pytest.mark.full
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "capped"])
@pytest.mark.parametrize("window", [None, 1000], ids=["", "window"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (7, 1), (12, 2), (64, 4)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_variants(capability, dtype, head_dim, heads, kv_heads, window, softcap):
    check(capability, dtype, head_dim, heads, kv_heads, window, softcap)


@pytest.mark.full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float32(capability, head_dim):
    check(capability, torch.float32, head_dim, window=1000, softcap=30.0)


def test_places_in_the_cache_are_64_bits():
    """A cache may have more than 2**31 elements."""
    for launch in attention(90, torch.bfloat16, 128)[:2]:
        ttir = compiled(launch, 90).asm["ttir"]
        loads = re.findall(r"arith\.extsi .* : tensor<\d+xi32> to tensor<\d+xi64>", ttir)
        assert loads, launch.kernel.__name__
        assert re.search(r"arith\.muli .* : tensor<\d+xi64>", ttir), launch.kernel.__name__
