"""Peers: what others would use in place of the kernel, and the parts of it. To add one, write its function and list it
in PEERS.

Norms add a residual, as in the paper: residual += x; hidden = RMSNorm(residual).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from perf.kernels.correctness import TOLERANCE, distance, rms_norm
from perf.kernels.problem import Problem, drawn
from perf.kernels.timers import Contestant
from tokenweave.comm.group import Ranks
from tokenweave.comm.norm import Norm
from tokenweave.shard import shards

NO_CUDA = "it needs CUDA"
SCATTERED_WORLD_SIZES = (2, 4, 8)  # torch's kernel is compiled for these


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """residual += x; out = RMSNorm(residual), in fp32. All [rows, hidden], weight [hidden]."""
    total = x.float() + residual.float()
    residual.copy_(total)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    out.copy_(total * scale * weight.float())


class Bench:
    """What the peers on this rank share. no_multicast: why there are no multicast addresses; "" if there are."""

    def __init__(self, ranks: Ranks, problem: Problem, no_multicast: str):
        self.ranks = ranks
        self.problem = problem
        self.no_multicast = no_multicast
        cuda = problem.device.type == "cuda"
        size = (problem.max_rows, problem.hidden_size)
        self.source = torch.randn(size, device=problem.device).mul_(0.01).to(problem.dtype)
        self.x, self.residual, self.out = self.source.clone(), self.source.clone(), self.source.clone()
        self.weight = drawn(problem, "norm weight")
        # One fused kernel on a GPU; eager torch would take five.
        self._add_norm: Any = torch.compile(add_norm) if cuda else add_norm

    @functools.cached_property
    def symmetric(self) -> Tensor:
        """[max_rows, hidden] in torch's symmetric memory. Collective at first."""
        from torch._C._distributed_c10d import _SymmetricMemory  # as in comm/symmetric.py: an allocation of its own
        from torch.distributed import _symmetric_memory as symmetric

        rows, hidden = self.source.shape
        strides, dtype = (hidden, 1), self.source.dtype
        memory = _SymmetricMemory.empty_strided_p2p((rows, hidden), strides, dtype, self.problem.device)
        symmetric.rendezvous(memory, self.ranks.control)
        return memory

    @property
    def group_name(self) -> str:
        return str(self.ranks.control.group_name)

    @functools.cached_property
    def flashinfer(self) -> Any:
        """(flashinfer.comm, its workspace). Collective at first."""
        comm: Any = importlib.import_module("flashinfer.comm")
        backend: Any = importlib.import_module("flashinfer.comm.mnnvl").TorchDistBackend(group=self.ranks.control)
        workspace = comm.create_allreduce_fusion_workspace(
            backend="auto",
            world_size=self.ranks.world_size,
            rank=self.ranks.rank,
            max_token_num=self.problem.max_rows,
            hidden_dim=self.problem.hidden_size,
            dtype=self.problem.dtype,
            comm_backend=backend,
        )
        return comm, workspace

    def share(self, rows: int) -> int:
        """Of the rank that has most."""
        return max(map(len, shards(rows, self.ranks.world_size)))

    def norm(self, x: Tensor) -> None:
        """Adds and normalises rows, from x to `out`."""
        rows = len(x)
        self._add_norm(x, self.residual[:rows], self.weight, self.out[:rows], self.problem.eps)

    def refill(self, buffer: Tensor) -> Callable[[], object]:
        """An all-reduce in place must not grow without bound."""
        return functools.partial(buffer.copy_, self.source[: len(buffer)])

    def close(self) -> None:
        if "flashinfer" in self.__dict__:
            self.flashinfer[1].destroy()


# -- the peers: from a bench and a number of rows to what is timed ----------------------------------------------------


def full_norm(bench: Bench, rows: int) -> Contestant:
    return Contestant(lambda: bench.norm(bench.source[:rows]))


def partial_norm(bench: Bench, rows: int) -> Contestant:
    return Contestant(lambda: bench.norm(bench.source[: bench.share(rows)]))


