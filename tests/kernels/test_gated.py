"""act(gate) * up in Triton's interpreter against torch, and as compiled."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tokenweave.models.layers import activation_function

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new")


def expected(name: str, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation_function(name)(gate) * up


def strided(rows: int, columns: int) -> torch.Tensor:
    """Rows that lie 5 elements apart."""
    wide = torch.randn(rows, columns + 5, generator=torch.Generator().manual_seed(rows + columns)).mul_(3)
    return wide[:, 2 : columns + 2]


def difference(name: str, rows: int, width: int) -> float:
    from tokenweave.kernels.activation import KINDS
    from tokenweave.kernels.gated import gated

    gate_up = fenced(strided(rows, 2 * width))
    got, wanted = gated(gate_up, KINDS[name]), expected(name, gate_up)
    assert got.shape == wanted.shape
    assert got.is_contiguous()
    return float((got - wanted).abs().max()) if rows else 0.0


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(3, 7), (2, 1024), (1, 1030), (0, 8)])
def test_as_torch(interpreted, name, rows, width):
    assert interpreted(difference, name, rows, width) < 1e-5


def far_out(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenweave.kernels.activation import KINDS
    from tokenweave.kernels.gated import gated

    gate_up = torch.cat((torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 0.0]), torch.ones(7)))[None]
    return gated(gate_up, KINDS[name]), expected(name, gate_up)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_gates_give_no_nan(interpreted, name):
    torch.testing.assert_close(*interpreted(far_out, name))


def test_a_swapped_gate_and_up_would_be_seen():
    gate_up = strided(3, 14)
    swapped = torch.cat((gate_up[:, 7:], gate_up[:, :7]), dim=1)
    assert float((expected("silu", gate_up) - expected("silu", swapped)).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_compiled(capability, dtype, kind):
    pytest.importorskip("triton")
    from tokenweave.kernels.gated import gated

    (launch,) = launches(lambda: gated(torch.empty(64, 2 * 1792, dtype=dtype, device="meta"), kind))
    built = compiled(launch, capability)
    assert not built.complaints(capability)
    assert built.asm["ptx"].count("ld.global.v4") >= 2, "loads of less than 16 bytes"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1792), (77, 3584), (5, 100)])
def test_on_a_gpu(name, dtype, rows, width):
    from tokenweave.kernels.activation import KINDS
    from tokenweave.kernels.gated import gated

    gate_up = torch.randn(rows, 2 * width, device="cuda", dtype=dtype).mul_(3)
    got, wanted = gated(gate_up, KINDS[name]).float(), expected(name, gate_up).float()
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}[dtype]
    torch.testing.assert_close(got, wanted, rtol=2 * step, atol=1e-6)
