"""Both forms of a sum against the maths of Reduce in plain torch, unsharded, in fp64."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from tokenweave.comm.communicator import Communicator, slice_of, surviving
from tokenweave.comm.norm import Norm
from tokenweave.comm.transport import GlooTransport, LocalTransport
from tokenweave.shard import shards
from tokenweave.weave.lanes import InlineLane, ThreadLane
from tokenweave.weave.request import Gather, Reduce, Rows

HIDDEN = 64
MAX_ROWS = 40
SMS = {"attn": 3, "mlp": 2}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}  # of a few roundings, of values about 1

each_world = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
each_form = pytest.mark.parametrize("form", ["reference", "sharded"])


@dataclass(frozen=True)
class Sum:
    """One Reduce of a strand: which of its parts it has."""

    bias: bool = False
    post_norm: bool = False
    norm: bool = True
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """A strand's sums over `rows` rows, from the first, which makes the residual."""

    sums: tuple[Sum, ...]
    rows: int = 7
    dtype: torch.dtype = torch.float32
    offset: float = 0.0  # of norm weights: 1 for Gemma


EMBED = Sum()
LAYERS = {
    "llama": (Sum(), Sum()),
    "llama with biases": (Sum(bias=True), Sum(bias=True)),
    "gemma": (Sum(post_norm=True), Sum(post_norm=True)),
    "olmo": (Sum(post_norm=True, norm=False), Sum(post_norm=True, norm=False)),
}
CUTS = [None, (), (0,), (6,), (2, 3), (0, 6), (1, 2, 4, 5), tuple(range(7))]

EVERY_PART = [
    Case((first, Sum(*parts, rows=cut), Sum()))
    for first in (EMBED, Sum(norm=False))
    for parts in itertools.product([False, True], repeat=3)
    for cut in CUTS
]
SHAPES = [
    Case(
        (EMBED, *layer, Sum(layer[0].bias, layer[0].post_norm, layer[0].norm, rows=cut), layer[1]), rows, dtype, offset
    )
    for name, layer in LAYERS.items()
    for offset in ([1.0] if name == "gemma" else [0.0])
    for dtype in TOLERANCE
    for rows, cut in [(1, None), (1, (0,)), (2, (1,)), (3, None), (13, (3, 12)), (MAX_ROWS, (39,)), (33, ())]
]


# -- what runs on the ranks -------------------------------------------------------------------------------------------


def run_cases(form: str, cases: Sequence[Case]) -> list[list[torch.Tensor]]:
    """For each case, the hidden states that each of its sums gives back."""
    return [run_case(open_communicator(case.dtype), form, case) for case in cases]


def run_case(communicator: Communicator, form: str, case: Case) -> list[torch.Tensor]:
    channel = communicator.open(case.rows, 0, InlineLane(), form, SMS)
    return [give_back(channel, request) for request in requests(case, communicator.rank)]


def give_back(channel, request: Reduce) -> torch.Tensor:
    """The partial goes in by the lent buffer, as a model's does, and the buffer is overwritten afterwards."""
    lent = channel.partial(len(request.partial))
    lent.copy_(request.partial)
    hidden = Reduce(lent, request.bias, request.post_norm, request.norm, request.rows).submit(channel).wait().data
    lent.fill_(torch.nan)  # neither the residual nor what was given back may live in it
    return hidden.clone()


def open_communicator(dtype: torch.dtype) -> Communicator:
    if not dist.is_initialized():
        return Communicator(LocalTransport(), 0, MAX_ROWS, HIDDEN, dtype, torch.device("cpu"))
    rank = dist.get_rank()
    transport = GlooTransport(rank, dist.get_world_size(), None)
    return Communicator(transport, rank, MAX_ROWS, HIDDEN, dtype, torch.device("cpu"))


def requests(case: Case, rank: int) -> list[Reduce]:
    made, alive = [], case.rows
    for step, one in enumerate(case.sums):
        rows = None if one.rows is None else Rows(one.rows, torch.tensor(one.rows, dtype=torch.long))
        alive = alive if one.rows is None else len(one.rows)
        partial = drawn(f"partial {rank}", step, case.dtype, alive, HIDDEN)
        norms = [norm(case, name, step) if wanted else None for name, wanted in (("p", one.post_norm), ("n", one.norm))]
        bias = drawn("bias", step, case.dtype, HIDDEN) if one.bias else None
        made.append(Reduce(partial, bias, *norms, rows=rows))
    return made


def norm(case: Case, name: str, step: int) -> Norm:
    return Norm(drawn(name, step, case.dtype, HIDDEN), 1e-5, case.offset)


