"""What memory is for, in numbers and words; the cache that there is room for, on a GPU that is a fake."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.capture import captured_runner
from tokenweave import LLM, SamplingParams
from tokenweave.comm.group import PeerError
from tokenweave.engine import allocation, memory, rank, runner
from tokenweave.engine.allocation import MOST_BLOCKS, largest_batch, measure_graphs, poorest
from tokenweave.engine.memory import (
    MOST_GRAPHS,
    Memory,
    Reading,
    cache_bytes_left,
    check_claim,
    explained,
    is_out_of_memory,
    room_for_graphs,
    size,
)

GIB, MIB = 1 << 30, 1 << 20
OPTIONS: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 50, "max_num_seqs": 7, "progress": False}
BLOCK_BYTES = 2 * 3 * 4 * 4 * 8 * 4  # keys and values, layers, tokens, KV heads, head size, fp32


# -- numbers and words -------------------------------------------------------------------------------------------------


def reading(free: int, reserved: int = 0, peak: int = 0) -> Reading:
    """Of a GPU of 80 GiB, in GiB."""
    return Reading(80 * GIB, free * GIB, reserved * GIB, reserved * GIB, peak * GIB)


def test_what_is_left_for_the_cache():
    """20 GiB are others' at the start; then 16 for weights, 1 for communication, and 3 more at times."""
    start, now = reading(free=60), reading(free=43, reserved=16, peak=19)
    assert cache_bytes_left(start, now, 0.5, 0) == (40 - 16 - 1 - 3) * GIB
    assert cache_bytes_left(start, now, 0.5, 2 * GIB) == (40 - 16 - 1 - 3 - 2) * GIB
    assert cache_bytes_left(start, now, 0.2, 0) == -4 * GIB
    used_before = reading(free=60, reserved=5)  # by this process: its tensors are others' too
    assert cache_bytes_left(used_before, reading(free=43, reserved=21, peak=24), 0.5, 0) == (40 - 20) * GIB


def test_the_cache_takes_no_memory_that_is_not_there():
    """Others have taken 30 GiB since the start; or have let go of all that they had."""
    start = reading(free=60)
    assert cache_bytes_left(start, reading(free=13, reserved=16, peak=19), 0.75, 0) == 10 * GIB
    assert cache_bytes_left(start, reading(free=63, reserved=16, peak=19), 0.5, GIB) == 20 * GIB


def test_a_gpu_must_have_what_is_asked_for():
    check_claim(reading(free=60), 0.75)
    said = (
        r"^gpu_memory_utilization=0.9 asks for 72.0 GiB of this GPU's 80.0 GiB, of which 60.0 GiB are free; "
        r"free memory on it, or lower gpu_memory_utilization$"
    )
    with pytest.raises(ValueError, match=said):
        check_claim(reading(free=60), 0.9)


@pytest.mark.parametrize(
    ("taken", "count", "bytes_"),
    [
        ([300, 10, 20, 30], 32, 300 + 31 * 20),  # a fiftieth of the GPU is 640 MiB
        ([300, 1, 1, 1], MOST_GRAPHS, 300 + (MOST_GRAPHS - 1)),
        ([300, 400, 400], 8, 300 + 7 * 400),
        ([300], MOST_GRAPHS, 300),
        ([-5, -5, 2], MOST_GRAPHS, 0),  # somebody else let go of memory meanwhile
    ],
)
def test_room_for_graphs(taken, count, bytes_):
    taken_bytes = [each * MIB for each in taken]
    assert room_for_graphs(taken_bytes, 50 * 640 * MIB) == (count, bytes_ * MIB)


def test_out_of_memory_by_any_name():
    torch_says = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    behind = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    assert not is_out_of_memory(behind)
    behind.__context__ = torch_says
    for error in (torch_says, torch.AcceleratorError("CUDA error: out of memory"), behind):
        assert is_out_of_memory(error)
        with pytest.raises(MemoryError), explained("a step", "lower it", None):
            raise error
    for error in (RuntimeError("out of memory in a bottle"), torch.AcceleratorError("CUDA error: misaligned address")):
        assert not is_out_of_memory(error)
        with pytest.raises(RuntimeError, match=str(error)), explained("a step", "lower it", None):
            raise error


