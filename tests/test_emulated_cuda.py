"""The code for CUDA, whole, on a GPU that is emulated (tests/emulated): LLM(device="cuda") and all that is behind it.

What it gives is what the CPU's code gives, and nothing on the way is refused. Planted faults show that it would be.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import prompt_batch
from tests.emulated import cuda
from tests.emulated.cuda import emulated_gpu
from tests.ranks import RankPool
from tests.weave.streams import hazards
from tokenweave import LLM, SamplingParams
from tokenweave.engine import engine, fetch, packing
from tokenweave.models import layers
from tokenweave.weave import streams

pytest.importorskip("triton")

PROMPTS = prompt_batch(3, (3, 30, 1, 9, 12, 2))
OPTIONS = {"block_size": 4, "max_num_batched_tokens": 20, "max_model_len": 64, "enable_prefix_caching": False}
OPTIONS |= {"num_kv_blocks": 64, "progress": False, "timeout_s": 60.0}


def wanting(**more: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "temperature": 0.0} | more))


GREEDY = wanting()
MIXED = [
    wanting(min_tokens=5, logprobs=3),
    wanting(repetition_penalty=1.3),
    wanting(temperature=1.0, n=2, presence_penalty=0.5, frequency_penalty=0.5, seed=1),
    wanting(temperature=0.7, top_k=7, top_p=0.9, min_p=0.01, logprobs=0, seed=2),
    wanting(temperature=0.7, top_p=0.9, seed=3),
    wanting(temperature=1.2, seed=4, logprobs=2),
]
Params = SamplingParams | Sequence[SamplingParams]
Emulated = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    """emulated(world_size, fn, *args): fn's results on ranks where Triton's kernels can be interpreted."""
    pools: dict[int, RankPool] = {}

    def run(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:  # read when Triton is imported, and a pool may start anew
            patch.setenv("TRITON_INTERPRET", "1")
            return pools.setdefault(world_size, RankPool(world_size)).run(fn, *args)

    yield run
    for pool in pools.values():
        pool.close()


# -- the runtime -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """calls: what each generated. hazards: of all streams and graphs. streams: how many worked. left_bytes: of the
    GPU's memory, once the LLM is closed."""

    calls: list[Any]
    preemptions: int
    cached_tokens: int
    graphs: int
    streams: int
    hazards: list[str]
    left_bytes: int
    memory: str


def texts(outputs: Any) -> list[list[tuple[Any, ...]]]:
    """(token ids, text, why it ended, log-probabilities) of each completion."""
    return [[(one.token_ids, one.text, one.finish_reason, rounded(one.logprobs)) for one in o.outputs] for o in outputs]


def rounded(logprobs: Any) -> Any:
    """[{token: log-probability to 3 places}], or None"""
    return logprobs and [{token: round(float(one.logprob), 3) for token, one in each.items()} for each in logprobs]


def on_cpu(folder: Path, params: Params, options: Mapping[str, Any]) -> list[list[tuple[Any, ...]]]:
    with LLM(folder, device="cpu", **(OPTIONS | {"dtype": options.get("dtype", "auto")})) as llm:
        return texts(llm.generate(PROMPTS, params))


def on_gpu(folder: Path, params: Params, options: Mapping[str, Any], kernels: str = "torch") -> Made:
    """Three calls. In the last one everything is compiled and captured, so that no step may wait for the GPU."""
    with emulated_gpu(kernels=kernels) as gpu, nccl_over_gloo():
        gpu.queue.noting = True
        with LLM(folder, device="cuda", **{**OPTIONS, **options}) as llm:
            llm._runner.storage.fill_(float("nan"))
            outputs = [llm.generate(PROMPTS, params) for _ in range(2)]
            with steps_that_never_wait(gpu.queue):
                outputs.append(llm.generate(PROMPTS, params))
            memory = str(llm.memory)
        notes, gpu.queue.notes = (gpu.queue.notes, *gpu.queue.graphs), []
    found = [str(hazard) for part in notes for hazard in hazards(part)]
    graphs, gpu.queue.graphs = len(gpu.queue.graphs), []
    del notes
    gc.collect()
    metrics = [one.metrics for call in outputs for one in call]
    return Made(
        [texts(call) for call in outputs],
        sum(one.preemptions for one in metrics),
        sum(one.cached_tokens for one in metrics),
        graphs,
        len(gpu.queue.worked),
        found,
        gpu.memory.allocated_bytes,
        memory,
    )


