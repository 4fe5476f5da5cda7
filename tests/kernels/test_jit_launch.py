"""Triton's launch path on a GPU that is not there: all kernels of real models' steps compile, fit an H100, and are not
compiled again for what varies between steps: each time a step would wait for a second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.jit_driver import Launched, gpu
from tests.kernels.triton_aot import SHARED_LIMIT_BYTES
from tokenweave.engine.batch import Batch
from tokenweave.engine.buckets import bucket_of
from tokenweave.weave.plan import Plan

MODELS = ("LLAMA_8B", "LLAMA_70B", "MIXTRAL", "QWEN3_MOE")
CONTEXTS = (0, 15, 16, 17, 4000)
ATTENTION = {  # how often each kernel may be compiled in a model's life
    "rotate_and_write_kernel": 1,
    "residual_rms_norm_kernel": 5,  # without a residual yet and with it, from bf16 and fp32; and with rows that go on
    "prefill": 2,  # with spans of one token beside longer ones, which are the decode kernel's, and without
    "decode": 2,  # a sequence's keys split, and not
    "join": 1,
    "limit_kernel": 1,
    "draw_kernel": 1,
}
MLP = {"gated_kernel": 1}
EXPERTS = {
    "choose_kernel": 1,
    "count_kernel": 1,
    "order_kernel": 1,
    "grouped_gemm_kernel": 8,  # four sizes of tiles, each for both GEMMs
    "combine_kernel": 1,
}


@pytest.fixture(autouse=True)
def triton():
    return pytest.importorskip("triton")


def a_rank(model: str) -> Any:
    from tests.kernels import model_steps

    return model_steps.Rank(getattr(model_steps, model))


def steps() -> list[Batch]:
    """Prompts of lengths that are 1, odd, multiples of 16; batches that decode; both mixed."""
    from tests.kernels.model_steps import batch_of, decode_of

    prompts = [batch_of((length, context)) for length in (2, 16, 17, 2048) for context in CONTEXTS]
    decodes = [decode_of(rows, context) for rows in (1, 2, 3, 16, 17, 100, 256) for context in CONTEXTS]
    several = [batch_of(*[(9, 30)] * count, *[(1, 70)] * one) for count in (2, 3, 15, 16) for one in (0, 1)]
    return [*prompts, *decodes, decode_of(1, 100_000), decode_of(3, 30_000), *several, batch_of((301, 0), (1, 5000))]


def allowed(model: str) -> dict[str, int]:
    return ATTENTION | (MLP if model.startswith("LLAMA") else EXPERTS)


@pytest.mark.parametrize("model", ["LLAMA_70B", "QWEN3_MOE"])
def test_what_varies_between_steps_is_compiled_once(model):
    with gpu(compiles=False) as driver:
        rank = a_rank(model)
        for step in steps():
            rank.run(step)
            rank.run(step, "sharded", cut=step.rows // 2 or None)
            rank.capture(step)
    assert driver.built == allowed(model)


@pytest.mark.parametrize("model", MODELS)
def test_kernels_compile_and_fit(model):
    from tests.kernels.model_steps import batch_of

    step = batch_of((512, 0), (1, 5000), (33, 77))
    with gpu() as driver:
        rank = a_rank(model)
        rank.run(step)
        built = driver.built.copy()
        assert not driver.spilled
        assert all(0 <= launched.shared_bytes <= SHARED_LIMIT_BYTES[90] for launched in driver.launched)
        again = batch_of((511, 3), (1, 4097), (30, 1))
        rank.run(again)
        assert driver.built == built
    assert set(built) == set(allowed(model))


def told(launched: Launched) -> tuple[Any, ...]:
    """All of a launch but where its tensors lie."""
    values = {
        name: (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
        for name, value in launched.arguments.items()
    }
    return launched.kernel, launched.grid, launched.num_warps, values


@pytest.mark.parametrize("cut", [None, 16])
@pytest.mark.parametrize(
    ("one", "other"),
    [([(1, 5)] * 24, [(1, 200)] * 17), ([(300, 0), (1, 40)], [(100, 300), (250, 0)])],
    ids=["decode", "prefill"],
)
def test_launches_of_a_bucket_depend_on_nothing_else(one, other, cut):
    """Of what its tables hold, that is: a captured graph is launched for any step of its bucket."""
    from tests.kernels.model_steps import BOUNDS, batch_of

    batches = [batch_of(*spans) for spans in (one, other)]
    assert len({bucket_of(batch, Plan(batch.rows, cut), BOUNDS) for batch in batches}) == 1
    launches = []
    for batch in batches:
        with gpu(compiles=False) as driver:
            a_rank("LLAMA_70B").capture(batch, cut=cut)
        launches.append([told(launched) for launched in driver.launched])
    assert launches[0] == launches[1]
