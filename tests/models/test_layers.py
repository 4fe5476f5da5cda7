"""Linear layers: the way for a few rows on several threads gives what torch's own does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenweave.models.layers import FEW_ROWS, linear


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.usefixtures("two_threads")
def test_linear(rows, dtype, with_bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(80, 48).to(dtype)
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
