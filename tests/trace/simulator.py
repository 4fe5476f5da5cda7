"""Simulated steps, for realistic spans without a runtime: strands of layers, a first-in-first-out comm lane."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from tokenweave.trace.spans import Recorder, Span


@dataclass(frozen=True)
class Step:
    tokens: tuple[int, ...]  # of each half
    phase: str = "prefill"
    inline: bool = False  # sums on the compute lane, as with overlap off


def simulate(
    steps: list[Step],
    world_size: int = 2,
    layers: int = 8,
    token_ns: float = 1500,
    launch_ns: float = 20_000,
    communication_share: float = 0.8,
    jitter: float = 0.1,
    seed: int = 0,
) -> list[Span]:
    """Spans of all ranks, times in ns from 1_000_000 on. A sum lasts `communication_share` of an MLP segment."""
    recorders = [Recorder(rank) for rank in range(world_size)]
    clock = Clock(recorders, token_ns, launch_ns, communication_share, jitter, random.Random(seed))
    for number, step in enumerate(steps):
        for recorder in recorders:
            recorder.step = number
            recorder.phases[number] = step.phase
        run_step(clock, step, layers)
    return [span for recorder in recorders for span in recorder.spans]


class Clock:
    """When each lane of each rank is free, and what it did before."""

    def __init__(self, recorders, token_ns, launch_ns, communication_share, jitter, random):
        self.recorders = recorders
        self.token_ns, self.launch_ns, self.communication_share = token_ns, launch_ns, communication_share
        self.jitter, self.random = jitter, random
        self.compute_ns = [1_000_000] * len(recorders)
        self.comm_ns = [1_000_000] * len(recorders)

    def duration_ns(self, tokens, weight):
        return int((self.launch_ns + tokens * self.token_ns * weight) * self.random.uniform(1, 1 + 2 * self.jitter))

    def segment(self, half, name, tokens, weight):
        for rank, recorder in enumerate(self.recorders):
            start = self.compute_ns[rank]
            self.compute_ns[rank] = start + self.duration_ns(tokens, weight)
            recorder.record("compute", "segment", half, name, start, self.compute_ns[rank], tokens)

    def sum(self, half, name, tokens, inline):
        """Ends at the same time on all ranks; starts when a rank's lane is free. Returns the end."""
        kind = "gather" if name == "head" else "sum"
        starts = [max(pair) for pair in zip(self.compute_ns, self.comm_ns)]
        end = max(starts) + self.duration_ns(tokens, self.communication_share * (0.2 if name == "head" else 1))
        for recorder, start in zip(self.recorders, starts):
            recorder.record("compute" if inline else "comm", kind, half, name, start, end, tokens, tokens * 2048)
        self.comm_ns = [end] * len(starts)
        if inline:
            self.compute_ns = list(self.comm_ns)
        return end

    def wait(self, half, name, tokens, end, inline):
        for rank, recorder in enumerate(self.recorders):
            start = self.compute_ns[rank]
            hand_over_ns = self.random.randint(2_000, 12_000)
            self.compute_ns[rank] = max(start, end) + hand_over_ns
            if not inline:
                recorder.record("compute", "wait", half, name, start, self.compute_ns[rank], tokens)


def run_step(clock: Clock, step: Step, layers: int) -> None:
    names = ["embed", *["attn", "mlp"] * layers, "head"]
    weights = {"embed": 0.1, "attn": 0.8, "mlp": 1.0, "head": 0.3}
    waiting = deque((half, 0) for half in range(len(step.tokens)))
    in_flight: dict[int, int] = {}
    while waiting:
        half, i = waiting.popleft()
        alive = step.tokens[half] if i < len(names) - 2 else max(1, step.tokens[half] // 64)
        if i:
            clock.wait(half, names[i - 1], alive, in_flight[half], step.inline)
        if i < len(names):
            clock.segment(half, names[i], alive, weights[names[i]])
            in_flight[half] = clock.sum(half, names[i], alive, step.inline)
            waiting.append((half, i + 1))
