"""A step is queued without a look at what the device computes: on CUDA every look would wait for all that is queued.

Operators run on a CPU here, under a mode that refuses those which wait on CUDA. A second run on the meta device, which
holds no values at all, covers what a CPU does otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoints import prompt_batch
from tests.waits import waits
from tokenweave import LLM, SamplingParams
from tokenweave.engine import engine
from tokenweave.engine.sampler import GREEDY, History, SamplingRow, sample


class Waits(Exception):
    """An operator for which the host would wait."""


class NoWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    """Raises Waits where the host looks at a tensor's values."""
    with pytest.MonkeyPatch.context() as patch, NoWaits():
        for name in ("tolist", "numpy", "__array__", "cpu"):  # no operators
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


def refuse(name: str) -> Callable[..., Any]:
    def look(*_: Any, **__: Any) -> Any:
        raise Waits(f"Tensor.{name}")

    return look


PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=6, min_tokens=6, logprobs=3),
    SamplingParams(temperature=0, max_tokens=6, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(temperature=1, max_tokens=6, n=2, presence_penalty=0.5, frequency_penalty=0.5, seed=1),
    SamplingParams(temperature=0.7, max_tokens=6, top_k=7, top_p=0.9, min_p=0.01, logprobs=0),
    SamplingParams(temperature=0.7, max_tokens=6, top_p=0.9),
]


@pytest.mark.parametrize("overlap", ["off", "fused"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "qwen3_moe"])
def test_a_step(checkpoint, monkeypatch, name, overlap):
    """Forward pass and sampling of prompts, chunks and decodes; sums run inline, where the mode sees them."""
    run_step, steps = engine.run_step, []

    def watched(*step: Any) -> Any:
        steps.append(step)
        with no_waits():
            return run_step(*step)

    monkeypatch.setattr(engine, "run_step", watched)
    options = {"overlap": overlap, "max_num_batched_tokens": 20, "num_kv_blocks": 64, "block_size": 4}
    with LLM(checkpoint(name), async_scheduling=True, progress=False, **options) as llm:
        outputs = llm.generate(prompt_batch(3, (3, 30, 1, 9, 12, 2)), PARAMS)
    assert all(output.finished for output in outputs)
    assert sum(bool(step.batch.late) for _, step, _ in steps) >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_step_on_a_gpu(checkpoint, monkeypatch, name, eager):
    """torch itself refuses what waits. A first call compiles, and a second one captures, which may."""
    run_step = engine.run_step

    def watched(*step: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_step(*step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = {"max_num_batched_tokens": 20, "num_kv_blocks": 64, "block_size": 16, "enable_prefix_caching": False}
    params = [replace(one, seed=1) for one in PARAMS]
    with LLM(checkpoint(name, dtype="bfloat16"), enforce_eager=eager, progress=False, **options) as llm:
        assert llm._engine.overlapped
        prompts = prompt_batch(3, (3, 30, 1, 9, 12, 2))
        outputs = [llm.generate(prompts, params) for _ in range(2)]
        monkeypatch.setattr(engine, "run_step", watched)
        outputs.append(llm.generate(prompts, params))
    tokens = [[[one.token_ids for one in output.outputs] for output in call] for call in outputs]
    assert tokens[0] == tokens[1] == tokens[2]


KINDS = {
    "greedy": GREEDY,
    "random": SamplingRow(temperature=1.0, key=1, position=2),
    "top_k": SamplingRow(temperature=1.0, top_k=5),
    "nucleus": SamplingRow(temperature=1.0, top_p=0.9),
    "all filters": SamplingRow(temperature=1.0, top_k=50, top_p=0.9, min_p=0.1),
    "penalised": SamplingRow(repetition_penalty=1.2, history=History(0, 0, (1, 2, 3, 3), 1, 2)),
    "suppressed": SamplingRow(suppressed_token_ids=(4, 5)),
    "reported": SamplingRow(logprobs=5),
}


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)], ids=[*KINDS, "together"])
def test_sampling_where_there_are_no_values(kinds):
    rows = [replace(KINDS[kind], position=i) for i, kind in enumerate(kinds)]
    logits = torch.empty(len(rows), 50_000, device="meta")
    sampled = sample(logits, rows, torch.empty(3, dtype=torch.long, device="meta"))
    assert sampled.token_ids.shape == (len(rows),)
    assert all(tensor.device.type == "meta" for tensor in sampled.tensors)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: int(x[0]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_looks_are_refused(look):
    x = torch.arange(4.0)
    with no_waits(), pytest.raises(Waits):
        look(x)
