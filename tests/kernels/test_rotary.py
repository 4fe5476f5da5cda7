"""Rotation and cache write in Triton's interpreter against torch, and as compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tests.pairwise import pairwise
from tokenweave.comm.norm import Norm
from tokenweave.models.rope import rotate

LAYERS, BLOCK_SIZE, BLOCKS = 3, 4, 5
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Arguments of rotate_and_write. storage: [block, layer, 2, token, kv_head, head_dim]."""

    qk: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    storage: torch.Tensor
    layer: int
    heads: int
    norms: tuple[Norm, Norm] | None

    @property
    def storage_rows(self) -> torch.Tensor:
        return self.storage.view(-1, self.storage.shape[4] * self.storage.shape[5])


def a_case(heads, kv_heads, head_dim, layer=1, with_norms=False, tokens=6, dtype=torch.float32, device="cpu") -> Case:
    """qk and v are views of one GEMM's output; the cache starts as NaN; the third token is padding."""
    torch.manual_seed(heads * head_dim + kv_heads)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(device=device, dtype=dtype)
    angles = torch.rand(tokens, 1, head_dim // 2, device=device).mul_(7)
    angles = torch.cat((angles, angles), dim=-1)
    storage = torch.full((BLOCKS, LAYERS, 2, BLOCK_SIZE, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    place = torch.randperm(BLOCKS * BLOCK_SIZE)[:tokens]
    slots = place // BLOCK_SIZE * (LAYERS * 2 * BLOCK_SIZE) + place % BLOCK_SIZE
    slots[2:3] = -1
    weights = torch.randn(2, head_dim).to(device=device, dtype=dtype)
    return Case(
        qkv[:, : heads + kv_heads],
        qkv[:, heads + kv_heads :],
        angles.cos() * 1.1,
        angles.sin() * 1.1,
        slots.to(device),
        storage,
        layer,
        heads,
        (Norm(weights[0], EPS, 1.0), Norm(weights[1], EPS, 1.0)) if with_norms else None,
    )


def in_torch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, the cache as written)"""
    qk, storage = case.qk, case.storage.clone()
    if case.norms:
        qk = torch.cat((case.norms[0](qk[:, : case.heads]), case.norms[1](qk[:, case.heads :])), dim=1)
    qk = rotate(qk, (case.cos, case.sin))
    for token, slot in enumerate(case.slots.tolist()):
        if slot >= 0:
            block, offset = slot // (LAYERS * 2 * BLOCK_SIZE), slot % BLOCK_SIZE
            storage[block, case.layer, 0, offset] = qk[token, case.heads :]
            storage[block, case.layer, 1, offset] = case.v[token]
    return qk[:, : case.heads], storage


def in_triton(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenweave.kernels.rotary import rotate_and_write

    q = rotate_and_write(
        case.qk,
        case.v,
        case.cos,
        case.sin,
        case.slots,
        case.storage_rows,
        case.layer,
        BLOCK_SIZE,
        case.heads,
        case.norms,
    )
    return q, case.storage


def both(*settings, **more) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    case = moved(a_case(*settings, **more), fenced)
    wanted = in_torch(case)
    return in_triton(case), wanted


def check(got, wanted, tolerance=1e-6) -> None:
    """Equal also in where nothing was written."""
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


SHAPES = [(4, 2, 8), (3, 1, 12), (1, 1, 64), (9, 3, 256)]  # heads, kv_heads, head_dim


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("with_norms", [False, True])
def test_as_torch(interpreted, shape, layer, with_norms):
    got, wanted = interpreted(both, *shape, layer, with_norms)
    check(got, wanted)
    assert wanted[1].isnan().any(), "padding is to leave something unwritten"
    assert not wanted[1].isnan().all()


def test_no_tokens(interpreted):
    got, wanted = interpreted(both, 4, 2, 8, tokens=0)
    check(got, wanted)


@pytest.mark.parametrize("fault", ["layer", "sine", "slot", "value", "norm"])
def test_a_fault_would_be_seen(fault):
    """The cases tell the right maths from slightly wrong ones."""
    case = a_case(4, 2, 8, with_norms=True)
    slots = case.slots.clone()
    slots[0] += 1
    wrong = {
        "layer": replace(case, layer=0),
        "sine": replace(case, sin=-case.sin),
        "slot": replace(case, slots=slots),
        "value": replace(case, v=case.qk[:, case.heads :]),
        "norm": replace(case, norms=case.norms[::-1]),
    }[fault]
    with pytest.raises(AssertionError):
        check(in_torch(wrong), in_torch(case))


COMPILED = pairwise(
    {
        "capability": CAPABILITIES,
        "dtype": (torch.bfloat16, torch.float16),
        "shape": ((32, 8, 128), (8, 1, 128), (14, 2, 64), (8, 4, 256), (12, 12, 96)),
        "norms": (False, True),
    },
    lambda case: True,
)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case.values())))
def test_compiled(case):
    pytest.importorskip("triton")
    (launch,) = launches(lambda: in_triton(on_meta(a_case(*case["shape"], 1, case["norms"], dtype=case["dtype"]))))
    built = compiled(launch, case["capability"])
    assert not built.complaints(case["capability"])
    assert built.asm["ptx"].count("st.global.v4") >= 3, "stores of less than 16 bytes"


def moved(case: Case, move: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return replace(case, **{name: move(value) for name, value in vars(case).items() if isinstance(value, torch.Tensor)})


def on_meta(case: Case) -> Case:
    """Without data, so that only the launch remains."""
    return moved(case, lambda tensor: tensor.to("meta"))


def test_layers_share_one_kernel():
    """A layer is no reason to compile anew."""
    pytest.importorskip("triton")
    seen = [launches(lambda layer=layer: in_triton(on_meta(a_case(4, 2, 8, layer))))[0] for layer in range(3)]
    special = [parameter for parameter in seen[0].kernel.params if not parameter.do_not_specialize]
    for parameter in special:
        values = [launch.arguments[parameter.name] for launch in seen]
        assert all(isinstance(value, torch.Tensor) or value == values[0] for value in values), parameter.name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 8, 128), (12, 12, 96), *SHAPES], ids=str)
@pytest.mark.parametrize("with_norms", [False, True])
def test_on_a_gpu(shape, dtype, with_norms):
    case = a_case(*shape, 1, with_norms, 17, dtype, "cuda")
    wanted = in_torch(case)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-19}[dtype]
    check(in_triton(case), wanted, 2 * step)
