"""Window: the stretch of time a picture shows. Pure decisions on spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tokenweave.trace.overlap import Interval
from tokenweave.trace.spans import Span

MAX_LAYERS = 6  # more than this in one panel and names no longer fit into their bars
ZOOM_LAYERS = 3


def telling_step(spans: Sequence[Span]) -> int:
    """The step with the most tokens: a prefill, where there was one. Of equals the most split, then the last."""
    steps: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        steps[span.step].append(span)

    def weight(step: int) -> tuple[int, int, int]:
        tokens = half_tokens(steps[step])
        return sum(tokens), len(tokens), step

    return max(steps, key=weight)


def half_tokens(spans: Iterable[Span]) -> list[int]:
    """The tokens of each half of a step. The largest count of each half, as rows drop out in the last layer."""
    tokens: dict[int, int] = defaultdict(int)
    for span in spans:
        tokens[span.half] = max(tokens[span.half], span.tokens)
    return [tokens[half] for half in sorted(tokens)]


def extent(spans: Sequence[Span]) -> Interval:
    """From the first start to the last end, at least 1 ns."""
    start_ns = min(span.start_ns for span in spans)
    return start_ns, max(start_ns + 1, max(span.end_ns for span in spans))


def zoom(spans: Sequence[Span]) -> Interval | None:
    """Some layers from the middle of a step, or None if the whole step is short enough to be read."""
    half, rank = min((span.half, span.rank) for span in spans)
    starts_ns = layer_starts(s for s in spans if s.kind == "segment" and s.half == half and s.rank == rank)
    if len(starts_ns) <= MAX_LAYERS:
        return None
    first = len(starts_ns) // 2 - 1
    return starts_ns[first], starts_ns[first + ZOOM_LAYERS]


def layer_starts(segments: Iterable[Span]) -> list[int]:
    """When each layer of one strand begins: at the segment that comes most often, the first of equals (so "attn")."""
    starts: dict[str, list[int]] = defaultdict(list)
    for span in sorted(segments, key=lambda span: span.start_ns):
        starts[span.name].append(span.start_ns)
    return max(starts.values(), key=len, default=[])


def clip(spans: Iterable[Span], window: Interval) -> list[Span]:
    """The parts of spans that lie in the window."""
    start_ns, end_ns = window
    return [
        span._replace(start_ns=max(span.start_ns, start_ns), end_ns=min(span.end_ns, end_ns))
        for span in spans
        if span.start_ns < end_ns and span.end_ns > start_ns
    ]
