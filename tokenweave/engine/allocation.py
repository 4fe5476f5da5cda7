"""Allocation of the KV cache: as many blocks as memory has room for beside weights and the largest step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod

from torch import Tensor

from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.buckets import Bounds
from tokenweave.engine.capturer import Capturer
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.engine.memory import (
    Memory,
    Meter,
    available_bytes,
    cache_bytes_left,
    explained,
    host_cache_bytes,
    room_for_graphs,
)
from tokenweave.engine.runner import Runner
from tokenweave.engine.sampler import History, SamplingRow, sample
from tokenweave.weave.plan import plan_step

log = logging.getLogger(__name__)
MOST_BLOCKS = 1 << 18  # rank 0 keeps a record of each; more are only taken where requests of full length need them
LOWER = "lower max_num_batched_tokens or max_num_seqs, raise tensor_parallel_size, or free memory"
# Of the costliest kind: everything that a request can ask of sampling.
DRAWN = SamplingRow(
    temperature=1.0,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    history=History(slot=0, start=0, token_ids=(0,)),
    suppressed_token_ids=(0,),
    logprobs=20,
)


def allocate_cache(runner: Runner) -> None:
    """Give `runner` its `storage`, of as many blocks as asked for, else as the poorest rank has memory for, and its
    `memory`, which says what that is. Collective.

    On CUDA the largest step is run first, and what it takes at most is left free, within gpu_memory_utilization, and so
    is what CUDA graphs take, of which a few are captured. On a CPU blocks are as many as max_num_seqs sequences of
    max_model_len need, within a share of the free memory.
    Raises ValueError with the numbers, on every rank, where there is too little memory.
    """
    ranks, meter = runner.ranks, runner.meter
    memory = host_memory(runner) if meter is None else profile(runner, meter)
    runner.memory = memory = poorest(ranks.gather(memory), memory, runner.config.gpu_memory_utilization)
    runner.most_graphs = memory.graphs or runner.most_graphs
    with ranks.together("allocating the KV cache"):
        runner.storage = allocate(runner, memory)
    if ranks.rank == 0:
        log.info("memory of rank 0: %s", memory)


def host_memory(runner: Runner) -> Memory:
    """On a CPU, with the blocks that this rank would take."""
    total_bytes, block_bytes = available_bytes(), block_bytes_of(runner)
    blocks = runner.config.num_kv_blocks or min(blocks_wanted(runner), host_cache_bytes() // block_bytes)
    return Memory(total_bytes, weights_bytes(runner), None, 0, block_bytes, runner.config.block_size, blocks)


def profile(runner: Runner, meter: Meter) -> Memory:
    """On a GPU, with the blocks that this rank would take, after the largest step was run. Collective."""
    config, block_bytes, weights = runner.config, block_bytes_of(runner), weights_bytes(runner)
    meter.restart()
    # The host waits for no rank in a step on CUDA, so all come to the end of this, even if one fails.
    with runner.ranks.together("running the largest step"), explained("the largest step", LOWER, meter, ValueError):
        run_largest_step(runner)
    runner.synchronize()
    peak_bytes = meter.read().peak_bytes
    now = replace(meter.restart(), peak_bytes=peak_bytes)
    taken_bytes = measure_graphs(runner, meter)
    graphs, graphs_bytes = room_for_graphs(taken_bytes, now.total_bytes) if taken_bytes else (0, 0)
    assert runner.start is not None
    left = cache_bytes_left(runner.start, now, config.gpu_memory_utilization, graphs_bytes)
    blocks = config.num_kv_blocks or min(max(blocks_wanted(runner), MOST_BLOCKS), left // block_bytes)
    sizes = (now.total_bytes, weights, peak_bytes - weights, now.others_bytes, block_bytes, config.block_size, blocks)
    return Memory(*sizes, graphs, graphs_bytes)


def run_largest_step(runner: Runner) -> None:
    """max_num_batched_tokens tokens of max_num_seqs sequences, by every plan that may come, and all drawn from."""
    config = runner.config
    sequences = min(config.max_num_seqs, config.max_num_batched_tokens)
    rows = min(config.max_num_batched_tokens, sequences * runner.max_model_len)
    batch = largest_batch(rows, sequences, config.block_size)
    with tiny_cache(runner, None):
        for mode in modes(runner):
            logits = runner.forward(batch, plan_step(mode, rows, None))
            sample(logits, [DRAWN] * sequences)


def modes(runner: Runner) -> tuple[str, ...]:
    """Of the plans that may come."""
    every = ("off", "fused", "weave") if runner.ranks.world_size > 1 else ("off",)
    return every if runner.config.overlap == "auto" else (runner.config.overlap,)


def measure_graphs(runner: Runner, meter: Meter) -> list[int]:
    """Bytes that some graphs take, the first with all that they share; [] where nothing is captured. No counter of
    torch's tells what the driver keeps, so it is what the GPU has less of. Collective."""
    with tiny_cache(runner, runner.capturer):
        if runner.graphs is None:
            return []
        free_bytes = [meter.restart().free_bytes]
        for batch in graph_batches(runner.graphs.bounds, runner.max_model_len):
            plan = plan_step(modes(runner)[-1], batch.rows, None)
            for _ in range(2):  # the second time it is captured
                runner.forward(batch, plan)
            runner.synchronize()
            free_bytes.append(meter.restart().free_bytes)
    prefill, decode, *others = [before - after for before, after in pairwise(free_bytes)]
    return [prefill + decode, *others]


