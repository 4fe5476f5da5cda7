"""The fused kernel on one GPU, over peer pointers: W virtual ranks in one launch, on streams, and as processes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from perf.virtual import VirtualRanks
from tests.comm.test_channels import EMBED, HIDDEN, LAYERS, MAX_ROWS, Case, Sum, check, requests
from tests.kernels.twin import Outcome, Scenario, wrong
from tests.pairwise import pairwise
from tokenweave.comm.fused import FusedCommunicator, explain
from tokenweave.comm.group import PeerError, Ranks
from tokenweave.comm.symmetric import Layout
from tokenweave.comm.transport import GlooTransport, LocalTransport
from tokenweave.engine.communication import wire
from tokenweave.kernels.driver import DriverError
from tokenweave.kernels.fused import Geometry, Launch, Report, Variant
from tokenweave.weave.lanes import InlineLane, StreamLane
from tokenweave.weave.request import Norm, Reduce, Rows
from tokenweave.weave.streams import CudaStreams

pytestmark = pytest.mark.gpu

TIMEOUT_S = 20.0
MANY = 1000  # launches in a row
FLAGS = {
    "norm": {"norm": True},
    "residual": {"residual": True, "norm": True},
    "post-norm": {"post_norm": True, "norm": True, "bias": True, "keep": False},
    "gemma": {"post_norm": True, "residual": True, "norm": True},
    "olmo": {"post_norm": True, "residual": True},
    "last": {"residual": True, "listed": True, "norm": True, "keep": False},
    "gemma-last": {"residual": True, "listed": True, "bias": True, "post_norm": True, "norm": True},
}
AXES = {
    "world_size": (2, 4, 8),
    "hidden_size": (264, 2880, 8192, 16384),  # fewer vectors than threads, tails, many for each thread
    "sum": ("two_shot", "one_shot"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "flags": tuple(FLAGS),
    "rows": ("one", "few", "ragged", "many"),
    "blocks": ((1, 2, 1), (5, 3, 13)),  # of the launches on one signal pad: 13 x 8 ranks fit on a GPU of 108 SMs
}
CASES = pairwise(AXES, lambda case: case["rows"] != "many" or case["hidden_size"] < 8192)
SMALL = [
    {"world_size": 4, "hidden_size": 264, "sum": sum_by, "dtype": torch.bfloat16, "flags": flags}
    for sum_by, flags in (("two_shot", "residual"), ("two_shot", "gemma-last"), ("one_shot", "gemma-last"))
]
CHANNEL_CASES = [
    Case((EMBED, *LAYERS[name], Sum(post_norm=name == "gemma", rows=cut), LAYERS[name][1]), rows, dtype, offset)
    for name, dtype, offset in (("llama", torch.float32, 0.0), ("gemma", torch.bfloat16, 1.0))
    for rows, cut in [(1, (0,)), (3, None), (13, (3, 12)), (MAX_ROWS, (39,)), (33, ())]
]


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(", ", "+") for value in case.values())


def device() -> torch.device:
    return torch.device("cuda", 0)


# -- virtual ranks: one launch plays all of them ----------------------------------------------------------------------


def scenario_of(case: dict[str, Any], **words: Any) -> Scenario:
    world_size = case["world_size"]
    rows = {"one": 1, "few": world_size - 1, "ragged": 2 * world_size + 1, "many": 19 * world_size + 3}[case["rows"]]
    variant = Variant(case["dtype"], case["hidden_size"], world_size, case["sum"], **FLAGS[case["flags"]])
    if variant.listed:
        words |= {"residual_rows": 3 * rows, "listed": tuple(sorted(random.Random(rows).sample(range(3 * rows), rows)))}
    offset = 1.0 if variant.post_norm else 0.0  # as Gemma has it
    blocks = [[count] for count in case["blocks"]]
    return Scenario(variant, Geometry(32, 1), rows, blocks, offset=offset, post_offset=offset, **words)


class Played:
    """A scenario on virtual ranks. What the launches point to lives as long as this does."""

    def __init__(self, given: Scenario):
        self.given = given
        variant = given.variant
        one_shot = variant.sum == "one_shot"
        most = [given.rows, given.residual_rows] if one_shot else [len(o) for o in (*given.owners, *given.owned)]
        layout = Layout(given.rows, variant.hidden_size, variant.dtype)
        words = (device(), TIMEOUT_S, max(1, *most), not variant.listed)
        self.ranks = VirtualRanks(variant.world_size, layout, *words)
        self.vectors = [each.to(device()) for each in (given.weight, given.post_weight, given.bias)]
        self.listed = torch.tensor(given.listed or [0], dtype=torch.int32, device=device())
        self.partials = given.partials.to(device())
        self.launches = [self._launch(half) for half in range(given.channels)]
        for half in range(given.channels):
            self._give_residuals(half)
        torch.cuda.synchronize()

    def _launch(self, half: int) -> Launch:
        given, one_shot = self.given, self.given.variant.sum == "one_shot"
        launch = self.ranks.arguments(half, [owned.start for owned in given.owners] + [given.rows])
        for rank, owned in enumerate(given.owned):
            launch.first_residual[rank] = 0 if one_shot else owned.start
        launch.weight, launch.post_weight, launch.bias = (each.data_ptr() for each in self.vectors)
        launch.residual_rows = self.listed.data_ptr()
        launch.eps, launch.offset = given.eps, given.offset
        launch.post_eps, launch.post_offset = given.post_eps, given.post_offset
        return launch

    def _give_residuals(self, half: int) -> None:
        """Every rank its shard of the residual that comes in, or all of it in one shot."""
        given, residual = self.given, self.given.residuals[half].to(device())
        for rank, owned in enumerate(given.owned):
            part = residual if given.variant.sum == "one_shot" else residual[owned.start : owned.stop]
            self.ranks.residual_in[half, rank, : len(part)] = part

    def queue(self, half: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch on the current stream. Returns copies of all ranks' hidden states and residuals."""
        ranks, given = self.ranks, self.given
        ranks.partial[half].copy_(self.partials[half, number])
        ranks.hidden[half].fill_(torch.nan)
        ranks.launch(given.variant, self.launches[half], given.blocks[number][0])
        ranks.partial[half].fill_(torch.nan)  # as the next layer's GEMM will: nobody may still read it
        return ranks.hidden[half].clone(), ranks.residual_out[half].clone()

    def run(self) -> Outcome:
        """All launches, each half's on a stream of its own."""
        given = self.given
        streams = [torch.cuda.Stream() for _ in range(given.channels)]
        seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in streams]
        for number in range(given.launches):
            for half, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    seen[half].append(self.queue(half, number))
        torch.cuda.synchronize()
        return self.outcome([[(hidden.cpu(), residual.cpu()) for hidden, residual in each] for each in seen])

    def outcome(self, seen: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Outcome:
        given, ranks = self.given, range(self.given.variant.world_size)
        one_shot = given.variant.sum == "one_shot"
        kept = [given.rows if one_shot else len(given.owners[rank]) for rank in ranks]
        hidden = [[[each[0][rank] for each in half] for rank in ranks] for half in seen]
        residual = [[[each[1][rank, : kept[rank]] for each in half] for rank in ranks] for half in seen]
        return Outcome(hidden, residual, self.ranks.reported(), 0, "")


def problem(given: Scenario) -> str | None:
    played = Played(given)
    outcome = played.run()
    function = played.ranks.launcher._functions[given.variant]
    if function.local_bytes:
        return f"{function.local_bytes} bytes of local memory"
    return wrong(given, outcome)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_virtual_ranks_are_right_and_bitwise_equal(case):
    assert problem(scenario_of(case)) is None


@pytest.mark.parametrize("case", SMALL, ids=label)
def test_small_runs_for_sanitizers(case):
    assert problem(scenario_of({**case, "rows": "ragged", "blocks": (2, 1, 3)})) is None


@pytest.mark.parametrize("sum_by", ["two_shot", "one_shot"])
def test_both_halves_at_once(sum_by):
    case = {"world_size": 4, "hidden_size": 2880, "sum": sum_by, "dtype": torch.bfloat16, "flags": "residual"}
    given = scenario_of({**case, "rows": "many", "blocks": (2, 5, 3, 8, 1, 4)}, channels=2)
    assert problem(given) is None


def idempotent(world_size: int, sum_by: str, channels: int = 1) -> Scenario:
    """Launches whose results do not depend on those before, and differ from each other."""
    case = {"world_size": world_size, "hidden_size": 1032, "sum": sum_by, "dtype": torch.bfloat16, "flags": "norm"}
    return scenario_of({**case, "rows": "ragged", "blocks": (1, 2, 3, 5)}, channels=channels)


class Repeats:
    """Repeats a scenario's launches on the current stream, and counts values that are not what they were at first."""

    def __init__(self, given: Scenario):
        self.played = Played(given)
        outcome = self.played.run()
        assert wrong(given, outcome) is None
        self.expected = [
            [outcome.hidden[half][0][number].view(torch.int16).to(device()) for number in range(given.launches)]
            for half in range(given.channels)
        ]
        self.differing = torch.zeros(given.channels, dtype=torch.int64, device=device())

    def queue(self, half: int, number: int) -> None:
        hidden, _ = self.played.queue(half, number)
        self.differing[half] += (hidden.view(torch.int16) != self.expected[half][number]).sum()

    def check(self) -> None:
        torch.cuda.synchronize()
        assert [report.reason for report in self.played.ranks.reported()] == [0] * self.played.ranks.world_size
        assert self.differing.tolist() == [0] * len(self.differing)


@pytest.mark.parametrize(("world_size", "sum_by"), [(2, "one_shot"), (4, "two_shot"), (8, "two_shot")])
def test_a_thousand_launches_in_a_row(world_size, sum_by):
    repeats = Repeats(idempotent(world_size, sum_by))
    for i in range(MANY):
        repeats.queue(0, i % repeats.played.given.launches)
    repeats.check()


@pytest.mark.parametrize("sum_by", ["two_shot", "one_shot"])
def test_a_graph_with_both_halves_in_flight_replayed_a_thousand_times(sum_by):
    """Each half has a branch of the graph with four launches."""
    repeats = Repeats(idempotent(4, sum_by, channels=2))
    for half in range(2):
        repeats.queue(half, 0)  # what torch's own operations need is loaded before the capture
    repeats.check()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        first = torch.cuda.current_stream()
        other.wait_stream(first)
        for half, stream in enumerate((first, other)):
            with torch.cuda.stream(stream):
                for number in range(repeats.played.given.launches):
                    repeats.queue(half, number)
        first.wait_stream(other)
    for _ in range(MANY):
        graph.replay()
    repeats.check()


def test_a_launch_whose_blocks_do_not_all_fit_is_refused():
    played = Played(idempotent(8, "two_shot"))
    assert wrong(played.given, played.run()) is None
    variant, launcher = played.given.variant, played.ranks.launcher
    layout = launcher.geometry(variant)
    on_one = launcher._functions[variant].max_resident_blocks(layout.threads, layout.shared_bytes(variant))
    fitting = on_one * torch.cuda.get_device_properties(device()).multi_processor_count // 8
    with pytest.raises(DriverError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
        played.ranks.launch(variant, played.launches[0], fitting + 1)
    Repeats(played.given).check()  # nothing is broken


# -- ranks on streams: real communicators, one launch each ------------------------------------------------------------


def on_device(request: Reduce, lent: torch.Tensor) -> Reduce:
    """The same request, its partial in the buffer that the channel lends."""

    def moved(norm: Norm | None) -> Norm | None:
        return None if norm is None else replace(norm, weight=norm.weight.to(device()))

    lent.copy_(request.partial)
    rows = None if request.rows is None else Rows(request.rows.host, request.rows.index.to(device()))
    bias = None if request.bias is None else request.bias.to(device())
    return Reduce(lent, bias, moved(request.post_norm), moved(request.norm), rows)


class OnStreams:
    """W communicators in one process, each with a lane of its own."""

    def __init__(self, world_size: int, dtype: torch.dtype, one_shot_rows: int, timeout_s: float):
        layout = Layout(MAX_ROWS, HIDDEN, dtype)
        self.virtual = VirtualRanks(world_size, layout, device(), timeout_s, residual_rows=1)
        wirings = [replace(wiring, one_shot_rows=one_shot_rows) for wiring in self.virtual.wirings]
        self.communicators = [FusedCommunicator(LocalTransport(), wiring) for wiring in wirings]
        self.lanes = [StreamLane(CudaStreams(device())) for _ in wirings]

    def open(self, rows: int) -> list[Any]:
        pairs = zip(self.communicators, self.lanes, strict=True)
        return [communicator.open(rows, 0, lane, "fused", {"attn": 3, "mlp": 2}) for communicator, lane in pairs]

    def run(self, case: Case) -> list[list[torch.Tensor]]:
        """For each rank, the hidden states that each sum gives back."""
        channels, of_ranks = self.open(case.rows), [requests(case, rank) for rank in range(len(self.lanes))]
        results: list[list[torch.Tensor]] = [[] for _ in channels]
        for step in zip(*of_ranks, strict=True):
            moved = [on_device(each, channel.partial(len(each.partial))) for each, channel in zip(step, channels)]
            torch.cuda.synchronize()  # or a rank's launch waits for copies that queue behind another's
            pending = [each.submit(channel) for each, channel in zip(moved, channels)]
            for result, one in zip(results, pending):
                result.append(one.wait().data.clone())
        torch.cuda.synchronize()
        for communicator in self.communicators:
            communicator.check()
        return [[each.cpu() for each in result] for result in results]

    def warm_up(self, case: Case) -> None:
        """Variants are compiled and loaded at their first launch, while other ranks' launches may wait already."""
        launcher = self.virtual.launcher
        for sum_by in ("one_shot", "two_shot"):
            for variant in variants(case, self.communicators[0], sum_by):
                if variant not in launcher._functions:
                    launcher.load(variant)


def variants(case: Case, communicator: FusedCommunicator, sum_by: str) -> list[Variant]:
    """All that the sums of a case may need."""
    layout, world_size = communicator.wiring.layout, communicator.wiring.world_size
    found = []
    for step, one in enumerate(case.sums):
        flags = {"residual": step > 0, "listed": one.rows is not None and step > 0, "bias": one.bias}
        flags |= {"post_norm": one.post_norm, "norm": one.norm}
        found.append(Variant(layout.dtype, layout.hidden_size, world_size, sum_by, **flags))
    return found


@pytest.mark.parametrize(("world_size", "one_shot_rows"), [(2, 0), (4, 0), (4, 13)])
def test_ranks_on_streams_follow_the_maths(world_size, one_shot_rows):
    for dtype in (torch.float32, torch.bfloat16):
        cases = [case for case in CHANNEL_CASES if case.dtype == dtype]
        ranks = OnStreams(world_size, dtype, one_shot_rows, TIMEOUT_S)
        results = []
        for case in cases:
            ranks.warm_up(case)
            results.append(ranks.run(case))
        check([[of_case[rank] for of_case in results] for rank in range(world_size)], cases, world_size)


def test_a_dead_rank_is_reported_and_reset_starts_again():
    """Rank 3 of 4 stays away. If each launch behind that took the timeout, the test would outlast its own."""
    case = Case((EMBED, Sum()), rows=13)
    ranks = OnStreams(4, torch.float32, 0, timeout_s=1.0)
    ranks.warm_up(case)
    check([[each] for each in ranks.run(case)], [case], 4)
    queue_without_rank_3(ranks, case, MANY)
    torch.cuda.synchronize()
    for rank, communicator in enumerate(ranks.communicators[:3]):
        why = r"(3 did not arrive within 1 s|\d gave up, which waited for rank 3)"
        says = rf"rank {rank}, half 0, block \d+: rank {why}"
        for attempt in (communicator.check, lambda: communicator.open(1, 0, InlineLane(), "fused", {})):  # noqa: B023
            with pytest.raises(PeerError, match=says):
                attempt()
    told = [Report.from_buffer_copy(each.wiring.report.numpy().tobytes()) for each in ranks.communicators]
    assert any("did not arrive" in explain(report, 1.0) for report in told[:3])
    start_again(ranks, case)


def test_a_host_has_its_rank_give_up_and_reset_starts_again():
    """Long before the time of the kernels is over, and while they run."""
    case = Case((EMBED, Sum()), rows=13)
    ranks = OnStreams(4, torch.float32, 0, timeout_s=600.0)
    ranks.warm_up(case)
    check([[each] for each in ranks.run(case)], [case], 4)
    queue_without_rank_3(ranks, case, 20)  # no more than the driver queues: the host would wait
    ranks.communicators[0].abort("the call was given up")
    torch.cuda.synchronize()
    with pytest.raises(PeerError, match=r"told by its host to give up on rank 3 .*: the call was given up$"):
        ranks.communicators[0].check()
    for communicator in ranks.communicators[1:3]:
        with pytest.raises(PeerError, match=r": rank 0 gave up, which was told to by its host; look at"):
            communicator.check()
    start_again(ranks, case)


def queue_without_rank_3(ranks: OnStreams, case: Case, launches: int) -> None:
    channels = ranks.open(case.rows)[:3]
    for _ in range(launches):
        for rank, channel in enumerate(channels):
            channel.residual = None
            on_device(requests(case, rank)[0], channel.partial(case.rows)).submit(channel)


def start_again(ranks: OnStreams, case: Case) -> None:
    for communicator in ranks.communicators:
        communicator.reset(torch.cuda.synchronize)
    check([[each] for each in ranks.run(case)], [case], 4)


# -- ranks as processes: symmetric memory, all of it on one GPU -------------------------------------------------------


def open_process(dtype: torch.dtype, one_shot_rows: int, timeout_s: float) -> FusedCommunicator:
    """Collective, on ranks of a pool: what the engine wires, but that all ranks share one GPU."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(device())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, world_size, device(), timeout_s, dist.new_group(backend="gloo"), None)
    wiring = replace(wire("peer", ranks, Layout(MAX_ROWS, HIDDEN, dtype)), one_shot_rows=one_shot_rows)
    communicator = FusedCommunicator(GlooTransport(rank, world_size, None), wiring)
    ranks.gather(None)
    return communicator


def run_in_process(communicator: FusedCommunicator, lane: Any, case: Case) -> list[torch.Tensor]:
    channel = communicator.open(case.rows, 0, lane, "fused", {"attn": 3, "mlp": 2})
    results = []
    for request in requests(case, communicator.rank):
        lent = channel.partial(len(request.partial))
        results.append(on_device(request, lent).submit(channel).wait().data.clone())
        lent.fill_(torch.nan)
    torch.cuda.synchronize()
    communicator.check()
    return [each.cpu() for each in results]


def processes_follow_the_maths(one_shot_rows: int) -> list[list[torch.Tensor]]:
    communicators = {
        dtype: open_process(dtype, one_shot_rows, timeout_s=60.0) for dtype in (torch.float32, torch.bfloat16)
    }
    lanes = (InlineLane(), StreamLane(CudaStreams(device())))
    results = [run_in_process(communicators[case.dtype], lanes[i % 2], case) for i, case in enumerate(CHANNEL_CASES)]
    dist.barrier()  # nobody lets go of memory that another still reads
    return results


def processes_repeat(launches: int, replays: int) -> list[torch.Tensor]:
    """The same sum again and again, then as a graph, in place of its first result each time."""
    communicator = open_process(torch.float32, 0, timeout_s=60.0)
    request = requests(Case((EMBED,), MAX_ROWS), communicator.rank)[0]
    channel = communicator.open(MAX_ROWS, 0, InlineLane(), "fused", {"attn": 3})
    moved = on_device(request, channel.partial(MAX_ROWS))
    hidden = again(channel, moved)
    first = hidden.clone()
    for _ in range(launches):
        again(channel, moved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden.zero_()
        again(channel, moved)
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    communicator.check()
    dist.barrier()
    assert hidden.equal(first)
    return [hidden.cpu()]


def again(channel: Any, request: Reduce) -> torch.Tensor:
    channel.residual = None
    return request.submit(channel).wait().data


def processes_lose_one() -> list[str]:
    """The last rank stays away from the second sum; afterwards all start again."""
    communicator = open_process(torch.float32, 0, timeout_s=4.0)
    case, said = Case((EMBED, Sum()), rows=5), []
    run_in_process(communicator, InlineLane(), case)
    if communicator.rank < dist.get_world_size() - 1:
        for _ in range(2):
            with pytest.raises(PeerError) as caught:
                run_in_process(communicator, InlineLane(), case)
            said.append(str(caught.value))
    communicator.reset(dist.barrier)
    check([[run_in_process(communicator, InlineLane(), case)]], [case], dist.get_world_size())
    dist.barrier()
    return said


@pytest.mark.parametrize(("world_size", "one_shot_rows"), [(2, 13), (4, 0)])
def test_processes_on_one_gpu_follow_the_maths(ranks: Callable[[int], Any], world_size, one_shot_rows):
    results = ranks(world_size).run(processes_follow_the_maths, one_shot_rows)
    check(results, CHANNEL_CASES, world_size)


def test_processes_on_one_gpu_repeat_launches_and_a_graph(ranks: Callable[[int], Any]):
    results = ranks(2).run(processes_repeat, launches=200, replays=100)
    check([[each] for each in results], [Case((EMBED,), MAX_ROWS)], 2)


def test_processes_on_one_gpu_report_a_dead_one(ranks: Callable[[int], Any]):
    *others, dead = ranks(4).run(processes_lose_one)
    assert dead == []
    for rank, said in enumerate(others):
        assert len(said) == 2
        for text in said:
            assert text.startswith(f"rank {rank}, half 0, block ")
            assert "rank 3 did not arrive within 4 s" in text or "waited for rank 3" in text
