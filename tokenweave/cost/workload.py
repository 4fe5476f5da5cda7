"""Workload: the requests that a deployment is sized for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenweave.cost.memory import Memory
from tokenweave.cost.work import Chunk


@dataclass(frozen=True)
class Workload:
    """Requests of `prompt_len` tokens that get `output_len` more. Either `batch_size` of them at once, or so many a
    second, forever. step_tokens: the most tokens of one step; longer prompts are computed in chunks."""

    prompt_len: int = 2048
    output_len: int = 256
    batch_size: int = 1
    request_rate: float | None = None  # requests / s
    step_tokens: int = 8192
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len", "batch_size", "step_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        for name in ("request_rate", "ttft_target_s", "tpot_target_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number > 0, got {value!r}")

    @property
    def tokens(self) -> int:
        """Of one request when it ends."""
        return self.prompt_len + self.output_len


def prefill_steps(prompt_len: int, batch_size: int, step_tokens: int) -> Iterator[tuple[Chunk, ...]]:
    """The steps that compute `batch_size` prompts one after the other, each of `step_tokens` tokens while there are so
    many: whole prompts, and parts of those that a step has no more room for."""
    step: list[Chunk] = []
    room = step_tokens
    for _ in range(batch_size):
        done = 0
        while done < prompt_len:
            tokens = min(room, prompt_len - done)
            step.append(Chunk(tokens, done, wanted=int(done + tokens == prompt_len)))
            done, room = done + tokens, room - tokens
            if room == 0:
                yield tuple(step)
                step, room = [], step_tokens
    if step:
        yield tuple(step)


def why_no_room(memory: Memory, workload: Workload, device: str) -> str:
    """Why a workload does not fit into the memory of a device ("GPU"); "" if it does."""
    room = memory.usable_bytes - memory.weights_bytes - memory.workspace_bytes
    if room <= 0:
        needed, usable = (memory.weights_bytes + memory.workspace_bytes) / 1e9, memory.usable_bytes / 1e9
        return f"weights and workspace need {needed:.1f} GB a {device}, and {usable:.1f} GB can be used"
    requests = workload.batch_size if workload.request_rate is None else 1
    if memory.largest_batch(workload.tokens) < requests:
        batch, context = memory.largest_batch(workload.tokens), memory.largest_context(requests)
        return (
            f"keys and values of {requests} x {workload.tokens} tokens do not fit: at most {batch} such requests, or "
            f"{context} tokens each"
        )
    return ""
