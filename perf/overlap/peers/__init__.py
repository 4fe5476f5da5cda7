"""Peers: what else could run the same work on the same ranks. Add one: a file with a Peer, and its name here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from perf.overlap.peers.opened import Opened
from perf.overlap.peers.transformers_tp import TransformersTP
from perf.overlap.peers.vllm import Vllm
from perf.overlap.points import Setting
from tokenweave.comm.group import Ranks

__all__ = ["PEERS", "Opened", "Peer", "open_peers", "tried"]


class Peer(Protocol):
    name: str

    def missing(self, setting: Setting, load_format: str) -> str:
        """Why it cannot take part here; "" if it can. load_format: "dummy" where the model's folder has no weights."""

    def open(self, folder: Path, setting: Setting, load_format: str) -> Opened:
        """Load the model in `folder`, on every rank."""


Contestants = dict[str, Callable[[], Any]]
PEERS: tuple[Peer, ...] = (TransformersTP(), Vllm())


def open_peers(
    folder: Path, setting: Setting, load_format: str, ranks: Ranks, without: Collection[str]
) -> tuple[dict[str, Opened], dict[str, str]]:
    """(what runs, by name; why the others do not). Collective: a peer that fails on one rank is missing on all."""
    running: dict[str, Opened] = {}
    missing: dict[str, str] = {}
    for peer in PEERS:
        if reason := "left out" if peer.name in without else peer.missing(setting, load_format):
            missing[peer.name] = reason
            continue
        try:
            with ranks.together(f"opening {peer.name}"):
                running[peer.name] = peer.open(folder, setting, load_format)
        except Exception as error:  # it is a guest: listed as missing, with what it said, and the run goes on
            missing[peer.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return running, missing


def tried(prepare: dict[str, Callable[[], Callable[[], Any]]], ranks: Ranks) -> tuple[Contestants, dict[str, str]]:
    """(what each peer is timed with, why others are not): each is prepared and run once. Collective."""
    usable: Contestants = {}
    missing: dict[str, str] = {}
    for name, prepared in prepare.items():
        try:
            with ranks.together(f"trying {name}"):
                run = prepared()
                run()
            usable[name] = run
        except Exception as error:  # as above
            missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return usable, missing
