"""Predictions for outsiders: a model, a machine, a workload; seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenweave.cost.choice import Choice, check_mode
from tokenweave.cost.collectives import Collectives, read_collectives
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import Hardware, find_hardware
from tokenweave.cost.search import best_weave
from tokenweave.cost.shape import read_shape
from tokenweave.cost.step import Step
from tokenweave.cost.work import Batch, Chunk


def predict_prefill(
    config: Any,
    *,
    hardware: str | Path | Hardware = "h100-sxm",
    world_size: int,
    prompt_len: int,
    mode: str,
    batch_size: int = 1,
    collectives: str | Path | None = None,
) -> float:
    """Seconds of one step that computes `batch_size` prompts of `prompt_len` tokens, launched kernel by kernel.

    config: a transformers config, or a path to config.json or its folder. hardware: a known name or a .json file.
    mode: "off" (all-reduce, in the switch where it can; then residual + RMSNorm of all rows), "fused" (the fused
    kernel), "weave" (two halves, with the best cut and SM counts; unsplit where no split pays), "nocomm" (off without
    the sums). collectives: a folder of measured curves (tokenweave_figure_4.csv, tokenweave_figure_10.csv), else by
    data sheet. Every row goes through every layer, as in published systems. Raises ValueError, FileNotFoundError.
    """
    chunks = [Chunk(_count("prompt_len", prompt_len))] * _count("batch_size", batch_size)
    return _seconds(make_cost(config, hardware, world_size, collectives), Batch(chunks), mode)


def predict_decode(
    config: Any,
    *,
    hardware: str | Path | Hardware = "h100-sxm",
    world_size: int,
    context_len: int,
    mode: str,
    batch_size: int = 1,
    collectives: str | Path | None = None,
) -> float:
    """Seconds of one step that makes a token for each of `batch_size` sequences with `context_len` tokens in the cache,
    launched as a CUDA graph. The other arguments are those of predict_prefill."""
    chunks = [Chunk(1, _count("context_len", context_len))] * _count("batch_size", batch_size)
    return _seconds(make_cost(config, hardware, world_size, collectives, graph=True), Batch(chunks), mode)


def make_cost(
    config: Any,
    hardware: str | Path | Hardware,
    world_size: int,
    collectives: str | Path | None = None,
    *,
    drops_rows: bool = False,
    graph: bool = False,
) -> Cost:
    """The cost model of a model on W ranks of a machine, from what predict_prefill takes."""
    shape, machine = read_shape(config), find_hardware(hardware)
    row_bytes = shape.hidden_size * shape.dtype_bytes
    curves: Collectives | None = None
    if collectives is not None:
        curves = read_collectives(collectives, world_size, row_bytes)
    return Cost(shape, machine, world_size, curves, drops_rows=drops_rows, graph=graph)


def _seconds(cost: Cost, batch: Batch, mode: str) -> float:
    check_mode(mode)
    step = Step(cost, batch)
    if mode != "weave":
        return step.seconds(Choice(mode))
    woven = best_weave(step)
    fused_s = step.seconds(Choice("fused"))
    return fused_s if woven is None else min(fused_s, woven[1])


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value
