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

from tokenweave import LLM, SamplingParams
from tokenweave.comm.group import PeerError
from tokenweave.engine import allocation, memory, rank, runner
from tokenweave.engine.allocation import MOST_BLOCKS, largest_batch, poorest
from tokenweave.engine.memory import Memory, Reading, cache_bytes_left, explained, size

GIB, MIB = 1 << 30, 1 << 20
OPTIONS: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 50, "max_num_seqs": 7, "progress": False}
BLOCK_BYTES = 2 * 3 * 4 * 4 * 8 * 4  # keys and values, layers, tokens, KV heads, head size, fp32


# -- numbers and words -------------------------------------------------------------------------------------------------


def test_what_is_left_for_the_cache():
    assert cache_bytes_left(80 * GIB, 0.9, peak_bytes=16 * GIB, others_bytes=1 * GIB) == 55 * GIB
    assert cache_bytes_left(80 * GIB, 0.2, peak_bytes=16 * GIB, others_bytes=1 * GIB) == -1 * GIB
    assert cache_bytes_left(100, 1.0, 0, 0) == 100


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
    host = Memory(4 * GIB, 5 * MIB, None, 0, block_bytes=1 << 10, block_size=8, blocks=64)
    assert str(host) == "4.0 GiB free: weights 5.0 MiB, KV cache 64.0 KiB = 64 blocks = 512 tokens"


def test_the_poorest_rank_decides():
    mine = Memory(80 * GIB, 1, 2, 3, block_bytes=4, block_size=5, blocks=100)
    assert poorest([mine, replace(mine, blocks=60), replace(mine, blocks=70)], mine, 0.9) == replace(mine, blocks=60)
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
    """A meter: of a GPU with so much memory, where the largest step takes so much."""

    total_bytes: int
    peak_bytes: int
    others_bytes: int = 0
    restarts: int = 0

    def read(self) -> Reading:
        free_bytes = self.total_bytes - self.others_bytes - 100
        return Reading(self.total_bytes, free_bytes, 100, 90, self.peak_bytes)

    def restart(self) -> None:
        self.restarts += 1


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
    gpu = Gpu(total_bytes=1000 * BLOCK_BYTES, peak_bytes=400 * BLOCK_BYTES, others_bytes=50 * BLOCK_BYTES)
    with caplog.at_level(logging.INFO):
        found, tokens = blocks_on([gpu], checkpoint("llama"), {"gpu_memory_utilization": 0.8})
    assert found.blocks == 800 - 400 - 50
    assert (found.block_bytes, found.others_bytes) == (BLOCK_BYTES, 50 * BLOCK_BYTES)
    assert found.weights_bytes + found.activations_bytes == 400 * BLOCK_BYTES
    assert f"memory of rank 0: {found}" in caplog.messages
    with LLM(checkpoint("llama"), **OPTIONS) as llm:
        assert found.weights_bytes == sum(load.into.nbytes for load in llm._runner.model.loads())
        assert llm.memory.activations_bytes is None
        assert greedy(llm) == tokens


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


def test_the_largest_step_leaves_nothing_behind(checkpoint):
    with on(Gpu(80 * GIB, GIB)), LLM(checkpoint("llama"), **OPTIONS, num_kv_blocks=9) as llm:
        assert llm._runner.storage.shape[0] == 9
        assert llm._runner.attention.eager.storage is llm._runner.storage


@pytest.mark.gpu
def test_a_gpu_is_used_as_far_as_allowed(checkpoint):
    options = {"enforce_eager": True, "gpu_memory_utilization": 0.25, "max_num_batched_tokens": 2048, "progress": False}
    prompts = [[1] * 600] * 8
    with LLM(checkpoint("llama", dtype="bfloat16"), **options) as llm:
        found = llm.memory
        assert found.total_bytes == torch.cuda.mem_get_info()[1]
        used = found.weights_bytes + found.activations_bytes + found.cache_bytes + found.others_bytes
        assert used <= 0.25 * found.total_bytes
        torch.cuda.reset_peak_memory_stats()
        llm.generate(prompts, SamplingParams(max_tokens=3, top_p=0.9, repetition_penalty=1.1, logprobs=5))
        assert torch.cuda.max_memory_allocated() <= used - found.others_bytes + 64 * MIB


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
