"""Throughput: mixed requests all at once, beside transformers' continuous batching, and vLLM where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from perf.gpu.clock import in_turn, seconds_of
from perf.gpu.figure import Figure, spread
from perf.gpu.model import config_folder, free, greedy, opened, prompt, twin
from perf.gpu.scale import Scale

GOAL = 3.0
PEER_S = 120.0  # the bound on every wait for a peer
VLLM_S = 150.0  # it compiles and captures before it generates
Requests = list[tuple[list[int], int]]  # (prompt, how many tokens to make)


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    requests = mixed_requests(scale)
    tokens = sum(count for _, count in requests)
    what = f"{len(requests)} mixed requests"
    with config_folder(scale) as folder:
        ours = [tokens / s for s in our_seconds(scale, folder, requests)]
        say(spread(f"{what}: tokenweave", ours, "tokens/s"))
        theirs = tokens / transformers_seconds(scale, folder, requests)
        free(scale)
        say(Figure(f"{what}: transformers, continuous batching", theirs, "tokens/s"))
        say(spread(f"{what}: tokenweave over transformers", [rate / theirs for rate in ours], "times", GOAL))
        if find_spec("vllm") is None:
            say(Figure(f"{what}: vLLM", float("nan"), "tokens/s", note="not installed"))
            return
        vllm = tokens / vllm_seconds(scale, folder, requests)
        say(Figure(f"{what}: vLLM", vllm, "tokens/s"))
        say(spread(f"{what}: tokenweave over vLLM", [rate / vllm for rate in ours], "times"))


def mixed_requests(scale: Scale) -> Requests:
    random = Random(0)
    sizes = [
        (random.randint(*scale.prompt_tokens), random.randint(*scale.output_tokens)) for _ in range(scale.requests)
    ]
    return [(prompt(scale, length, seed), count) for seed, (length, count) in enumerate(sizes)]


def our_seconds(scale: Scale, folder: Path, requests: Requests) -> list[float]:
    prompts, params = [ids for ids, _ in requests], [greedy(count) for _, count in requests]
    with opened(scale, folder, max_num_seqs=len(requests)) as llm:
        run = {"ours": lambda: llm.generate(prompts, params)}
        return in_turn(run, scale.torch_device, min(3, scale.rounds))["ours"]


def transformers_seconds(scale: Scale, folder: Path, requests: Requests) -> float:
    """Of its second run, with the graphs that it captures and the kernels that it loads in the first."""
    model = twin(scale, folder, scale.torch_dtype)
    config = GenerationConfig(do_sample=False, max_new_tokens=max(count for _, count in requests), eos_token_id=-1)
    # without sharing, or the second run would find its prompts cached
    batching = ContinuousBatchingConfig(allow_block_sharing=False, **scale.peer)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
    manager.start()
    try:
        complete(manager, requests)
        return seconds_of(lambda: complete(manager, requests), scale.torch_device)
    finally:
        manager.stop(block=True, timeout=PEER_S)


def complete(manager: Any, requests: Requests) -> None:
    """All requests through transformers' manager. Raises TimeoutError, and RuntimeError where one ends early."""
    left = {manager.add_request(ids, max_new_tokens=count, eos_token_id=-1): count for ids, count in requests}
    deadline_s = time.monotonic() + PEER_S
    while left:
        result = manager.get_result(timeout=1.0)
        if result is not None and result.is_finished():
            made = len(result.generated_tokens)
            if result.error or made != left.pop(result.request_id):
                raise RuntimeError(f"transformers' continuous batching made {made} tokens, then: {result.error}")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"transformers' continuous batching had {len(left)} requests left after {PEER_S:g} s")


def vllm_seconds(scale: Scale, folder: Path, requests: Requests) -> float:
    """Of its second run, in a process of its own."""
    given = json.dumps({"folder": str(folder), "max_model_len": scale.max_model_len, "requests": requests})
    command = [sys.executable, "-m", "perf.gpu.vllm_peer"]
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, timeout=VLLM_S, check=True)
    return float(done.stdout.strip().splitlines()[-1])
