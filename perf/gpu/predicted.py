"""Predicted against measured, after `tokenweave calibrate`: GEMMs, attention, and whole steps at W=1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as functional

from perf.gpu.clock import median_s
from perf.gpu.figure import Figure
from perf.gpu.model import config_folder, opened
from perf.gpu.scale import Scale
from tokenweave.cost.calibrate import Point, pairs, predict
from tokenweave.cost.choice import Choice
from tokenweave.cost.cost import Cost
from tokenweave.cost.hardware import Hardware
from tokenweave.cost.machine import calibrated, hardware_at_hand
from tokenweave.cost.step import Step as CostStep
from tokenweave.cost.work import Batch as CostBatch
from tokenweave.cost.work import Chunk
from tokenweave.engine.at_hand import shape_of
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.engine import Step, run_step
from tokenweave.engine.runner import Runner
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.weave.plan import Plan

REPEATS = 10  # in a row: of an operator alone, the host's part does not count


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    hardware = hardware_at_hand(scale.torch_device)
    source = "calibrated" if calibrated(scale.torch_device) else "by data sheet: run `tokenweave calibrate` first"
    errors = []
    for what, measured_s, predicted_s in rows(scale, hardware):
        errors.append(predicted_s / measured_s - 1)
        note = f"measured {1e3 * measured_s:.3f} ms, predicted {1e3 * predicted_s:.3f} ms"
        say(Figure(what, 100 * errors[-1], "% error", note=note))
    sizes = sorted(map(abs, errors))
    say(Figure("half of the errors are below", 100 * sizes[len(sizes) // 2], "%", note=f"hardware {source}"))
    say(Figure("the largest error", 100 * sizes[-1], "%"))


def rows(scale: Scale, hardware: Hardware) -> Iterator[tuple[str, float, float]]:
    """(what, measured seconds, predicted seconds)."""
    for what, run, point in (*gemms(scale), *attentions(scale)):
        predicted_s = predict(hardware, point, 1)
        assert predicted_s is not None
        yield what, median_s(partial(repeated, run), scale.torch_device, scale.rounds) / REPEATS, predicted_s
    yield from steps(scale, hardware)


def repeated(run: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        run()


def gemms(scale: Scale) -> Iterator[tuple[str, Callable[[], object], Point]]:
    """Every GEMM of a layer. Few of the shapes are ones that calibrate has seen."""
    shape, device = scale.shape, scale.torch_device
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv_size = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {"qkv": (hidden + 2 * kv_size, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for name, (n, k) in sizes.items():
        weight = torch.randn(n, k, device=device).to(scale.torch_dtype)
        for count in scale.step_tokens:
            x = torch.randn(count, k, device=device).to(scale.torch_dtype)
            point = Point("gemm", (count, n, k), scale.dtype, 0.0, 0.0)
            yield f"GEMM {name}, {count} x {k} x {n}", partial(torch.mm, x, weight.T), point


def attentions(scale: Scale) -> Iterator[tuple[str, Callable[[], object], Point]]:
    shape, device = scale.shape, scale.torch_device
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape["hidden_size"] // heads
    for count in scale.step_tokens:
        q, k, v = (
            torch.randn(1, n, count, head_dim, device=device).to(scale.torch_dtype) for n in (heads, kv_heads, kv_heads)
        )
        run = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        point = Point("attention", (count, heads, kv_heads, head_dim), scale.dtype, 0.0, pairs(count, heads, head_dim))
        yield f"causal attention, {count} tokens", run, point


def steps(scale: Scale, hardware: Hardware) -> Iterator[tuple[str, float, float]]:
    """Whole steps, sampling included: prompts, and rows that decode, as CUDA graphs where the runtime has them."""
    most = max(scale.step_tokens)
    with config_folder(scale) as folder, opened(scale, folder, max_num_batched_tokens=most) as llm:
        runner = llm._runner
        for count in scale.step_tokens:
            yield f"prefill step, {count} tokens", *both(scale, runner, runner.blank_batch(count), hardware)
        for context in scale.contexts:
            for size in scale.batches:
                batch = decoding(runner, size, context)
                yield f"decode step, batch {size}, context {context}", *both(scale, runner, batch, hardware)


def both(scale: Scale, runner: Runner, batch: Batch, hardware: Hardware) -> tuple[float, float]:
    """(measured, predicted) seconds."""
    graph = runner.graphs is not None and runner.graphs.takes(batch)
    cost = Cost(shape_of(runner), hardware, 1, graph=graph)
    step = Step(batch, Plan(batch.rows), (SamplingRow(),) * len(batch.spans))
    measured_s = median_s(lambda: run_step(runner, step), scale.torch_device, scale.rounds)
    chunks = [Chunk(len(span), span.context, span.wanted) for span in batch.spans]
    return measured_s, CostStep(cost, CostBatch(chunks)).seconds(Choice("off"))


def decoding(runner: Runner, sequences: int, context: int) -> Batch:
    """Sequences with blocks of their own, as far as there are; what the cache holds does not matter."""
    size, have = runner.config.block_size, len(runner.storage)
    per = -(-(context + 1) // size)
    tables = [tuple((i * per + j) % have for j in range(per)) for i in range(sequences)]
    span = Span((0,), context, (), prompt_len=context, wanted=1)
    return Batch(tuple(replace(span, block_table=table) for table in tables))
