"""Which steps wait for the host: what is worth a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import find_hardware
from tokenweave.cost.host_bound import GRAIN, device_s, host_bound_tokens
from tokenweave.cost.published import PUBLISHED

LAUNCH_S = 20e-6


def cost_of(name: str, world_size: int, host_launch_s: float = LAUNCH_S) -> Cost:
    return Cost(PUBLISHED[name], replace(find_hardware("h100-sxm"), host_launch_s=host_launch_s), world_size)


@pytest.mark.parametrize(
    ("name", "world_size", "woven"),
    [("Llama-3.1-8B", 1, False), ("Llama-3.1-8B", 8, True), ("Llama-3.3-70B", 8, True), ("Llama-3.3-70B", 8, False)],
)
def test_a_longer_prompt_keeps_the_device_busy(name, world_size, woven):
    cost = cost_of(name, world_size)
    tokens, host_s = host_bound_tokens(cost, woven, 8192), cost.host_s(2 if woven else 1)
    assert GRAIN <= tokens < 8192
    assert device_s(cost, tokens, woven) < host_s <= device_s(cost, tokens + GRAIN, woven)


def test_more_ranks_and_two_strands_wait_for_the_host_longer():
    tokens = [
        host_bound_tokens(cost_of("Llama-3.1-8B", ranks), woven, 8192)
        for ranks, woven in ((1, False), (8, False), (8, True))
    ]
    assert tokens == sorted(set(tokens))


def test_within_what_a_step_may_have():
    cost = cost_of("Llama-3.1-8B", 8)
    assert host_bound_tokens(cost, True, 300) == 256
    assert host_bound_tokens(cost, True, 10) == 0
    assert host_bound_tokens(cost_of("Llama-3.1-8B", 8, host_launch_s=0.0), True, 8192) == 0
