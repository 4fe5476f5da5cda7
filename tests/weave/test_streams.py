"""The comm lane as a stream: what orders the two streams is in the code, and no event or wait can be left out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.capture import captured_runner
from tests.weave.steps import SCENES, play, scene_runner
from tests.weave.streams import (
    FakeStreams,
    Mark,
    Note,
    earliest,
    hazards,
    is_joined,
    latest,
    marks,
    run_again,
    without,
)
from tokenweave.engine.capturer import CudaCapturer
from tokenweave.engine.runner import Runner
from tokenweave.models.layers import linear
from tokenweave.weave.lanes import open_lane
from tokenweave.weave.streams import COMM, COMPUTE, StreamLane
from tokenweave.weave.weave import weave

FORMS = ("reference", "sharded")
CALLS = 4  # a job's: an event behind the partial, comm's wait for it, an event behind the sum, compute's wait for it


@pytest.fixture
def on_ranks(ranks: Any):
    """on_ranks(world_size, fn, *args) -> each rank's result; one rank is this process."""
    return lambda world_size, fn, *args: [fn(*args)] if world_size == 1 else ranks(world_size).run(fn, *args)


def noted(runner: Runner, scene: str, form: str) -> tuple[FakeStreams, list[torch.Tensor]]:
    """The notes of a scene's steps, and their logits."""
    streams = FakeStreams()
    runner.lane = StreamLane(streams, (streams,))
    with torch.inference_mode(), streams:
        logits = play(runner, SCENES[scene], form)
    return streams, logits


def name_of(mark: Mark, streams: FakeStreams) -> str:
    job = streams.jobs[mark.event.job]
    what = f"{mark.stream}'s wait" if mark.waits else f"an event on {mark.stream}"
    return f"{what} for the {job.kind} of half {job.half} at {job.site} ({job.rows} rows)"


def unneeded(folder: Path, scene: str, form: str) -> tuple[list[str], list[str], int]:
    """On a rank: the hazards of a scene; events and waits without which there are none either; how many all are."""
    # In bf16 the logits are read as they are widened; in fp32 nobody reads the first half's before the next wait.
    with scene_runner(folder, "bfloat16") as runner:
        streams, logits = noted(runner, scene, form)
        listed = marks(streams.notes)
    assert all(step.isfinite().all() for step in logits)
    rows = [streams.jobs[mark.event.job].rows for mark in listed]
    idle = [i for i in range(len(listed)) if rows[i] and not hazards(without(streams.notes, i))]
    assert len(listed) == CALLS * len(streams.jobs)
    return [str(one) for one in hazards(streams.notes)], [name_of(listed[i], streams) for i in idle], len(listed)


@pytest.mark.parametrize(
    ("world_size", "scene"), [(1, "prefill"), (1, "cut in a sequence"), (1, "decode"), (1, "mixed"), (2, "mixed")]
)
@pytest.mark.parametrize("form", FORMS)
def test_no_event_or_wait_can_be_left_out(on_ranks, checkpoint, world_size, scene, form):
    for found, idle, count in on_ranks(world_size, unneeded, checkpoint("llama"), scene, form):
        assert found == []
        assert idle == []
        assert count >= CALLS * 16


@pytest.mark.parametrize("architecture", ["olmo2", "gemma2", "llama_bias", "qwen3_moe"])
def test_streams_of_other_models(checkpoint, architecture):
    """A gather inside attention, norms before the residual, biases, experts: none needs a line in the lane."""
    for form in FORMS:
        with scene_runner(checkpoint(architecture), "bfloat16") as runner:
            streams, _ = noted(runner, "cut in a chunk", form)
        assert [str(one) for one in hazards(streams.notes)] == []


