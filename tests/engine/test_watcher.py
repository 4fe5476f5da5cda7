"""The thread that looks at the ranks while the host is held elsewhere."""

from __future__ import annotations

import itertools
import threading

from tokenweave.engine import watcher
from tokenweave.engine.watcher import Watcher

END_S = 30.0


def test_sums_are_told_to_give_up_when_a_rank_has_ended(monkeypatch):
    monkeypatch.setattr(watcher, "LOOK_S", 0.001)
    looks, told, done = itertools.count(1), list[str](), threading.Event()

    def watch() -> None:
        if next(looks) == 3:
            raise ConnectionError("rank 1 ended with exit code -9")

    def abort(why: str) -> None:
        told.append(why)
        done.set()

    Watcher(watch, abort)
    assert done.wait(END_S)
    assert told == ["rank 1 ended with exit code -9"]
    assert next(looks) == 4  # and never again


def test_a_closed_one_looks_no_more(monkeypatch):
    monkeypatch.setattr(watcher, "LOOK_S", 0.001)
    looked = threading.Event()
    Watcher(looked.set, lambda why: None).close()
    for thread in threading.enumerate():
        if thread.name == "tokenweave-watcher":
            thread.join(END_S)
    assert "tokenweave-watcher" not in {thread.name for thread in threading.enumerate()}
