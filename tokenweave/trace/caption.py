"""Caption: what a picture says in words."""

from __future__ import annotations

from collections.abc import Sequence

from tokenweave.trace.overlap import Overlap
from tokenweave.trace.spans import Span
from tokenweave.trace.window import extent, half_tokens

MAX_TITLE = 110  # characters; more would be too small to read


def title_line(title: str) -> str:
    """The title in one line, cut where it is too long; a dollar sign would otherwise start a formula."""
    line = " ".join(title.split()) or "Timeline"
    return (line if len(line) <= MAX_TITLE else line[: MAX_TITLE - 1] + "…").replace("$", r"\$")


def headline(mean: Overlap) -> tuple[str, str]:
    if mean.hidden_share is None:
        return "–", "no communication"
    return f"{mean.hidden_share:.0%}", "of communication hidden"


def describe_steps(shown: Sequence[Span]) -> str:
    """For example "step 3 (prefill): 1024 tokens in 2 halves (512 + 512), 2 ranks, 24.3 ms"."""
    steps = sorted({span.step for span in shown})
    tokens = [half_tokens(span for span in shown if span.step == step) for step in steps]
    start_ns, end_ns = extent(shown)
    phases = ", ".join(sorted({span.phase for span in shown if span.phase}))
    name = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    ranks = len({span.rank for span in shown})
    parts = [
        f"{name} ({phases})" if phases else name,
        f"{plural(sum(map(sum, tokens)), 'token')}{describe_halves(tokens)}",
        plural(ranks, "rank"),
        duration((end_ns - start_ns) / 1e9),
    ]
    return "  ·  ".join(parts)


def describe_halves(tokens: Sequence[Sequence[int]]) -> str:
    if max(map(len, tokens)) == 1:
        return ", not split"
    return f" in {len(tokens[0])} halves ({' + '.join(map(str, tokens[0]))})" if len(tokens) == 1 else ", split"


def describe_times(mean: Overlap) -> str:
    """The times of the mean rank."""
    return "  ·  ".join(
        f"{name} {duration(seconds)}"
        for name, seconds in [
            ("compute", mean.compute_s),
            ("communication", mean.communication_s),
            ("hidden", mean.hidden_s),
            ("exposed", mean.exposed_s),
            ("idle", mean.idle_s),
        ]
    )


def duration(seconds: float) -> str:
    """Three digits, in the unit that keeps the number short."""
    for unit_s, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit_s:
            return f"{seconds / unit_s:#.3g}".rstrip(".") + f" {unit}"
    return "0" if seconds == 0 else f"{seconds * 1e9:.0f} ns"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
