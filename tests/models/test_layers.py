"""Linear layers: the way that is fast on this machine gives what plain maths does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenweave.models.layers import by_onednn, linear


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_linear(rows, dtype, with_bias, strided):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(80, 48).to(dtype)
    if strided:  # as a part of a merged product, and of a merged weight, is
        x, weight = torch.cat((x, x + 1), dim=1)[:, :48], torch.cat((weight, weight), dim=1)[:, 48:]
    bias = torch.randn(80).to(dtype) if with_bias else None
    expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    result = linear(x, weight, bias)
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=10 * tolerance)
    if not with_bias:
        out = torch.full((rows, 80), float("nan"), dtype=dtype)
        assert linear(x, weight, out=out) is out
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("shape", [(80, 0), (0, 48)])
def test_a_rank_without_rows_or_columns(shape):
    """Where there are more ranks than there is to share."""
    x, weight = torch.randn(5, shape[1]), torch.randn(*shape)
    assert linear(x, weight).equal(torch.zeros(5, shape[0]))
    assert linear(x, weight, out=torch.full((5, shape[0]), float("nan"))).equal(torch.zeros(5, shape[0]))


def test_onednn_takes_what_torch_does_not_give_it():
    x86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    weight = torch.randn(80, 48)
    assert by_onednn(weight, weight) == x86
    assert not by_onednn(weight.bfloat16(), weight.bfloat16())
    assert not by_onednn(weight, weight[:0])
