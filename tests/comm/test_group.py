"""Control messages, and failures that every rank gets to know."""

import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tokenweave.comm import group
from tokenweave.comm.group import (
    PIECE_BYTES,
    PeerError,
    Ranks,
    environment_world_size,
    has_workers,
    is_lost_peer,
    join,
    room_after,
)
from tokenweave.models.shards import CheckpointError

CPU = torch.device("cpu")
LEAST, MOST = PIECE_BYTES
AROUND = [size + off for size in (LEAST, 2 * LEAST, MOST) for off in range(-30, 5)]  # of what a first piece holds
SIZES = [0, 1, LEAST - 100, *AROUND, 1 << 20, *AROUND[::-1], 0, MOST // 2 + 1, 5, 5]

each_world = pytest.mark.parametrize("world_size", [1, 2, 4])


class Odd(Exception):
    """Cannot be pickled, nor made from a text."""

    def __init__(self, one: int, two: int):
        super().__init__(f"odd {one}\nand {two}")
        self.function = lambda: one


FAILURES = {
    "ValueError": lambda: ValueError("too few"),
    "TypeError": lambda: TypeError("no such option"),
    "FileNotFoundError": lambda: FileNotFoundError("no config.json"),
    "CheckpointError": lambda: CheckpointError("truncated"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "OSError": lambda: OSError(5, "disk"),
    "MemoryError": lambda: MemoryError("all gone"),
    "KeyError": lambda: KeyError("layer"),
    "Odd": lambda: Odd(1, 2),
}
PLAIN = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "FileNotFoundError": FileNotFoundError,
    "CheckpointError": ValueError,
    "UnicodeDecodeError": ValueError,
}


# -- what runs on the ranks -------------------------------------------------------------------------------------------


def messages_arrive() -> list[int]:
    """Every size through `send` and `receive`, in order; returns the sizes as this rank has them."""
    ranks = join(CPU, 60.0)
    if ranks.rank == 0:
        for size in SIZES:
            ranks.send(b"x" * size)
        sizes = SIZES
    else:
        sizes = [len(ranks.receive()) for _ in SIZES]
    ranks.leave()
    return sizes


def gathered() -> list:
    ranks = join(CPU, 60.0)
    values = ranks.gather({"rank": ranks.rank, "padding": "x" * 10_000 * ranks.rank})
    ranks.leave()
    return [(value["rank"], len(value["padding"])) for value in values]


def failing(kind: str, failing_ranks: tuple[int, ...]) -> tuple[str, str, int]:
    """(kind of the error that this rank raises, its text, a sum over all ranks afterwards)."""
    ranks = join(CPU, 60.0)
    raised: BaseException | None = None
    try:
        with ranks.together("testing"):
            if ranks.rank in failing_ranks:
                raise FAILURES[kind]()
    except Exception as error:
        raised = error
    after = sum(ranks.gather(1))  # nobody is out of step
    ranks.leave()
    return type(raised).__name__, str(raised), after


def worlds() -> tuple[int, bool]:
    return environment_world_size(), has_workers()


def waits_for_nothing() -> tuple[bool, str]:
    """Rank 1 waits for a message that does not come."""
    ranks = join(CPU, 1.0)
    if ranks.rank == 0:
        time.sleep(2.0)
        return True, ""
    try:
        ranks.receive()
    except Exception as error:
        return is_lost_peer(error), str(error)
    return False, "got a message"


def left_nccl(stuck: bool) -> tuple[list[str], bool]:
    """The groups that NCCL's ends were called for, and whether the default group's end would wait for NCCL again. A
    stand-in for NCCL comes back, or does not."""
    ranks = join(CPU, 60.0)
    ranks.device = torch.device("cuda", 0)
    forever, ended = threading.Event(), []

    def end(comm: object) -> None:
        ended.append("comm" if comm is kept[0] else "another")
        if stuck:
            forever.wait()
        else:
            dist.destroy_process_group(comm)

    kept = [ranks.comm]
    with (
        mock.patch.object(dist.distributed_c10d, "_abort_process_group", end),
        mock.patch.object(group, "NCCL_CLOSE_S", 0.3),
    ):
        ranks.abort()
        ranks.abort()
        ranks.leave()
    listed = kept[0] in dist.distributed_c10d._world.pg_names
    forever.set()
    return ended, listed


# -- what is expected of them -----------------------------------------------------------------------------------------


def on_ranks(ranks, world_size: int, function, *args) -> list:
    return [function(*args)] if world_size == 1 else ranks(world_size).run(function, *args)


@each_world
def test_messages_of_every_size_arrive_in_order(ranks, world_size):
    assert on_ranks(ranks, world_size, messages_arrive) == [SIZES] * world_size


@pytest.mark.parametrize(
    ("size", "room"),
    [(9, LEAST), (LEAST, LEAST), (LEAST + 1, 2 * LEAST), (MOST, MOST), (MOST + 1, MOST), (10**9, MOST)],
)
def test_a_message_as_long_as_the_last_one_travels_in_one_piece(size, room):
    """Unless that would be long: what follows may be short, and is filled up to it."""
    assert room_after(size) == room


@each_world
def test_gather_has_every_rank_in_order(ranks, world_size):
    everyone = [(rank, 10_000 * rank) for rank in range(world_size)]
    assert on_ranks(ranks, world_size, gathered) == [everyone] * world_size


@each_world
def test_nothing_fails(ranks, world_size):
    assert on_ranks(ranks, world_size, failing, "ValueError", ()) == [("NoneType", "None", world_size)] * world_size


@pytest.mark.parametrize("kind", FAILURES)
def test_one_failure_reaches_every_rank(ranks, kind):
    results = ranks(4).run(failing, kind, (2,))
    assert results[2] == (kind, str(FAILURES[kind]()), 4)  # its own error, as it was
    seen = PLAIN.get(kind, PeerError).__name__
    for rank in (0, 1, 3):
        name, text, after = results[rank]
        assert (name, after) == (seen, 4)
        assert text.startswith("rank 2")
        assert str(FAILURES[kind]()) in text


def test_when_several_fail_each_raises_its_own(ranks):
    results = ranks(4).run(failing, "OSError", (1, 3))
    assert [name for name, _, _ in results] == ["PeerError", "OSError", "PeerError", "OSError"]
    assert results[0][1].startswith("rank 1 failed in testing: OSError")


def test_a_failure_of_one_rank_alone_goes_up():
    with pytest.raises(Odd), Ranks(0, 1, CPU, 1.0, None, None).together("testing"):
        raise Odd(1, 2)


def test_torchrun_decides_the_world_size(ranks, monkeypatch):
    assert ranks(2).run(worlds) == [(2, False), (2, False)]
    assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert environment_world_size() == 8
    monkeypatch.delenv("WORLD_SIZE")
    assert worlds() == (1, False)


def test_a_world_of_one_makes_no_group():
    ranks = join(CPU, 1.0)
    assert (ranks.rank, ranks.world_size, ranks.control, ranks.comm) == (0, 1, None, None)
    assert not dist.is_initialized()
    ranks.leave()


@pytest.mark.parametrize("stuck", [False, True])
def test_nccl_that_does_not_let_go_is_left_behind(ranks, stuck):
    assert ranks(2).run(left_nccl, stuck) == [(["comm"], False)] * 2
    assert ("leaving NCCL did not end within 0.3 s" in ranks(2).output(0)) == stuck


def test_waits_are_bounded(ranks):
    lost, text = ranks(2).run(waits_for_nothing)[1]
    assert lost, text


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("gloo/transport"), TimeoutError(), OSError()]
)
def test_other_errors_lose_no_peer(error):
    assert not is_lost_peer(error)
