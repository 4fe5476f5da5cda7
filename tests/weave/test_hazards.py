"""The hazard checker: silent on clean steps of every kind, and loud about each planted fault."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.weave.faults import (
    hidden_is_partial,
    hidden_is_the_other_partial,
    shared_buffers,
    without_submit_edge,
    without_wait,
)
from tests.weave.steps import SCENES, batches, play, scene_runner
from tokenweave.weave.accesses import AccessMode, ByteRange, byte_range, c10d_writes
from tokenweave.weave.conflicts import Access, Clocks, find_hazards
from tokenweave.weave.hazards import HazardRecorder
from tokenweave.weave.lanes import InlineLane, ThreadLane
from tokenweave.weave.plan import Plan
from tokenweave.weave.weave import weave

FORMS = ("reference", "sharded")
JOBS = 2 * (1 + 3 * 2 + 1)  # of a step: two halves, each with an embedding, three layers and a head
BUFFER_FAULTS = {fault.__name__: fault for fault in (shared_buffers, hidden_is_partial, hidden_is_the_other_partial)}


@pytest.fixture
def on_ranks(ranks: Any) -> Callable[..., list[Any]]:
    """on_ranks(world_size, fn, *args) -> each rank's result; one rank is this process."""
    return lambda world_size, fn, *args: [fn(*args)] if world_size == 1 else ranks(world_size).run(fn, *args)


# -- clean steps ------------------------------------------------------------------------------------------------------


def hazards_of_scenes(folder: Path, form: str, woven: bool, scenes: list[str]) -> dict[str, list[str]]:
    """On a rank: what is wrong with each scene."""
    recorder, wrong = HazardRecorder(), {}
    with scene_runner(folder, observers=(recorder,)) as runner:
        for name in scenes:
            with recorder:
                logits = play(runner, SCENES[name], form, woven)
            wrong[name] = [str(hazard) for hazard in recorder.check()]
            wrong[name] += [f"step {i} is not finite" for i, step in enumerate(logits) if not step.isfinite().all()]
            rows = sum(wanted for _, _, wanted in SCENES[name].sequences)
            assert len(logits[-1]) == rows
            assert recorder.accesses
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("form", "woven"), [("reference", True), ("sharded", True), ("sharded", False)])
def test_clean_steps_of_every_kind(on_ranks, checkpoint, world_size, form, woven):
    results = on_ranks(world_size, hazards_of_scenes, checkpoint("llama"), form, woven, list(SCENES))
    assert results == [{name: [] for name in SCENES}] * world_size


@pytest.mark.parametrize("architecture", ["olmo2", "gemma2", "qwen3_moe", "llama_bias", "mistral"])
def test_clean_steps_of_other_models(on_ranks, checkpoint, architecture):
    """A gather inside attention, norms before the residual, experts, biases, a window: none needs a line here."""
    scenes = ["mixed", "cut in a chunk"]
    for form in FORMS:
        results = on_ranks(2, hazards_of_scenes, checkpoint(architecture), form, True, scenes)
        assert results == [{name: [] for name in scenes}] * 2


def test_fewer_rows_than_ranks(on_ranks, checkpoint):
    scenes = ["odd rows", "a row each", "one row first", "a half without logits"]
    results = on_ranks(4, hazards_of_scenes, checkpoint("llama"), "sharded", True, scenes)
    assert results == [{name: [] for name in scenes}] * 4


# -- planted faults ---------------------------------------------------------------------------------------------------


def hazards_without(folder: Path, form: str, scene: str, missing: Any) -> list[tuple[str, int, int]]:
    """On a rank: (job, its rows, hazards) for every job of the scene's step, with `missing(job's number)` planted."""
    recorder, found = HazardRecorder(), []
    # In bf16 the logits are read as they are widened; in fp32 nobody reads the first half's before the next wait.
    with scene_runner(folder, "bfloat16", (recorder,)) as runner:
        play(runner, SCENES[scene], form)
        step = batches(SCENES[scene])[-1]
        for number in range(JOBS):
            with missing(number) as jobs, recorder:
                runner.forward(step, Plan(step.rows, SCENES[scene].cut, form))
            assert len(jobs) == JOBS
            job = jobs[number]
            found.append((f"{number}: {job.kind} of half {job.half} at {job.site}", job.rows, len(recorder.check())))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scene", ["prefill", "decode", "mixed", "cut in a sequence"])
