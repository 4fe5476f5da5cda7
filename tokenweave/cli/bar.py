"""Bar: how far a run of measurements is, on a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm


class Bar:
    """Seconds of a budget, with what was just done. Shown on a terminal only."""

    def __init__(self, task: str, budget_s: float, show: bool):
        self._start_s = time.monotonic()
        layout = "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = tqdm(total=budget_s, desc=task, bar_format=layout, disable=None if show else True)

    def update(self, words: str) -> None:
        if self._bar.disable:
            return
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.n = min(self._bar.total, time.monotonic() - self._start_s)
        self._bar.refresh()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
