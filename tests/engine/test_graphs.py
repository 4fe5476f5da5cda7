"""Captured steps: the tokens of eager ones, whatever the batches hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.capture import FakeCapturer, TableBackend, captured_runner
from tests.checkpoints import prompt_batch
from tokenweave import LLM, SamplingParams
from tokenweave.engine import graphs
from tokenweave.engine.attention import Backends
from tokenweave.engine.batch import Batch, Span
from tokenweave.weave.plan import Plan

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=7, ignore_eos=True, seed=3)
LENGTHS = (1, 30, 7, 18, 3)
OPTIONS = {
    "device": "cpu",
    "max_num_batched_tokens": 32,
    "max_num_seqs": 4,
    "block_size": 4,
    "num_kv_blocks": 64,
    "max_model_len": 64,
    "enable_prefix_caching": False,
    "progress": False,
    "timeout_s": 60.0,
}


def tokens_of(llm: LLM, params: SamplingParams) -> tuple[list[list[int]], torch.Tensor]:
    """Two calls' tokens from a cache of NaN, and which places of it were written."""
    llm._runner.storage.fill_(float("nan"))
    tokens = []
    for seed in (0, 1):  # the same buckets, other contents
        outputs: Any = llm.generate(prompt_batch(seed, LENGTHS), params)
        tokens += [output.outputs[0].token_ids for output in outputs]
    return tokens, ~llm._runner.storage.isnan().flatten(4).any(-1)


def both(folder: Path, options: Mapping[str, Any], params: SamplingParams) -> list[Any]:
    """On a rank: (eager tokens, captured tokens, whether they wrote the same places, captures, replays, buckets)."""
    with LLM(folder, **OPTIONS | dict(options)) as llm:
        eager, written = tokens_of(llm, params)
    with LLM(folder, **OPTIONS | dict(options)) as llm, captured_runner(llm._runner) as capturer:
        captured, written_too = tokens_of(llm, params)
        held = llm._runner.graphs.held
        buckets = [(bucket.form, len(bucket.halves)) for bucket, _ in held]
    return [eager, captured, torch.equal(written, written_too), capturer.captures, capturer.replays, buckets]


def agree(results: Sequence[list[Any]]) -> list[tuple[str, int]]:
    """Checks every rank's; returns the buckets."""
    for eager, captured, same_places, captures, replays, buckets in results:
        assert captured == eager == results[0][0]
        assert same_places
        assert replays > captures >= len(buckets) > 2
    return results[0][-1]


@pytest.mark.parametrize(
    ("name", "overlap"),
    [("llama", "off"), ("llama", "fused"), ("llama", "weave"), ("gemma2", "weave"), ("qwen2_window", "off")],
)
def test_captured_tokens_are_eager_tokens(checkpoint, name, overlap):
    buckets = agree([both(checkpoint(name), {"overlap": overlap}, GREEDY)])
    assert {form for form, _ in buckets} == {"reference" if overlap == "off" else "sharded"}
    assert any(halves == 2 for _, halves in buckets) == (overlap == "weave")


@pytest.mark.parametrize("overlap", ["off", "weave"])
def test_captured_tokens_on_two_ranks(ranks, checkpoint, overlap):
    agree(ranks(2).run(both, checkpoint("llama"), {"overlap": overlap}, SAMPLED))


def test_tokens_that_the_host_does_not_know_yet(checkpoint):
    """Overlapped scheduling: a captured step finds the tokens of the step before on the device."""
    agree([both(checkpoint("llama"), {"overlap": "weave", "async_scheduling": True}, SAMPLED)])