def test_every_wait_counts(on_ranks, checkpoint, world_size, form, scene):
    for found in on_ranks(world_size, hazards_without, checkpoint("llama"), form, scene, without_wait):
        assert [job for job, rows, hazards in found if (hazards > 0) != (rows > 0)] == []


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scene", ["prefill", "mixed"])
def test_every_submit_counts(on_ranks, checkpoint, world_size, form, scene):
    for found in on_ranks(world_size, hazards_without, checkpoint("llama"), form, scene, without_submit_edge):
        assert [job for job, rows, hazards in found if rows and not hazards] == []


def hazards_with_buffers(folder: Path, fault: str, form: str, woven: bool, scenes: list[str]) -> dict[str, list[str]]:
    recorder, found = HazardRecorder(), {}
    with scene_runner(folder, observers=(recorder,)) as runner:
        for name in scenes:
            with BUFFER_FAULTS[fault](runner), recorder:
                play(runner, SCENES[name], form, woven)
            found[name] = [str(hazard) for hazard in recorder.check()]
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "form", "woven"),
    [
        ("shared_buffers", "reference", True),
        ("shared_buffers", "sharded", True),
        ("hidden_is_partial", "sharded", True),
        ("hidden_is_partial", "sharded", False),
        ("hidden_is_the_other_partial", "sharded", True),
    ],
)
def test_buffers_that_alias(on_ranks, checkpoint, world_size, fault, form, woven):
    scenes = ["prefill", "chunked prefill", "decode", "mixed", "cut in a sequence", "a row each", "no logits at all"]
    for found in on_ranks(world_size, hazards_with_buffers, checkpoint("llama"), fault, form, woven, scenes):
        assert [name for name in scenes if not found[name]] == []


def test_a_report_names_both_accesses(checkpoint):
    found = hazards_with_buffers(checkpoint("llama"), "shared_buffers", "reference", True, ["prefill"])["prefill"]
    writers = ("aten.mm.out", "aten.copy_")  # of a partial: torch's product, or a copy of oneDNN's
    report = next(line for line in found if any(name in line for name in writers) and "at attn)" in line)
    assert "\n" not in report
    for words in ("on the compute lane (", "on the comm lane (sum of half ", "writes bytes 0-", "reads bytes 0-"):
        assert words in report


# -- the recorder, on strands of a few lines ------------------------------------------------------------------------


class Sum:
    """A request whose sum is one operator on a buffer of the test's."""

    def __init__(self, run: Callable[[], Any], half: int = 0, site: str = "sum"):
        self.run, self.half, self.site = run, half, site

    def submit(self, lane: Any) -> Any:
        return lane.submit(self.run, half=self.half, site=self.site)


def hazards_of(*strands: Any, lane: str = "thread") -> list[str]:
    recorder = HazardRecorder()
    open_lane = ThreadLane(30.0, (recorder,)) if lane == "thread" else InlineLane((recorder,))
    with recorder:
        weave(strands, [open_lane] * len(strands))
    open_lane.close()
    return [str(hazard) for hazard in recorder.check()]


