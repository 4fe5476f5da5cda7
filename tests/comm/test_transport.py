"""Transports against plain torch: every rank's data is drawn from a seed, so that each side can compute the other's."""

import pytest
import torch
import torch.distributed as dist

from tokenweave.comm.transport import CollectiveTransport, GlooTransport, LocalTransport
from tokenweave.shard import shards

HIDDEN = 24
WIDE = 512  # enough for a rank's rows to go in two pieces
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 2, 3, 5, 64, 97)
WIDTHS = (259, 8, 2, 1)  # of all ranks' columns together: from uneven parts to ranks with none
# CollectiveTransport is NCCL's; gloo has the same collectives, and checks all but NCCL itself.
TRANSPORTS = (GlooTransport, CollectiveTransport)
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)
each_world = pytest.mark.parametrize("world_size", [2, 3, 4])


def drawn(rank: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + rank)).to(dtype)


def drawn_by_all(world_size: int, dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    return [drawn(rank, dtype, *shape) for rank in range(world_size)]


def ownerships(rows: int, world_size: int) -> list[list[range]]:
    """Even shards; and what is left of them when most rows drop out: all with one rank, or none with the first."""
    empty, end = range(0, 0), range(rows, rows)
    first = [range(0, rows), *[end] * (world_size - 1)]
    last = [*[empty] * (world_size - 1), range(0, rows)]
    return [shards(rows, world_size), first, last]


CASES = [(dtype, rows) for dtype in DTYPES for rows in ROWS]


# -- what runs on the ranks -------------------------------------------------------------------------------------------


def opened(kind: type) -> GlooTransport | CollectiveTransport:
    return kind(dist.get_rank(), dist.get_world_size(), None)


def all_reduced(kind: type) -> list[torch.Tensor]:
    transport, results = opened(kind), []
    for dtype, rows in CASES:
        total = drawn(transport.rank, dtype, rows, HIDDEN)
        transport.all_reduce(total)
        results.append(total)
    return results


def reduce_scattered(kind: type) -> list[torch.Tensor]:
    transport, results = opened(kind), []
    for dtype, rows in CASES:
        for owners in ownerships(rows, transport.world_size):
            partial = drawn(transport.rank, dtype, rows, HIDDEN)
            out = torch.full((len(owners[transport.rank]), HIDDEN), torch.nan)
            transport.reduce_scatter(partial, owners, out)
            assert partial.equal(drawn(transport.rank, dtype, rows, HIDDEN)), "the partial was changed"
            results.append(out)
    return results


def rows_gathered(kind: type) -> list[torch.Tensor]:
    transport, results = opened(kind), []
    for dtype, rows in CASES:
        for owners in ownerships(rows, transport.world_size):
            mine = owners[transport.rank]
            data = torch.full((rows, HIDDEN), torch.nan, dtype=dtype)
            data[mine.start : mine.stop] = drawn(0, dtype, rows, HIDDEN)[mine.start : mine.stop]
            transport.all_gather_rows(data, owners)
            results.append(data)
    return results


def rows_summed(kind: type, rows: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, list[range]]]:
    """Of each ownership: what a sum of rows gives whose finish doubles each row, the total, and the parts finished."""
    transport, results = opened(kind), []
    for owners in ownerships(rows, transport.world_size):
        mine = owners[transport.rank]
        total = torch.full((len(mine), WIDE), torch.nan)
        out, finished = torch.full((rows, WIDE), torch.nan, dtype=dtype), []

        def finish(part: range, total=total, out=out, mine=mine, finished=finished) -> None:
            finished.append(part)
            out[mine.start + part.start : mine.start + part.stop] = 2 * total[part.start : part.stop]

        sent_bytes = transport.sum_rows(drawn(transport.rank, dtype, rows, WIDE), owners, total, finish, out)
        sent_rows = rows - len(mine) + len(mine) * (transport.world_size - 1)
        assert sent_bytes == sent_rows * WIDE * dtype.itemsize
        results.append((out, total, finished))
    return results


def columns_gathered(kind: type) -> list[list[torch.Tensor]]:
    transport, results = opened(kind), []
    for dtype, rows in CASES:
        for columns in WIDTHS:
            widths = [len(part) for part in shards(columns, transport.world_size)]
            outs = [torch.full((rows, width), torch.nan, dtype=dtype) for width in widths]
            transport.all_gather_columns(drawn(transport.rank, dtype, rows, widths[transport.rank]), outs)
            results.append(outs)
    return results


def charged() -> list[int]:
    transport = opened(GlooTransport)
    data = torch.zeros(12, HIDDEN)
    owners = shards(12, transport.world_size)
    mine = torch.empty(len(owners[transport.rank]), HIDDEN)
    outs = [torch.empty(12, HIDDEN) for _ in owners]
    return [
        transport.all_reduce(data),
        transport.reduce_scatter(data, owners, mine),
        transport.all_gather_rows(data, owners),
        transport.all_gather_columns(data, outs),
    ]


