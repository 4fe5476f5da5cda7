"""Workloads: requests to serve, as lengths and arrival times. Pure: the same arguments give the same requests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

# Percentile -> tokens: a long-tailed chat mix in the manner of ShareGPT, of our own making. Its means are near the 161
# prompt and 338 output tokens that the vLLM paper (arXiv 2309.06180, section 6.1) gives for that data set.
CHAT_PROMPT = {0: 4, 25: 14, 50: 50, 75: 190, 90: 480, 99: 1100, 100: 1600}
CHAT_OUTPUT = {0: 4, 25: 90, 50: 270, 75: 510, 90: 730, 99: 1050, 100: 1400}


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
    "chat": Mix(24, CHAT_PROMPT, CHAT_OUTPUT, scale=0.25, rate_per_s=4.0),
    "quick-fixed": Mix(4, fixed(32), fixed(4)),
    "quick-chat": Mix(4, CHAT_PROMPT, CHAT_OUTPUT, scale=0.02, rate_per_s=20.0),
}
