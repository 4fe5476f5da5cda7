"""Loading and launching: with the real bindings on a stub of libcuda, and for real where there is a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tokenweave.kernels.driver import DriverError, bind_context, driver_refusal, open_driver
from tokenweave.kernels.function import Function
from tokenweave.kernels.jit import arch_of, cubin

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = """
struct Argument { int* counts; int add; };
extern "C" __global__ void count(Argument argument) {
  extern __shared__ int kept[];
  kept[threadIdx.x] = argument.add;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(argument.counts + blockIdx.y, kept[blockDim.x - 1]);
}
"""


# -- which cubins a driver takes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvrtc", "driver"),
    [((12, 8), (12, 8)), ((12, 9), (12, 2)), ((12, 2), (12, 9)), ((12, 9), (13, 0)), ((13, 1), (13, 0))],
)
def test_a_driver_takes_its_own_major_version_and_older_ones(nvrtc, driver):
    assert driver_refusal(nvrtc, driver) is None


@pytest.mark.parametrize(("nvrtc", "driver"), [((13, 0), (12, 9)), ((12, 0), (11, 8))])
def test_a_newer_major_version_is_refused_with_what_to_install(nvrtc, driver):
    lowest = {13: 580, 12: 525}[nvrtc[0]]
    refusal = driver_refusal(nvrtc, driver)
    assert refusal is not None
    assert f"CUDA {nvrtc[0]}.{nvrtc[1]}" in refusal
    assert f"install a torch for CUDA {driver[0]}, or update the driver to {lowest} or later" in refusal


def test_a_major_version_not_known_yet_is_refused_too():
    assert str(driver_refusal((14, 0), (13, 2))).endswith("install a torch for CUDA 13, or update the driver")


# -- calls of the driver, on a stub -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub of libcuda."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-python: pip install tokenweave[cuda]")
    if torch.version.cuda:
        pytest.skip("a CUDA build of torch would load the stub too: the tests marked gpu are for it")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("stub")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", HERE / "stub_driver.c"], check=True, timeout=60
    )
    return folder


def stub_calls(stub: Path, **variables: str) -> dict[str, str]:
    """What each step of stub_calls.py printed, or its standard error as "failed"."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(stub), "STUB_DRIVER_VERSION": "13000"} | variables
    command = [sys.executable, "-u", "-m", "tests.kernels.stub_calls"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    steps = [step.partition("\n") for step in done.stdout.split("-- ")[1:]]
    return {name: said.strip() for name, _, said in steps} | ({"failed": done.stderr} if done.returncode else {})


@pytest.fixture(scope="module")
def said(stub) -> dict[str, str]:
    return stub_calls(stub)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("attributes", "(104, 103, 101)"),  # the stub's 100 + the number of the attribute
        ("argument bytes", "16"),
        ("resident", "3"),
        ("struct", "plain 0x33 grid 1 2 3 block 4 5 6 shared 7 stream 0x8000 argument 8 9\nNone"),
        ("bytes", "cooperative 0x33 grid 1 2 3 block 4 5 6 shared 7 stream (nil) argument 8 9\nNone"),
    ],
)
def test_the_driver_gets_what_a_launch_says(step, expected, said):
    assert said.get("failed") is None
    assert said[step] == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("another arch", "DriverError: cuModuleLoadData failed: CUDA_ERROR_NO_BINARY_FOR_GPU: the cubin may be for"),
        ("another name", 'DriverError: cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND: no kernel extern "C" q'),
        ("too much shared", "kernel k may not have 1000000 bytes of dynamic shared memory on this GPU"),
        ("size", "ValueError: kernel k takes a struct of 16 bytes, got 15"),
        ("too large", "launching kernel k failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE (grid=(720, 1, 1), "),
        ("no context", "CUDA_ERROR_INVALID_CONTEXT: this thread has no CUDA context, call bind_context() in it"),
    ],
)
def test_errors_are_named(step, expected, said):
    assert expected in said[step]


