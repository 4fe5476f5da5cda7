"""Counts what collectives send, by the counters of the loopback interface. For test_link.py, which runs it as

    unshare --user --map-root-user --net python -m tests.comm.wire

in a network namespace of its own, where nobody else sends. Prints a JSON list of Measured.
"""

import fcntl
import json
import multiprocessing
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from tokenweave.comm.transport import GlooTransport
from tokenweave.shard import shards

WORLD_SIZES = (2, 4)
DATA_BYTES = (1 << 20, 4 << 20)
HIDDEN = 512
CALLS = 5
SETTLE_S = 0.05  # for acknowledgements of what went before


@dataclass(frozen=True)
class Measured:
    """Bytes that all ranks together were charged for, and that the interface counted, headers included."""

    world_size: int
    data_bytes: int
    collective: str
    charged_bytes: int
    counted_bytes: int


def main() -> None:
    bring_up("lo")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    measured = [one for world_size in WORLD_SIZES for one in measure(world_size)]
    json.dump([asdict(one) for one in measured], sys.stdout)


def bring_up(interface: str) -> None:
    """ip link set `interface` up, where there may be no ip command."""
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", interface.encode(), 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, get_flags, request), 16)
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh22x", interface.encode(), flags | up))


def measure(world_size: int) -> list[Measured]:
    """Forks the ranks, which is quicker than to import torch in each. They meet in a file: no thread is needed here."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        place = (world_size, f"{folder}/store", theirs)
        ranks = [context.Process(target=run, args=(rank, *place)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        theirs.close()
        measured = ours.recv()
        for rank in ranks:
            rank.join()
    return measured


def run(rank: int, world_size: int, meeting: str, answer: Connection) -> None:
    store = dist.FileStore(meeting, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    transport = GlooTransport(rank, world_size, dist.new_group(backend="gloo"))
    measured = [
        count(transport, data_bytes, name, call)
        for data_bytes in DATA_BYTES
        for name, call in collectives(transport, data_bytes).items()
    ]
    if rank == 0:
        answer.send(measured)
    dist.barrier()
    dist.destroy_process_group()


def collectives(transport: GlooTransport, data_bytes: int) -> dict[str, Callable[[], int]]:
    data = torch.zeros(data_bytes // HIDDEN // 4, HIDDEN)
    owners = shards(len(data), transport.world_size)
    shard = torch.empty(len(owners[transport.rank]), HIDDEN)
    outs = [torch.empty_like(data) for _ in owners]
    return {
        "all_reduce": lambda: transport.all_reduce(data),
        "reduce_scatter": lambda: transport.reduce_scatter(data, owners, shard),
        "all_gather_rows": lambda: transport.all_gather_rows(data, owners),
        "sum_rows": lambda: transport.sum_rows(data, owners, shard, lambda rows: None, data),
        "all_gather_columns": lambda: transport.all_gather_columns(data, outs),
    }


def count(transport: GlooTransport, data_bytes: int, name: str, call: Callable[[], int]) -> Measured:
    call()  # connections and buffers are made by now
    dist.barrier()
    time.sleep(SETTLE_S)
    before = sent_bytes("lo")
    dist.barrier()
    charged = torch.tensor(sum(call() for _ in range(CALLS)))
    dist.barrier()
    counted = sent_bytes("lo") - before
    dist.barrier()
    dist.all_reduce(charged)
    return Measured(transport.world_size, data_bytes, name, int(charged), counted)


def sent_bytes(interface: str) -> int:
    with open("/proc/net/dev") as counters:
        line = next(line for line in counters if line.strip().startswith(f"{interface}:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
