"""The stand-in for TP=8 on one GPU: one rank's true share of Llama-70B, a few layers; the wire is simulated.

Run by `python -m perf.gpu --only stand_in [--dry-run]`. The weave, the lanes, the plan, the GEMMs and the fused kernel
on its SMs are real. The kernel's loads and stores stay in this GPU's memory, and its blocks stay on their SMs until the
wire would be done by the cost model. So SM contention and overlap are real, and only the wire is not: every figure is
labelled so. On a CPU (dry run) sums sleep on a paced link instead.

Modes: off (all-reduce, then residual and norm of all rows), fused (one kernel), weave (two halves, planned by the cost
model), carved weave (the same, its GEMMs told to leave the sums' SMs free), nocomm (off without its all-reduce).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from perf.gpu.clock import in_turn
from perf.gpu.figure import Figure, spread
from perf.gpu.scale import TINY, Scale
from perf.gpu_timing import Contestant, interleaved_us
from perf.lone import LoneRanks, open_runner, prompt_batch
from perf.overlap.silent import SilentTransport
from perf.stand_in_kernel import CudaDevice, StandInKernels, StandInTransport, Wire
from tokenweave.comm.choice import Choice
from tokenweave.comm.communicator import Communicator
from tokenweave.comm.fused import FusedCommunicator, Wiring, report_memory
from tokenweave.comm.link import Link, PacedTransport
from tokenweave.comm.symmetric import Layout, SymmetricMemory
from tokenweave.config import EngineConfig
from tokenweave.cost.cost import Cost
from tokenweave.cost.machine import hardware_at_hand
from tokenweave.cost.planner import Planner
from tokenweave.engine.at_hand import cost_of, shape_of
from tokenweave.engine.batch import Batch
from tokenweave.engine.runner import Runner
from tokenweave.weave.plan import Plan

WORLD_SIZE = 8
GOAL_TOKENS, GOAL = 4096, 1.03
ROUNDS = 7
TIMEOUT_S = 20.0
LABEL = "stand-in: the wire is simulated"
WOVEN = ("weave", "carved weave")
MODES = ("off", "fused", *WOVEN, "nocomm")
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Sizes:
    shape: dict[str, Any]
    layers: int
    tokens: tuple[int, ...]
    rounds: int
    link: Link | None = None  # of the dry run


FULL_SIZES = Sizes(LLAMA_70B, 8, (1024, 2048, GOAL_TOKENS, 8192), ROUNDS)
DRY_SIZES = Sizes(SMALL, 2, (32, 64), 2, Link(1e9, 1e-4))


def measure(scale: Scale, say: Callable[[Figure], None]) -> None:
    sizes = DRY_SIZES if scale.name == TINY.name else FULL_SIZES
    with tempfile.TemporaryDirectory() as folder:
        runner, wired = opened(scale, sizes, Path(folder))
        try:
            for tokens in sizes.tokens:
                for figure in compared(tokens, measured(runner, wired, sizes, tokens)):
                    say(figure)
            runner.check()  # a kernel that gave up would have been quick
        finally:
            runner.close()


def opened(scale: Scale, sizes: Sizes, folder: Path) -> tuple[Runner, Any]:
    """(rank 0 of 8, the transport whose all-reduce takes the wire's time)."""
    most = max(sizes.tokens)
    llama = LlamaConfig(num_hidden_layers=sizes.layers, max_position_embeddings=most, rms_norm_eps=1e-5, **sizes.shape)
    llama.architectures = ["LlamaForCausalLM"]
    llama.save_pretrained(folder)
    config = EngineConfig(
        str(folder), device=scale.device, dtype=scale.dtype, load_format="dummy", progress=False,
        link=sizes.link if scale.device == "cpu" else None,
        max_num_batched_tokens=most, num_kv_blocks=-(-most // 16) + 1, timeout_s=TIMEOUT_S, overlap="weave",
        enforce_eager=True,  # the host's part does not count: see perf/gpu_timing.py
    )  # fmt: skip
    ranks = LoneRanks(0, WORLD_SIZE, scale.torch_device, TIMEOUT_S)
    connect = connect_cuda if scale.device == "cuda" else connect_paced
    runner = open_runner(config, ranks, connect)
    wired = runner.transport = runner.communicator.transport
    return runner, wired


def connect_paced(runner: Runner) -> Communicator:
    config, spec = runner.config, runner.spec
    assert config.link is not None
    transport = PacedTransport(SilentTransport(0, WORLD_SIZE), config.link)
    device = runner.ranks.device
    return Communicator(transport, 0, config.max_num_batched_tokens, spec.hidden_size, runner.dtype, device)


def connect_cuda(runner: Runner) -> Communicator:
    """The fused communicator of rank 0, with its peers' memory replaced by its own."""
    device = runner.ranks.device
    collectives = Cost(shape_of(runner), hardware_at_hand(device), WORLD_SIZE).collectives
    wire = Wire(collectives.plain_s, lambda rows: collectives.fused_s(rows, None))
    return stand_in(runner, StandInKernels(CudaDevice(device), wire))


def stand_in(runner: Runner, kernels: StandInKernels) -> FusedCommunicator:
    """The communicator over `kernels`. Rows beyond the last are room for shards of one row more."""
    device, rows = runner.ranks.device, runner.config.max_num_batched_tokens + WORLD_SIZE
    layout = Layout(rows, runner.spec.hidden_size, runner.dtype)
    local = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    memory = SymmetricMemory(local, (local.data_ptr(),) * WORLD_SIZE)
    wiring = Wiring("peer", 0, layout, memory, report_memory(device), kernels, TIMEOUT_S)
    communicator = FusedCommunicator(SilentTransport(0, WORLD_SIZE), wiring)
    scratch = torch.empty(rows, runner.spec.hidden_size, dtype=runner.dtype, device=device)
    lasting = communicator._fused[0].launch
    communicator.transport = StandInTransport(WORLD_SIZE, kernels, lasting, scratch)
    communicator.choice = Choice("multimem", LABEL)
    return communicator


def measured(runner: Runner, wired: Any, sizes: Sizes, tokens: int) -> dict[str, list[float]]:
    """Milliseconds of a forward pass by mode and round, of the device alone on CUDA; modes take turns."""
    batch = prompt_batch([i % sizes.shape["vocab_size"] for i in range(tokens)], runner.config.block_size)
    plans = plans_of(batch, cost_of(runner), tokens)
    contestants = {mode: partial(forward, runner, wired, batch, mode, plans[mode]) for mode in MODES}
    if runner.ranks.device.type == "cuda":
        timers = {mode: Contestant(launch_of(run), launches=1) for mode, run in contestants.items()}
        return {mode: [us / 1e3 for us in found] for mode, found in interleaved_us(timers, sizes.rounds).items()}
    seconds = in_turn(contestants, runner.ranks.device, sizes.rounds)
    return {mode: [1e3 * s for s in found] for mode, found in seconds.items()}


def launch_of(run: Callable[[], None]) -> Callable[[int], None]:
    """As Contestant counts launches."""
    return lambda i: run()


def plans_of(batch: Batch, cost: Cost, tokens: int) -> dict[str, Plan]:
    plain = Plan(tokens, None, "reference")
    woven = Planner("weave", cost, most_rows=tokens).plan(batch.spans)
    woven_plans = dict(zip(WOVEN, (woven, replace(woven, carve_out=True)), strict=True))
    return {"off": plain, "fused": Plan(tokens, None, "sharded"), **woven_plans, "nocomm": plain}


def forward(runner: Runner, wired: Any, batch: Batch, mode: str, plan: Plan) -> None:
    silent = SilentTransport(0, WORLD_SIZE)
    runner.communicator.transport = silent if mode == "nocomm" else wired
    runner.forward(batch, plan)


def compared(tokens: int, ms: dict[str, list[float]]) -> list[Figure]:
    """Times by mode; then, round by round, weave with a carve-out over without, and the faster of the two, as an LLM
    finds out when it starts, over nocomm and under off."""
    what = f"TP={WORLD_SIZE}, {tokens} tokens"
    found = [spread(f"{what}, {mode}", ms[mode], "ms", note=LABEL) for mode in MODES]
    best = min(WOVEN, key=lambda mode: statistics.median(ms[mode]))
    goal, note = GOAL if tokens == GOAL_TOKENS else None, f"{LABEL}; {best}"
    return [
        *found,
        spread(f"{what}, carved weave over weave", over(ms[WOVEN[1]], ms[WOVEN[0]]), "", note=LABEL),
        spread(f"{what}, weave over nocomm", over(ms[best], ms["nocomm"]), "", goal, note, at_most=True),
        spread(f"{what}, off over weave", over(ms["off"], ms[best]), "", note=note),
    ]


def over(above: list[float], below: list[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]
