"""Steps of real models' shapes, whose tensors are on "meta" and say that they are on CUDA: every Triton kernel is
launched as by the runtime, and nothing is computed. To be used inside `jit_driver.gpu`.

    rank = Rank(LLAMA_8B)
    rank.run(batch_of((512, 0), (1, 5000)))     # spans of (tokens, context before them)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenweave.comm.communicator import Communicator
from tokenweave.comm.transport import Transport
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.buckets import Bounds, bucket_of
from tokenweave.engine.half import Half
from tokenweave.engine.inputs import inputs_of, padded_inputs_of
from tokenweave.engine.packing import pack, unpack
from tokenweave.engine.sampler import SamplingRow, sample
from tokenweave.engine.tables import capacity_of, tables_of
from tokenweave.engine.triton_attention import TritonBackend
from tokenweave.kernels.attention_sizes import Gpu
from tokenweave.models import layers
from tokenweave.models.decoder import Decoder
from tokenweave.models.layers import Place, gated_function
from tokenweave.models.spec import DecoderSpec, ExpertsSpec
from tokenweave.weave.lanes import InlineLane
from tokenweave.weave.plan import Plan
from tokenweave.weave.weave import weave

META, CPU, CUDA = map(torch.device, ("meta", "cpu", "cuda"))
BLOCK_SIZE = 16
MODEL_LEN = 131072
BOUNDS = Bounds(decode_rows=256, prefill_tokens=2048, blocks=MODEL_LEN // BLOCK_SIZE, block_size=BLOCK_SIZE)


@dataclass(frozen=True)
class Shape:
    """A model, of two layers, and among how many ranks it is cut."""

    spec: DecoderSpec
    world_size: int


def experts(count: int, top_k: int, size: int) -> tuple[ExpertsSpec, ...]:
    return (ExpertsSpec(count, top_k, size, True, "gate", "experts.{e}", "w1", "w3", "w2"),) * 2


ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA_8B = Shape(DecoderSpec(128256, 4096, 2, 32, 8, 128, 14336, 1e-5, MODEL_LEN, ROPE), 1)
LLAMA_70B = Shape(DecoderSpec(128256, 8192, 2, 64, 8, 128, 28672, 1e-5, MODEL_LEN, ROPE), 8)
MIXTRAL = Shape(DecoderSpec(32000, 4096, 2, 32, 8, 128, 14336, 1e-5, MODEL_LEN, ROPE, experts=experts(8, 2, 14336)), 8)
QWEN3_MOE = Shape(
    DecoderSpec(151936, 2048, 2, 32, 4, 128, 6144, 1e-6, MODEL_LEN, ROPE, qk_norm="head", experts=experts(128, 8, 768)),
    2,
)


class Wire(Transport):
    """To ranks that are not there."""

    rank = 0

    def __init__(self, world_size: int):
        self.world_size = world_size

    def all_reduce(self, total: Tensor) -> int:
        return 0

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        return 0

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        return 0

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        return 0


class Rank:
    """The first rank of a model on an H100."""

    def __init__(self, shape: Shape):
        spec, place = shape.spec, Place(0, shape.world_size, torch.bfloat16, META)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "gated_function", lambda activation, device: gated_function(activation, CUDA))
            self.model = Decoder(spec, None, MODEL_LEN, place)
        kv_heads = len(self.model.layers[0].attention.kv_heads)
        storage = torch.empty(
            1000, spec.num_layers, 2, BLOCK_SIZE, kv_heads, spec.head_dim, dtype=torch.bfloat16, device=META
        )
        self.spec = spec
        self.attention = TritonBackend(storage, Gpu(132, 90))
        self.communicator = Communicator(Wire(shape.world_size), 0, 8192, spec.hidden_size, torch.bfloat16, META)
        self.previous = torch.empty(BOUNDS.decode_rows, dtype=torch.long, device=META)

    def run(self, batch: Batch, form: str = "reference", cut: int | None = None) -> None:
        """As a step is queued that is not captured."""
        parts = [batch.narrow(*bound) for bound in Plan(batch.rows, cut).bounds]
        self.queue(parts, [inputs_of(part, self.tables(part, capacity_of(part, BLOCK_SIZE))) for part in parts], form)

    def capture(self, batch: Batch, form: str = "reference", cut: int | None = None) -> None:
        """As a step of the batch's bucket is."""
        bucket = bucket_of(batch, Plan(batch.rows, cut, form), BOUNDS)
        parts = bucket.split(batch)
        rooms = zip(parts, bucket.halves, strict=True)
        self.queue(parts, [padded_inputs_of(part, self.tables(part, room)) for part, room in rooms], form, True)

    def tables(self, part: Batch, room: Any) -> Any:
        return tables_of(part, room, self.spec.num_layers, BLOCK_SIZE)

    def queue(self, parts: Sequence[Batch], host: Sequence[Any], form: str, captured: bool = False) -> None:
        inputs = unpack(pack(host, CPU).to(META), host)
        halves = []
        for i, (part, of) in enumerate(zip(parts, inputs, strict=True)):
            channel = self.communicator.open(len(of.token_ids), i, InlineLane(), form, {})
            attention = self.attention(part.spans, of.tables)
            halves.append(Half(part, of, attention, channel, self.previous, captured))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            logits = torch.cat(weave([self.model.strand(half) for half in halves], [half.channel for half in halves]))
            sample(logits, [SamplingRow(temperature=0.8, top_k=50, top_p=0.9)] * len(logits))


def batch_of(*spans: tuple[int, int]) -> Batch:
    """Each (tokens, context before them), in blocks of its own; all of them make logits."""
    counts = [-(-(tokens + context) // BLOCK_SIZE) for tokens, context in spans]
    return Batch(
        tuple(
            Span((1,) * tokens, context, tuple(range(i, i + count)), tokens + context, wanted=1)
            for i, ((tokens, context), count) in enumerate(zip(spans, counts, strict=True))
        )
    )


def decode_of(rows: int, context: int) -> Batch:
    return batch_of(*[(1, context)] * rows)