def test_others_have_what_is_neither_free_nor_torchs():
    reading = Reading(
        100 * GIB, free_bytes=60 * GIB, reserved_bytes=30 * GIB, allocated_bytes=25 * GIB, peak_bytes=28 * GIB
    )
    assert reading.others_bytes == 10 * GIB
    assert str(reading) == (
        "100.0 GiB in all: tensors 25.0 GiB, kept for tensors 5.0 GiB, others 10.0 GiB, free 60.0 GiB"
    )


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 * MIB // 2, "1.5 MiB"),
        (80 * GIB, "80.0 GiB"),
        (-2 * GIB, "-2.0 GiB"),
    ],
)
def test_sizes(count_bytes, text):
    assert size(count_bytes) == text


def test_memory_in_words():
    gpu = Memory(80 * GIB, 15 * GIB, 1280 * MIB, GIB, block_bytes=2 * MIB, block_size=16, blocks=28_000)
    assert str(gpu) == (
        "80.0 GiB: weights 15.0 GiB, activations 1.2 GiB, KV cache 54.7 GiB = 28,000 blocks = 448,000 tokens, "
        "others 1.0 GiB"
    )
    assert ", up to 100 CUDA graphs 1.5 GiB, others" in str(replace(gpu, graphs=100, graphs_bytes=1536 * MIB))
    host = Memory(4 * GIB, 5 * MIB, None, 0, block_bytes=1 << 10, block_size=8, blocks=64)
    assert str(host) == "4.0 GiB free: weights 5.0 MiB, KV cache 64.0 KiB = 64 blocks = 512 tokens"


def test_the_poorest_rank_decides():
    mine = Memory(80 * GIB, 1, 2, 3, block_bytes=4, block_size=5, blocks=100)
    mine = replace(mine, graphs=90, graphs_bytes=7)
    everyone = [mine, replace(mine, blocks=60, graphs=80), replace(mine, blocks=70, graphs=50, graphs_bytes=9)]
    assert poorest(everyone, mine, 0.9) == replace(mine, blocks=60, graphs=50)
    none = Memory(80 * GIB, 70 * GIB, 3 * GIB, GIB, block_bytes=1 << 21, block_size=16, blocks=-900)
    with pytest.raises(ValueError, match=r"^no memory is left for one KV block of 2097152 bytes on rank 1") as caught:
        poorest([mine, none], mine, 0.9)
    assert (
        "within gpu_memory_utilization=0.9 of 80.0 GiB: weights 70.0 GiB, activations 3.0 GiB, KV cache 0 bytes = "
        "0 blocks = 0 tokens, others 1.0 GiB; raise it, lower max_num_batched_tokens or max_num_seqs, raise"
    ) in str(caught.value)


def test_the_largest_batch():
    batch = largest_batch(50, 7, block_size=4)
    assert [len(span) for span in batch.spans] == [8, 7, 7, 7, 7, 7, 7]
    assert {span.block_table for span in batch.spans} == {(0, 0)}  # of its memory the cache should take none
    assert len(batch.wanted_rows()) == 7


# -- a GPU that is none ------------------------------------------------------------------------------------------------


@dataclass
class Gpu:
    """A meter: of a GPU with so much memory, where the largest step takes so much. others: what is not torch's when
    something was loaded; before: what was not at the start."""

    total_bytes: int
    peak_bytes: int
    others_bytes: int = 0
    before_bytes: int = 0
    starts: int = 0

    def read(self) -> Reading:
        free_bytes = self.total_bytes - self.others_bytes - 100
        return Reading(self.total_bytes, free_bytes, 100, 90, self.peak_bytes)

    def restart(self) -> Reading:
        """At the start: before anything is loaded, and by the runner."""
        if self.starts < 2:
            self.starts += 1
            return Reading(self.total_bytes, self.total_bytes - self.before_bytes, 0, 0, 0)
        return self.read()