def all_reduce(bench: Bench, rows: int) -> Contestant:
    x = bench.x[:rows]
    return Contestant(lambda: dist.all_reduce(x, group=bench.ranks.comm), bench.refill(x))


def all_reduce_norm(bench: Bench, rows: int) -> Contestant:
    x = bench.x[:rows]

    def run() -> None:
        dist.all_reduce(x, group=bench.ranks.comm)
        bench.norm(x)

    return Contestant(run, bench.refill(x))


def multimem(bench: Bench, rows: int) -> Contestant:
    x, name = bench.symmetric[:rows], bench.group_name
    return Contestant(lambda: torch.ops.symm_mem.multimem_all_reduce_(x, "sum", name), bench.refill(x))


def multimem_norm(bench: Bench, rows: int) -> Contestant:
    x, name = bench.symmetric[:rows], bench.group_name

    def run() -> None:
        torch.ops.symm_mem.multimem_all_reduce_(x, "sum", name)
        bench.norm(x)

    return Contestant(run, bench.refill(x))


def reduce_scatter(bench: Bench, rows: int) -> Contestant:
    return Contestant(lambda: scatter(bench, rows))


def all_gather(bench: Bench, rows: int) -> Contestant:
    return Contestant(lambda: gather(bench, rows))


def unfused(bench: Bench, rows: int) -> Contestant:
    """The gather overwrites what the next run sums: refilled."""

    def run() -> None:
        scatter(bench, rows)
        bench.norm(bench.x[: bench.share(rows)])
        gather(bench, rows)

    return Contestant(run, bench.refill(bench.symmetric[:rows]))


def scatter(bench: Bench, rows: int) -> None:
    """x[:share] = this rank's rows of the sum. torch wants flat tensors."""
    share = bench.x[: bench.share(rows)]
    torch.ops.symm_mem.reduce_scatter_out(bench.symmetric[:rows].view(-1), bench.group_name, False, share.view(-1))


def gather(bench: Bench, rows: int) -> None:
    share = bench.out[: bench.share(rows)]
    torch.ops.symm_mem.multimem_all_gather_out(share, bench.group_name, bench.symmetric[:rows])


def flashinfer(bench: Bench, rows: int) -> Contestant:
    comm, workspace = bench.flashinfer
    residual = bench.residual[:rows]
    run = functools.partial(
        comm.allreduce_fusion,
        input=bench.source[:rows],
        workspace=workspace,
        pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm,
        launch_with_pdl=True,  # as its own examples and vLLM do
        residual_in=residual,
        residual_out=residual,
        norm_out=bench.out[:rows],
        rms_gamma=bench.weight,
        rms_eps=bench.problem.eps,
        fp32_acc=True,
    )
    return Contestant(run)


# -- what a peer needs; "" if it is there -----------------------------------------------------------------------------


def needs_nothing(bench: Bench) -> str:
    return ""


def needs_multicast(bench: Bench) -> str:
    return bench.no_multicast


def needs_scatter(bench: Bench) -> str:
    """Rows are shared out evenly, too: the measured row counts divide by these world sizes."""
    if bench.no_multicast or bench.ranks.world_size in SCATTERED_WORLD_SIZES:
        return bench.no_multicast
    return f"torch's reduce-scatter is for {', '.join(map(str, SCATTERED_WORLD_SIZES))} ranks"


def needs_flashinfer(bench: Bench) -> str:
    if bench.problem.device.type != "cuda":
        return NO_CUDA
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed: pip install flashinfer-python"
    try:
        _ = bench.flashinfer
    except Exception as error:  # another project's code, of any version: it is listed as missing, with this reason
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


# -- where a run leaves the normalised sum, [rows, hidden] ------------------------------------------------------------


def in_out(bench: Bench, rows: int) -> Tensor:
    return bench.out[:rows]


def in_symmetric(bench: Bench, rows: int) -> Tensor:
    return bench.symmetric[:rows]


