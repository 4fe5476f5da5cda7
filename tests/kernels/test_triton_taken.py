"""Where tensors are on CUDA the Triton kernels are taken, and only there is Triton needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.test_grouped_gemm import a_block
from tokenweave.comm.communicator import settle
from tokenweave.comm.norm import Norm
from tokenweave.engine.drawing import draw, drawing_arrays
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.kernels.triton_needed import check_triton
from tokenweave.models.layers import gated_function
from tokenweave.weave.request import Reduce

LAUNCHED = {  # by whom, and the kernels it is to launch
    "mlp": ["gated_kernel"],
    "experts": ["choose_kernel", "count_kernel", "order_kernel", *["grouped_gemm_kernel"] * 2, "combine_kernel"],
    "channel": ["residual_rms_norm_kernel"],
    "sampler": ["limit_kernel", "draw_kernel"],
}


@dataclass(frozen=True)
class Half:
    """What an MLP sees of one."""

    room: torch.Tensor

    def partial(self, rows: int) -> torch.Tensor:
        return self.room[:rows]


def mlp(device: str) -> torch.Tensor:
    return gated_function("silu", torch.device(device))(torch.linspace(-4, 4, 40).view(2, 20))


def experts(device: str) -> torch.Tensor:
    torch.manual_seed(0)
    block, x = a_block(4, 2, 24, 16), torch.randn(5, 24)
    return block(x, Half(torch.empty(8, 24)))


def channel(device: str) -> torch.Tensor:
    torch.manual_seed(0)
    total, residual, weight, out = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.empty(3, 8)
    request = Reduce(total, bias=torch.randn(8), post_norm=Norm(weight, 1e-5, 1.0), norm=Norm(weight, 1e-6))
    return torch.stack((settle(total, residual, request, out), out))


def sampler(device: str) -> torch.Tensor:
    rows = [SamplingRow(temperature=0.7, top_k=5, key=1, position=3), SamplingRow(temperature=1.0, top_p=0.8, key=-2)]
    arrays = drawing_arrays(rows, 9)
    given = (torch.from_numpy(arrays[name]) for name in ("integers", "floats"))
    return draw(torch.linspace(-3, 3, 18).view(2, 9), rows, *given)


def on_both(name: str) -> tuple[torch.Tensor, list[str], torch.Tensor, list[str]]:
    """(result, kernels launched) as on a CPU, then as if CPU tensors were on CUDA."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    run = InterpretedFunction.run

    def record(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", record)
        plain, plain_launched = globals()[name]("cpu"), launched.copy()
        patch.setattr(torch.Tensor, "is_cuda", True)
        return plain, plain_launched, globals()[name]("cuda"), launched


@pytest.mark.parametrize("name", LAUNCHED)
def test_taken_on_cuda_alone(interpreted, name):
    plain, plain_launched, fast, launched = interpreted(on_both, name)
    assert plain_launched == []
    assert launched == LAUNCHED[name]
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_a_cpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import tokenweave.cli.entry, tokenweave.engine.rank; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def test_cuda_without_triton_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_triton(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed: pip install"):
        check_triton(torch.device("cuda"))
