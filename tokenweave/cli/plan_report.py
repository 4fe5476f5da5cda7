"""Report: everything that `tokenweave plan` says, before it is laid out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenweave.cost.explain import Explanation, explain
from tokenweave.cost.hardware import KNOWN
from tokenweave.cost.memory import smallest_world_size
from tokenweave.cost.shape import ModelShape, shard_shape
from tokenweave.cost.sizing import WORLD_SIZES, Advice, Gain, Size, Sizer, advise, changed
from tokenweave.cost.work import Chunk
from tokenweave.cost.workload import Workload


@dataclass(frozen=True)
class WhatIf:
    """The same deployment on a changed machine. gain: the baseline's prefill of one prompt over the plan's."""

    factors: dict[str, float]
    size: Size
    gain: float


@dataclass(frozen=True)
class Report:
    """size: of the chosen world size; sizes: of all that were looked at. device: what a rank has of its own, in words.
    has_sms: whether a plan's SM counts matter. max_len: tokens the model was made for; None: not known."""

    model: str
    max_len: int | None
    hardware: str
    device: str
    has_sms: bool
    dtype: str
    workload: Workload
    size: Size
    sizes: list[Size]
    advice: Advice
    gains: list[Gain]
    what_if: list[WhatIf]
    explanation: Explanation | None


def make_report(
    model: str,
    sizer: Sizer,
    workload: Workload,
    world_size: int | None,
    what_if: list[dict[str, float]],
    batch: tuple[Chunk, ...] | None,
) -> Report:
    """world_size: None = the fewest that serve the workload. Raises ValueError for what does not fit, saying what
    would."""
    if world_size is not None:
        check_heads(sizer.shape, world_size)
    check_length(model, sizer.shape.max_len, workload)
    sizes = [sizer.size(workload, count) for count in sorted({*sizer.world_sizes(), world_size or 1})]
    advice = advise(sizes, workload)
    chosen = world_size or advice.fewest or fewest_that_serve(sizes)
    size = next((size for size in sizes if size.world_size == chosen), None)
    if size is None or size.serving["auto"] is None:
        raise ValueError(refusal(model, sizer, workload, world_size, sizes))
    return Report(
        model=model,
        max_len=sizer.shape.max_len,
        hardware=sizer.hardware.name,
        device=sizer.hardware.device,
        has_sms=bool(sizer.hardware.tiles),
        dtype=sizer.shape.dtype,
        workload=workload,
        size=size,
        sizes=sizes,
        advice=advice,
        gains=sizer.gains(size.world_size),
        what_if=[suppose(sizer, workload, size.world_size, factors) for factors in what_if],
        explanation=None if batch is None else explain(sizer.cost(size.world_size, is_decode(batch)), batch),
    )


def check_heads(shape: ModelShape, world_size: int) -> None:
    """Raises ValueError for ranks that cannot share the heads evenly."""
    try:
        shard_shape(shape, world_size)
    except ValueError as error:
        raise ValueError(f"--tp {world_size} cannot be: {error}") from None


def check_length(model: str, max_len: int | None, workload: Workload) -> None:
    """Raises ValueError for requests longer than the model was made for."""
    if max_len is not None and workload.tokens > max_len:
        raise ValueError(
            f"{model} was made for {max_len} tokens, and a request has {workload.tokens}; lower --prompt-len "
            f"({workload.prompt_len}) or --output-len ({workload.output_len})"
        )


def suppose(sizer: Sizer, workload: Workload, world_size: int, factors: dict[str, float]) -> WhatIf:
    other = Sizer(sizer.shape, changed(sizer.hardware, factors), sizer.collectives)
    (gain,) = other.gains(world_size, (workload.prompt_len,))
    return WhatIf(factors, other.size(workload, world_size), gain.planned)


def is_decode(batch: tuple[Chunk, ...]) -> bool:
    """Whether a step runs as a graph."""
    return all(chunk.tokens == 1 for chunk in batch)


def fewest_that_serve(sizes: list[Size]) -> int | None:
    return next((size.world_size for size in sizes if size.serving["auto"]), None)


def refusal(model: str, sizer: Sizer, workload: Workload, world_size: int | None, sizes: list[Size]) -> str:
    """Why a workload cannot be, and what would fit."""
    name, fewest = sizer.hardware.name, fewest_that_serve(sizes)
    tried = next(size for size in sizes if size.world_size == (world_size or sizes[-1].world_size))
    said = f"{model} in {sizer.shape.dtype} on {tried.world_size} x {name}: {tried.why_not}"
    if fewest is not None:
        return f"{said}; {fewest} x {name} serve it"
    fitting = [f"{count} x {known}" for known, count in others_that_serve(sizer, workload)]
    enough = smallest_world_size(
        sizer.shape, sizer.hardware, workload.tokens, min(workload.step_tokens, workload.prompt_len)
    )
    if enough is not None and enough > sizes[-1].world_size:
        fitting.insert(0, f"{enough} x {name} by their memory")
    if fitting:
        return f"{said}; what serves it: {', '.join(fitting)}"
    return f"{said}; nothing known serves it on up to {WORLD_SIZES[-1]}: lower the batch, the rate or the lengths"


def others_that_serve(sizer: Sizer, workload: Workload) -> Iterator[tuple[str, int]]:
    """(another known GPU, how many of it)."""
    for known in KNOWN:
        if known.tiles and known.name != sizer.hardware.name and sizer.shape.dtype in known.flops:
            other = Sizer(sizer.shape, known)
            count = fewest_that_serve([other.size(workload, world_size) for world_size in other.world_sizes()])
            if count is not None:
                yield known.name, count


def record(report: Report) -> dict[str, Any]:
    """Everything, for json.dumps. Times are seconds, sizes bytes."""
    return asdict(report) | {
        "size": of_size(report.size),
        "sizes": [of_size(size) for size in report.sizes],
        "what_if": [asdict(one) | {"size": of_size(one.size)} for one in report.what_if],
        "gains": [asdict(gain) | {"planned": gain.planned} for gain in report.gains],
        "explanation": report.explanation and asdict(report.explanation) | {"reasons": report.explanation.reasons},
    }


def of_size(size: Size) -> dict[str, Any]:
    bounds = {"prefill_bound": size.prefill and size.prefill.bound, "decode_bound": size.decode and size.decode.bound}
    return asdict(size) | bounds | {"kv_tokens": size.memory.kv_tokens}
