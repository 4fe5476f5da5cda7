"""Resources and machine code of small kernels, as NVIDIA's tools tell them."""

from __future__ import annotations

import re

import pytest

from tokenweave.kernels import inspect_cubin
from tokenweave.kernels.inspect_cubin import ToolMissing, find_tool, resources, sass
from tokenweave.kernels.jit import cubin

SHARED = """
extern "C" __global__ void shared(float4* x) {
  __shared__ float4 kept[64];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = kept[63 - threadIdx.x];
}
"""
SPILLED = """
extern "C" __global__ void spilled(float* x) {
  float kept[48];
#pragma unroll
  for (int i = 0; i < 48; i++) kept[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; i++) x[i * blockDim.x + threadIdx.x] = kept[47 - i] * kept[i * 7 % 48];
}
"""


@pytest.fixture(autouse=True)
def _tools(nvrtc, kernel_cache) -> None:
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, from Triton's wheel or a CUDA toolkit")


@pytest.mark.parametrize(("arch", "reserved_bytes"), [("sm_80", 0), ("sm_90a", 1024), ("sm_100a", 1024)])
def test_resources(arch, reserved_bytes):
    found = resources(cubin(SHARED, arch, None))
    assert 4 <= found.registers <= 32
    assert found.shared_bytes == 1024 + reserved_bytes
    assert not found.uses_local_memory


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_spills_show(arch):
    roomy = cubin(SPILLED, arch, None)
    tight = cubin(SPILLED, arch, None, ("--maxrregcount=32",))
    assert not resources(roomy).uses_local_memory
    assert resources(tight).uses_local_memory
    assert resources(tight).registers <= 32 < resources(roomy).registers
    assert not re.search(r"\b(STL|LDL)\b", sass(roomy))
    assert re.search(r"\bSTL\b", sass(tight))
    assert re.search(r"\bLDL\b", sass(tight))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_sass_shows_the_width_of_loads_and_stores(arch):
    code = sass(cubin(SHARED, arch, None))
    for instruction in ("LDG.E.128", "STG.E.128", "LDS.128", "STS.128", "BAR.SYNC"):
        assert instruction in code
    assert "shared:" in code.splitlines()


def test_of_several_kernels_one_must_be_named():
    both = cubin(SHARED + SPILLED, "sm_80", None)
    assert resources(both, "shared").shared_bytes == 1024
    assert resources(both, "spilled").shared_bytes == 0
    with pytest.raises(ValueError, match="expected one kernel in the cubin, which has "):
        resources(both)
    with pytest.raises(ValueError, match="expected other in the cubin, which has "):
        resources(both, "other")


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="cuobjdump does not take this cubin: "):
        resources(b"no cubin")


def test_without_the_tools_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(inspect_cubin, "triton_folder", lambda: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(ToolMissing, match=r"cuobjdump was not found .*: pip install triton"):
        resources(b"")