def test_a_job_waits_for_its_partial_and_for_nothing_later(checkpoint):
    """Between a job's event on compute and its own operators comm waits once; what compute queues after it can run
    beside the job."""
    with scene_runner(checkpoint("llama")) as runner:
        streams, _ = noted(runner, "prefill", "sharded")
    waits = [mark for mark in marks(streams.notes) if mark.waits and mark.stream == COMM]
    assert [mark.event.job for mark in waits] == list(range(len(streams.jobs)))
    beside = [note for note in streams.notes if note.stream == COMPUTE and not isinstance(note, Mark)]
    assert len(beside) > 100


@pytest.mark.parametrize("scene", ["prefill", "decode", "cut in a chunk"])
@pytest.mark.parametrize("form", FORMS)
def test_comm_forks_from_compute_and_joins_it_again(checkpoint, form, scene):
    """So that both streams fit into one graph."""
    with scene_runner(checkpoint("llama")) as runner:
        streams, _ = noted(runner, scene, form)
    first = next(note for note in streams.notes if note.stream == COMM)
    assert isinstance(first, Mark)
    assert first.waits
    assert is_joined(streams.notes)
    last = max(i for i, mark in enumerate(marks(streams.notes)) if mark.waits and mark.stream == COMPUTE)
    assert not is_joined(without(streams.notes, last))


def test_a_job_that_fails_is_joined(checkpoint):
    """Or CUDA's error at the end of a capture, that comm never came back, would take the place of the job's own."""

    def fail() -> None:
        torch.ones(3)
        raise torch.OutOfMemoryError("no memory")

    with FakeStreams() as streams, pytest.raises(torch.OutOfMemoryError, match="no memory"):
        StreamLane(streams, (streams,)).submit(fail)
    assert is_joined(streams.notes)


def test_captured_steps_are_in_order(checkpoint):
    """Padded, on fixed memory, and again as they are launched."""
    for scene in ("mixed", "decode", "cut in a chunk"):
        with scene_runner(checkpoint("llama"), "bfloat16") as runner, captured_runner(runner) as capturer:
            with torch.inference_mode():
                play(runner, SCENES[scene], "sharded")
                with capturer.streams:
                    play(runner, SCENES[scene], "sharded")
            assert capturer.replays >= capturer.captures > 0
            assert [str(one) for one in hazards(capturer.streams.notes)] == []


# -- other orders ------------------------------------------------------------------------------------------------------


def shuffled(seed: int):
    draw = random.Random(seed)
    return draw.choice


ORDERS = {"earliest": earliest, "latest": latest, **{f"seed {seed}": shuffled(seed) for seed in range(3)}}


def logits_again(runner: Runner, notes: list[Note], logits: list[torch.Tensor], order: Any) -> list[torch.Tensor]:
    """What the same operators give in another order, from memory that holds nothing of the first time."""
    poison(runner, logits)
    run_again(notes, order)
    return [step.clone() for step in logits]


