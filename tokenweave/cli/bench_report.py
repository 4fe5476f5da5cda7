"""Report: what `tokenweave bench` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenweave.cli.figures import metrics_of
from tokenweave.cli.setup import Setup
from tokenweave.outputs import RequestOutput


@dataclass(frozen=True)
class Load:
    """What is run: num_prompts prompts, which take prompt_lens in turn, all at once; so in each round."""

    prompt_lens: tuple[int, ...]
    output_len: int
    num_prompts: int
    rounds: int
    seed: int

    @property
    def tokens(self) -> int:
        """Of all prompts and completions of a round."""
        turns, rest = divmod(self.num_prompts, len(self.prompt_lens))
        return turns * sum(self.prompt_lens) + sum(self.prompt_lens[:rest]) + self.num_prompts * self.output_len

    def __str__(self) -> str:
        lens = ", ".join(map(str, self.prompt_lens))
        rounds = f"{self.rounds} round{'s' if self.rounds > 1 else ''} after one to warm up"
        prompts = f"{self.num_prompts} prompt{'s' if self.num_prompts > 1 else ''} of {lens} tokens at once"
        return f"{prompts}, {self.output_len} generated for each; {rounds}"


@dataclass(frozen=True)
class Round:
    """Seconds of one round, from when the engine took the prompts. prefill_s: to the last first token; decode_s: from
    the earliest first token to the end. ttft_s, tpot_s: each request's; tpot_s is empty where only one token is made.
    """

    seconds: float
    prefill_s: float
    decode_s: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    prompt_tokens: int
    generated_tokens: int
    preemptions: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        return (self.generated_tokens - len(self.ttft_s)) / self.decode_s if self.tpot_s else None

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.seconds


def round_of(outputs: Sequence[RequestOutput]) -> Round:
    """Of finished requests, of one completion each."""
    metrics, tokens = [metrics_of(output) for output in outputs], [len(one.outputs[0].token_ids) for one in outputs]
    first_s, end_s = [one.first_token_s or 0.0 for one in metrics], [one.finished_s or 0.0 for one in metrics]
    start_s = min(one.arrival_s for one in metrics)
    return Round(
        seconds=max(end_s) - start_s,
        prefill_s=max(first_s) - start_s,
        decode_s=max(end_s) - min(first_s),
        ttft_s=tuple(one.ttft_s or 0.0 for one in metrics),
        tpot_s=tuple((b - a) / (n - 1) for a, b, n in zip(first_s, end_s, tokens, strict=True) if n > 1),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        generated_tokens=sum(tokens),
        preemptions=sum(one.preemptions for one in metrics),
    )


@dataclass(frozen=True)
class Spread:
    """Over requests."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Result:
    """Of one overlap. seconds and rates: the median of the rounds. gain: the median over rounds of the first overlap's
    time over this one's. TPOT and decode rate: None where only one token is made."""

    overlap: str
    ttft_s: Spread
    tpot_s: Spread | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    tokens_per_s: float
    seconds: float
    gain: float
    preemptions: int


def result_of(overlap: str, rounds: Sequence[Round], first: Sequence[Round]) -> Result:
    """first: the rounds of the overlap that this one is compared with."""
    decode = [rate for one in rounds if (rate := one.decode_tokens_per_s) is not None]
    tpot_s = [seconds for one in rounds for seconds in one.tpot_s]
    return Result(
        overlap,
        spread([seconds for one in rounds for seconds in one.ttft_s]),
        spread(tpot_s) if tpot_s else None,
        statistics.median(one.prefill_tokens_per_s for one in rounds),
        statistics.median(decode) if decode else None,
        statistics.median(one.tokens_per_s for one in rounds),
        statistics.median(one.seconds for one in rounds),
        statistics.median(a.seconds / b.seconds for a, b in zip(first, rounds, strict=True)),
        sum(one.preemptions for one in rounds),
    )


def spread(values: Sequence[float]) -> Spread:
    p50, p99 = np.percentile(values, (50, 99))
    return Spread(statistics.fmean(values), float(p50), float(p99))


@dataclass(frozen=True)
class Report:
    setup: Setup
    load: Load
    results: list[Result]


def record(report: Report) -> dict[str, Any]:
    """Everything, for json.dumps. Times are seconds."""
    return report.setup.record() | {
        "load": asdict(report.load),
        "results": [asdict(result) for result in report.results],
    }
