"""Runner: one rank's model, cache, communicator and lanes. It runs the steps it is given."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.group import Ranks
from tokenweave.config import EngineConfig
from tokenweave.engine.batch import Batch, Half, Span
from tokenweave.engine.communication import open_communicator, open_transport
from tokenweave.engine.kv_cache import allocate_storage
from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.decoder import Decoder
from tokenweave.models.layers import Place
from tokenweave.models.registry import read_spec
from tokenweave.models.spec import DecoderSpec
from tokenweave.models.weights import load, unused
from tokenweave.trace.observe import TraceObserver, observed
from tokenweave.trace.spans import Recorder
from tokenweave.weave.lanes import InlineLane, Observer, open_lane
from tokenweave.weave.plan import Plan
from tokenweave.weave.weave import weave

CPU_CACHE_SHARE = 0.25  # of the memory that is free, for the KV cache, over all ranks of this host
CUDA_CACHE_SHARE = 0.90  # of what the weights left free


class Runner:
    """Everything of a rank that computes. Built on every rank in the same order, since building it communicates."""

    def __init__(
        self, config: EngineConfig, ranks: Ranks, folder: Path, hf_config: Any, observers: tuple[Observer, ...] = ()
    ):
        self.config = config
        self.ranks = ranks
        self.spec: DecoderSpec = read_spec(folder, hf_config)
        self.dtype = pick_dtype(config.dtype, hf_config, ranks.device)
        self.max_model_len = config.max_model_len or longest(self.spec)
        if self.max_model_len > longest(self.spec):
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the model was made for {longest(self.spec)} tokens"
            )
        if config.trace is not None and ranks.device.type == "cuda":
            raise ValueError("trace shows the lanes of a CPU; on CUDA use torch.profiler until streams are traced")
        self.recorder = Recorder(ranks.rank) if config.trace else None
        watching = (*observers, *((TraceObserver(self.recorder),) if self.recorder else ()))
        place = Place(ranks.rank, ranks.world_size, self.dtype, ranks.device)
        self.model = Decoder(self.spec, hf_config, self.max_model_len, place)
        self._load(Checkpoint(folder))
        self.transport = open_transport(config, ranks)
        self.inline = InlineLane(watching)
        self.lane = open_lane(ranks.device, ranks.timeout_s, watching)

    def connect(self) -> None:
        """Open what forms the sums. Collective, so not a part of building, which may fail on one rank alone."""
        self.communicator = open_communicator(
            self.config, self.ranks, self.transport, self.dtype, self.spec.hidden_size
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, plan: Plan) -> Tensor:
        """Logits [rows that make logits, vocabulary] fp32, the same on every rank."""
        lane = self.inline if plan.cut is None else self.lane
        bounds = enumerate(plan.bounds)
        channels = [self.communicator.open(stop - start, i, lane, plan.form, plan.sms) for i, (start, stop) in bounds]
        halves = [
            Half(batch.narrow(*bound), self.storage, channel)
            for bound, channel in zip(plan.bounds, channels, strict=True)
        ]
        strands = [self.model.strand(half) for half in halves]
        if self.recorder is not None:
            self._label(batch)
            strands = [observed(strand, i, self.recorder) for i, strand in enumerate(strands)]
        return torch.cat(weave(strands, channels))

    def blank_batch(self, rows: int) -> Batch:
        """A prompt of `rows` tokens in the cache's first blocks, to time or warm up a step with."""
        blocks = tuple(range(-(-rows // self.config.block_size)))
        return Batch((Span((0,) * rows, 0, blocks, prompt_len=rows, wanted=1),))

    def check(self) -> None:
        """Raises PeerError if a sum of the last step gives up on a rank: what it leaves behind is of no use."""
        self.communicator.finish()

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def close(self) -> None:
        self.lane.close()
        self.transport.close()

    def _label(self, batch: Batch) -> None:
        assert self.recorder is not None
        self.recorder.step += 1
        prefill = any(len(span) > 1 for span in batch.spans)
        self.recorder.phases[self.recorder.step] = "prefill" if prefill else "decode"

    def _load(self, checkpoint: Checkpoint) -> None:
        first = self.ranks.rank == 0
        load(self.model.loads(), checkpoint, progress=self.config.progress and first)
        if first and (left := unused(self.model.loads(), checkpoint)):
            listed = ", ".join(left[:3])
            warnings.warn(
                f"the checkpoint holds {len(left)} tensors that the model has no use for: {listed}", stacklevel=2
            )

    def allocate(self) -> None:
        """Allocate the KV cache: as many blocks as asked for, else as many as the poorest rank has memory for."""
        spec, block_size = self.spec, self.config.block_size
        kv_heads = len(self.model.layers[0].attention.kv_heads)
        block_bytes = 2 * spec.num_layers * block_size * kv_heads * spec.head_dim * self.dtype.itemsize
        wanted = self.config.max_num_seqs * -(-self.max_model_len // block_size)
        mine = self.config.num_kv_blocks or min(wanted, cache_bytes(self.ranks.device) // block_bytes)
        blocks = min(self.ranks.gather(mine))
        if blocks < 1:
            raise ValueError(
                f"no memory is left for one KV block of {block_bytes} bytes; lower block_size or free memory"
            )
        shape = (blocks, spec.num_layers, block_size, kv_heads, spec.head_dim)
        try:
            self.storage = allocate_storage(*shape, self.dtype, self.ranks.device)
        except RuntimeError as error:  # torch's way to say out of memory
            size = f"{blocks} KV blocks of {block_bytes} bytes"
            raise ValueError(f"there is no memory for {size}; lower num_kv_blocks, or free memory") from error


def pick_dtype(asked: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. "auto": the checkpoint's own on CUDA, float32 on a CPU."""
    if asked != "auto":
        return getattr(torch, asked)
    stated = getattr(hf_config, "dtype", None)
    return stated if device.type == "cuda" and isinstance(stated, torch.dtype) else torch.float32


def longest(spec: DecoderSpec) -> int:
    """Tokens the model was made for; dynamic rope is made for `factor` times its trained length."""
    stretch = spec.rope.get("factor", 1.0) if spec.rope.get("rope_type") == "dynamic" else 1.0
    return int(spec.max_position * stretch)


def cache_bytes(device: torch.device) -> int:
    """Bytes this rank may use for its KV cache."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_CACHE_SHARE)
    return int(available_bytes() * CPU_CACHE_SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_bytes() -> int:
    """Memory of this host that can be had without swapping: Linux's own estimate, else all that is not in use."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        sizes_kib = dict(line.split()[:2] for line in meminfo.read_text().splitlines())
        return int(sizes_kib["MemAvailable:"]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