@contextmanager
def steps_that_never_wait(queue: Any) -> Iterator[None]:
    """Inside, the host may wait for the GPU between steps alone, as torch.cuda.set_sync_debug_mode("error") has it."""
    run_step = engine.run_step

    def watched(*step: Any) -> Any:
        queue.sync_debug_mode = "error"
        try:
            return run_step(*step)
        finally:
            queue.sync_debug_mode = "default"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run_step", watched)
        yield


@contextmanager
def nccl_over_gloo() -> Iterator[None]:
    """Ranks that ask for NCCL get gloo."""
    new_group = dist.new_group

    def new(*args: Any, backend: str | None = None, **options: Any) -> Any:
        return new_group(*args, backend="gloo" if backend == "nccl" else backend, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new)
        yield


def agree(emulated: Emulated, world_size: int, folder: Path, params: Params, **options: Any) -> Made:
    """Three calls give what the CPU's code gives, nothing is unordered, and all memory comes back."""
    (wanted,) = emulated(1, on_cpu, folder, params, options)
    made = emulated(world_size, on_gpu, folder, params, options)
    for rank in made:
        assert rank.calls == [wanted] * 3
        assert rank.hazards == []
        assert rank.left_bytes == 0
        assert rank.streams == (2 if options.get("overlap") == "weave" else 1)
    return made[0]


@pytest.mark.parametrize(
    ("name", "params", "options"),
    [
        ("llama", MIXED, {"overlap": "weave"}),
        ("gemma2", GREEDY, {"overlap": "weave", "enforce_eager": True}),
        ("qwen3_moe", MIXED, {"enforce_eager": True}),
        ("olmo2", GREEDY, {"overlap": "fused", "async_scheduling": False}),
        ("llama_dynamic", GREEDY, {}),
    ],
)
def test_one_rank(emulated, checkpoint, name, params, options):
    made = agree(emulated, 1, checkpoint(name), params, **options)
    assert bool(made.graphs) == (name in ("llama", "olmo2"))


def test_two_ranks(emulated, checkpoint):
    """NCCL's communicator, over gloo."""
    agree(emulated, 2, checkpoint("llama"), GREEDY, overlap="weave", enforce_eager=True)


def test_preempted_and_cached(emulated, checkpoint):
    options = {"num_kv_blocks": 16, "enable_prefix_caching": True, "enforce_eager": True}
    made = agree(emulated, 1, checkpoint("qwen2_window"), wanting(max_tokens=8), **options)
    assert made.preemptions > 0
    assert made.cached_tokens > 0


def fill_memory(folder: Path) -> tuple[str, Made]:
    """Random weights in bf16, and a cache of as many blocks as memory has room for."""
    options = {"load_format": "dummy", "dtype": "bfloat16", "num_kv_blocks": None, "max_num_seqs": 8}
    return on_gpu(folder, wanting(max_tokens=2), options | {"gpu_memory_utilization": 0.1})


def test_memory_is_filled_and_comes_back(emulated, checkpoint):
    (made,) = emulated(1, fill_memory, checkpoint("mixtral"))
    assert made.calls[0] == made.calls[1] == made.calls[2]
    assert made.left_bytes == 0
    assert "KV cache" in made.memory


def fail_for_memory(folder: Path) -> list[str]:
    """What users are told, where there is too little for the weights, for the largest step, and in a step."""
    options = OPTIONS | {"enforce_eager": True}

    def run_out(total_bytes: int) -> None:
        with emulated_gpu(total_bytes, others_bytes=0) as gpu, LLM(folder, device="cuda", **options) as llm:
            gpu.memory.total_bytes = gpu.memory.allocated_bytes + 1000
            llm.generate(PROMPTS, GREEDY)

    return [what_it_raises(lambda size=size: run_out(size)) for size in (300 << 10, 550 << 10, 1 << 30)]


def test_out_of_memory_is_explained(emulated, checkpoint):
    (said,) = emulated(1, fail_for_memory, checkpoint("llama"))
    for answer, task in zip(said, ("the weights", "the largest step", "a step of 20 rows"), strict=True):
        assert f"Error: there is not enough GPU memory for {task} (" in answer