# -- what is expected of them -----------------------------------------------------------------------------------------


@each_world
@each_transport
def test_all_reduce(ranks, world_size, transport):
    results = ranks(world_size).run(all_reduced, transport)
    for case, (dtype, rows) in enumerate(CASES):
        parts = [part.double() for part in drawn_by_all(world_size, dtype, rows, HIDDEN)]
        bound = world_size * ULP[dtype] * sum(part.abs() for part in parts) + 1e-9
        for result in results:
            assert result[case].equal(results[0][case]), "ranks differ"
            assert ((result[case].double() - sum(parts)).abs() <= bound).all()


@each_world
def test_reduce_scatter_sums_in_rank_order(ranks, world_size):
    """Bitwise: fp32, rank 0's part first, whatever the dtype. So every form of the sum can give the same bits."""
    results = ranks(world_size).run(reduce_scattered, GlooTransport)
    for rank, expected in expected_shards(world_size):
        for result, shard in zip(results[rank], expected, strict=True):
            assert result.dtype == torch.float32
            assert result.equal(shard)


@each_world
def test_reduce_scatter_of_a_backend(ranks, world_size):
    """A backend's own collective may sum in any order, and in the dtype of the data."""
    results = ranks(world_size).run(reduce_scattered, CollectiveTransport)
    for rank, expected in expected_shards(world_size):
        for result, shard in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(result, shard, rtol=world_size * 2**-8, atol=world_size * 2**-7)


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    """In rank order, in fp32."""
    total = torch.zeros(parts[0].shape)
    for part in parts:
        total = total + part.float()
    return total


def expected_shards(world_size: int) -> list[tuple[int, list[torch.Tensor]]]:
    expected: list[tuple[int, list[torch.Tensor]]] = [(rank, []) for rank in range(world_size)]
    for dtype, rows in CASES:
        total = sum_of(drawn_by_all(world_size, dtype, rows, HIDDEN))
        for owners in ownerships(rows, world_size):
            for rank, owned in enumerate(owners):
                expected[rank][1].append(total[owned.start : owned.stop])
    return expected


@each_world
@each_transport
def test_all_gather_rows(ranks, world_size, transport):
    results = ranks(world_size).run(rows_gathered, transport)
    for result in results:
        at = iter(result)
        for dtype, rows in CASES:
            for _ in ownerships(rows, world_size):
                assert next(at).equal(drawn(0, dtype, rows, HIDDEN))


@each_world
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 1027])
def test_a_sum_of_rows_is_its_three_steps(ranks, world_size, rows, dtype):
    """Bitwise; where there are many rows, in two pieces."""
    results = ranks(world_size).run(rows_summed, GlooTransport, rows, dtype)
    total = sum_of(drawn_by_all(world_size, dtype, rows, WIDE))
    for rank, of_rank in enumerate(results):
        for owners, (out, shard, finished) in zip(ownerships(rows, world_size), of_rank, strict=True):
            assert shard.equal(total[owners[rank].start : owners[rank].stop])
            assert out.equal((2 * total).to(dtype))
            assert [row for part in finished for row in part] == list(range(len(owners[rank])))
    assert {len(of_rank[0][2]) for of_rank in results} == {2 if rows > 1000 else 1}


@each_world
@each_transport
def test_all_gather_columns(ranks, world_size, transport):
    results = ranks(world_size).run(columns_gathered, transport)
    for result in results:
        at = iter(result)
        for dtype, rows in CASES:
            for columns in WIDTHS:
                widths = [len(part) for part in shards(columns, world_size)]
                for rank, (out, width) in enumerate(zip(next(at), widths, strict=True)):
                    assert out.equal(drawn(rank, dtype, rows, width))


@each_world
def test_bytes_charged(ranks, world_size):
    """The line-rate minimum over all ranks. That gloo sends no more, test_link.py shows on the interface's counters."""
    data_bytes = 12 * HIDDEN * 4
    others = world_size - 1
    totals = [sum(of_rank) for of_rank in zip(*ranks(world_size).run(charged), strict=True)]
    assert totals == [
        2 * others * data_bytes,
        others * data_bytes,
        others * data_bytes,
        others * world_size * data_bytes,
    ]


def test_one_rank_sends_nothing():
    transport, data, out = LocalTransport(), torch.randn(3, HIDDEN), torch.empty(3, HIDDEN)
    assert transport.all_reduce(data) == transport.all_gather_rows(data, [range(3)]) == 0
    assert transport.reduce_scatter(data, [range(3)], out) == 0
    assert out.equal(data)
    assert transport.all_gather_columns(data, [out.zero_()]) == 0
    assert out.equal(data)
