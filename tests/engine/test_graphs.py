"""Captured steps: the tokens of eager ones, whatever the batches hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.capture import FakeCapturer, TableBackend, captured_runner
from tests.checkpoints import prompt_batch
from tokenweave import LLM, SamplingParams
from tokenweave.config import EngineConfig
from tokenweave.cost.choice import Choice
from tokenweave.engine import at_hand, graphs, memory, rank, runner
from tokenweave.engine.attention import Backends
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.runner import Runner
from tokenweave.engine.stepper import Stepper
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
    monkeypatch.setattr(runner, "MOST_GRAPHS", 3)
    eager, captured, _, captures, _, buckets = both(checkpoint("llama"), {"overlap": "off"}, GREEDY)
    assert captured == eager
    assert captures > len(buckets) == 3


# -- what is captured, and when ----------------------------------------------------------------------------------------


def decoding(rows: int) -> Batch:
    return Batch(tuple(Span((5,), 9, (3 * i, 3 * i + 1, 3 * i + 2), 9, 1) for i in range(rows)))


@contextmanager
def captured(folder: Path, **options: Any) -> Iterator[tuple[Runner, FakeCapturer]]:
    with LLM(folder, overlap="weave", **OPTIONS | options) as llm, captured_runner(llm._runner) as capturer:
        llm._runner.storage.zero_()  # or rows that decode read what was never written
        yield llm._runner, capturer


@pytest.mark.parametrize("decode", [True, False])
def test_a_step_is_captured_when_it_comes_again(checkpoint, decode):
    with captured(checkpoint("llama")) as (of, capturer):
        batch = decoding(3) if decode else of.blank_batch(23)
        counts, logits = [], []
        for _ in range(4):
            logits.append(of.forward(batch, Plan(batch.rows, batch.rows // 2, "sharded")))
            counts.append((capturer.captures, capturer.replays))
        assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
        assert all(torch.allclose(each, logits[0], atol=1e-4) for each in logits)


def test_nothing_is_captured_before_the_device_was_waited_for(checkpoint, monkeypatch):
    """By a wait with a bound, as torch's own at the start of a capture has none."""
    with captured(checkpoint("llama")) as (of, capturer):
        order, wait, capture = [], of.synchronize, capturer.capture
        monkeypatch.setattr(of, "synchronize", lambda: order.append("wait") or wait())
        monkeypatch.setattr(capturer, "capture", lambda run: order.append("capture") or capture(run))
        for _ in range(3):
            of.forward(decoding(2), Plan(2))
        assert order == ["wait", "capture"]


def test_what_has_come_is_forgotten_after_a_while(checkpoint, monkeypatch):
    monkeypatch.setattr(graphs, "REMEMBERED", 2)
    with captured(checkpoint("llama")) as (of, capturer):
        for rows in (1, 2, 3, 1, 3):
            of.forward(decoding(rows), Plan(rows))
        assert len(of.graphs.seen) == 2
        assert [bucket.halves[0].rows for bucket, _ in of.graphs.held] == [4]  # 3, padded
        assert capturer.captures == 1


def test_a_graph_that_made_room_comes_twice_again(checkpoint):
    """Or two buckets that take turns would be captured in every step."""
    with captured(checkpoint("llama")) as (of, capturer):
        of.most_graphs = 1
        counts = []
        for rows in (1, 1, 2, 2, 1, 1):
            of.forward(decoding(rows), Plan(rows))
            counts.append(capturer.captures)
        assert counts == [0, 1, 1, 2, 2, 3]
        assert len(of.graphs.held) == 1


def test_how_large_a_prefill_is_captured(checkpoint, monkeypatch):
    monkeypatch.setattr(at_hand, "host_bound_tokens", lambda cost, woven, most: 3 * most)
    with captured(checkpoint("llama")) as (of, _):
        assert at_hand.graph_tokens(of) == 96  # max_num_batched_tokens is 32
    with captured(checkpoint("llama"), cuda_graph_max_tokens=20) as (of, _):
        assert at_hand.graph_tokens(of) == of.graphs.bounds.prefill_tokens == 20
    monkeypatch.setattr(rank, "graph_tokens", lambda of: 17)
    with captured(checkpoint("llama")) as (of, _):
        assert of.graphs.bounds.prefill_tokens == 17


def predicted_tokens(folder: Path) -> int:
    """On a rank, which predicts what the others do not."""
    with captured(folder) as (of, _), patch.object(at_hand, "host_bound_tokens", lambda *_: 64 * (9 - of.ranks.rank)):
        return at_hand.graph_tokens(of)


def test_the_ranks_capture_what_rank_0_predicts(ranks, checkpoint):
    assert ranks(2).run(predicted_tokens, checkpoint("llama")) == [576, 576]


