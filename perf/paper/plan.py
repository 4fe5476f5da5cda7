"""Plan: what is measured for which figure. Pure, but for what models were made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.overlap.points import Point, Setting
from perf.paper.published import CHUNK, CHUNKS

FIGURES = ("1", "4", "10", "11", "12", "13")
KERNEL_FIGURES = ("4", "10")
STEP_FIGURES = ("1", "11")
MIX_ROUNDS = 1  # a mix is a thousand requests or so


@dataclass(frozen=True)
class Scale:
    """How much is run. chunks: of figure 13, tokens of a step; chunk: of figure 12, 0 = the paper's."""

    prompts: Sequence[int]
    mixes: Sequence[str]
    chunks: Sequence[int]
    rounds: int
    requests: int
    chunk: int = 0


FULL = Scale(
    prompts=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    mixes=("512-128", "1024-128", "2048-128", "sharegpt"),
    chunks=(1024, 2048, 4096, 8192),
    rounds=5,
    requests=1000,
)
QUICK = Scale((1024, 8192), ("2048-128", "sharegpt"), (2048, 8192), rounds=3, requests=64)
DRY = Scale((16, 48), ("quick-fixed", "quick-chat"), (32, 64), rounds=2, requests=0, chunk=64)


def points(setting: Setting, scale: Scale, figures: Sequence[str], max_tokens: int, first: bool) -> Iterator[Point]:
    """Of one model, each once. first: figure 13 is about the first model alone."""
    if {*STEP_FIGURES} & {*figures}:
        yield from prefills(setting, scale, max_tokens)
    if {"12", "13"} & {*figures}:
        own = scale.chunk or CHUNKS.get(setting.name, CHUNK)
        chunks = ([own] if "12" in figures else []) + ([*scale.chunks] if "13" in figures and first else [])
        for chunk in dict.fromkeys(chunks):
            for mix in scale.mixes:
                yield Point(setting, "mix", mix, MIX_ROUNDS, chunk, scale.requests)


def prefills(setting: Setting, scale: Scale, max_tokens: int) -> Iterator[Point]:
    """Prompts that are longer than what the model was made for are left out."""
    for tokens in scale.prompts:
        if tokens <= max_tokens:
            yield Point(setting, "prefill", tokens, scale.rounds)


def figures_of(point: Point, figures: Sequence[str], scale: Scale, first: bool) -> list[str]:
    """The figures that a point is a part of. first: as above."""
    if point.measure == "prefill":
        return [figure for figure in STEP_FIGURES if figure in figures]
    own = scale.chunk or CHUNKS.get(point.setting.name, CHUNK)
    belongs = {"12": point.chunk_tokens == own, "13": first and point.chunk_tokens in scale.chunks}
    return [figure for figure, mine in belongs.items() if mine and figure in figures]
