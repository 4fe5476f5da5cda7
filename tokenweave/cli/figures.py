"""Figures: what a run amounted to, computed from what it gave back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tokenweave.cli.setup import Setup
from tokenweave.outputs import RequestMetrics, RequestOutput
from tokenweave.trace.overlap import OverlapSummary
from tokenweave.trace.spans import Span

# What the times are of. With it, nobody need guess.
TIMES = (
    "Times run from when the engine took the prompts to the last token: loading, tokenizing and drawing\n"
    "are not in them, but what a first call has to warm up is."
)


@dataclass(frozen=True)
class Figures:
    """Counts over all prompts, and times in seconds on rank 0's clock (see TIMES).

    generated_tokens: end-of-sequence tokens count. ttft_*: time to first token, over prompts.
    """

    prompts: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    stopped: int
    cut_short: int
    preemptions: int
    seconds: float
    ttft_mean_s: float
    ttft_max_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.seconds


@dataclass(frozen=True)
class Run:
    """All that can be said of one run. woven: (steps in two halves, all steps); overlap and woven need a trace."""

    setup: Setup
    prompts: list[str]
    outputs: list[RequestOutput]
    figures: Figures
    overlap: OverlapSummary | None
    woven: tuple[int, int]

    @property
    def no_overlap(self) -> str | None:
        """Why there are no figures of hidden communication; None if there are."""
        if self.setup.world_size == 1:
            asked = self.setup.config.overlap == "weave"
            return "none: one rank has nothing to communicate" + (", so --overlap weave hid nothing" if asked else "")
        if self.overlap is None:
            return "not measured; --trace FILE says how much of it was hidden"
        return None if self.overlap.hidden_share is not None else "none in this run, so there was nothing to hide"


def figures(outputs: Iterable[RequestOutput]) -> Figures:
    """Of finished requests, at least one."""
    outputs = list(outputs)
    metrics = [metrics_of(output) for output in outputs]
    completions = [completion for output in outputs for completion in output.outputs]
    ttft_s = [one.ttft_s or 0.0 for one in metrics]
    return Figures(
        prompts=len(outputs),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        cached_tokens=sum(one.cached_tokens for one in metrics),
        generated_tokens=sum(len(completion.token_ids) for completion in completions),
        stopped=sum(completion.finish_reason == "stop" for completion in completions),
        cut_short=sum(completion.finish_reason == "length" for completion in completions),
        preemptions=sum(one.preemptions for one in metrics),
        seconds=max(one.finished_s or 0.0 for one in metrics) - min(one.arrival_s for one in metrics),
        ttft_mean_s=sum(ttft_s) / len(ttft_s),
        ttft_max_s=max(ttft_s),
    )


def metrics_of(output: RequestOutput) -> RequestMetrics:
    if output.metrics is None or output.metrics.finished_s is None:
        raise ValueError(f"request {output.request_id} is not finished; figures are of finished requests")
    return output.metrics


def count_woven(spans: Iterable[Span]) -> tuple[int, int]:
    """(steps that were split into halves, all steps) in a timeline."""
    halves: dict[int, set[int]] = defaultdict(set)
    for span in spans:
        halves[span.step].add(span.half)
    return sum(len(each) > 1 for each in halves.values()), len(halves)