def poison(runner: Runner, logits: list[torch.Tensor]) -> None:
    for tensor in (runner.storage, *logits, *(half.partial for half in runner.communicator._halves)):
        tensor.fill_(float("nan"))
    for half in runner.communicator._halves:
        half.hidden.fill_(float("nan"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scene", ["mixed", "cut in a chunk"])
@torch.inference_mode()
def test_logits_do_not_depend_on_how_streams_run(checkpoint, form, scene):
    with scene_runner(checkpoint("llama")) as runner:
        streams, logits = noted(runner, scene, form)
        expected = [step.clone() for step in logits]
        for name, order in ORDERS.items():
            again = logits_again(runner, streams.notes, logits, order)
            assert all(map(torch.equal, again, expected)), name


@pytest.mark.parametrize(("stream", "order"), [(COMPUTE, latest), (COMM, earliest)])
@torch.inference_mode()
def test_a_missing_wait_shows_in_some_order(checkpoint, stream, order):
    """The test above can fail: without compute's wait for a sum where comm is late, and without comm's wait for a
    partial where comm is early."""
    with scene_runner(checkpoint("llama")) as runner:
        streams, logits = noted(runner, "prefill", "reference")
        expected = [step.clone() for step in logits]
        listed = marks(streams.notes)
        jobs = [i for i, job in enumerate(streams.jobs) if job.site == "mlp"]
        missing = [
            i for i, mark in enumerate(listed) if mark.waits and mark.stream == stream and mark.event.job in jobs
        ]
        changed = []
        for number in missing[:4]:
            again = logits_again(runner, without(streams.notes, number), logits, order)
            changed.append(not all(map(torch.equal, again, expected)))
        assert all(changed)


# -- on a GPU ----------------------------------------------------------------------------------------------------------

SLEEP_CYCLES = 20_000_000  # some ten milliseconds


class Slow:
    """A request whose sum comes long after it was asked for."""

    def __init__(self, partial: torch.Tensor, out: torch.Tensor):
        self.partial, self.out = partial, out

    def submit(self, lane: Any) -> Any:
        def run() -> torch.Tensor:
            torch.cuda._sleep(SLEEP_CYCLES)
            return self.out.copy_(self.partial).mul_(2.0)

        return lane.submit(run)


def slow_strand(start: torch.Tensor, partial: torch.Tensor, out: torch.Tensor, steps: int) -> Any:
    """start * 3^steps: each step doubles on comm, and adds what it had on compute."""
    partial.copy_(start)
    for _ in range(steps):
        doubled = yield Slow(partial, out)
        partial.add_(doubled)
    return partial.clone()


def slow_weave(starts: list[torch.Tensor], buffers: list[torch.Tensor], lane: Any) -> list[torch.Tensor]:
    strands = [slow_strand(start, *buffers[2 * i : 2 * i + 2], steps=3) for i, start in enumerate(starts)]
    return weave(strands, [lane] * len(strands))


@pytest.mark.gpu
def test_streams_of_a_gpu_wait_for_each_other():
    lane, device = open_lane(torch.device("cuda"), 60.0), torch.device("cuda")
    starts = [torch.full((1 << 20,), value, device=device) for value in (1.0, 5.0)]
    buffers = [torch.zeros(1 << 20, device=device) for _ in range(4)]
    for _ in range(3):
        results = slow_weave(starts, buffers, lane)
        assert [float(result.min()) for result in results] == [27.0, 135.0]
        assert [float(result.max()) for result in results] == [27.0, 135.0]
    lane.close()


@pytest.mark.gpu
def test_both_streams_are_in_one_graph():
    """Captured as fork and join: launched again, it reads what its inputs hold by then."""
    lane, device = open_lane(torch.device("cuda"), 60.0), torch.device("cuda")
    starts = [torch.full((1 << 20,), value, device=device) for value in (1.0, 5.0)]
    buffers = [torch.zeros(1 << 20, device=device) for _ in range(4)]
    results = [torch.zeros(1 << 20, device=device) for _ in range(2)]

    def run() -> None:
        for result, got in zip(results, slow_weave(starts, buffers, lane), strict=True):
            result.copy_(got)

    run()
    torch.cuda.synchronize()
    replay = CudaCapturer(device).capture(run)
    for value in (2.0, 7.0):
        starts[0].fill_(value)
        replay()
        assert [(float(result.min()), float(result.max())) for result in results] == [(27 * value,) * 2, (135.0,) * 2]
    lane.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gemm_writes_where_the_partial_is_to_be(dtype):
    """Nothing is staged: no memory but the buffer is written, and none is allocated that holds a copy."""
    buffer = torch.zeros(300, 512, dtype=dtype, device="cuda")
    x, weight = torch.randn(200, 256, dtype=dtype, device="cuda"), torch.randn(512, 256, dtype=dtype, device="cuda")
    linear(x, weight, out=buffer[:200])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear(x, weight, out=buffer[:200])
    assert out.data_ptr() == buffer.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < out.nbytes
    torch.testing.assert_close(out, x @ weight.t())
    assert not buffer[200:].any()