@contextmanager
def on(*gpus: Gpu):
    """Each rank has one of these."""

    def mine(_: torch.device) -> Gpu:
        return gpus[dist.get_rank() if dist.is_initialized() else 0]

    with patch.object(runner, "open_meter", mine), patch.object(rank, "open_meter", mine):
        yield


def greedy(llm: LLM) -> list[int]:
    return llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids


def blocks_on(gpus: list[Gpu], folder: Path, options: dict[str, Any]) -> Any:
    """Runs on every rank: what memory is for, and what is generated; or the error."""
    with on(*gpus):
        try:
            with LLM(folder, **OPTIONS | options) as llm:
                assert len(llm._runner.storage) == llm.memory.blocks
                return llm.memory, greedy(llm)
        except ValueError as error:
            return str(error)


def test_the_cache_takes_what_the_largest_step_leaves(checkpoint, caplog):
    gpu = Gpu(1000 * BLOCK_BYTES, 400 * BLOCK_BYTES, others_bytes=150 * BLOCK_BYTES, before_bytes=100 * BLOCK_BYTES)
    with caplog.at_level(logging.INFO):
        found, tokens = blocks_on([gpu], checkpoint("llama"), {"gpu_memory_utilization": 0.8})
    assert found.blocks == 800 - 400 - 50
    assert (found.block_bytes, found.others_bytes) == (BLOCK_BYTES, 150 * BLOCK_BYTES)
    assert found.weights_bytes + found.activations_bytes == 400 * BLOCK_BYTES
    assert f"memory of rank 0: {found}" in caplog.messages
    with LLM(checkpoint("llama"), **OPTIONS) as llm:
        assert found.weights_bytes == sum(load.into.nbytes for load in llm._runner.model.loads())
        assert llm.memory.activations_bytes is None
        assert greedy(llm) == tokens


def test_the_cache_leaves_what_graphs_take(checkpoint, monkeypatch):
    monkeypatch.setattr(allocation, "measure_graphs", lambda *_: [50 * BLOCK_BYTES, 2 * BLOCK_BYTES])
    with on(Gpu(1000 * BLOCK_BYTES, 400 * BLOCK_BYTES)), LLM(checkpoint("llama"), **OPTIONS) as llm:
        assert llm._runner.most_graphs == llm.memory.graphs == 10  # a fiftieth of the GPU
        assert llm.memory.graphs_bytes == (50 + 9 * 2) * BLOCK_BYTES
        assert llm.memory.blocks == 900 - 400 - 50 - 9 * 2


def test_what_graphs_take_is_measured(checkpoint):
    """By a GPU where the first takes 100 bytes more than each."""
    with LLM(checkpoint("llama"), **OPTIONS, overlap="weave") as llm, captured_runner(llm._runner) as capturer:
        runner, meter = llm._runner, Gpu(GIB, 0, starts=2)
        meter.restart = lambda: reading_of(GIB - 100 * bool(capturer.captures) - 7 * capturer.captures)
        storage = runner.storage
        assert measure_graphs(runner, meter) == [114, 7, 7, 7, 7]  # the first stands for the largest of both kinds
        assert runner.capturer is capturer
        assert "graphs" not in vars(runner)  # nothing of what was measured with is kept
        assert "storage" not in vars(runner)
        runner.storage = storage


def reading_of(free_bytes: int) -> Reading:
    return Reading(GIB, free_bytes, 0, 0, 0)


def test_blocks_that_are_asked_for_are_taken(checkpoint):
    found, _ = blocks_on([Gpu(1000 * BLOCK_BYTES, 990 * BLOCK_BYTES)], checkpoint("llama"), {"num_kv_blocks": 11})
    assert found.blocks == 11


