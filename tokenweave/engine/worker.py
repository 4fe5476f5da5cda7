"""A worker's main: what rank 0 starts for each other rank (see workers.py). Not for the command line."""

from __future__ import annotations

import os
import pickle
import sys
import traceback

import torch

from tokenweave.comm.group import is_lost_peer, is_shared
from tokenweave.engine.engine import follow
from tokenweave.engine.messages import finish_call
from tokenweave.engine.rank import Rank, open_rank
from tokenweave.engine.workers import READY_FD


def main() -> int:
    config, meeting, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    ready = int(os.environ[READY_FD])
    os.write(ready, b"r")
    os.close(ready)
    try:
        rank = open_rank(config, meeting)
    except Exception as error:
        if not (is_shared(error) or is_lost_peer(error)):
            traceback.print_exc()
        return 1  # what is shared, rank 0 raises, and says who was lost
    try:
        serve(rank)
    except Exception as error:
        if not is_lost_peer(error):  # its own output says so, or rank 0
            traceback.print_exc()
        os._exit(1)  # at once: its GPU may have sums queued that never end, for which all that frees memory waits
    return 0


def serve(rank: Rank) -> None:
    """Follow rank 0 from call to call."""
    while wait_for_call():
        for message in follow(rank.runner, rank.ranks):
            if finish_call(message, rank.runner, rank.ranks):
                break
    rank.close()


def wait_for_call() -> bool:
    """Block until the caller wakes this rank; False when the caller closed, or ended."""
    return bool(sys.stdin.buffer.read(1))


if __name__ == "__main__":
    sys.exit(main())