def graph_batches(bounds: Bounds, max_model_len: int) -> list[Batch]:
    """Steps of different graphs: a prefill and rows that decode, in turn, the largest first."""
    batches = []
    for shift in range(3):
        tokens, rows = (max(1, most >> shift) for most in (bounds.prefill_tokens, bounds.decode_rows))
        batches.append(largest_batch(tokens, -(-tokens // max_model_len), bounds.block_size))
        batches.append(largest_batch(rows, rows, bounds.block_size))
    return batches


def largest_batch(rows: int, sequences: int, block_size: int) -> Batch:
    """`rows` tokens as the prompts of so many sequences, each of which makes logits. All blocks are the cache's first:
    what is computed is of no use, and the cache of a step that is looked at for its memory should take none."""
    shares = [rows // sequences + (i < rows % sequences) for i in range(sequences)]
    blocks = (0,) * -(-shares[0] // block_size)
    return Batch(tuple(Span((0,) * share, 0, blocks, prompt_len=share, wanted=1) for share in shares))


@contextmanager
def tiny_cache(runner: Runner, captured_by: Capturer | None) -> Iterator[None]:
    """A cache of one block for a while. What is opened on it goes with it, graphs as well."""
    capturer, runner.capturer = runner.capturer, captured_by
    runner.storage = empty_storage(runner, 1)
    try:
        yield
    finally:
        runner.capturer = capturer
        for name in ("storage", "attention", "graphs"):
            vars(runner).pop(name, None)


def poorest(everyone: list[Memory], mine: Memory, utilization: float) -> Memory:
    """This rank's memory with the fewest blocks and graphs of any. ValueError, where a rank has room for no block."""
    least = min(everyone, key=lambda memory: memory.blocks)
    if least.blocks < 1:
        raise ValueError(no_room(everyone.index(least), least, utilization))
    return replace(mine, blocks=least.blocks, graphs=min(memory.graphs for memory in everyone))


def no_room(rank: int, memory: Memory, utilization: float) -> str:
    """Why a rank has room for no block."""
    block = f"no memory is left for one KV block of {memory.block_bytes} bytes"
    if memory.activations_bytes is None:
        return f"{block}; lower block_size or free memory"
    numbers = replace(memory, blocks=0)
    return f"{block} on rank {rank}, within gpu_memory_utilization={utilization:g} of {numbers}; raise it, {LOWER}"


def allocate(runner: Runner, memory: Memory) -> Tensor:
    """Raises ValueError where torch cannot."""
    try:
        return empty_storage(runner, memory.blocks)
    except RuntimeError as error:  # torch's way to say out of memory
        blocks = f"{memory.blocks} KV blocks of {memory.block_bytes} bytes"
        numbers = "" if runner.meter is None else f" ({runner.meter.read()})"
        raise ValueError(f"there is no memory for {blocks}{numbers}; lower num_kv_blocks, or free memory") from error


def empty_storage(runner: Runner, blocks: int) -> Tensor:
    return allocate_storage(blocks, *block_shape(runner), runner.dtype, runner.ranks.device)


def block_shape(runner: Runner) -> tuple[int, int, int, int]:
    """[layer, token, kv_head, head_dim] of this rank."""
    kv_heads = len(runner.model.layers[0].attention.kv_heads)
    return runner.spec.num_layers, runner.config.block_size, kv_heads, runner.spec.head_dim


def block_bytes_of(runner: Runner) -> int:
    """Keys and values of a block."""
    return 2 * prod(block_shape(runner)) * runner.dtype.itemsize


def blocks_wanted(runner: Runner) -> int:
    """For as many sequences as run at once, each of full length."""
    return runner.config.max_num_seqs * -(-runner.max_model_len // runner.config.block_size)


def weights_bytes(runner: Runner) -> int:
    return sum(load.into.nbytes for load in runner.model.loads())