def use_it_all(folder: Path) -> list[Any]:
    """A stream, one that is broken off, a chat, and the command line."""
    from tokenweave.cli.entry import main

    with emulated_gpu():
        with LLM(folder, device="cuda", enforce_eager=True, **OPTIONS) as llm:
            streamed = [len(output.outputs[0].token_ids) for output in llm.generate("abc", GREEDY, stream=True)]
            broken = llm.generate("abc", GREEDY, stream=True)
            next(broken)
            chatted = llm.chat([{"role": "user", "content": "a"}], GREEDY)
        return [streamed, len(chatted), main(["generate", "--device", "cuda", "--enforce-eager", "12+34="])]


def test_streams_chats_and_the_command_line(emulated, checkpoint):
    assert emulated(1, use_it_all, checkpoint("llama")) == [[[1, 2, 3, 4, 5], 1, 0]]


def draw_a_timeline(folder: Path, path: Path) -> list[Any]:
    """What is in it: of both streams, in order of time, and nothing is captured meanwhile."""
    with emulated_gpu() as gpu, LLM(folder, device="cuda", overlap="weave", trace=str(path), **OPTIONS) as llm:
        llm.generate(PROMPTS, GREEDY)
        summary = llm.overlap_summary()
        assert summary is not None
        assert all(span.start_ns <= span.end_ns for span in llm.spans)
        return [{(span.lane, span.kind) for span in llm.spans}, summary.communication_s > 0, len(gpu.queue.graphs)]


def test_a_timeline_of_streams(emulated, checkpoint, tmp_path):
    ((seen, communicated, graphs),) = emulated(1, draw_a_timeline, checkpoint("llama"), tmp_path / "trace.json")
    assert seen == {("compute", "segment"), ("compute", "wait"), ("comm", "sum")}
    assert communicated
    assert graphs == 0
    assert (tmp_path / "trace.json").exists()
    assert (tmp_path / "trace.png").exists()


# -- planted faults ----------------------------------------------------------------------------------------------------


def index_on_the_host(patch: pytest.MonkeyPatch) -> None:
    unpack = packing.unpack

    def unpacked(*args: Any) -> Any:
        return [replace(half, logits_rows=half.logits_rows.cpu()) for half in unpack(*args)]

    patch.setattr(packing, "unpack", unpacked)


def pageable_copy(patch: pytest.MonkeyPatch) -> None:
    pack = packing.pack
    patch.setattr(packing, "pack", lambda halves, device: pack(halves, torch.device("cpu")))


def missing_device(patch: pytest.MonkeyPatch) -> None:
    empty = layers.Place.empty
    patch.setattr(layers.Place, "empty", lambda self, *shape: empty(replace(self, device=torch.device("cpu")), *shape))


def host_that_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fetch, "wait_until", lambda *_: None)


def look_at_a_step(patch: pytest.MonkeyPatch) -> None:
    sample = engine.sample

    def looking(logits: torch.Tensor, *args: Any) -> Any:
        assert logits.isfinite().all()
        return sample(logits, *args)

    patch.setattr(engine, "sample", looking)


def compute_that_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    wait = streams.CudaStreams.wait
    patch.setattr(streams.CudaStreams, "wait", lambda self, to, event: to == streams.COMM and wait(self, to, event))


def with_fault(plant: Callable[[pytest.MonkeyPatch], None], folder: Path, eager: bool) -> str:
    """What a run with the fault gives away."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        try:
            made = on_gpu(folder, wanting(max_tokens=2), {"overlap": "weave", "enforce_eager": eager})
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return f"{len(made.hazards)} hazards" if made.hazards else "nothing"


@pytest.mark.parametrize(
    ("plant", "eager", "said"),
    [
        (index_on_the_host, True, "at least two devices"),
        (pageable_copy, True, "not pinned"),
        (missing_device, True, "at least two devices|cpu tensor"),
        (host_that_does_not_wait, True, "Error"),
        (look_at_a_step, True, "synchronizing CUDA operation"),
        (compute_that_does_not_wait, True, "hazards"),
        (compute_that_does_not_wait, False, "unjoined work"),
    ],
)
def test_planted_faults_show(emulated, checkpoint, plant, eager, said):
    (answer,) = emulated(1, with_fault, plant, checkpoint("llama"), eager)
    assert re.search(said, answer), answer


# -- the emulation itself ----------------------------------------------------------------------------------------------


def run_both(folder: Path) -> None:
    options = OPTIONS | {"max_num_batched_tokens": 8, "max_num_seqs": 2, "enforce_eager": True}
    with emulated_gpu(kernels="both"), LLM(folder, device="cuda", **options) as llm:
        llm.generate([[1, 2, 3], [4]], [wanting(max_tokens=2), wanting(max_tokens=2, temperature=1.0, top_p=0.9)])


def test_kernels_in_torch_are_those_of_the_interpreter(emulated, checkpoint):
    """Every launch of a small model's steps: what is written, and where; and every access is in a tensor."""
    emulated(1, run_both, checkpoint("qwen3_moe"))


