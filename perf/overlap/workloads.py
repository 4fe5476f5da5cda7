"""Workloads: requests to serve, as lengths and arrival times. Pure: the same arguments give the same requests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

# Percentile -> tokens of ShareGPT conversations, first turns. The lengths are published with Sarathi-Serve (arXiv
# 2403.02310, Table 2: openchat_sharegpt4): github microsoft/sarathi-serve, commit 72339db, the file
# data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv, in tokens of Llama 2. The percentiles are ours,
# of the 5,316 first turns that pass vLLM's filter (4 tokens or more each, prompts up to 1024, both up to 2048), as
# TokenWeave's own benchmark applies it to another extract of ShareGPT. Means there: 136 and 472 tokens.
CHAT_PROMPT = {0: 4, 10: 15, 25: 26, 50: 58, 75: 154, 90: 381, 95: 574, 99: 901, 100: 1024}
CHAT_OUTPUT = {0: 4, 10: 70, 25: 250, 50: 473, 75: 682, 90: 868, 95: 935, 99: 1002, 100: 1024}


@dataclass(frozen=True)
class Arrival:
    """One request: prompt tokens, output tokens, and when it comes, in seconds after the start."""

    prompt: int
    output: int
    at_s: float = 0.0


@dataclass(frozen=True)
class Mix:
    """A request mix. scale: what the percentiles are multiplied by. rate_per_s 0: all requests are there at once."""

    requests: int
    prompt: Mapping[int, float]
    output: Mapping[int, float]
    scale: float = 1.0
    rate_per_s: float = 0.0

    def arrivals(self, seed: int = 0) -> list[Arrival]:
        draw = random.Random(seed)
        times = poisson_arrivals(self.requests, self.rate_per_s, draw)
        return [Arrival(self._length(self.prompt, draw), self._length(self.output, draw), at_s) for at_s in times]

    def _length(self, percentiles: Mapping[int, float], draw: random.Random) -> int:
        return max(1, round(self.scale * length_at(percentiles, 100 * draw.random())))

    @property
    def words(self) -> str:
        come = f"Poisson arrivals at {self.rate_per_s:g}/s" if self.rate_per_s else "all at once"
        parts = [f"{name} tokens {stated(p, self.scale)}" for name, p in self._parts]
        return f"{self.requests} requests, {come}; {'; '.join(parts)}"

    @property
    def _parts(self) -> list[tuple[str, Mapping[int, float]]]:
        return [("prompt", self.prompt), ("output", self.output)]


def stated(percentiles: Mapping[int, float], scale: float) -> str:
    if len(set(percentiles.values())) == 1:
        return f"{round(scale * percentiles[0])} each"
    return ", ".join(f"p{percent} {max(1, round(scale * tokens))}" for percent, tokens in percentiles.items())


def length_at(percentiles: Mapping[int, float], percent: float) -> float:
    """The length at a percentile: between the stated ones the logarithm is linear, as lengths are long-tailed."""
    points = sorted(percentiles.items())
    if len(points) < 2 or points[0][0] != 0 or points[-1][0] != 100:
        raise ValueError(f"percentiles must state 0 and 100, got {dict(percentiles)}")
    for (low, a), (high, b) in pairwise(points):
        if percent <= high:
            share = (percent - low) / (high - low)
            return math.exp((1 - share) * math.log(a) + share * math.log(b))
    raise ValueError(f"percent must be 0 to 100, got {percent}")


def poisson_arrivals(count: int, rate_per_s: float, draw: random.Random) -> list[float]:
    """Ascending seconds; the gaps are exponential with mean 1 / rate. Rate 0: all at 0."""
    if rate_per_s == 0:
        return [0.0] * count
    times, now_s = [], 0.0
    for _ in range(count):
        now_s += draw.expovariate(rate_per_s)
        times.append(now_s)
    return times


def fixed(tokens: int) -> dict[int, float]:
    return {0: tokens, 100: tokens}


MIXES = {
    "fixed": Mix(16, fixed(256), fixed(32)),
    "mixed": Mix(16, {0: 16, 100: 256}, {0: 32, 100: 272}),
    "chat": Mix(24, CHAT_PROMPT, CHAT_OUTPUT, scale=0.25, rate_per_s=4.0),
    "quick-fixed": Mix(4, fixed(32), fixed(4)),
    "quick-chat": Mix(4, CHAT_PROMPT, CHAT_OUTPUT, scale=0.02, rate_per_s=20.0),
    # TokenWeave's Figures 12 and 13
    "512-128": Mix(1000, fixed(512), fixed(128)),
    "1024-128": Mix(1000, fixed(1024), fixed(128)),
    "2048-128": Mix(1000, fixed(2048), fixed(128)),
    "sharegpt": Mix(1000, CHAT_PROMPT, CHAT_OUTPUT),
}


def mix_of(name: str, requests: int = 0) -> Mix:
    """By name; requests: in place of its own number, if not 0."""
    return replace(MIXES[name], requests=requests or MIXES[name].requests)