@dataclass(frozen=True)
class Peer:
    """column: in CSV files, the published ones where they have it. source: what exactly is timed. hidden: where the
    result is, for those that sum and normalise."""

    column: str
    label: str
    source: str
    prepare: Callable[[Bench, int], Contestant]
    missing: Callable[[Bench], str] = needs_nothing
    hidden: Callable[[Bench, int], Tensor] | None = None


NORM = "add + RMSNorm, torch.compile"
MULTIMEM = "torch.ops.symm_mem.multimem_all_reduce_"
SCATTER, GATHER = "torch.ops.symm_mem.reduce_scatter_out", "torch.ops.symm_mem.multimem_all_gather_out"
PEERS = (
    Peer("full_rms_norm_us", "RMSNorm, all tokens", NORM, full_norm),
    Peer("partial_rms_norm_us", "RMSNorm, one rank's share", NORM, partial_norm),
    Peer("torch_all_reduce_us", "NCCL all-reduce", "torch.distributed.all_reduce", all_reduce),
    Peer("multimem_all_reduce_us", "multimem all-reduce", MULTIMEM, multimem, needs_multicast),
    Peer(
        "simple_fusion_arln_us",
        "reduce-scatter + RMSNorm + all-gather",
        f"{SCATTER}, {NORM}, {GATHER}",
        unfused,
        needs_scatter,
        in_symmetric,
    ),
    Peer("multimem_rs_us", "reduce-scatter", f"{SCATTER} (over peer pointers)", reduce_scatter, needs_scatter),
    Peer("multimem_ag_us", "all-gather", GATHER, all_gather, needs_scatter),
    Peer(
        "torch_all_reduce_norm_us",
        "NCCL all-reduce + RMSNorm",
        f"torch.distributed.all_reduce, {NORM}",
        all_reduce_norm,
        needs_nothing,
        in_out,
    ),
    Peer(
        "multimem_all_reduce_norm_us",
        "multimem all-reduce + RMSNorm",
        f"{MULTIMEM}, {NORM}",
        multimem_norm,
        needs_multicast,
        in_out,
    ),
    Peer("flashinfer_us", "FlashInfer", "flashinfer.comm.allreduce_fusion", flashinfer, needs_flashinfer, in_out),
)


def vote(bench: Bench, peers: tuple[Peer, ...] = PEERS) -> tuple[list[Peer], dict[str, str]]:
    """Collective: (those that every rank can run, why not the others by label)."""
    by_rank = bench.ranks.gather({peer.label: peer.missing(bench) for peer in peers})
    reasons = {peer.label: next((each[peer.label] for each in by_rank if each[peer.label]), "") for peer in peers}
    return [peer for peer in peers if not reasons[peer.label]], {label: why for label, why in reasons.items() if why}


def sort_out_wrong(bench: Bench, peers: list[Peer], rows: int) -> tuple[list[Peer], dict[str, str]]:
    """Collective: (those that compute what they should, what is wrong with the others): no time counts for a call that
    was made wrongly, or for another version's meaning of it."""
    worst = {peer.label: max(bench.ranks.gather(off(bench, peer, rows))) for peer in peers}
    most = TOLERANCE[bench.problem.dtype]
    wrong = {label: f"its result is off by {far:.3g} of a value" for label, far in worst.items() if far > most}
    return [peer for peer in peers if peer.label not in wrong], wrong


def off(bench: Bench, peer: Peer, rows: int) -> float:
    """The error of the norm of the sum, on top of no residual."""
    if peer.hidden is None:
        return 0.0
    bench.residual.zero_()
    contestant = peer.prepare(bench, rows)
    contestant.before()
    bench.ranks.gather(None)  # every rank's input is there
    contestant.run()
    total = bench.source[:rows].double()
    dist.all_reduce(total, group=bench.ranks.comm)
    return distance(peer.hidden(bench, rows), rms_norm(Norm(bench.weight, bench.problem.eps), total))
