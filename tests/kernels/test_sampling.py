"""Drawing in two kernels, against engine/drawing.py in torch: in Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.fence import fenced
from tests.kernels.triton_aot import CAPABILITIES, compiled, launches
from tokenweave.engine import random
from tokenweave.engine.drawing import draw, drawing_arrays
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.engine.truncation import magnitudes, masses_of
from tokenweave.engine.upload import upload

CPU = torch.device("cpu")
KINDS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.3},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.9999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1e-4, "top_p": 0.9},
    {"temperature": 1e300, "top_p": 0.5},
    {"temperature": 0.0},
]


def rows_of(count: int) -> list[SamplingRow]:
    """Of all kinds, with keys of both signs and positions up to what a model has."""
    keys = [random.request_key(i, 0, 0) for i in range(count)]
    return [SamplingRow(**KINDS[i % len(KINDS)], key=keys[i], position=40_000 * i) for i in range(count)]


def scores_of(rows: int, width: int, seed: int = 0) -> Tensor:
    """Logits with ties, some of them -inf."""
    scores = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    scores[::2] = (4 * scores[::2]).round() / 4
    scores[:, width // 2 :: 7] = -math.inf
    return scores


def in_triton(scores: Tensor, rows: list[SamplingRow]) -> tuple[Tensor, Tensor]:
    """The tokens drawn, and the limits on the way."""
    from tokenweave.kernels import sampling

    seen = []

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append(args[4])
                kernel[grid](*args, **kwargs)

            return launch

    on = upload(drawing_arrays(rows, scores.shape[1]), scores.device)
    kernel = sampling.limit_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "limit_kernel", Spy())
        drawn = sampling.draw(fenced(scores), fenced(on["integers"]), fenced(on["floats"]), *random.CONSTANTS)
    return drawn, seen[0]


def in_torch(scores: Tensor, rows: list[SamplingRow]) -> Tensor:
    on = upload(drawing_arrays(rows, scores.shape[1]), CPU)
    return draw(scores, rows, on["integers"], on["floats"])


def kept_in_torch(scores: Tensor, rows: list[SamplingRow]) -> Tensor:
    from tokenweave.engine.truncation import truncate

    on = upload(drawing_arrays(rows, scores.shape[1]), CPU)
    x = (scores - scores.amax(-1, keepdim=True)) * on["floats"][:, :1]
    truncate(x, rows, on["integers"][:, 2], on["floats"][:, 1], on["floats"][:, 2])
    return x.isfinite()


@pytest.mark.parametrize(("count", "width"), [(len(KINDS), 5000), (4, 4096), (3, 1), (5, 37)])
def test_the_same_are_kept_and_drawn_as_in_torch(interpreted, count, width):
    scores, rows = scores_of(count, width), rows_of(count)
    drawn, limits = interpreted(in_triton, scores, rows)
    x = (scores - scores.amax(-1, keepdim=True)) * torch.from_numpy(drawing_arrays(rows, width)["floats"])[:, :1]
    kept = (magnitudes(x) <= limits[:, None]) & scores.isfinite()
    assert kept.equal(kept_in_torch(scores, rows))
    assert drawn.equal(in_torch(scores, rows))


def test_draws_are_many_different_ones(interpreted):
    """Over positions, and over keys; the noise of each is torch's own."""
    rows = [SamplingRow(temperature=1.0, key=i % 8, position=i // 8) for i in range(64)]
    scores = torch.randn(1, 300).expand(64, -1).contiguous()
    drawn, _ = interpreted(in_triton, scores, rows)
    assert drawn.equal(in_torch(scores, rows))
    assert len(set(drawn.tolist())) > 30


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_scores_that_no_model_should_give(interpreted, value, everywhere):
    """It comes to an end, with a token of the vocabulary, but for NaN the same as in torch."""
    rows, scores = rows_of(len(KINDS)), scores_of(len(KINDS), 1500)
    scores[:, slice(None) if everywhere else 77] = value
    drawn, _ = interpreted(in_triton, scores, rows)
    assert ((drawn >= 0) & (drawn < 1500)).all()
    assert math.isnan(value) or drawn.equal(in_torch(scores, rows))
    if value == math.inf and not everywhere:
        assert drawn.eq(77).all()


def all_numbers(integers: Tensor, width: int) -> Tensor:
    from tests.kernels.uniform_kernel import numbers

    return numbers(integers, width, *random.CONSTANTS)


def test_random_numbers_are_bitwise_those_of_torch(interpreted):
    rows = [replace(row, key=key) for row, key in zip(rows_of(4), (-1, 2**63 - 1, 0, -(2**63)), strict=True)]
    integers = torch.from_numpy(drawing_arrays([*rows, *rows_of(5)], 1500)["integers"])
    got = interpreted(all_numbers, integers, 1500)
    assert got.equal(random.uniform(integers[:, 0], integers[:, 1], torch.arange(1500)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled(capability):
    pytest.importorskip("triton")
    from tokenweave.kernels.sampling import draw as in_two_kernels

    integers, floats = torch.empty(4, 4, dtype=torch.int64, device="meta"), torch.empty(4, 4, device="meta")
    scores = torch.empty(4, 128_256, device="meta")
    two = launches(lambda: in_two_kernels(scores, integers, floats, *random.CONSTANTS))
    assert [launch.kernel.__name__ for launch in two] == ["limit_kernel", "draw_kernel"]
    for launch in two:
        built = compiled(launch, capability)
        assert not built.complaints(capability)
        assert "ld.global.v4" in built.asm["ptx"]
        assert "lg2.approx" not in built.asm["ptx"]  # near 1 it is wrong in most digits


@pytest.mark.gpu
def test_on_a_gpu():
    """What is kept has the mass that it should have, to the rounding of exponentials, and no more than it needs."""
    rows = [SamplingRow(temperature=1.0, top_p=0.5 + 0.49 * i / 64, key=i, position=i) for i in range(64)]
    scores = 3 * torch.randn(64, 128_256, device="cuda")
    on = upload(drawing_arrays(rows, scores.shape[1]), scores.device)
    counts = torch.zeros_like(scores)
    for position in range(200):
        on["integers"][:, 1] = position
        counts.scatter_(1, draw(scores, rows, on["integers"], on["floats"])[:, None], 1)
    masses = masses_of(scores - scores.amax(-1, keepdim=True)).double()
    lowest = scores.masked_fill(counts == 0, math.inf).amin(-1, keepdim=True)
    above = masses.masked_fill(scores <= lowest, 0).sum(-1) / masses.sum(-1)
    assert (above < on["floats"][:, 1] + 1e-5).all()


@pytest.mark.gpu
def test_draws_on_a_gpu_are_those_of_a_cpu():
    rows, scores = rows_of(64), scores_of(64, 128_256)
    on = upload(drawing_arrays(rows, scores.shape[1]), torch.device("cuda"))
    drawn = draw(scores.cuda(), rows, on["integers"], on["floats"]).cpu()
    assert (drawn != in_torch(scores, rows)).sum() <= 1  # where a limit or two noisy scores are a rounding error apart


@pytest.mark.gpu
def test_random_numbers_on_a_gpu():
    integers = torch.from_numpy(drawing_arrays(rows_of(64), 128_256)["integers"])
    expected = random.uniform(integers[:, 0], integers[:, 1], torch.arange(128_256))
    assert all_numbers(integers.cuda(), 128_256).cpu().equal(expected)
