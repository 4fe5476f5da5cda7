"""A progress bar for generation."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from tokenweave.engine.request import RequestState


class Progress:
    """Counts generated tokens, and finished requests, of a call. Shown on a terminal only."""

    def __init__(self, requests: list[RequestState], show: bool):
        self.completions = [completion for request in requests for completion in request.completions]
        total = sum(completion.max_tokens for completion in self.completions)
        self._bar = tqdm(total=total, desc="generating", unit=" tokens", disable=None if show else True)

    def update(self) -> None:
        """Called after each step."""
        if self._bar.disable:
            return
        done = sum(completion.finish_reason is not None for completion in self.completions)
        tokens = sum(len(one.sequence.tokens) - len(one.sequence.prompt) for one in self.completions)
        self._bar.set_postfix_str(f"{done}/{len(self.completions)} done", refresh=False)
        self._bar.update(tokens - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