@pytest.mark.parametrize("lane", ["thread", "inline"])
def test_a_result_that_its_own_strand_overwrites(lane):
    """A write to what is only lent shows in line too, where nothing else could come between."""
    hidden, partial = torch.zeros(4), torch.zeros(4)

    def fill() -> torch.Tensor:
        return hidden.copy_(partial)

    def strand(writes: bool) -> Any:
        for _ in range(3):
            lent = yield Sum(fill)
            partial.copy_(lent)
            if writes:
                lent.add_(1.0)

    assert hazards_of(strand(writes=False), lane=lane) == []
    for hazard in hazards_of(strand(writes=True), lane=lane):
        assert "loan on the half 0 loan lane (sum at sum) reads" in hazard
        assert "aten.add_.Tensor on the compute lane (half 0 after sum) writes" in hazard
    assert len(hazards_of(strand(writes=True), lane=lane)) == 3


def test_a_result_used_after_the_next_request():
    """By then the other half's sum may be writing there."""
    hidden = torch.zeros(4)

    def fill() -> torch.Tensor:
        return hidden.add_(1.0)

    def late() -> Any:
        lent = yield Sum(fill, 0, "first")
        yield Sum(lambda: None, 0, "second")
        lent.sum()

    def other() -> Any:
        yield Sum(lambda: None, 1, "first")
        yield Sum(fill, 1, "second")

    assert hazards_of(late()) == []
    assert "aten.sum.default on the compute lane (half 0 after second) reads" in hazards_of(late(), other())[0]


def test_a_partial_written_while_it_is_summed():
    partial = torch.zeros(4)

    def polite(half: int) -> Any:
        torch.add(partial, 1.0)
        yield Sum(lambda: partial.sum(), half)

    def rude(half: int) -> Any:
        partial.add_(1.0)
        yield Sum(lambda: partial.sum(), half)

    assert hazards_of(polite(0), polite(1)) == []
    (hazard,) = hazards_of(polite(0), rude(1))
    assert "aten.sum.default on the comm lane (sum of half 0 at sum) reads bytes 0-16" in hazard
    assert "aten.add_.Tensor on the compute lane (start of the step) writes bytes 0-16" in hazard


def test_jobs_that_are_alike_are_not_taken_for_one_another():
    partial, first = torch.zeros(4), threading.Event()
    recorder = HazardRecorder()
    lane = ThreadLane(30.0, (recorder,))

    def read() -> torch.Tensor:
        first.wait(30)
        return partial.sum()

    with recorder:
        early = lane.submit(read)
        partial.add_(1.0)
        late = lane.submit(read)
        first.set()
        early.wait(), late.wait()
    lane.close()
    (hazard,) = recorder.check()
    assert {hazard.first.op, hazard.second.op} == {"aten.sum.default", "aten.add_.Tensor"}


def test_neighbours_are_no_conflict():
    """Halves may lie in one storage, side by side."""
    storage = torch.zeros(8)

    def strand(half: int) -> Any:
        mine = storage[4 * half : 4 * half + 4]
        for _ in range(3):
            mine.add_(1.0)
            yield Sum(lambda: mine.mul_(2.0).clone(), half)

    assert hazards_of(strand(0), strand(1)) == []


def test_kernels_declare_what_they_touch():
    recorder = HazardRecorder()
    partial = torch.zeros(4)
    lane = ThreadLane(30.0, (recorder,))
    with recorder:
        pending = lane.submit(lambda: recorder.touches([partial], []), half=1, site="mlp")
        recorder.touches([], [partial[2:]])
        pending.wait()
        recorder.touches([], [partial])
    lane.close()
    (hazard,) = map(str, recorder.check())
    assert "kernel on the comm lane (sum of half 1 at mlp) reads bytes 0-16" in hazard
    assert "kernel on the compute lane (start of the step) writes bytes 8-16" in hazard


def test_memory_is_kept_so_that_no_address_means_two_things():
    recorder = HazardRecorder()
    lane = ThreadLane(30.0, (recorder,))

    def strand() -> Any:
        for _ in range(50):
            torch.ones(1000)  # dropped at once: the allocator would hand the same bytes to the job
            yield Sum(lambda: torch.ones(1000).sum())

    with recorder:
        weave([strand(), strand()], [lane, lane])
    lane.close()
    assert recorder.check() == []
    written = [a.bytes.storage for a in recorder.accesses if a.op == "aten.ones.default" and a.write]
    assert len(set(written)) == len(written) == 200