def test_a_small_model_does_not_get_millions_of_blocks(checkpoint, monkeypatch):
    monkeypatch.setattr(allocation, "MOST_BLOCKS", 300)
    found, _ = blocks_on([Gpu(80 * GIB, GIB)], checkpoint("llama"), {"max_model_len": 40})
    assert found.blocks == 300
    found, _ = blocks_on([Gpu(80 * GIB, GIB)], checkpoint("llama"), {"max_model_len": 400})
    assert found.blocks == 7 * 100  # as many as can be needed at once
    assert MOST_BLOCKS > 10**5


@pytest.mark.parametrize("overlap", ["off", "auto", "weave"])
def test_ranks_take_what_the_poorest_has(ranks, checkpoint, overlap):
    half = BLOCK_BYTES // 2  # of the KV heads
    gpus = [Gpu(1000 * half, 400 * half), Gpu(1000 * half, 500 * half, 100 * half)]
    (first, tokens), (second, others) = ranks(2).run(blocks_on, gpus, checkpoint("llama"), {"overlap": overlap})
    assert first.blocks == second.blocks == 900 - 500 - 100
    assert first.activations_bytes < second.activations_bytes
    assert tokens == others


def test_every_rank_says_which_has_no_room(ranks, checkpoint):
    gpus = [Gpu(80 * GIB, 15 * GIB), Gpu(80 * GIB, 79 * GIB, GIB)]
    first, second = ranks(2).run(blocks_on, gpus, checkpoint("llama"), {"overlap": "off"})
    assert first == second
    start = "no memory is left for one KV block of 1536 bytes on rank 1, within gpu_memory_utilization=0.9 of 80.0 GiB"
    assert first.startswith(start)


def test_every_rank_says_which_gpu_is_taken(ranks, checkpoint):
    gpus = [Gpu(80 * GIB, 15 * GIB), Gpu(80 * GIB, 15 * GIB, before_bytes=30 * GIB)]
    first, second = ranks(2).run(blocks_on, gpus, checkpoint("llama"), {"overlap": "off"})
    assert first == f"rank 1: {second}"
    assert second.startswith("gpu_memory_utilization=0.9 asks for 72.0 GiB of this GPU's 80.0 GiB, of which 50.0 GiB")
    results = ranks(2).run(blocks_on, gpus, checkpoint("llama"), {"overlap": "off", "num_kv_blocks": 9})
    assert [found.blocks for found, _ in results] == [9, 9]


def test_the_largest_step_leaves_nothing_behind(checkpoint):
    with on(Gpu(80 * GIB, GIB)), LLM(checkpoint("llama"), **OPTIONS, num_kv_blocks=9) as llm:
        assert llm._runner.storage.shape[0] == 9
        assert llm._runner.attention.eager.storage is llm._runner.storage


def longest_traced(gpus: list[Gpu], folder: Path, path: Path) -> int:
    """On a rank: the rows of the longest half of a timeline."""
    options = OPTIONS | {"overlap": "auto", "trace": str(path)}
    with on(*gpus), LLM(folder, **options, num_kv_blocks=9) as llm:
        greedy(llm)
        return max(span.tokens for span in llm.spans)


def test_a_timeline_shows_neither_the_largest_step_nor_what_was_timed(ranks, checkpoint, tmp_path):
    gpus = [Gpu(80 * GIB, GIB), Gpu(80 * GIB, GIB)]
    assert max(ranks(2).run(longest_traced, gpus, checkpoint("llama"), tmp_path / "trace.json")) <= 3  # of the prompt


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False])
def test_a_gpu_is_used_as_far_as_allowed(checkpoint, eager):
    options = {
        "enforce_eager": eager,
        "gpu_memory_utilization": 0.25,
        "max_num_batched_tokens": 2048,
        "progress": False,
    }
    prompts = [[1] * 600] * 8
    with LLM(checkpoint("llama", dtype="bfloat16"), **options) as llm:
        found, start = llm.memory, llm._runner.start
        assert found.total_bytes == torch.cuda.mem_get_info()[1]
        assert (found.graphs, found.graphs_bytes) == (0, 0) if eager else found.graphs >= 8
        tensors = found.weights_bytes + found.activations_bytes + found.cache_bytes + found.graphs_bytes
        assert tensors + found.others_bytes - start.others_bytes <= 0.25 * found.total_bytes
        torch.cuda.reset_peak_memory_stats()
        for count in range(1, 9):
            for _ in range(3):  # queued, captured, launched
                params = SamplingParams(max_tokens=3, top_p=0.9, repetition_penalty=1.1, logprobs=5)
                llm.generate(prompts[:count], params)
        assert torch.cuda.max_memory_allocated() <= tensors + 64 * MIB
        now = llm._runner.meter.restart()
        assert start.free_bytes - now.free_bytes <= 0.25 * found.total_bytes


