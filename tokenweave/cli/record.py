"""Record: a run for machines."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenweave.cli.figures import Run
from tokenweave.outputs import CompletionOutput, Logprob, RequestOutput


def record(run: Run) -> dict[str, Any]:
    """Everything that the table says and every completion, for json.dumps. Times are seconds."""
    config, woven = run.setup.config, dict(zip(("woven_steps", "steps"), run.woven, strict=True))
    trace = None if config.trace is None else Path(config.trace)
    return run.setup.record() | {
        "overlap": config.overlap,
        "figures": asdict(run.figures) | {"tokens_per_s": run.figures.tokens_per_s},
        "communication": None if run.no_overlap or run.overlap is None else asdict(run.overlap) | woven,
        "no_communication": run.no_overlap,
        "trace": None if trace is None else {"timeline": str(trace), "picture": str(trace.with_suffix(".png"))},
        "outputs": [of_request(*pair) for pair in zip(run.prompts, run.outputs, strict=True)],
    }


def of_request(prompt: str, output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    return {
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "ttft_s": metrics and metrics.ttft_s,
        "latency_s": metrics and metrics.latency_s,
        "completions": [of_completion(completion) for completion in output.outputs],
    }


def of_completion(completion: CompletionOutput) -> dict[str, Any]:
    logprobs = [[of_logprob(*item) for item in token.items()] for token in completion.logprobs or ()]
    return vars(completion) | {
        "cumulative_logprob": finite(completion.cumulative_logprob),
        "logprobs": None if completion.logprobs is None else logprobs,
    }


def of_logprob(token_id: int, logprob: Logprob) -> dict[str, Any]:
    return {"token_id": token_id} | asdict(logprob) | {"logprob": finite(logprob.logprob)}


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None for it."""
    return value if value is not None and math.isfinite(value) else None
