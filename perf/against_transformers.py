"""tokenweave against transformers: the same weights, prompts, threads and machine, in one process, pair by pair.

Under torchrun with two ranks: tensor-parallel prefill of both. In a plain process: prefill, and 16 requests at once.
Usage: python -m perf.cpu runs this and all else; alone: python -m perf.against_transformers [--shape ...] [--rounds N].
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from perf.shapes import SHAPES, model_folder, prompt
from perf.timing import Comparison, as_json, compare, interleaved, table
from tokenweave import LLM, SamplingParams

PREFILL_TOKENS = 1024
PROMPT_LENGTHS = [16 + 16 * i for i in range(16)]
OUTPUT_LENGTHS = [32 + 16 * (i * 7 % 16) for i in range(16)]


def prefill_pair(llm: LLM, model: Any, rounds: int, what: str, goal: float) -> Comparison:
    """Time to the first token of one prompt; logits of the last token only, on both sides."""
    ids = prompt(PREFILL_TOKENS)
    first = SamplingParams(temperature=0.0, max_tokens=1)
    seconds = interleaved(
        {"ours": lambda: discard(llm.generate(ids, first)), "other": lambda: discard(transformers_prefill(model, ids))},
        rounds,
    )
    return compare(what, seconds["ours"], seconds["other"], goal)


def decode_pair(llm: LLM, model: Any, rounds: int, outputs: list[int], what: str, goal: float) -> Comparison:
    """Seconds to complete 16 requests. transformers runs them as one left-padded batch until the longest ends."""
    prompts = [prompt(length, seed=i) for i, length in enumerate(PROMPT_LENGTHS)]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in outputs]
    seconds = interleaved(
        {
            "ours": lambda: discard(llm.generate(prompts, params)),
            "other": lambda: discard(transformers_generate(model, prompts, max(outputs))),
        },
        rounds,
    )
    return compare(what, seconds["ours"], seconds["other"], goal)


def discard(_: Any) -> None:
    """The result was only wanted for the time it took."""


@torch.inference_mode()
def transformers_prefill(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), logits_to_keep=1).logits.argmax(-1)


@torch.inference_mode()
def transformers_generate(model: Any, prompts: list[list[int]], new_tokens: int) -> torch.Tensor:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )


def one_rank(folder: Path, rounds: int) -> list[Comparison]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal, mixed = [64] * 16, OUTPUT_LENGTHS
    with LLM(folder, progress=False, enable_prefix_caching=False, max_num_batched_tokens=4096) as llm:
        name = folder.name
        return [
            prefill_pair(llm, model, rounds, f"{name}: prefill of {PREFILL_TOKENS} tokens", 1.0),
            decode_pair(llm, model, rounds, mixed, f"{name}: 16 requests, prompts 16-256, outputs 32-272", 1.5),
            decode_pair(llm, model, rounds, equal, f"{name}: 16 requests, prompts 16-256, outputs 64 each", 1.5),
        ]


def two_ranks(folder: Path, rounds: int) -> list[Comparison]:
    world_size = int(os.environ["WORLD_SIZE"])
    with LLM(folder, progress=False, enable_prefix_caching=False, overlap="auto") as llm:
        parallel = DistributedConfig(tp_size=world_size, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=parallel).eval()
        what = f"{folder.name}: TP={world_size} prefill of {PREFILL_TOKENS} tokens, transformers' tp_plan"
        return [prefill_pair(llm, model, rounds, what, 1.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-512x8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run: Callable[[Path, int], list[Comparison]] = two_ranks if int(os.environ.get("WORLD_SIZE", "1")) > 1 else one_rank
    rows = run(model_folder(options.shape), options.rounds)
    if int(os.environ.get("RANK", "0")) == 0:
        print(table(rows, "transformers"))
        if options.json:
            options.json.write_text(json.dumps(as_json(rows), indent=1))


if __name__ == "__main__":
    main()