def drawn(name: str, step: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    seed = zlib.crc32(f"{name} {step}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def two_halves_in_turn(form: str, case: Case) -> list[list[torch.Tensor]]:
    """The sums of two halves interleaved on a lane of their own, as the weave does it; both over the same data."""
    communicator, lane = open_communicator(case.dtype), ThreadLane(timeout_s=60)
    channels = [communicator.open(case.rows, half, lane, form, SMS) for half in range(2)]
    results: list[list[torch.Tensor]] = [[], []]
    for request in requests(case, communicator.rank):
        own = [replace(request, partial=request.partial.clone()) for _ in channels]  # a sum may be made in place
        pending = [one.submit(channel) for one, channel in zip(own, channels, strict=True)]
        for result, one in zip(results, pending, strict=True):
            result.append(one.wait().data.clone())
    lane.close()
    return results


def gathered(form: str) -> list[torch.Tensor]:
    """Columns of ragged widths."""
    communicator, results = open_communicator(torch.float32), []
    for rows, columns in ((1, 259), (5, 3), (0, 8)):
        widths = tuple(map(len, shards(columns, communicator.transport.world_size)))
        channel = communicator.open(rows, 0, InlineLane(), form, SMS)
        part = drawn("logits", 0, torch.float32, rows, columns).split(widths, dim=1)[communicator.rank]
        results.append(Gather(part.contiguous(), widths).submit(channel).wait())
    return results


# -- what is expected of them -----------------------------------------------------------------------------------------


def expected(case: Case, world_size: int) -> list[torch.Tensor]:
    residual, results = None, []
    for step, (one, request) in enumerate(zip(case.sums, requests(case, 0), strict=True)):
        alive = slice(None) if one.rows is None else list(one.rows)
        shape = request.partial.shape
        parts = [drawn(f"partial {rank}", step, case.dtype, *shape).double() for rank in range(world_size)]
        total = sum(parts) + (request.bias.double() if one.bias else 0)
        total = rms_norm(request.post_norm, total) if one.post_norm else total
        residual = total if residual is None else residual[alive] + total
        results.append(rms_norm(request.norm, residual) if one.norm else residual)
    return results


def rms_norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.offset + norm.weight.double())


def on_ranks(ranks, world_size: int, function, *args) -> list:
    return [function(*args)] if world_size == 1 else ranks(world_size).run(function, *args)


def check(results: list[list[list[torch.Tensor]]], cases: Sequence[Case], world_size: int) -> None:
    for i, case in enumerate(cases):
        reference = expected(case, world_size)
        for of_rank in results:
            for ours, first, wanted in zip(of_rank[i], results[0][i], reference, strict=True):
                assert ours.dtype == case.dtype
                assert ours.shape == wanted.shape, case
                assert ours.equal(first), f"ranks differ: {case}"
                close = (ours.double() - wanted).abs() <= TOLERANCE[case.dtype] * (1 + wanted.abs())
                assert close.all(), case


@each_world
@each_form
def test_every_combination_of_parts(ranks, world_size, form):
    check(on_ranks(ranks, world_size, run_cases, form, EVERY_PART), EVERY_PART, world_size)


@each_world
@each_form
def test_the_shapes_of_real_layers(ranks, world_size, form):
    check(on_ranks(ranks, world_size, run_cases, form, SHAPES), SHAPES, world_size)


@each_world
@each_form
def test_two_halves_share_nothing(ranks, world_size, form):
    case = Case((EMBED, *LAYERS["gemma"], Sum(rows=(2, 3))), rows=9, offset=1.0)
    for halves in on_ranks(ranks, world_size, two_halves_in_turn, form, case):
        for half in halves:
            for ours, wanted in zip(half, expected(case, world_size), strict=True):
                torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


@each_world
@each_form
def test_gather_joins_ragged_columns(ranks, world_size, form):
    for result in on_ranks(ranks, world_size, gathered, form):
        for joined, (rows, columns) in zip(result, ((1, 259), (5, 3), (0, 8)), strict=True):
            assert joined.equal(drawn("logits", 0, torch.float32, rows, columns))


def sent_bytes(form: str, rows: int, kept: tuple[int, ...]) -> int:
    """What this rank sends for a half's first sum, and one that keeps `kept` rows."""
    communicator = open_communicator(torch.float32)
    channel = communicator.open(rows, 0, InlineLane(), form, SMS)
    for request in requests(Case((EMBED, Sum(rows=kept)), rows), communicator.rank):
        give_back(channel, request)
    return channel.sent_bytes


@each_form
def test_rows_that_drop_out_are_not_sent(ranks, form):
    row_bytes = HIDDEN * 4
    for kept in ((), (0,), (1, 5, 7)):
        total = sum(ranks(2).run(sent_bytes, form, 8, kept))
        assert total == 2 * row_bytes * (8 + len(kept))  # W = 2: each row crosses the wire twice


# -- who owns which rows ----------------------------------------------------------------------------------------------


def test_slice_of():
    rows = (0, 3, 4, 9)
    assert slice_of(rows, range(0, 4)) == slice(0, 2)
    assert slice_of(rows, range(4, 9)) == slice(2, 3)
    assert slice_of(rows, range(5, 9)) == slice(3, 3)
    assert slice_of((), range(0, 4)) == slice(0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7, 10])
def test_surviving_rows_stay_with_their_owners(world_size, count):
    owners = shards(10, world_size)
    for rows in itertools.combinations(range(10), count):
        left = surviving(owners, rows)
        assert [i for owned in left for i in owned] == list(range(count))  # contiguous, and every row has one owner
        for before, after in zip(owners, left, strict=True):
            assert all(rows[i] in before for i in after)


def test_surviving_twice():
    """A second cut counts rows as the first has left them."""
    left = surviving(shards(10, 3), (1, 4, 5, 9))  # owners 0-3, 4-6, 7-9
    assert left == [range(0, 1), range(1, 3), range(3, 4)]
    assert surviving(left, (2, 3)) == [range(0, 0), range(0, 1), range(1, 2)]
