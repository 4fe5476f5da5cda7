"""Runner: one rank's model, cache, communicator and lanes. It runs the steps it is given."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenweave.comm.communicator import Channel, Communicator
from tokenweave.comm.group import Ranks
from tokenweave.comm.transport import Transport
from tokenweave.config import EngineConfig
from tokenweave.engine.attention import Backends, HalfAttention, check_attention, open_attention
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.buckets import GRAPH_TOKENS, Bounds, Bucket
from tokenweave.engine.capturer import Capturer, CudaCapturer
from tokenweave.engine.communication import open_communicator, open_transport
from tokenweave.engine.fetch import Fetch
from tokenweave.engine.graphs import Graphs
from tokenweave.engine.half import Half
from tokenweave.engine.histories import Histories
from tokenweave.engine.inputs import Inputs, inputs_of
from tokenweave.engine.memory import MOST_GRAPHS, Memory, is_out_of_memory, open_meter
from tokenweave.engine.packing import upload
from tokenweave.engine.tables import Tables, capacity_of, tables_of
from tokenweave.engine.watcher import Watcher
from tokenweave.kernels.gemm_sms import leave_free, why_not
from tokenweave.models.checkpoint import Checkpoint
from tokenweave.models.decoder import Decoder
from tokenweave.models.dummy import fill
from tokenweave.models.layers import Place
from tokenweave.models.registry import read_spec
from tokenweave.models.spec import DecoderSpec, longest
from tokenweave.models.weights import load, unused
from tokenweave.trace.observe import TraceObserver, observed
from tokenweave.trace.spans import Recorder
from tokenweave.trace.stream_recorder import StreamRecorder
from tokenweave.weave.lanes import InlineLane, Observer, open_lane
from tokenweave.weave.plan import Plan
from tokenweave.weave.weave import weave

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runner:
    """Everything of a rank that computes. Built on every rank in the same order, since building it communicates."""

    watcher: Watcher | None = None
    storage: Tensor  # the KV cache, and what memory is for: see allocation.py
    memory: Memory

    def __init__(
        self, config: EngineConfig, ranks: Ranks, folder: Path, hf_config: Any, observers: tuple[Observer, ...] = ()
    ):
        self.config = config
        self.ranks = ranks
        self.meter = open_meter(ranks.device)
        self.start = None if self.meter is None else self.meter.restart()  # before anything is loaded
        self.spec: DecoderSpec = read_spec(folder, hf_config)
        self.dtype = pick_dtype(config.dtype, hf_config, ranks.device)
        check_attention(config.attention, ranks.device, self.dtype, self.spec.head_dim)
        self.max_model_len = config.max_model_len or longest(self.spec)
        if self.max_model_len > longest(self.spec):
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the model was made for {longest(self.spec)} tokens"
            )
        self.recorder = open_recorder(ranks) if config.trace else None
        watching = (*observers, *((TraceObserver(self.recorder),) if self.recorder else ()))
        place = Place(ranks.rank, ranks.world_size, self.dtype, ranks.device)
        self.model = Decoder(self.spec, hf_config, self.max_model_len, place)
        if config.load_format == "dummy":
            fill(self.model.loads(), self.spec.norm_offset)
        else:
            self._load(Checkpoint(folder))
        self.transport = open_transport(config, ranks)
        self.inline = InlineLane(watching)
        self.lane = open_lane(ranks.device, ranks.timeout_s, watching)
        captured = ranks.device.type == "cuda" and not config.enforce_eager and self.recorder is None
        self.capturer: Capturer | None = CudaCapturer(ranks.device) if captured else None
        self.most_graphs = MOST_GRAPHS  # until it is seen what they take: see allocation.py
        self.graph_tokens = config.cuda_graph_max_tokens or GRAPH_TOKENS  # until the machine is known: see rank.py
        self.histories = Histories(ranks.device)  # what a step's sampling knows of those before
        self.steps, self.queued = 0, "nothing"  # for errors: how many steps were queued, and the last one

    def connect(self) -> None:
        """Open what forms the sums. Collective, so not a part of building, which may fail on one rank alone."""
        self.communicator = open_communicator(
            self.config, self.ranks, self.transport, self.dtype, self.spec.hidden_size
        )
        if self.ranks.watch is not None and self.ranks.device.type == "cuda":
            self.watcher = Watcher(self.ranks.watch, self.communicator.abort)

    @torch.inference_mode()
    def forward(self, batch: Batch, plan: Plan, previous: Tensor | None = None) -> Tensor:
        """Logits [rows that make logits, vocabulary] fp32, the same on every rank.

        previous: int64, the tokens that the step before drew, on this device: late rows find theirs there.
        """
        self.steps += 1
        self.queued = f"step {self.steps}: {batch.rows} rows" + (f", cut at {plan.cut}" if plan.cut else "")
        if self.recorder is not None:
            self._label(batch)
        if self.graphs is not None and self.graphs.takes(batch):
            return self.graphs.forward(batch, plan, previous)
        parts = [batch.narrow(*bound) for bound in plan.bounds]
        inputs = upload([inputs_of(part, self._tables(part)) for part in parts], self.ranks.device)
        attentions = [self.attention.eager(part.spans, of.tables) for part, of in zip(parts, inputs, strict=True)]
        channels = self._channels([part.rows for part in parts], plan.form, plan.sms)
        halves = [Half(*each, previous) for each in zip(parts, inputs, attentions, channels, strict=True)]
        return torch.cat(self._weave(halves, plan.carved_sms))

    def queue(
        self,
        bucket: Bucket,
        parts: Sequence[Batch],
        inputs: Sequence[Inputs[Tensor]],
        attentions: Sequence[HalfAttention],
        previous: Tensor,
    ) -> list[Tensor]:
        """As Steps.queue."""
        channels = self._channels([capacity.tokens for capacity in bucket.halves], bucket.form, bucket.sms)
        each = zip(parts, inputs, attentions, channels, strict=True)
        return self._weave([Half(*of, previous, captured=True) for of in each], bucket.carved_sms)

    @cached_property
    def attention(self) -> Backends:
        """Asked for at the first step, when the cache is there."""
        return open_attention(self.config.attention, self.storage)

    @cached_property
    def graphs(self) -> Graphs | None:
        """None where every step is queued anew. Collective: asked for when the cache and communication are open."""
        config, first = self.config, self.ranks.rank == 0
        if self.capturer is None:
            return None
        attention = self.attention.captured
        able = attention is not None and self.spec.rope.get("rope_type") != "dynamic"
        if not all(self.ranks.gather(able)):  # a captured step is padded, and its sums are too: all ranks or none
            if first:
                log.info("no CUDA graphs: attention, or dynamic rope, decides on the host what is queued")
            return None
        assert attention is not None
        most_rows = config.max_num_batched_tokens
        bounds = Bounds(
            decode_rows=min(config.max_num_seqs, most_rows),
            prefill_tokens=min(self.graph_tokens, most_rows),
            blocks=-(-self.max_model_len // config.block_size),
            block_size=config.block_size,
        )
        shape = (self.spec.num_layers, config.max_num_seqs, self.most_graphs, self.ranks.device)
        return Graphs(self, attention, self.capturer, bounds, *shape, config.progress and first)

    def _channels(self, rows: Sequence[int], form: str, sms: Mapping[str, int]) -> list[Channel]:
        """One for each half of so many rows."""
        lane = self.inline if len(rows) == 1 else self.lane
        return [self.communicator.open(count, i, lane, form, sms) for i, count in enumerate(rows)]

    def _weave(self, halves: Sequence[Half], carved_sms: int) -> list[Tensor]:
        """Each half's logits [rows that make logits, vocabulary] fp32."""
        strands = [self.model.strand(half) for half in halves]
        if self.recorder is not None:
            strands = [observed(strand, i, self.recorder) for i, strand in enumerate(strands)]
        biases = self.spec.qkv_bias or self.spec.mlp_bias
        with leave_free(carved_sms, self.ranks.device, biases):
            return weave(strands, [half.channel for half in halves])

    def _tables(self, batch: Batch) -> Tables[np.ndarray] | None:
        """Of exactly this batch, where attention reads any."""
        if not self.attention.eager.reads_tables:
            return None
        block_size = self.config.block_size
        return tables_of(batch, capacity_of(batch, block_size), self.spec.num_layers, block_size)

    def blank_batch(self, rows: int) -> Batch:
        """A prompt of `rows` tokens in the cache's first blocks, to time or warm up a step with."""
        blocks = tuple(range(-(-rows // self.config.block_size)))
        return Batch((Span((0,) * rows, 0, blocks, prompt_len=rows, wanted=1),))

    def fetch(self, tensors: Sequence[Tensor] = ()) -> Fetch:
        """Start to bring tensors of this device to the host, behind all that is queued now. `wait` of what this returns
        is bounded, and raises what `check` does: what is left behind is then of no use."""
        return Fetch(tensors, self.ranks.device, self.check, 2 * self.ranks.timeout_s, self.queued)

    def check(self) -> None:
        """Raises ConnectionError if a rank that this process started has ended, PeerError if a sum that is done gave up
        on a rank. Does not wait."""
        if self.ranks.watch is not None:
            self.ranks.watch()
        self.communicator.check()

    def synchronize(self) -> None:
        """Wait until everything that was queued is done. Bounded and checked as a fetch."""
        self.fetch().wait()

    @property
    def carves(self) -> bool:
        """Whether GEMMs can be told how many SMs sums leave: known of the fused kernel's, and not of NCCL's."""
        if self.ranks.device.type != "cuda" or self.communicator.choice.implementation == "sharded":
            return False
        if reason := why_not():
            log.info("GEMMs take no notice of sums: %s", reason)
        return not reason

    @property
    def sums(self) -> tuple[Communicator, Transport]:
        """As Steps.sums. A harness may change them between steps."""
        return self.communicator, self.communicator.transport

    def everywhere(self, task: str, run: Callable[[], T]) -> T | None:
        """As Steps.everywhere. Collective; rank 0 warns of memory that ran out."""
        made, failure = None, ""
        with self.ranks.together(task):
            try:
                made = run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reading = "" if self.meter is None else f" ({self.meter.read()})"
                failure = f"rank {self.ranks.rank} has not enough GPU memory for {task}{reading}"
        failures = [each for each in self.ranks.gather(failure) if each]
        if failures and self.ranks.rank == 0:
            going_on = "every step is queued anew from now on, which is slower; lower gpu_memory_utilization"
            warnings.warn(f"{failures[0]}: {going_on}", stacklevel=2)
        return None if failures else made

    def abort(self, why: str) -> None:
        """As Communicator.abort."""
        if "communicator" in vars(self):
            self.communicator.abort(why)

    def close(self, failed: bool = False) -> None:
        """failed: what is queued may never end, for want of a rank."""
        if "graphs" in vars(self) and self.graphs is not None:
            self.graphs.close()  # before NCCL, which waits for graphs that have its collectives
        if failed:
            self.ranks.abort()
        if self.watcher is not None:
            self.watcher.close()
        self.lane.close()
        self.transport.close()

    def _label(self, batch: Batch) -> None:
        assert self.recorder is not None
        self.recorder.begin_step("prefill" if any(len(span) > 1 for span in batch.spans) else "decode")

    def _load(self, checkpoint: Checkpoint) -> None:
        first = self.ranks.rank == 0
        load(self.model.loads(), checkpoint, progress=self.config.progress and first)
        if first and (left := unused(self.model.loads(), checkpoint)):
            listed = ", ".join(left[:3])
            warnings.warn(
                f"the checkpoint holds {len(left)} tensors that the model has no use for: {listed}", stacklevel=2
            )


def open_recorder(ranks: Ranks) -> Recorder:
    """What keeps a rank's timeline: by the host's clock, or on CUDA by the device's."""
    return StreamRecorder(ranks.rank) if ranks.device.type == "cuda" else Recorder(ranks.rank)


def pick_dtype(asked: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. "auto": the checkpoint's own on CUDA, float32 on a CPU."""
    if asked != "auto":
        return getattr(torch, asked)
    stated = getattr(hf_config, "dtype", None)
    return stated if device.type == "cuda" and isinstance(stated, torch.dtype) else torch.float32
