"""The choice of experts in Triton's interpreter against torch, and as compiled."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches


def expected(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    weights, chosen = logits.float().softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), chosen


def choose(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenweave.kernels.expert_choice import choose_experts

    return choose_experts(logits, top_k, renormalise)


def distinct(tokens: int, experts: int) -> torch.Tensor:
    """Logits without ties, in rows that lie apart."""
    random = torch.Generator().manual_seed(tokens)
    rows = [torch.randperm(experts + 3, generator=random) * 0.37 - 5 for _ in range(tokens)]
    return torch.stack([*rows, torch.zeros(experts + 3)])[:tokens, :experts]


def check(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert got[1].tolist() == wanted[1].tolist()
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-7)


def both(tokens: int, experts: int, top_k: int, renormalise: bool) -> tuple:
    logits = fenced(distinct(tokens, experts))
    return choose(logits, top_k, renormalise), expected(logits, top_k, renormalise)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("sizes", [(5, 8, 2), (3, 60, 6), (2, 4, 4), (4, 1, 1), (0, 8, 2)], ids=str)
def test_as_torch(interpreted, sizes, renormalise):
    check(*interpreted(both, *sizes, renormalise))


def test_ties_go_to_the_lower_number(interpreted):
    weights, chosen = interpreted(choose, torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5]), 4, True)
    assert chosen.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_extremes(interpreted):
    """Where probabilities underflow, or nothing is a number, experts that exist are still named."""
    logits = torch.tensor([[500.0, -500.0, -500.0], [float("nan")] * 3])
    weights, chosen = interpreted(choose, logits, 3, True)
    assert chosen[0].tolist() == [0, 1, 2]
    assert weights[0].tolist() == [1, 0, 0]
    assert chosen[1].ge(0).all()
    assert chosen[1].lt(3).all()
    assert weights[1].isnan().all()


@pytest.mark.parametrize("fault", ["order", "weights"])
def test_a_fault_would_be_seen(fault):
    weights, chosen = expected(distinct(3, 8), 3, True)
    wrong = (weights, chosen.flip(1)) if fault == "order" else (expected(distinct(3, 8), 3, False)[0], chosen)
    with pytest.raises(AssertionError):
        check(wrong, (weights, chosen))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sizes", [(8, 2), (128, 8), (60, 4)], ids=str)
def test_compiled(capability, sizes):
    pytest.importorskip("triton")
    logits = torch.empty(16, sizes[0], dtype=torch.bfloat16, device="meta")
    (launch,) = launches(lambda: choose(logits, sizes[1], True))
    assert not compiled(launch, capability).complaints(capability)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 8, 2), (300, 128, 8), (7, 60, 4)], ids=str)
def test_on_a_gpu(sizes):
    logits, top_k = distinct(*sizes[:2]).to("cuda"), sizes[2]
    check(choose(logits, top_k, True), expected(logits, top_k, True))