def test_nothing_is_recorded_outside():
    recorder = HazardRecorder()
    lane = ThreadLane(30.0, (recorder,))
    lane.submit(lambda: torch.ones(4)).wait()
    with recorder:
        torch.ones(4)
    lane.submit(lambda: recorder.touches([torch.ones(4)], [])).wait()
    lane.close()
    assert [access.op for access in recorder.accesses] == ["aten.ones.default"]
    with recorder:
        pass
    assert recorder.accesses == []


@pytest.mark.parametrize("lane", ["thread", "inline"])
def test_a_failing_job_leaves_nothing_behind(lane):
    def strand() -> Any:
        yield Sum(lambda: torch.ones(2) @ torch.ones(3))

    with pytest.raises(RuntimeError, match="size"):
        hazards_of(strand(), lane=lane)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


# -- what operators touch ---------------------------------------------------------------------------------------------


def touched(run: Callable[..., Any], *tensors: torch.Tensor) -> tuple[set[int], set[int], int]:
    """(which of `tensors` are read, which written, how many other tensors are written) by run(*tensors)."""
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    with torch.inference_mode(), AccessMode(lambda op, reads, writes: seen.append((reads, writes))):
        run(*tensors)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    reads, writes = ([t.untyped_storage().data_ptr() for pair in seen for t in pair[side]] for side in (0, 1))
    fresh = [address for address in writes if address not in addresses]
    return (
        {addresses.index(r) for r in reads if r in addresses},
        {addresses.index(w) for w in writes if w in addresses},
        len(fresh),
    )


@pytest.mark.parametrize(
    ("name", "run", "reads", "writes", "fresh"),
    [
        ("out of place", lambda a, b: a + b, {0, 1}, set(), 1),
        ("in place", lambda a, b: a.add_(b), {1}, {0}, 0),
        ("out=", lambda a, b: torch.mm(a, a, out=b), {0}, {1}, 0),
        ("views", lambda a, b: (a.t(), a[1:], a.view(-1), a.chunk(2), a.unsqueeze(0).expand(3, 4, 4)), set(), set(), 0),
        ("no copy needed", lambda a, b: (a.reshape(16), a.float(), a.contiguous(), a.flatten()), set(), set(), 0),
        ("a copy needed", lambda a, b: a.t().reshape(16), {0}, set(), 1),
        ("written through a view", lambda a, b: a[1:].copy_(b[1:]), {1}, {0}, 0),
        ("a list", lambda a, b: torch.cat([a, b]), {0, 1}, set(), 1),
        ("composite", lambda a, b: F.linear(a, b), {0, 1}, set(), 1),
        ("a shape", lambda a, b: (torch.empty_like(a), b.new_empty(3)), set(), set(), 2),
        ("index", lambda a, b: a.index_copy_(0, torch.arange(4), b), {1}, {0}, 1),
        ("select into", lambda a, b: torch.index_select(a, 0, torch.arange(4), out=b), {0}, {1}, 1),
        ("keyword", lambda a, b: torch.add(input=a, other=b, out=a), {0, 1}, {0}, 0),
    ],
)
def test_operators(name, run, reads, writes, fresh):
    assert touched(run, torch.ones(4, 4), torch.ones(4, 4)) == (reads, writes, fresh)


def c10d_accesses() -> list[tuple[str, list[int], list[int]]]:
    """On a rank: the collectives of a transport, and the numbers of bytes that each reads and writes."""
    import torch.distributed as dist

    seen: list[tuple[str, list[int], list[int]]] = []
    data, peer = torch.zeros(2, 4), 1 - dist.get_rank()
    with AccessMode(lambda op, reads, writes: seen.append((op, [t.nbytes for t in reads], [t.nbytes for t in writes]))):
        works = [dist.irecv(data[peer], peer), dist.isend(data[1 - peer], peer)]
        for work in works:
            work.wait()
        dist.all_reduce(data)
    return [(op, reads, writes) for op, reads, writes in seen if op.startswith("c10d")]


