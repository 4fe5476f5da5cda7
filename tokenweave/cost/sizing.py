"""Sizing: what a workload takes of a model on W accelerators of a kind: latencies, throughput, memory, bottlenecks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tokenweave.cost.breakdown import Breakdown, break_down
from tokenweave.cost.choice import Choice
from tokenweave.cost.collectives import read_collectives
from tokenweave.cost.cost import Cost
from tokenweave.cost.decide import decide
from tokenweave.cost.hardware import Hardware
from tokenweave.cost.memory import Memory, memory_of
from tokenweave.cost.search import best_weave
from tokenweave.cost.shape import ModelShape
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk
from tokenweave.cost.workload import Workload, prefill_steps, why_no_room
from tokenweave.models.spec import DecoderSpec, fits

WORLD_SIZES = (1, 2, 4, 8)  # of one machine
TOKEN_COUNTS = tuple(2**power for power in range(7, 16))
MODES = ("off", "fused", "weave")
MOST_CONCURRENT = 4096  # requests that decode together


@dataclass(frozen=True)
class Serving:
    """What requests see. ttft_s: mean over requests; concurrency: requests that decode together."""

    ttft_s: float
    tpot_s: float
    concurrency: int
    tokens_per_s: float  # generated

    def meets(self, workload: Workload) -> bool:
        """Both targets, where there are any."""
        ttft_s, tpot_s = workload.ttft_target_s, workload.tpot_target_s
        return (ttft_s is None or self.ttft_s <= ttft_s) and (tpot_s is None or self.tpot_s <= tpot_s)


@dataclass(frozen=True)
class Size:
    """A workload on W accelerators. serving: by overlap, None where it cannot be served; why_not says why."""

    world_size: int
    memory: Memory
    serving: dict[str, Serving | None]
    why_not: str
    prefill: Breakdown | None  # of the baseline's step, where there is one
    decode: Breakdown | None


@dataclass(frozen=True)
class Gain:
    """The prefill of one prompt. Gains: the baseline's time over this one's; `plan`: what overlap="auto" would do."""

    tokens: int
    off_s: float
    fused: float
    weave: float
    nocomm: float
    plan: Choice

    @property
    def planned(self) -> float:
        return {"off": 1.0, "fused": self.fused, "weave": self.weave}[self.plan.mode]


class Sizer:
    """Asks the cost model about a model on a machine. Prefill steps are launched kernel by kernel, decode steps as a
    graph. collectives: a folder of measured curves, else by data sheet. Raises ValueError, FileNotFoundError."""

    def __init__(self, shape: ModelShape, hardware: Hardware, collectives: Path | None = None):
        self.shape, self.hardware, self.collectives = shape, hardware, collectives
        self.cost = functools.lru_cache(None)(self._cost)
        self._seconds = functools.lru_cache(None)(self._step_seconds)

    def world_sizes(self, most: int = WORLD_SIZES[-1]) -> list[int]:
        """Powers of two up to `most` that share the model's heads evenly."""
        return [w for w in (2**power for power in range(most.bit_length())) if w <= most and shares(self.shape, w)]

    def size(self, workload: Workload, world_size: int) -> Size:
        """Everything about a workload at one W."""
        memory = memory_of(self.shape, self.hardware, world_size, min(workload.step_tokens, workload.prompt_len))
        why_not = why_no_room(memory, workload, self.hardware.device)
        if why_not:
            return Size(world_size, memory, dict.fromkeys((*MODES, "auto")), why_not, None, None)
        serving = {mode: self.serve(workload, world_size, mode) for mode in (*MODES, "auto")}
        prefill, decode = self._breakdowns(workload, world_size, serving["off"])
        why_not = "" if serving["auto"] else self._why_too_many(workload, world_size)
        return Size(world_size, memory, serving, why_not, prefill, decode)

    def serve(self, workload: Workload, world_size: int, mode: str) -> Serving | None:
        """mode: "off", "fused", "weave" or "auto". None: more requests come than can be served."""
        if workload.request_rate is None:
            return self._serve_batch(workload, world_size, mode)
        return self._serve_rate(workload, world_size, mode)

    def gains(self, world_size: int, token_counts: tuple[int, ...] = TOKEN_COUNTS) -> list[Gain]:
        """Of one prompt's prefill, by its length, as far as the model's own reaches."""
        longest = self.shape.max_len or max(token_counts)
        return [self._gain(world_size, tokens) for tokens in token_counts if tokens <= longest]

    # -- a batch of requests at once -----------------------------------------------------------------------------------

    def _serve_batch(self, workload: Workload, world_size: int, mode: str) -> Serving:
        """All prompts, step after step; then all requests decode together."""
        at_s, first_s = 0.0, []
        for chunks in prefill_steps(workload.prompt_len, workload.batch_size, workload.step_tokens):
            at_s += self.seconds(world_size, chunks, mode)
            first_s += [at_s] * sum(chunk.wanted for chunk in chunks)
        tpot_s = self.decode_s(workload, world_size, workload.batch_size, mode)
        total_s = at_s + (workload.output_len - 1) * tpot_s
        generated = workload.batch_size * workload.output_len
        return Serving(sum(first_s) / len(first_s), tpot_s, workload.batch_size, generated / total_s)

    def decode_s(self, workload: Workload, world_size: int, concurrency: int, mode: str) -> float:
        """A step that gives each of `concurrency` requests a token, halfway through its output."""
        chunks = (Chunk(1, workload.prompt_len + workload.output_len // 2),) * concurrency
        return self.seconds(world_size, chunks, mode, graph=True)

    # -- requests at a rate --------------------------------------------------------------------------------------------

    def _serve_rate(self, workload: Workload, world_size: int, mode: str) -> Serving | None:
        """In a steady state prefills take a share of the time, and decode steps get the rest. By Little's law as many
        requests decode together as come within the time that one takes. A prompt waits as in a queue with Poisson
        arrivals and equal service (M/D/1)."""
        rate = workload.request_rate or 0.0
        prefill_s = self.prefill_s(workload, world_size, mode)
        busy = rate * prefill_s
        most = self._most_concurrent(workload, world_size)

        def arriving(concurrency: int) -> float:
            """How many requests decode together if steps are as long as those of `concurrency`."""
            tpot_s = self.decode_s(workload, world_size, concurrency, mode) / (1.0 - busy)
            return rate * workload.output_len * tpot_s

        if busy >= 1.0 or most < 1 or arriving(most) > most:
            return None
        concurrency = least(lambda count: arriving(count) <= count, most)
        tpot_s = self.decode_s(workload, world_size, concurrency, mode) / (1.0 - busy)
        waiting_s = prefill_s * busy / (2.0 * (1.0 - busy)) + tpot_s / 2
        return Serving(prefill_s + waiting_s, tpot_s, concurrency, rate * workload.output_len)

    def prefill_s(self, workload: Workload, world_size: int, mode: str) -> float:
        """Of one prompt."""
        steps = prefill_steps(workload.prompt_len, 1, workload.step_tokens)
        return sum(self.seconds(world_size, chunks, mode) for chunks in steps)

    def most_requests_per_s(self, workload: Workload, world_size: int, mode: str = "auto") -> float:
        """What could be served at most: as many decode together as memory holds, and prefills take the rest."""
        most = self._most_concurrent(workload, world_size)
        if most < 1:
            return 0.0
        each_s = self.decode_s(workload, world_size, most, mode) * workload.output_len / most
        return 1.0 / (each_s + self.prefill_s(workload, world_size, mode))

    def _most_concurrent(self, workload: Workload, world_size: int) -> int:
        step_tokens = min(workload.step_tokens, workload.prompt_len)
        memory = memory_of(self.shape, self.hardware, world_size, step_tokens)
        return min(MOST_CONCURRENT, memory.largest_batch(workload.tokens))

    def _why_too_many(self, workload: Workload, world_size: int) -> str:
        most = self.most_requests_per_s(workload, world_size)
        return f"serves at most {most:.2g} requests/s"

    # -- steps ---------------------------------------------------------------------------------------------------------

    def seconds(self, world_size: int, chunks: tuple[Chunk, ...], mode: str, graph: bool = False) -> float:
        return self._seconds(world_size, chunks, mode, graph)

    def _step_seconds(self, world_size: int, chunks: tuple[Chunk, ...], mode: str, graph: bool) -> float:
        """weave: unsplit where no split pays, as predict_prefill has it; auto: the best of all."""
        step = Step(self.cost(world_size, graph), Batch(chunks))
        if mode in ("off", "fused", "nocomm"):
            return step.seconds(Choice(mode))
        found = best_weave(step)
        unsplit_s = [step.seconds(Choice(each)) for each in (("fused",) if mode == "weave" else ("off", "fused"))]
        return min([*unsplit_s, *([found.seconds] if found else [])])

    def _gain(self, world_size: int, tokens: int) -> Gain:
        """Splitting is shown also where it does not pay."""
        step = Step(self.cost(world_size, False), Batch([Chunk(tokens)]))
        off_s, fused_s, nocomm_s = (step.seconds(Choice(mode)) for mode in ("off", "fused", "nocomm"))
        found = best_weave(step)
        woven_s = found.seconds if found else fused_s
        return Gain(tokens, off_s, off_s / fused_s, off_s / woven_s, off_s / nocomm_s, decide(step).choice)

    def _breakdowns(
        self, workload: Workload, world_size: int, serving: Serving | None
    ) -> tuple[Breakdown | None, Breakdown | None]:
        """Of the baseline's first prefill step, and of a decode step."""
        prompts = next(prefill_steps(workload.prompt_len, workload.batch_size, workload.step_tokens))
        prefill = break_down(Step(self.cost(world_size, False), Batch(prompts)), "off")
        if serving is None:
            return prefill, None
        chunk = Chunk(1, workload.prompt_len + workload.output_len // 2)
        decode = break_down(Step(self.cost(world_size, True), Batch([chunk] * serving.concurrency)), "off")
        return prefill, decode

    def _cost(self, world_size: int, graph: bool) -> Cost:
        curves = None
        if self.collectives is not None:
            row_bytes = self.shape.hidden_size * self.shape.dtype_bytes
            curves = read_collectives(self.collectives, world_size, row_bytes)
        return Cost(self.shape, self.hardware, world_size, curves, graph=graph)


def shares(shape: ModelShape, world_size: int) -> bool:
    """Whether W ranks can share the heads evenly."""
    heads: DecoderSpec = shape  # type: ignore[assignment]  # which looks at the head counts alone
    return fits(heads, world_size)


def least(holds: Callable[[int], bool], most: int) -> int:
    """The smallest count from 1 to `most` for which `holds`; it holds for `most`."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


# -- which W -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """World sizes: the fewest GPUs that serve the workload (and meet its targets), those with the most tokens/s a GPU,
    and those that end one request first. None: none of those looked at."""

    fewest: int | None
    best_per_gpu: int | None
    fastest: int | None


def advise(sizes: list[Size], workload: Workload) -> Advice:
    """Of sizes by ascending W."""
    good = [(size.world_size, served) for size in sizes if (served := size.serving["auto"]) and served.meets(workload)]
    if not good:
        return Advice(None, None, None)
    steps = workload.output_len - 1
    return Advice(
        fewest=good[0][0],
        best_per_gpu=max(good, key=lambda one: one[1].tokens_per_s / one[0])[0],
        fastest=min(good, key=lambda one: one[1].ttft_s + steps * one[1].tpot_s)[0],
    )


# -- what if -----------------------------------------------------------------------------------------------------------

WHAT_IF = ("flops", "bandwidth", "link")


def changed(hardware: Hardware, factors: dict[str, float]) -> Hardware:
    """The same machine with FLOPS, memory bandwidth or link bandwidth times a factor."""
    flops = factors.get("flops", 1.0)
    return replace(
        hardware,
        flops={dtype: peak * flops for dtype, peak in hardware.flops.items()},
        memory_bandwidth=hardware.memory_bandwidth * factors.get("bandwidth", 1.0),
        link_bandwidth=hardware.link_bandwidth * factors.get("link", 1.0),
    )