@pytest.mark.gpu
def test_a_gpu_that_is_full(checkpoint):
    with pytest.raises(
        ValueError, match=r"there is no memory for 10{9} KV blocks of .* GiB in all: .*; lower num_kv_blocks"
    ):
        LLM(checkpoint("llama"), progress=False, num_kv_blocks=10**9)
    with pytest.raises(
        ValueError, match=r"no memory is left for one KV block .* gpu_memory_utilization=1e-06 of .*; raise it"
    ):
        LLM(checkpoint("llama"), progress=False, gpu_memory_utilization=1e-6)


# -- memory that runs out ----------------------------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. ...")


NUMBERS = r"\(80\.0 GiB in all: tensors 90 bytes, kept for tensors 10 bytes, others 0 bytes, free 80\.0 GiB\)"


@pytest.mark.parametrize(
    ("where", "task", "advice"),
    [
        ((runner, "Decoder"), "the weights", "raise tensor_parallel_size"),
        ((allocation, "run_largest_step"), "the largest step", "lower max_num_batched_tokens or max_num_seqs"),
    ],
)
def test_out_of_memory_while_opening(checkpoint, where, task, advice):
    said = rf"^there is not enough GPU memory for {task} {NUMBERS}; {advice}"
    with on(Gpu(80 * GIB, GIB)), patch.object(*where, out_of_memory), pytest.raises(ValueError, match=said):
        LLM(checkpoint("llama"), **OPTIONS)


def test_no_memory_for_the_blocks_that_were_asked_for(checkpoint):
    said = rf"^there is no memory for 10{{12}} KV blocks of {BLOCK_BYTES} bytes {NUMBERS}; lower num_kv_blocks"
    with on(Gpu(80 * GIB, GIB)), pytest.raises(ValueError, match=said):
        LLM(checkpoint("llama"), **OPTIONS, num_kv_blocks=10**12)


def run_out(folder: Path, failing: int) -> str:
    """Runs on every rank: a call in which one of them runs out of memory."""
    with on(*[Gpu(80 * GIB, GIB)] * 2), LLM(folder, **OPTIONS, num_kv_blocks=9, overlap="off", timeout_s=20) as llm:
        if dist.get_rank() == failing:
            llm._runner.forward = out_of_memory
        try:
            llm.generate([1, 2, 3])
        except (MemoryError, PeerError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("failing", [0, 1])
def test_out_of_memory_in_a_step(ranks, checkpoint, failing):
    said = ranks(2).run(run_out, checkpoint("llama"), failing)
    assert said[failing].startswith("MemoryError: there is not enough GPU memory for a step of 3 rows (80.0 GiB in all")
    assert "lower gpu_memory_utilization" in said[failing]
    assert said[1 - failing].startswith("PeerError: another rank was lost")


def test_other_errors_pass():
    with pytest.raises(ArithmeticError), explained("a step", "lower it", None):
        raise ArithmeticError
    with (
        pytest.raises(MemoryError, match=r"^there is not enough GPU memory for a step; lower it$"),
        explained("a step", "lower it", None),
    ):
        out_of_memory()


def test_a_host_is_asked_as_before(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 80 * GIB)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.host_cache_bytes() == 20 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.host_cache_bytes() == 5 * GIB