def test_collectives_are_seen(ranks):
    """c10d's schemas leave it open what is written; without the list, receives would count as reads."""
    expected = [
        ("c10d.recv_.default", [], [16]),
        ("c10d.send.default", [16], []),
        ("c10d.allreduce_.default", [], [32]),
    ]
    assert ranks(2).run(c10d_accesses) == [expected] * 2


def test_a_collective_that_is_not_listed():
    with pytest.raises(NotImplementedError, match=r"c10d.scatter_.default.*list it in .*C10D_WRITES"):
        c10d_writes(torch.ops.c10d.scatter_.default)


def test_byte_ranges():
    base = torch.zeros(4, 8)
    storage = base.untyped_storage().data_ptr()
    assert byte_range(base) == ByteRange(storage, 0, 128)
    assert byte_range(base[1:3]) == ByteRange(storage, 32, 96)
    assert byte_range(base[:, 2:4]) == ByteRange(storage, 8, 112)  # from its first element to its last
    assert byte_range(base.t()[3:5, ::2]) == ByteRange(storage, 12, 84)
    assert byte_range(base.half()[1, 1]).last - byte_range(base.half()[1, 1]).first == 2
    empty = byte_range(base[2:2])
    assert empty.first == empty.last
    assert byte_range(base[:2]).overlaps(byte_range(base[1:]))
    assert not byte_range(base[:2]).overlaps(byte_range(base[2:]))
    assert not byte_range(base).overlaps(byte_range(torch.zeros(4, 8)))


# -- clocks and conflicts ---------------------------------------------------------------------------------------------


def access(lane: str, clocks: Clocks, first: int = 0, last: int = 8, write: bool = True, storage: int = 1) -> Access:
    return Access(lane, "op", "here", ByteRange(storage, first, last), write, clocks.now(lane))


def test_order_is_passed_on():
    clocks = Clocks()
    one = access("a", clocks)
    clocks.merge("b", clocks.send("a"))
    clocks.merge("c", clocks.send("b"))
    other = access("c", clocks)
    assert find_hazards([one, other]) == []
    after_the_send = access("a", clocks)
    (hazard,) = find_hazards([one, after_the_send, other])
    assert hazard.first is after_the_send
    assert hazard.second is other


def test_reads_do_not_conflict():
    clocks = Clocks()
    reads = [access("a", clocks, write=False), access("b", clocks, write=False)]
    assert find_hazards(reads) == []
    assert len(find_hazards([reads[0], access("b", clocks)])) == 1


def before(one: Access, other: Access) -> bool:
    return other.clock.get(one.lane, 0) >= one.epoch


@pytest.mark.parametrize("seed", range(20))
def test_against_every_pair(seed):
    """The search by windows finds what comparing every pair finds, on random histories of three lanes."""
    draw, clocks, accesses = random.Random(seed), Clocks(), []
    for _ in range(150):
        lane, other = draw.sample(["a", "b", "c"], 2)
        if draw.random() < 0.25:
            clocks.merge(other, clocks.send(lane))
        first = draw.randrange(20)
        accesses.append(
            access(lane, clocks, first, first + draw.randrange(1, 6), draw.random() < 0.4, draw.randrange(3))
        )
    expected = {
        frozenset((i, j))
        for i, one in enumerate(accesses)
        for j, other in enumerate(accesses[:i])
        if one.lane != other.lane and one.bytes.overlaps(other.bytes) and (one.write or other.write)
        if not before(one, other) and not before(other, one)
    }
    number = {id(access): i for i, access in enumerate(accesses)}
    hazards = find_hazards(accesses)
    found = {frozenset((number[id(hazard.first)], number[id(hazard.second)])) for hazard in hazards}
    assert found == expected
    assert len(hazards) == len(expected)
    assert expected
