"""CUDA graphs: a step that was queued once, launched again as one. Both lanes are in one graph, as fork and join."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenweave.engine.attention import Backend, HalfAttention
from tokenweave.engine.batch import Batch
from tokenweave.engine.buckets import Bounds, Bucket, bucket_of, why_eager
from tokenweave.engine.capturer import Capturer
from tokenweave.engine.inputs import LATE, Inputs, padded_inputs_of
from tokenweave.engine.packing import pack, unpack
from tokenweave.engine.tables import tables_of
from tokenweave.weave.plan import Plan

log = logging.getLogger(__name__)
MOST_GRAPHS = 128  # held at a time; the least recently used one goes first


class Steps(Protocol):
    """What queues a step: the runner. sums: what forms the sums now; a graph is right for that alone."""

    @property
    def sums(self) -> Hashable: ...

    def queue(
        self,
        bucket: Bucket,
        parts: Sequence[Batch],
        inputs: Sequence[Inputs[Tensor]],
        attentions: Sequence[HalfAttention],
        previous: Tensor,
    ) -> list[Tensor]:
        """Run captured halves; returns each half's logits [rows of its capacity, vocabulary] fp32."""

    def synchronize(self) -> None:
        """Wait, bounded, until all that is queued is done."""

    def capturing(self) -> AbstractContextManager[None]:
        """Around a capture: what fails on one rank fails on all, and running out of memory is explained."""


@dataclass(frozen=True)
class Graph:
    """One captured step. packed: what its inputs are views of. kept: all else that it reads and nobody else keeps."""

    packed: Tensor
    logits: list[Tensor]  # of each half, [rows of its capacity, vocabulary]
    replay: Callable[[], None]
    kept: object


class Graphs:
    """Steps by bucket. A bucket is captured when it first comes; every rank comes to it in the same step."""

    def __init__(
        self,
        steps: Steps,
        attention: Backend,
        capturer: Capturer,
        bounds: Bounds,
        num_layers: int,
        most_drawn: int,
        device: torch.device,
        progress: bool,
    ):
        """most_drawn: tokens that one step may draw. progress: show a bar that counts captures, on a terminal."""
        self.steps = steps
        self.attention = attention
        self.capturer = capturer
        self.bounds = bounds
        self.num_layers = num_layers
        self.device = device
        self.previous = torch.zeros(most_drawn, dtype=torch.long, device=device)
        self.held: OrderedDict[tuple[Bucket, Hashable], Graph] = OrderedDict()
        self.logits: Tensor | None = None
        self.progress = progress

    def takes(self, batch: Batch) -> bool:
        """Whether steps like this are captured: the same on every rank."""
        reason = why_eager(batch, self.bounds)
        if reason is not None:
            log.debug("not captured: %s", reason)
        return reason is None

    def forward(self, batch: Batch, plan: Plan, previous: Tensor | None) -> Tensor:
        """As Runner.forward, for a batch that is taken."""
        bucket = bucket_of(batch, plan, self.bounds)
        parts = bucket.split(batch)
        host = self._inputs(parts, bucket)
        if batch.late:
            assert previous is not None, LATE
            self.previous[: len(previous)].copy_(previous)
        key = (bucket, self.steps.sums)
        graph = self.held.get(key)
        if graph is None:
            graph = self.held[key] = self._capture(bucket, parts, host)
        else:
            graph.packed.copy_(pack(host, self.device), non_blocking=True)
        self.held.move_to_end(key)
        graph.replay()
        pairs = zip(graph.logits, parts, strict=True)
        return torch.cat([logits[: len(part.wanted_rows())] for logits, part in pairs])

    @cached_property
    def bar(self) -> tqdm:
        disable = None if self.progress else True
        return tqdm(desc="capturing CUDA graphs", unit=" graphs", leave=False, disable=disable)

    def close(self) -> None:
        if self.held:
            self.bar.close()
        self.held.clear()

    def _inputs(self, parts: Sequence[Batch], bucket: Bucket) -> list[Inputs[np.ndarray]]:
        shape = (self.num_layers, self.bounds.block_size)
        pairs = zip(parts, bucket.halves, strict=True)
        return [padded_inputs_of(part, tables_of(part.spans, room, *shape)) for part, room in pairs]

    def _capture(self, bucket: Bucket, parts: list[Batch], host: list[Inputs[np.ndarray]]) -> Graph:
        """Run the step once, which compiles and allocates what it needs; then capture it."""
        packed = pack(host, self.device).to(self.device)
        inputs = unpack(packed, host)
        attentions = [self.attention(part.spans, of.tables) for part, of in zip(parts, inputs, strict=True)]
        queue = partial(self.steps.queue, bucket, parts, inputs, attentions, self.previous)
        logits = self._room_for(queue())

        def run() -> None:
            for out, half in zip(logits, queue(), strict=True):
                out.copy_(half)

        self.steps.synchronize()  # bounded, as torch's own wait at the start of a capture is not
        if len(self.held) == MOST_GRAPHS:
            self.held.popitem(last=False)
        with self.steps.capturing():
            replay = self.capturer.capture(run)
        self.bar.update()
        return Graph(packed, logits, replay, (inputs, attentions))

    def _room_for(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Where a graph leaves its logits. All share one memory; what is outgrown stays with the graphs that use it."""
        counts = [len(half) for half in logits]
        if self.logits is None or len(self.logits) < sum(counts):
            self.logits = logits[0].new_empty(sum(counts), *logits[0].shape[1:])
        return list(self.logits[: sum(counts)].split(counts))
