"""Baseline: FlashInfer's fused all-reduce, residual and RMSNorm; NCCL's sum where it has no kernel (the first sum)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from perf.overlap.baselines.channel import BaselineCommunicator, PlainChannel
from tokenweave.engine.rank import Rank


class FlashInfer:
    name = "FlashInfer"

    def missing(self, rank: Rank) -> str:
        if rank.ranks.device.type != "cuda":
            return "it needs CUDA"
        if importlib.util.find_spec("flashinfer") is None:
            return "it is not installed: pip install flashinfer-python"
        return ""

    def open(self, rank: Rank) -> FlashInferCommunicator:
        return FlashInferCommunicator(rank)


class FlashInferCommunicator(BaselineCommunicator):
    def __init__(self, rank: Rank):
        super().__init__(rank, FlashInferChannel)
        runner, ranks = rank.runner, rank.ranks
        self.library: Any = importlib.import_module("flashinfer.comm")
        backend: Any = importlib.import_module("flashinfer.comm.mnnvl").TorchDistBackend(group=ranks.control)
        self.workspace = self.library.create_allreduce_fusion_workspace(
            backend="auto",
            world_size=ranks.world_size,
            rank=ranks.rank,
            max_token_num=runner.config.max_num_batched_tokens,
            hidden_dim=runner.spec.hidden_size,
            dtype=runner.dtype,
            comm_backend=backend,
        )


class FlashInferChannel(PlainChannel):
    communicator: FlashInferCommunicator

    def add_norm(self, partial: Tensor, residual: Tensor, norm: Any, out: Tensor) -> None:
        library = self.communicator.library
        library.allreduce_fusion(
            input=partial,
            workspace=self.communicator.workspace,
            pattern=library.AllReduceFusionPattern.kARResidualRMSNorm,
            launch_with_pdl=True,  # as its own examples and vLLM do
            residual_in=residual,
            residual_out=residual,
            norm_out=out,
            rms_gamma=self.communicator.gain(norm),
            rms_eps=norm.eps,
            fp32_acc=True,
        )
