"""The tables of `tokenweave plan`, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenweave.cli.cells import Cells, aligned, duration
from tokenweave.cli.plan_report import Report
from tokenweave.cost.breakdown import Breakdown
from tokenweave.cost.choice import Choice
from tokenweave.cost.sizing import Serving, Size
from tokenweave.cost.workload import Workload

LABEL_WIDTH = 19
MOST_TOGETHER = 8  # GPUs of one machine, as a rule: what the figures were fitted to


def table(report: Report, plot: Path | None = None) -> str:
    """All sections, with an empty line between."""
    sections = [
        of_model(report),
        of_modes(report),
        of_sizes(report),
        of_gains(report),
        of_what_if(report),
        of_explanation(report),
    ]
    said = "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))
    return said + (f"\n\n{labelled('plot', str(plot))}\n" if plot else "\n")


def of_model(report: Report) -> Iterator[str]:
    size, memory, workload = report.size, report.size.memory, report.workload
    yield f"{report.model} on {size.world_size} x {report.hardware}, {report.dtype}"
    yield labelled("workload", describe(workload))
    if size.world_size > MOST_TOGETHER and report.device == "GPU":
        yield labelled("machines", f"{size.world_size} GPUs are taken to be joined like {MOST_TOGETHER} of one machine")
    used = f"{gigabytes(memory.weights_bytes)} weights, {gigabytes(memory.workspace_bytes)} workspace"
    yield labelled(f"memory of a {report.device}", f"{used}, {gigabytes(memory.usable_bytes)} usable of it")
    each, requests = f"{memory.kv_bytes_per_token / 1e3:.1f} KB each", memory.largest_batch(workload.tokens)
    tokens = f"{memory.kv_tokens} tokens ({each})"
    yield labelled("room for", f"{tokens}: {requests} such requests, or one {longest(report)}")
    for phase, breakdown in (("prefill", size.prefill), ("decode", size.decode)):
        if breakdown is not None:
            yield labelled(f"{phase} waits for", waits(breakdown))


def longest(report: Report) -> str:
    """The longest request: as the memory allows, or the model."""
    max_len = report.max_len
    if max_len is None or max_len >= report.size.memory.kv_tokens:
        return "as long as that"
    return f"of {max_len}, the model's longest"


def of_modes(report: Report) -> Iterator[str]:
    rows: list[Cells] = [("overlap", "TTFT", "TPOT", "tokens/s", f"a {report.device}", "at once")]
    for mode, serving in report.size.serving.items():
        rows.append((mode, *of_serving(serving, report.size.world_size)))
    yield from aligned(rows)
    yield from of_targets(report)


def of_targets(report: Report) -> Iterator[str]:
    workload, serving = report.workload, report.size.serving["auto"]
    assert serving is not None
    for name, target_s, is_s in (
        ("TTFT", workload.ttft_target_s, serving.ttft_s),
        ("TPOT", workload.tpot_target_s, serving.tpot_s),
    ):
        if target_s is not None:
            met = "met" if is_s <= target_s else f"missed: {is_s / target_s:.2f} times as long"
            yield labelled(f"{name} target", f"{duration(target_s)}, {met}")


def of_sizes(report: Report) -> Iterator[str]:
    device = report.device
    rows: list[Cells] = [(f"{device}s", "TTFT", "TPOT", "tokens/s", f"a {device}", "at once", "TTFT gain")]
    for size in report.sizes:
        auto, off = size.serving["auto"], size.serving["off"]
        gain = f"{off.ttft_s / auto.ttft_s:.2f}x" if auto and off else "-"
        rows.append((str(size.world_size), *of_serving(auto, size.world_size), gain))
    lines = list(aligned(rows))
    notes = ["", *(remark(size, report.workload) for size in report.sizes)]
    yield from (f"{line}  {note}".rstrip() for line, note in zip(lines, notes))
    yield "TTFT gain: by overlap=auto over off"
    advice = report.advice
    if advice.fewest is None:
        yield labelled("advice", "none of these meets the targets")
    else:
        yield labelled(
            "advice",
            f"fewest {device}s {advice.fewest}, most tokens/s a {device} {advice.best_per_gpu}, fastest for a request "
            f"{advice.fastest}",
        )


def remark(size: Size, workload: Workload) -> str:
    auto = size.serving["auto"]
    if auto is None:
        return size.why_not
    return "" if auto.meets(workload) else "misses a target"


def of_gains(report: Report) -> Iterator[str]:
    if report.size.world_size == 1:
        yield f"prefill of one prompt: one {report.device} has nothing to sum or to gain; --tp N shows the gains of N"
        return
    rows: list[Cells] = [("tokens", "off", "fused", "weave", "no sums", "plan")]
    for gain in report.gains:
        gains = (f"{value:.2f}x" for value in (gain.fused, gain.weave, gain.nocomm))
        rows.append((str(gain.tokens), duration(gain.off_s), *gains, of_choice(gain.plan, report.has_sms)))
    yield "prefill of one prompt: time of off, and how many times as fast the others are"
    yield from aligned(rows, left=(5,))


def of_what_if(report: Report) -> Iterator[str]:
    if not report.what_if:
        return
    now = next((gain.planned for gain in report.gains if gain.tokens == report.workload.prompt_len), None)
    rows: list[Cells] = [("what if", "TTFT", "TPOT", "tokens/s", f"a {report.device}", "at once", "prefill gain")]
    cells = of_serving(report.size.serving["auto"], report.size.world_size)
    rows.append(("as it is", *cells, "" if now is None else f"{now:.2f}x"))
    for one in report.what_if:
        name = ", ".join(f"{what} x {factor:g}" for what, factor in one.factors.items())
        rows.append((name, *of_serving(one.size.serving["auto"], one.size.world_size), f"{one.gain:.2f}x"))
    yield from aligned(rows, left=(0,))


def of_explanation(report: Report) -> Iterator[str]:
    one = report.explanation
    if one is None:
        return
    parts = f"{one.chunks} part{'s' if one.chunks > 1 else ''}"
    yield f"a step of {one.rows} tokens in {parts}: {of_choice(one.taken, report.has_sms)}"
    yield labelled("predicted", ", ".join(f"{mode} {duration(seconds)}" for mode, seconds in one.predicted_s.items()))
    for i, reason in enumerate(one.reasons):
        yield labelled("" if i else "why", reason)


# -- cells -------------------------------------------------------------------------------------------------------------


def describe(workload: Workload) -> str:
    each = f"{workload.prompt_len} prompt tokens, {workload.output_len} generated"
    if workload.request_rate is not None:
        return f"{workload.request_rate:g} requests/s, {each}"
    return f"{workload.batch_size} request{'s' if workload.batch_size > 1 else ''} at once, {each}"


def waits(breakdown: Breakdown) -> str:
    """The parts of a step, the largest first, those under 1 % left out."""
    names = {
        "gemm_compute_s": "GEMM compute",
        "gemm_memory_s": "reading weights",
        "attention_compute_s": "attention compute",
        "attention_memory_s": "reading keys and values",
        "memory_s": "norms and activations",
        "communication_s": "communication",
        "launch_s": "launches and the host",
    }
    parts = {words: getattr(breakdown, name) for name, words in names.items()}
    total_s = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{words} {seconds / total_s:.0%}" for words, seconds in largest if seconds >= 0.01 * total_s)
    return f"{breakdown.bound}: {listed} of {duration(total_s)} (off)"


def of_serving(serving: Serving | None, world_size: int) -> Cells:
    if serving is None:
        return ("-",) * 5
    rates = (f"{serving.tokens_per_s:.1f}", f"{serving.tokens_per_s / world_size:.1f}")
    return (duration(serving.ttft_s), duration(serving.tpot_s), *rates, str(serving.concurrency))


def of_choice(choice: Choice, has_sms: bool) -> str:
    if choice.mode != "weave":
        return choice.mode
    sms = f", {choice.attention_sms} and {choice.mlp_sms} SMs" if has_sms else ""
    return f"weave at row {choice.cut}{sms}"


def labelled(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
