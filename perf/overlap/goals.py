"""Goals: what the harness must show on a link, and whether it did. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perf.overlap import figures
from perf.overlap.figures import with_ideal
from perf.overlap.points import Point

TINY = "llama-128x2"  # of --quick
LONG_TOKENS = 1024
HIDDEN = {1000: 0.75, 500: 0.90}  # Mbit/s -> least share hidden by weave, for prompts of LONG_TOKENS and more
GAIN = {1000: 1.40, 500: 1.60}  # Mbit/s -> least off / weave at LONG_TOKENS
PEER, PEER_GAIN, PEER_MBIT = "transformers TP", 1.5, 1000
ALONE_GAIN, MIXED_GAIN = 1.0, 1.5  # of one rank over transformers: prefill of LONG_TOKENS, and the mix "mixed"


@dataclass(frozen=True)
class Finding:
    setting: str
    what: str
    goal: str
    found: str
    met: bool


def findings(results: list[tuple[Point, dict[str, Any]]]) -> list[Finding]:
    """Of every prefill point on a link, and of one rank without one, in order; the tiny model's mean nothing."""
    results = [pair for pair in results if pair[0].setting.shape != TINY]
    on_a_link = [pair for pair in results if pair[0].measure == "prefill" and pair[0].setting.link != "none"]
    alone = [pair for pair in results if (pair[0].setting.ranks, pair[0].setting.device) == (1, "cpu")]
    found = [one for point, result in on_a_link for one in judge(point, result)]
    return found + [one for point, result in alone for one in judge_alone(point, result)]


def judge_alone(point: Point, result: dict[str, Any]) -> Iterator[Finding]:
    where = point.setting.title
    if point.measure == "prefill" and point.x == LONG_TOKENS and PEER in result["seconds"]:
        ratio = figures.ratio(result["seconds"], PEER, "off")
        goal, met = f">= {ALONE_GAIN:.2f}", ratio.median >= ALONE_GAIN
        yield Finding(where, f"{PEER} / off, {LONG_TOKENS} tokens", goal, f"{ratio:.2f}", met)
    if point.measure == "mix" and point.x == "mixed" and PEER in result["figures"]:
        rates = {mode: result["figures"][mode]["output tokens/s"] for mode in ("off", PEER)}
        ratio = figures.ratio(rates, "off", PEER)
        goal, met = f">= {MIXED_GAIN:.2f}", ratio.median >= MIXED_GAIN
        yield Finding(where, f"tokens/s of off / {PEER}, {point.x} requests", goal, f"{ratio:.2f}", met)


def judge(point: Point, result: dict[str, Any]) -> Iterator[Finding]:
    seconds, tokens, mbit = with_ideal(result["seconds"]), int(point.x), round(point.setting.mbit_per_s)
    where, at = point.setting.title, f"{tokens} tokens"
    if tokens >= LONG_TOKENS and mbit in HIDDEN and (share := figures.hidden(seconds, "weave")):
        least = HIDDEN[mbit]
        yield Finding(where, f"hidden by weave, {at}", f">= {least:.0%}", f"{share:.0%}", share.median >= least)
    if tokens == LONG_TOKENS and mbit in GAIN:
        ratio, least = figures.gain(seconds, "weave"), GAIN[mbit]
        found = (
            f"{ratio:.2f}; ideal {figures.gain(seconds, 'ideal').median:.2f}" if "ideal" in seconds else f"{ratio:.2f}"
        )
        yield Finding(where, f"off / weave, {at}", f">= {least:.2f}", found, ratio.median >= least)
    if tokens == LONG_TOKENS and mbit == PEER_MBIT and PEER in seconds:
        ratio = figures.ratio(seconds, PEER, "weave")
        found = f"{ratio:.2f}"
        yield Finding(where, f"{PEER} / weave, {at}", f">= {PEER_GAIN:.2f}", found, ratio.median >= PEER_GAIN)
    for mode in ("weave", "auto"):
        ratio = figures.gain(seconds, mode)
        met = figures.never_slower(seconds, mode)
        yield Finding(where, f"{mode} against off, {at}", "not slower by more than the spread", f"{ratio:.2f}", met)
