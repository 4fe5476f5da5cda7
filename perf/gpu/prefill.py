"""Prefill: FLOP/s from the prompt to the first token, over what a matmul reaches."""

from __future__ import annotations

from collections.abc import Callable

from perf.gpu.clock import in_turn
from perf.gpu.figure import Figure, spread
from perf.gpu.model import config_folder, greedy, opened, prompt
from perf.gpu.rates import matmul_flops_per_s, prefill_flops
from perf.gpu.scale import Scale

GOAL = 0.60


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    best = matmul_flops_per_s(scale)
    say(Figure(f"matmul of {scale.matmul_size} cubed, {scale.dtype}", best / 1e12, "TFLOP/s"))
    tokens, ids = scale.prefill_tokens, prompt(scale, scale.prefill_tokens)
    with config_folder(scale) as folder, opened(scale, folder, max_num_batched_tokens=tokens) as llm:
        run = {"prefill": lambda: llm.generate(ids, greedy(1))}
        seconds = in_turn(run, scale.torch_device, scale.rounds)["prefill"]
    flops = prefill_flops(scale, tokens)
    say(spread(f"prefill of {tokens} tokens, to the first token", [1e3 * s for s in seconds], "ms"))
    say(spread(f"prefill of {tokens} tokens", [flops / s / best for s in seconds], "of the matmul's FLOP/s", GOAL))
