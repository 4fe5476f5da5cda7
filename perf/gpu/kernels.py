"""Kernels: where the time of a step goes, kernel by kernel, and how long the GPU has nothing to do between them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from perf.gpu.clock import synchronize
from perf.gpu.figure import Figure
from perf.gpu.model import config_folder, opened
from perf.gpu.predicted import decoding
from perf.gpu.rates import copy_bytes_per_s, decode_bytes
from perf.gpu.scale import Scale
from tokenweave.engine.batch import Batch
from tokenweave.engine.engine import Step, run_step
from tokenweave.engine.runner import Runner
from tokenweave.engine.sampling_row import SamplingRow
from tokenweave.weave.plan import Plan

STEPS = 8  # that are looked at
LISTED = 12  # kernels by name
NAME_LENGTH = 60


@dataclass(frozen=True)
class Ran:
    """One kernel, or copy, on the device's clock."""

    name: str
    start_us: float
    end_us: float


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    rate = copy_bytes_per_s(scale)
    most = max(scale.prefill_tokens, *scale.batches)
    with config_folder(scale) as folder, opened(scale, folder, max_num_batched_tokens=most) as llm:
        runner = llm._runner
        for size in scale.batches:
            floor_ms = 1e3 * decode_bytes(scale, size, scale.decode_context) / rate
            note = f"reading weights, keys and values takes {floor_ms:.3f} ms at the rate of a copy"
            tell(scale, runner, f"decode, batch {size}", decoding(runner, size, scale.decode_context), say, note)
        tell(scale, runner, f"prefill, {scale.prefill_tokens} tokens", runner.blank_batch(scale.prefill_tokens), say)


def tell(scale: Scale, runner: Runner, what: str, batch: Batch, say: Callable[[Figure], None], note: str = "") -> None:
    ran = profiled(scale, partial(run_step, runner, Step(batch, Plan(batch.rows), (SamplingRow(),) * len(batch.spans))))
    busy_us, idle_us = busy_and_idle(ran)
    say(Figure(f"{what}: the GPU at work, a step", busy_us / STEPS / 1e3, "ms", note=note))
    say(Figure(f"{what}: between kernels, a step", idle_us / STEPS / 1e3, "ms", note=f"{len(ran) / STEPS:.0f} kernels"))
    for name, us, calls in by_name(ran)[:LISTED]:
        note = f"{calls / STEPS:g} times, {100 * us / busy_us:.0f} %"
        say(Figure(f"{what}: {name[:NAME_LENGTH]}", us / STEPS / 1e3, "ms", note=note))


def profiled(scale: Scale, run: Callable[[], object]) -> list[Ran]:
    """What STEPS steps run on the device, after two that are not looked at: one may compile, one may capture."""
    cuda = scale.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):
        run()
    synchronize(scale.torch_device)
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(STEPS):
            run()
        synchronize(scale.torch_device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in found.events() if event.device_type == kind and (cuda or event.cpu_parent is None)]
    return [Ran(event.name, event.time_range.start, event.time_range.end) for event in events]


def busy_and_idle(ran: Sequence[Ran]) -> tuple[float, float]:
    """(us in which something ran, us between the first start and the last end in which nothing did)."""
    busy_us, until_us = 0.0, float("-inf")
    for one in sorted(ran, key=lambda one: one.start_us):
        busy_us += max(0.0, one.end_us - max(one.start_us, until_us))
        until_us = max(until_us, one.end_us)
    return busy_us, until_us - min(one.start_us for one in ran) - busy_us


def by_name(ran: Sequence[Ran]) -> list[tuple[str, float, int]]:
    """(name, us in all, how many) of each kernel, the longest first."""
    us: dict[str, float] = defaultdict(float)
    for one in ran:
        us[one.name] += one.end_us - one.start_us
    calls = Counter(one.name for one in ran)
    return [(name, us[name], calls[name]) for name in sorted(us, key=lambda name: us[name], reverse=True)]