def refused() -> dict[str, str]:
    """What each of these raises."""
    with emulated_gpu(total_bytes=1 << 20, others_bytes=0):
        x, side = torch.arange(12.0, device="cuda").view(3, 4), torch.cuda.Stream()
        rows, graph = torch.tensor([1]), torch.cuda.CUDAGraph()

        def capture(run: Callable[[], Any]) -> None:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                run()

        def overwrite() -> None:
            host = torch.ones(4).pin_memory()
            x[0].copy_(host, non_blocking=True)
            host.zero_()
            torch.cuda.synchronize()

        attempts: dict[str, Callable[[], Any]] = {
            "index": lambda: x[rows],
            "index_select": lambda: x.index_select(0, rows),
            "index_put": lambda: x.index_put_((rows,), x[0]),
            "add": lambda: x + torch.ones(3, 4),
            "where": lambda: torch.where(x > 0, x, torch.zeros(3, 4)),
            "out": lambda: torch.mm(x, x.t(), out=torch.empty(3, 3)),
            "numpy": lambda: x.numpy(),
            "to the device": lambda: torch.ones(3).to("cuda", non_blocking=True),
            "to the host": lambda: torch.empty(3, 4).copy_(x, non_blocking=True),
            "another dtype": lambda: torch.ones(3).pin_memory().to("cuda", torch.float16, non_blocking=True),
            "generator": lambda: x.normal_(generator=torch.Generator()),
            "memory": lambda: torch.empty(1 << 20, device="cuda"),
            "overwritten": overwrite,
            "waiting capture": lambda: capture(lambda: x.sum().item()),
            "copying capture": lambda: capture(lambda: torch.tensor([1], device="cuda")),
            "unjoined capture": lambda: capture(lambda: side.wait_event(torch.cuda.current_stream().record_event())),
            "argument": lambda: torch.cuda.Event(timing=True),
        }
        return {name: what_it_raises(attempt) for name, attempt in attempts.items()}


def what_it_raises(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_a_gpu_refuses_is_refused(emulated):
    (said,) = emulated(1, refused)
    two = dict.fromkeys(("index", "index_select", "index_put", "add", "where", "out"), "at least two devices")
    waits = dict.fromkeys(
        ("to the device", "to the host", "another dtype"), "non_blocking=True that waits all the same"
    )
    captures = dict.fromkeys(("waiting capture", "copying capture"), "not permitted when stream is capturing")
    others = {
        "numpy": "not supported|can't convert",
        "generator": "Expected a 'cuda' device type",
        "memory": "OutOfMemoryError",
        "overwritten": "while it was being copied",
        "unjoined capture": "nothing",
        "argument": "TypeError",
    }
    expected = two | waits | captures | others
    assert {name: bool(re.search(expected[name], answer)) for name, answer in said.items()} == dict.fromkeys(said, True)


@pytest.mark.parametrize("kind", [cuda.Stream, cuda.Event, cuda.CUDAGraph])
def test_what_stands_in_takes_what_the_real_one_takes(kind):
    real = getattr(torch.cuda, kind.__name__)
    assert parameters(kind).items() <= parameters(real).items()
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            assert parameters(method).items() <= parameters(getattr(real, name)).items(), name


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Defaults by name."""
    every = inspect.signature(function).parameters
    return {name: one.default for name, one in every.items() if one.kind is not one.VAR_KEYWORD}
