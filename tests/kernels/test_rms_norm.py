"""Bias, post-norm, residual and norm in Triton's interpreter against comm/communicator.py's torch, and as compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tests.pairwise import pairwise
from tokenweave.comm.communicator import add_up, normed
from tokenweave.comm.norm import Norm

EPS = 1e-5
PARTS = ("residual", "bias", "post_norm", "norm", "rows")
FEATURES = tuple(
    tuple(part for part in PARTS if part in case)
    for case in (
        {"norm"},  # no residual came in
        {"residual", "norm"},
        {"residual", "norm", "bias"},
        {"residual", "norm", "post_norm"},
        {"residual", "norm", "bias", "post_norm", "rows"},
        {"residual", "norm", "rows"},
        {"residual"},
        {"post_norm"},
    )
)


@dataclass(frozen=True)
class Request:
    """What add_up reads of a Reduce."""

    partial: torch.Tensor
    bias: torch.Tensor | None
    post_norm: Norm | None


@dataclass(frozen=True)
class Case:
    """Arguments of residual_rms_norm; rows lie a little apart."""

    total: torch.Tensor
    residual: torch.Tensor | None
    out: torch.Tensor
    bias: torch.Tensor | None
    post_norm: Norm | None
    norm: Norm | None
    rows: torch.Tensor | None


def a_case(parts, rows, hidden, dtype=torch.float32, total_dtype=None, offset=0.0, device="cpu") -> Case:
    torch.manual_seed(hidden + rows)

    def values(*shape, dtype=dtype):
        return torch.randn(*shape[:-1], shape[-1] + 16)[..., : shape[-1]].to(device=device, dtype=dtype)

    listed = torch.arange(1, 2 * rows, 2, device=device) if "rows" in parts else None
    before = len(listed) * 2 if listed is not None else rows
    norms = {name: Norm(values(hidden), EPS, offset) for name in ("post_norm", "norm")}
    return Case(
        values(rows, hidden, dtype=total_dtype or dtype),
        values(before, hidden) if "residual" in parts else None,
        values(rows, hidden),
        values(hidden) if "bias" in parts else None,
        norms["post_norm"] if "post_norm" in parts else None,
        norms["norm"] if "norm" in parts else None,
        listed,
    )


def in_torch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, out)"""
    residual, out = None if case.residual is None else case.residual.clone(), case.out.clone()
    if residual is not None and case.rows is not None:
        residual = residual.index_select(0, case.rows)
    residual = add_up(case.total.clone(), residual, Request(case.out, case.bias, case.post_norm))
    return residual, normed(residual, case.norm, out)


def in_triton(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenweave.kernels.rms_norm import residual_rms_norm

    kept = case.total.clone()
    residual = residual_rms_norm(case.total, case.residual, case.out, case.bias, case.post_norm, case.norm, case.rows)
    assert case.total.equal(kept)
    assert (residual is case.residual) == (case.residual is not None and case.rows is None)
    return residual, case.out


def differences(*settings) -> list[float]:
    """The largest of residual and out, each relative to the largest value."""
    case = a_case(*settings)
    fences = {name: fenced(value) for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    case = replace(case, **fences)
    wanted = in_torch(case)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(in_triton(case), wanted, strict=True)]


@pytest.mark.parametrize("parts", FEATURES, ids="-".join)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 64), (2, 100)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_as_torch(interpreted, parts, rows, hidden, offset):
    assert max(interpreted(differences, parts, rows, hidden, torch.float32, None, offset)) < 1e-6


@pytest.mark.parametrize("hidden", [5120, 8192])
def test_hidden_sizes_of_models(interpreted, hidden):
    assert max(interpreted(differences, PARTS, 2, hidden)) < 2e-6


def without_rows() -> bool:
    case = a_case(("residual", "norm"), 0, 64)
    return in_triton(case)[0] is case.residual


def test_no_rows(interpreted):
    assert interpreted(without_rows)


@pytest.mark.parametrize("fault", ["eps", "offset", "rows", "bias"])
def test_a_fault_would_be_seen(fault):
    """The cases tell the right maths from slightly wrong ones."""
    case = a_case(PARTS, 3, 64)
    changed = {
        "eps": {"norm": Norm(case.norm.weight, 2e-2)},
        "offset": {"post_norm": Norm(case.post_norm.weight, EPS, 1.0)},
        "rows": {"rows": case.rows - 1},
        "bias": {"bias": None},
    }[fault]
    wrong = replace(case, **changed)
    assert float((in_torch(case)[1] - in_torch(wrong)[1]).abs().max()) > 1e-3


COMPILED = pairwise(
    {
        "capability": CAPABILITIES,
        "dtype": (torch.bfloat16, torch.float16),
        "total": ("same", torch.float32),  # the sharded form keeps its sums in fp32
        "hidden": (2880, 5120, 8192, 16384),
        "parts": (FEATURES[0], FEATURES[1], FEATURES[4]),
    },
    lambda case: True,
)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case.values())))
def test_compiled(case):
    pytest.importorskip("triton")
    dtype, capability = case["dtype"], case["capability"]
    total = dtype if case["total"] == "same" else case["total"]
    (launch,) = launches(lambda: in_triton_meta(a_case(case["parts"], 4, case["hidden"], dtype, total)))
    built = compiled(launch, capability)
    assert not built.complaints(capability)
    assert "st.global.v4" in built.asm["ptx"] or "st.global.v8" in built.asm["ptx"], "stores of less than 16 bytes"


def in_triton_meta(case: Case) -> None:
    from tokenweave.kernels.rms_norm import residual_rms_norm

    residual_rms_norm(case.total, case.residual, case.out, case.bias, case.post_norm, case.norm, case.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", FEATURES, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8192), (33, 5120), (7, 100)])
@pytest.mark.parametrize("wide", [True, False])
def test_on_a_gpu(parts, dtype, rows, hidden, wide):
    case = a_case(parts, rows, hidden, dtype, torch.float32 if wide else dtype, 1.0, device="cuda")
    wanted = in_torch(case)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-19}[dtype]
    for got, want in zip(in_triton(case), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2 * step, atol=2 * step)
