"""Peers: what else could run the same prefill on the same ranks. Add one: a file with a Peer, and its name here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from perf.overlap.peers.transformers_tp import TransformersTP
from perf.overlap.points import Setting
from tokenweave.comm.group import Ranks


class Peer(Protocol):
    name: str

    def missing(self, setting: Setting) -> str:
        """Why it cannot take part here; "" if it can."""

    def open(self, folder: Path, setting: Setting) -> Callable[[list[int]], Any]:
        """Load the weights of `folder`, on every rank. Returns what computes the first token after a prompt."""


PEERS: tuple[Peer, ...] = (TransformersTP(),)


def open_peers(folder: Path, setting: Setting, ranks: Ranks) -> tuple[dict[str, Any], dict[str, str]]:
    """(what runs, by name; why the others do not). Collective: a peer that fails on one rank is missing on all."""
    running: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for peer in PEERS:
        if reason := peer.missing(setting):
            missing[peer.name] = reason
            continue
        try:
            with ranks.together(f"opening {peer.name}"):
                running[peer.name] = peer.open(folder, setting)
        except Exception as error:  # it is a guest: listed as missing, with what it said, and the run goes on
            missing[peer.name] = f"{type(error).__name__}: {error}"
    return running, missing