class Steps:
    """Random steps of one cache, cut anywhere: chunks and rows that decode, with tokens that the host does not know."""

    def __init__(self, seed: int, drawn: int):
        self.random, self.drawn = Random(seed), drawn

    def step(self) -> tuple[Batch, Plan]:
        batch = self.batch()
        cut = self.random.randint(1, batch.rows - 1) if batch.rows > 1 and self.random.random() < 0.7 else None
        return batch, Plan(batch.rows, cut, self.random.choice(["reference", "sharded"]) if cut is None else "sharded")

    def batch(self) -> Batch:
        blocks, decode = self.random.sample(range(64), 64), self.random.random() < 0.4
        spans, late, row = [], [], 0
        for _ in range(self.random.randint(1, 4)):
            count = 1 if decode else self.random.randint(1, 8)
            context = self.random.randint(decode, 40)
            table = tuple(blocks.pop() for _ in range(-(-(context + count) // 4)))
            tokens = tuple(self.random.randrange(259) for _ in range(count))
            spans.append(Span(tokens, context, table, context + count, 1 if decode else self.random.randint(0, 1)))
            row += count
            late += [(row - 1, self.random.randrange(self.drawn))] * self.random.randint(0, 1)
        return Batch((*spans[:-1], replace(spans[-1], wanted=1)), tuple(late))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.inference_mode()
def test_any_steps(checkpoint, name):
    """What an earlier step of a bucket was like shows in none: neither in logits nor in the cache."""
    steps = Steps(seed=0, drawn=4)
    with captured(checkpoint(name)) as (of, capturer):
        of.storage.normal_(generator=torch.Generator().manual_seed(0))
        kept, made = of.storage.clone(), of.graphs
        for i in range(80):
            (batch, plan), previous = steps.step(), torch.arange(4) * 50 + i
            logits, written = of.forward(batch, plan, previous), of.storage.clone()
            of.storage.copy_(kept)
            of.graphs = None
            assert torch.allclose(logits, of.forward(batch, plan, previous), atol=1e-3)
            assert torch.allclose(written, of.storage, atol=1e-3)
            of.storage.copy_(kept)
            of.graphs = made
    assert capturer.replays > 30


def test_a_stepper_times_graphs(checkpoint):
    """Not a capture."""
    stepper = Stepper(EngineConfig(str(checkpoint("llama")), **OPTIONS))
    with captured_runner(stepper.rank.runner) as capturer:
        counts = []
        stepper.plan_seconds = lambda plan, run=stepper.plan_seconds: counts.append(capturer.captures) or run(plan)
        for choice in (Choice("off"), Choice("weave", 8, 4, 4), Choice("weave", 16, 4, 4), Choice("off")):
            stepper.seconds((23, choice))
    stepper.close()
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


class FullCapturer(FakeCapturer):
    """Has memory for so many graphs; the last one's work is queued, as far as to its end."""

    def __init__(self, room: int, error: Exception):
        super().__init__()
        self.room, self.error = room, error

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(run)
        if self.captures > self.room:
            raise self.error
        return replay


def run_out(folder: Path, failing: int, error: Exception) -> list[Any]:
    """On a rank: what is told as `both` tells it, where one rank's memory runs out in its third capture; warnings."""
    options = {"overlap": "weave"}
    with LLM(folder, **OPTIONS | options) as llm:
        eager, _ = tokens_of(llm, SAMPLED)
        with captured_runner(llm._runner), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            capturer = llm._runner.capturer = FullCapturer(2 if llm._ranks.rank == failing else 99, error)
            tokens, _ = tokens_of(llm, SAMPLED)
            held = llm._runner.graphs.held
            told = [str(one.message) for one in warned if "GPU memory" in str(one.message)]
            return [tokens == eager, len(held), capturer.captures, told]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")])  # fmt: skip  # noqa: E501
def test_without_memory_for_graphs_every_rank_goes_on_without(ranks, checkpoint, error):
    first, second = ranks(2).run(run_out, checkpoint("llama"), 1, error)
    assert first[:3] == second[:3] == [True, 0, 3]
    assert second[3] == []
    assert first[3] == [
        "rank 1 has not enough GPU memory for capturing a CUDA graph: every step is queued anew from now on, which is "
        "slower; lower gpu_memory_utilization"
    ]


def test_other_errors_in_a_capture_are_errors(checkpoint):
    with captured(checkpoint("llama")) as (of, _):
        of.capturer = FullCapturer(0, RuntimeError("CUDA error: operation not permitted when stream is capturing"))
        of.forward(decoding(1), Plan(1))
        with pytest.raises(RuntimeError, match="not permitted"):
            of.forward(decoding(1), Plan(1))


def test_addresses_stay(checkpoint):
    """Inputs and logits of a bucket lie where they lay when it was captured."""
    with LLM(checkpoint("llama"), overlap="weave", **OPTIONS) as llm, captured_runner(llm._runner):
        places: dict[Any, set[int]] = {}
        for seed in range(3):
            llm.generate(prompt_batch(seed, LENGTHS), GREEDY)
            for bucket, graph in llm._runner.graphs.held.items():
                tensors = [graph.step.packed, *graph.logits]
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
    monkeypatch.setattr(memory, "MOST_GRAPHS", 3)
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
    """From the third step of a kind on, queueing one makes the host wait for nothing."""
    with LLM(checkpoint("llama"), overlap="weave", enforce_eager=eager, **ON_GPU | LONG) as llm:
        runner = llm._runner
        runner.storage.zero_()
        decode = Batch(tuple(Span((5,), 20, (2 * i, 2 * i + 1), 20, 1) for i in range(11)))
        for batch in (runner.blank_batch(200), decode):
            plan = Plan(batch.rows, batch.rows // 2, "sharded")
            expected = runner.forward(batch, plan)
            runner.forward(batch, plan)  # captures it
            runner.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                logits = runner.forward(batch, plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            runner.synchronize()
            assert torch.equal(logits, expected)
