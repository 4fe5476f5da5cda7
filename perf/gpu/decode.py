"""Decode: seconds of a step over those that reading the weights, keys and values takes at a copy's rate."""

from __future__ import annotations

from collections.abc import Callable

from perf.gpu.clock import in_turn
from perf.gpu.figure import Figure, spread
from perf.gpu.model import config_folder, greedy, opened, prompt
from perf.gpu.rates import copy_bytes_per_s, decode_bytes
from perf.gpu.scale import Scale
from tokenweave import LLM

GOAL = 0.80
LAUNCHES = {"CUDA graphs": False, "enforce_eager": True}


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    rate = copy_bytes_per_s(scale)
    say(Figure("copy within memory, read and written", rate / 1e9, "GB/s"))
    for name, eager in LAUNCHES.items():
        most = max(scale.batches)
        with config_folder(scale) as folder, opened(scale, folder, enforce_eager=eager, max_num_seqs=most) as llm:
            for batch in scale.batches:
                step_s = step_seconds(scale, llm, batch)
                floor_s = decode_bytes(scale, batch, scale.decode_context + scale.decode_tokens / 2) / rate
                what = f"decode, batch {batch}, {name}"
                say(spread(f"{what}: a step", [1e3 * s for s in step_s], "ms"))
                goal = None if eager else GOAL
                say(spread(what, [floor_s / s for s in step_s], "of the memory's bandwidth", goal))


def step_seconds(scale: Scale, llm: LLM, batch: int) -> list[float]:
    """Of one step by round: what a completion of many tokens takes, less one of one token."""
    prompts = [prompt(scale, scale.decode_context, seed) for seed in range(batch)]
    runs = {
        "one": lambda: llm.generate(prompts, greedy(1)),
        "many": lambda: llm.generate(prompts, greedy(1 + scale.decode_tokens)),
    }
    seconds = in_turn(runs, scale.torch_device, scale.rounds)
    return [(many - one) / scale.decode_tokens for one, many in zip(seconds["one"], seconds["many"], strict=True)]
