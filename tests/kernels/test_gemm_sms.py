"""What torch's GEMMs are told of SMs: what is set, in which order, and that it is taken back."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenweave.kernels import gemm_sms
from tokenweave.kernels.gemm_sms import leave_free

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HANDLE, SMS = 0x7F0012345678, 132
INVALID_VALUE = 7


@pytest.fixture
def told(monkeypatch) -> list[Any]:
    """What cuBLAS and torch are told, in order; a stand-in for cuBLAS refuses what cuBLAS does."""
    calls: list[Any] = []

    def set_target(handle: ctypes.c_void_p, sms: ctypes.c_int) -> int:
        assert handle.value == HANDLE
        calls.append(sms.value)
        return 0 if 0 <= sms.value <= SMS else INVALID_VALUE

    monkeypatch.setattr(gemm_sms, "library", lambda: SimpleNamespace(cublasSetSmCountTarget=set_target))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: HANDLE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=SMS))
    monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", lambda sms: calls.append(("carve-out", sms)))
    return calls


def test_gemms_are_told_what_is_left_and_then_all(told):
    with leave_free(4, CUDA):
        told.append("GEMMs")
    assert told == [128, "GEMMs", 0]


def test_gemms_with_biases_are_told_as_well(told):
    with leave_free(8, CUDA, biases=True):
        told.append("GEMMs")
    assert told == [124, ("carve-out", 8), "GEMMs", ("carve-out", None), 0]


@pytest.mark.parametrize("biases", [False, True])
def test_an_error_is_not_held_up_and_leaves_nothing_behind(told, biases):
    with pytest.raises(KeyError, match="lost"), leave_free(4, CUDA, biases):
        raise KeyError("lost")
    assert told[-1] == 0
    assert not biases or told[-2] == ("carve-out", None)


def test_more_than_there_are_is_refused(told):
    with pytest.raises(RuntimeError, match=r"told of -1 SMs \(status 7\)"), leave_free(SMS + 1, CUDA):
        told.append("GEMMs")
    assert told == [-1, 0]


@pytest.mark.parametrize(("sms", "device"), [(0, CUDA), (4, CPU), (0, CPU)])
def test_nobody_is_told_anything_on_a_cpu_or_of_no_sms(monkeypatch, told, sms, device):
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: pytest.fail("asked for cuBLAS"))
    with leave_free(sms, device, biases=True):
        pass
    assert told == []


def test_a_torch_without_cuda_says_why_not():
    if torch.version.cuda is None:
        assert "libtorch_cuda.so" in gemm_sms.why_not()
    else:
        assert gemm_sms.why_not() == ""  # the symbol is there, with or without a GPU


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def target() -> int:
    found = ctypes.c_int(-1)
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    assert gemm_sms.library().cublasGetSmCountTarget(handle, ctypes.byref(found)) == 0
    return found.value


@pytest.mark.gpu
def test_torchs_handle_keeps_the_target_over_gemms_and_streams():
    x, weight = (torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected, count = x @ weight, torch.cuda.get_device_properties(0).multi_processor_count
    assert target() == 0
    with leave_free(count // 2, torch.device("cuda", 0)):
        assert target() == count - count // 2
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            got = torch.mm(x, weight, out=torch.empty_like(x))
            assert target() == count - count // 2
    assert target() == 0
    torch.cuda.synchronize()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("biases", [False, True])
def test_a_graph_is_captured_as_gemms_were_told(biases):
    x, weight = (torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    bias = torch.randn(2048, dtype=torch.bfloat16, device="cuda") if biases else None
    expected = torch.nn.functional.linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), leave_free(16, torch.device("cuda", 0), biases):
        got = torch.nn.functional.linear(x, weight, bias)
    assert (target(), torch._C._get_sm_carveout_experimental()) == (0, None)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1.0)
