"""Norm against transformers' own: the two weight conventions, and where each rounds."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tokenweave.comm.norm import Norm

HIDDEN = 48
EPS = 1e-5
KINDS = {"llama": (LlamaRMSNorm, 0.0), "olmo2": (Olmo2RMSNorm, 0.0), "gemma2": (Gemma2RMSNorm, 1.0)}
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def both(kind: str, dtype: torch.dtype, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, transformers') of the same random weight."""
    theirs, offset = KINDS[kind]
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    module = theirs(HIDDEN, eps=EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        return Norm(weight, EPS, offset)(x), module(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_as_transformers(kind, dtype, scale):
    x = (scale * torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))).to(dtype)
    ours, theirs = both(kind, dtype, x)
    assert ours.dtype == dtype
    assert ours.shape == x.shape
    # Llama's rounds before it multiplies by the weight, too: two units in the last place between them, else one.
    torch.testing.assert_close(ours, theirs, rtol=(4 if dtype == torch.float32 else 2) * ULP[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_is_rounded_once(dtype):
    x = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight.double())
    torch.testing.assert_close(Norm(weight, EPS, 1.0)(x).double(), exact, rtol=0.51 * ULP[dtype] + 1e-6, atol=1e-30)


def test_rows_of_zeros_stay_zeros():
    assert Norm(torch.ones(HIDDEN), EPS)(torch.zeros(3, HIDDEN)).eq(0).all()


def test_the_input_stays_as_it_was():
    x = torch.randn(3, HIDDEN)
    before = x.clone()
    Norm(torch.ones(HIDDEN), EPS)(x)
    assert x.equal(before)


def test_no_rows():
    assert Norm(torch.ones(HIDDEN), EPS)(torch.empty(0, HIDDEN)).shape == (0, HIDDEN)
