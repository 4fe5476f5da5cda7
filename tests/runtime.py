"""The runtime on a rank, watched: what it generates, the logits that made each token, and every step's plan.

`watched_generate` is what multi-rank tests send to the ranks (tests/ranks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenweave import LLM, RequestOutput, SamplingParams
from tokenweave.weave.plan import Plan


@dataclass(frozen=True)
class Watched:
    """logits: on rank 0, for each prompt its [new tokens, vocab] fp32; empty elsewhere. plans: one per step."""

    outputs: list[RequestOutput]
    logits: list[torch.Tensor]
    plans: list[Plan]

    @property
    def tokens(self) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in self.outputs]

    @property
    def preemptions(self) -> int:
        return sum(output.metrics.preemptions for output in self.outputs)


def watched_generate(
    folder: Path, prompts: Sequence[Sequence[int]], params: SamplingParams, options: Mapping[str, Any]
) -> Watched:
    """Generate with a fresh LLM whose cache starts as NaN, so that reading what nobody wrote shows."""
    with LLM(folder, progress=False, **options) as llm:
        return watched_call(llm, prompts, params)


def watched_call(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Watched:
    llm._runner.storage.fill_(float("nan"))
    steps = watch_forward(llm)
    drawn = watch_tokens(llm, steps) if llm._ranks.rank == 0 else {}
    outputs = llm.generate(list(prompts), params)
    logits = [torch.stack(drawn[output.request_id]) for output in outputs] if drawn else []
    return Watched(outputs, logits, [plan for plan, _ in steps])


def watch_forward(llm: LLM) -> list[tuple[Plan, torch.Tensor]]:
    """Keep every step's plan and the last one's logits."""
    steps: list[tuple[Plan, torch.Tensor]] = []
    forward = llm._runner.forward

    def watched(batch: Any, plan: Plan, previous: torch.Tensor | None = None) -> torch.Tensor:
        logits = forward(batch, plan, previous)
        steps.append((plan, logits.clone()))  # a graph's next launch would overwrite them
        return logits

    llm._runner.forward = watched  # type: ignore[method-assign]
    return steps


def watch_tokens(llm: LLM, steps: list[tuple[Plan, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Keep, by request, the logits row of every token that was drawn and wanted."""
    rows: dict[str, list[torch.Tensor]] = {}
    take_in, taken = llm._engine._take_in, 0

    def watched(launched: Any) -> Any:
        nonlocal taken
        for (request, completion), row in zip(launched.drawing, steps[taken][1], strict=True):
            if completion.finish_reason is None:
                rows.setdefault(request.request_id, []).append(row)
        taken += 1
        return take_in(launched)

    llm._engine._take_in = watched  # type: ignore[method-assign]
    return rows
