"""Peer: vLLM on the same ranks, started by the same torchrun (its executor "external_launcher"). Never ran yet."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from perf.overlap.peers.opened import Opened
from perf.overlap.points import Setting
from perf.overlap.workloads import Arrival
from perf.shapes import VOCAB_SIZE, prompt
from tokenweave.models.registry import read_config

MEMORY_SHARE = 0.35  # of each GPU: tokenweave's weights and cache are there as well


class Vllm:
    name = "vLLM"

    def missing(self, setting: Setting, load_format: str) -> str:
        if setting.device != "cuda":
            return "it is compared on GPUs only"
        return "" if importlib.util.find_spec("vllm") else "it is not installed: pip install vllm"

    def open(self, folder: Path, setting: Setting, load_format: str) -> Opened:
        vllm: Any = importlib.import_module("vllm")
        llm = vllm.LLM(
            model=str(folder),
            load_format=load_format,
            skip_tokenizer_init=True,
            tensor_parallel_size=setting.ranks,
            distributed_executor_backend="external_launcher",
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,
            seed=0,  # the same on every rank
        )

        vocabulary = min(VOCAB_SIZE, int(read_config(folder).vocab_size))

        def serve(requests: list[tuple[list[int], int]]) -> Any:
            prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
            params = [
                vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                for _, tokens in requests
            ]
            return llm.generate(prompts, params, use_tqdm=False)

        return Opened(lambda ids: serve([(ids, 1)]), None, lambda arrivals: serve(requests_of(arrivals, vocabulary)))


def requests_of(arrivals: list[Arrival], vocab_size: int) -> list[tuple[list[int], int]]:
    return [(prompt(one.prompt, number, vocab_size), one.output) for number, one in enumerate(arrivals)]