def test_a_thread_without_a_context_gets_that_of_torchs_device(stub):
    assert "context 0x14" in stub_calls(stub, STUB_NO_CONTEXT="1")["load"]  # the stub's 0x11 + device 3


def test_a_driver_older_than_the_nvrtc_loads_nothing(stub):
    said = stub_calls(stub, STUB_DRIVER_VERSION="12080")
    assert said["load"].startswith("DriverError: NVRTC is of CUDA 13.0, but the driver takes CUDA 12.x at most")


def test_without_a_driver_the_error_says_so():
    pytest.importorskip("cuda.bindings", reason="needs cuda-python: pip install tokenweave[cuda]")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.raises(DriverError):
        open_driver()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


class Argument(ctypes.Structure):
    _fields_ = (("counts", ctypes.c_void_p), ("add", ctypes.c_int))


SHARED_BYTES = 100 * 1024  # more than the 48 KB that need no asking


@pytest.fixture
def counter(nvrtc, kernel_cache) -> Function:
    torch.cuda.init()
    return Function(cubin(SOURCE, arch_of(torch.cuda.get_device_capability()), None), "count", SHARED_BYTES)


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize("cooperative", [False, True])
def test_launches_in_order_with_an_argument_that_is_reused(counter, cooperative):
    counts = torch.zeros(3, dtype=torch.int32, device="cuda")
    argument = Argument(counts.data_ptr(), 0)
    for add in range(1, 101):
        argument.add = add
        sent = argument if add % 2 else bytes(argument)
        counter.launch((4, 3, 1), (64, 1, 1), SHARED_BYTES, current_stream(), sent, cooperative)
    assert counts.tolist() == [4 * 5050] * 3


@pytest.mark.gpu
def test_a_captured_launch_keeps_the_argument_of_its_time(counter):
    counts = torch.zeros(1, dtype=torch.int32, device="cuda")
    argument, graph = Argument(counts.data_ptr(), 5), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter.launch((2, 1, 1), (32, 1, 1), 1024, current_stream(), argument)
        counter.launch((2, 1, 1), (32, 1, 1), 1024, current_stream(), argument, cooperative=True)
    argument.add = 1000
    for _ in range(10):
        graph.replay()
    assert counts.tolist() == [10 * 2 * 2 * 5]


@pytest.mark.gpu
def test_launches_from_a_new_thread(counter):
    counts = torch.zeros(1, dtype=torch.int32, device="cuda")
    stream = current_stream()

    def launch() -> None:
        bind_context()
        counter.launch((1, 1, 1), (32, 1, 1), 1024, stream, Argument(counts.data_ptr(), 7))

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join(timeout=60)
    assert counts.tolist() == [7]


@pytest.mark.gpu
def test_occupancy_bounds_what_a_cooperative_launch_takes(counter):
    resident = counter.max_resident_blocks(1024, SHARED_BYTES)
    blocks = resident * torch.cuda.get_device_properties().multi_processor_count
    counts = torch.zeros(1, dtype=torch.int32, device="cuda")
    argument = Argument(counts.data_ptr(), 1)
    counter.launch((blocks, 1, 1), (1024, 1, 1), SHARED_BYTES, current_stream(), argument, cooperative=True)
    with pytest.raises(DriverError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
        counter.launch((blocks + 1, 1, 1), (1024, 1, 1), SHARED_BYTES, current_stream(), argument, cooperative=True)
    assert counts.tolist() == [blocks]


@pytest.mark.gpu
def test_the_gpu_tells_the_resources_of_a_kernel(counter):
    assert 4 <= counter.registers <= 64
    assert counter.local_bytes == 0
    assert counter.argument_bytes in (None, ctypes.sizeof(Argument))
    with pytest.raises(DriverError, match="dynamic shared memory on this GPU"):
        Function(cubin(SOURCE, arch_of(torch.cuda.get_device_capability()), None), "count", 1 << 24)
