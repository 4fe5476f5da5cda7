"""The sampler's random numbers in Triton's interpreter: bitwise torch's own."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tokenweave.engine import random


def arguments(rows: int, width: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of both signs, positions and columns up to what a model has."""
    keys = [random.request_key(seed, 0, 0) for seed in range(rows)]
    keys[-2:] = [-1, 2**63 - 1][-rows:] if rows else []
    columns = torch.arange(width, device=device) * 97 + 150_000
    return torch.tensor(keys, device=device, dtype=torch.int64), torch.arange(rows, device=device) * 40_000, columns


def in_triton(keys: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    from tokenweave.kernels.sampling import uniform

    return uniform(keys, positions, columns, *map(random._signed, (random.GAMMA, *random.MULTIPLIERS)))


def in_fences(*given: torch.Tensor) -> torch.Tensor:
    return in_triton(*map(fenced, given))


@pytest.mark.parametrize(("rows", "width"), [(5, 1500), (1, 1), (0, 8)])
def test_bitwise_as_torch(interpreted, rows, width):
    given = arguments(rows, width)
    got = interpreted(in_fences, *given)
    assert got.equal(random.uniform(*given))
    assert got.lt(1).all()
    assert got.gt(0).all()


@pytest.mark.parametrize("fault", ["key", "position", "column"])
def test_a_fault_would_be_seen(fault):
    given = list(arguments(3, 50))
    right = random.uniform(*given)
    at = ["key", "position", "column"].index(fault)
    given[at] = given[at] + 1
    assert random.uniform(*given).ne(right).sum() > 140


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled(capability):
    pytest.importorskip("triton")
    (launch,) = launches(lambda: in_triton(*(given.to("meta") for given in arguments(4, 4096))))
    built = compiled(launch, capability)
    assert not built.complaints(capability)
    assert "st.global.v4" in built.asm["ptx"]


@pytest.mark.gpu
def test_bitwise_on_a_gpu():
    """The kernel gives the CPU's numbers, which are defined by integers and so are the same anywhere."""
    assert random.uniform(*arguments(64, 128_256, "cuda")).cpu().equal(random.uniform(*arguments(64, 128_256)))
