"""Watcher: has sums give up when a rank has ended, whatever the host is at."""

from __future__ import annotations

import threading
from collections.abc import Callable

LOOK_S = 0.1


class Watcher:
    """A thread that looks at the ranks. The main thread does, too, but not while the driver holds it: a launch may wait
    for room in its queue, and the kernel at the head of that for a rank that is gone."""

    def __init__(self, watch: Callable[[], None], abort: Callable[[str], None]):
        """watch: as Ranks.watch. abort: as Communicator.abort; called once at most."""
        self._closed = threading.Event()
        threading.Thread(target=self._look, args=(watch, abort), name="tokenweave-watcher", daemon=True).start()

    def _look(self, watch: Callable[[], None], abort: Callable[[str], None]) -> None:
        try:
            while not self._closed.wait(LOOK_S):
                watch()
        except ConnectionError as error:
            abort(str(error))

    def close(self) -> None:
        self._closed.set()