def test_few_graphs_are_held_and_the_tokens_are_the_same(checkpoint, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    eager, captured, _, captures, _, buckets = both(checkpoint("llama"), {"overlap": "off"}, GREEDY)
    assert captured == eager
    assert captures > len(buckets) == 3


def test_addresses_stay(checkpoint):
    """Inputs and logits of a bucket lie where they lay when it was captured."""
    with LLM(checkpoint("llama"), overlap="weave", **OPTIONS) as llm, captured_runner(llm._runner):
        places: dict[Any, set[int]] = {}
        for seed in range(3):
            llm.generate(prompt_batch(seed, LENGTHS), GREEDY)
            for bucket, graph in llm._runner.graphs.held.items():
                tensors = [graph.packed, *graph.logits]
                places.setdefault(bucket, set()).add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(places) > 3
    assert all(len(found) == 1 for found in places.values())


class StaleBackend(TableBackend):
    """Has copied the lengths of the first batch."""

    def __call__(self, spans: Any, tables: Any) -> Any:
        return super().__call__(spans, replace(tables, kv_lengths=tables.kv_lengths.clone()))


def test_what_is_left_of_the_first_batch_shows(checkpoint):
    """The tests above can fail."""
    with LLM(checkpoint("llama"), overlap="off", **OPTIONS) as llm:
        eager, _ = tokens_of(llm, GREEDY)
        with captured_runner(llm._runner):
            llm._runner.attention = Backends(llm._runner.attention.eager, StaleBackend(llm._runner.storage))
            assert tokens_of(llm, GREEDY)[0] != eager


def test_eager_where_it_is_asked_for(checkpoint):
    with LLM(checkpoint("llama"), enforce_eager=True, **OPTIONS) as llm:
        assert llm._runner.capturer is None
        llm.generate(prompt_batch(0, (3,)), GREEDY)
        assert llm._runner.graphs is None


# -- the capturer of these tests ---------------------------------------------------------------------------------------


def test_the_fake_finds_freed_memory_and_host_reads():
    capturer, out = FakeCapturer(), torch.zeros(4)
    kept = [torch.ones(4)]

    def add() -> None:
        out.add_(kept[0])

    replay = capturer.capture(add)
    replay()
    assert out.tolist() == [2.0] * 4
    kept.clear()
    with pytest.raises(AssertionError, match=r"memory that aten.add_.Tensor uses was freed after the capture"):
        replay()
    with pytest.raises(AssertionError, match="waits for the device"):
        capturer.capture(lambda: out.sum().item() and None)


def test_the_fake_keeps_host_numbers_and_reads_memory_anew():
    capturer, data, out, factor = FakeCapturer(), torch.ones(3), torch.zeros(3), [2]
    replay = capturer.capture(lambda: out.copy_(data * factor[0] + data))
    data.fill_(10.0)
    factor[0] = 100
    replay()
    assert out.tolist() == [30.0] * 3


# -- on a GPU ----------------------------------------------------------------------------------------------------------

ON_GPU = {name: value for name, value in OPTIONS.items() if name != "device"} | {"device": "cuda", "dtype": "float32"}
LONG = {"max_num_batched_tokens": 512, "max_num_seqs": 16, "num_kv_blocks": 512, "max_model_len": 256, "block_size": 16}


def on_gpu(folder: Path, **options: Any) -> tuple[list[list[int]], int]:
    """Tokens of three calls, and how many graphs they were launched from."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with LLM(folder, **ON_GPU | LONG | options) as llm:
        tokens = []
        for seed in range(3):
            outputs: Any = llm.generate(prompt_batch(seed, (1, 30, 7, 118, 3)), GREEDY)
            tokens += [output.outputs[0].token_ids for output in outputs]
        return tokens, len(llm._runner.graphs.held) if llm._runner.graphs else 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2_window", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("overlap", ["off", "fused", "weave"])
def test_captured_tokens_on_a_gpu(checkpoint, name, overlap):
    eager, none = on_gpu(checkpoint(name), overlap=overlap, enforce_eager=True)
    captured, graphs_held = on_gpu(checkpoint(name), overlap=overlap)
    assert none == 0
    assert graphs_held > 2
    assert captured == eager


@pytest.mark.gpu
def test_graphs_that_are_let_go_leave_the_others_whole(checkpoint, monkeypatch):
    """With a graph goes what torch keeps for cuBLAS on the stream that all were captured on, from torch 2.12 on."""
    eager, _ = on_gpu(checkpoint("llama"), overlap="weave", enforce_eager=True)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    captured, graphs_held = on_gpu(checkpoint("llama"), overlap="weave")
    assert graphs_held == 3
    assert captured == eager


@pytest.mark.multigpu
@pytest.mark.parametrize("overlap", ["off", "fused", "weave"])
def test_captured_tokens_on_two_gpus(ranks, checkpoint, overlap):
    """By the fused kernel where the GPUs can, and by NCCL."""
    for comm in ("auto", "sharded"):
        eager = ranks(2).run(on_gpu, checkpoint("llama"), overlap=overlap, comm=comm, enforce_eager=True)
        captured = ranks(2).run(on_gpu, checkpoint("llama"), overlap=overlap, comm=comm)
        assert [tokens for tokens, _ in captured] == [tokens for tokens, _ in eager]
        assert all(held > 2 for _, held in captured)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False])
def test_no_step_waits_for_the_gpu(checkpoint, eager):
    """From the second step of a kind on, queueing one makes the host wait for nothing."""
    with LLM(checkpoint("llama"), overlap="weave", enforce_eager=eager, **ON_GPU | LONG) as llm:
        runner = llm._runner
        runner.storage.zero_()
        decode = Batch(tuple(Span((5,), 20, (2 * i, 2 * i + 1), 20, 1) for i in range(11)))
        for batch in (runner.blank_batch(200), decode):
            plan = Plan(batch.rows, batch.rows // 2, "sharded")
            expected = runner.forward(batch, plan).clone()
            runner.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                logits = runner.forward(batch, plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            runner.synchronize()
            assert torch.equal(logits, expected)
