"""CUDA graphs: a step that was queued once, launched again as one. Both lanes are in one graph, as fork and join."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, TypeVar

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
REMEMBERED = 1024  # kinds of steps that have come once

T = TypeVar("T")
Key = tuple[Bucket, Hashable]  # the bucket, and what forms the sums


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

    def everywhere(self, task: str, run: Callable[[], T]) -> T | None:
        """What `run` returns; None on every rank where the memory of any ran out. Other failures fail on all."""


@dataclass(frozen=True)
class Queued:
    """A step that can be queued again, with other inputs. packed: what its inputs are views of. queue: queues it, and
    returns each half's logits [rows of its capacity, vocabulary]; it keeps all that the step reads."""

    packed: Tensor
    queue: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Graph:
    """One captured step, which leaves its logits in memory that other graphs write to as well."""

    step: Queued
    logits: list[Tensor]
    replay: Callable[[], None]


class Graphs:
    """Steps by bucket. A bucket is captured when it comes again: many prefills come once, and to capture a step takes
    longer than to queue it. The first time it is queued as it will be captured, padding and all: so the same kernels
    give the same tokens every time, and what a capture cannot do, to compile and to load, is done.

    All ranks decide alike: they see the same steps, and a capture is one where it is one on all of them. Where memory
    runs out in one, all graphs go, and from then on every step is queued anew.
    """

    def __init__(
        self,
        steps: Steps,
        attention: Backend,
        capturer: Capturer,
        bounds: Bounds,
        num_layers: int,
        most_drawn: int,
        most: int,
        device: torch.device,
        progress: bool,
    ):
        """most_drawn: tokens that one step may draw. most: graphs that are held at a time; the least recently used one
        goes first. progress: show a bar that counts captures, on a terminal."""
        self.steps = steps
        self.attention = attention
        self.capturer = capturer
        self.bounds = bounds
        self.num_layers = num_layers
        self.device = device
        self.previous = torch.zeros(most_drawn, dtype=torch.long, device=device)
        self.most = most
        self.held: OrderedDict[Key, Graph] = OrderedDict()
        self.seen: OrderedDict[Key, None] = OrderedDict()
        self.full = False  # memory ran out in a capture
        self.logits: Tensor | None = None
        self.progress = progress

    def takes(self, batch: Batch) -> bool:
        """Whether steps like this are captured: the same on every rank."""
        reason = "memory ran out" if self.full else why_eager(batch, self.bounds)
        if reason is not None:
            log.debug("not captured: %s", reason)
        return reason is None

    def settled(self, batch: Batch, plan: Plan) -> bool:
        """Whether a step like this runs as it will from now on: launched as a graph, or never as one."""
        return not self.takes(batch) or (bucket_of(batch, plan, self.bounds), self.steps.sums) in self.held

    def forward(self, batch: Batch, plan: Plan, previous: Tensor | None) -> Tensor:
        """As Runner.forward, for a batch that is taken."""
        bucket = bucket_of(batch, plan, self.bounds)
        parts = bucket.split(batch)
        host = self._inputs(parts, bucket)
        if batch.late:
            assert previous is not None, LATE
            self.previous[: len(previous)].copy_(previous)
        key = (bucket, self.steps.sums)
        if key in self.held:
            logits = self._launch(key, host)
        else:
            queued = self._prepare(bucket, parts, host)
            logits = self._capture(key, queued) if key in self.seen else self._first(key, queued)
        return torch.cat([half[: len(part.wanted_rows())] for half, part in zip(logits, parts, strict=True)])

    @cached_property
    def bar(self) -> tqdm:
        disable = None if self.progress else True
        return tqdm(desc="capturing CUDA graphs", unit=" graphs", leave=False, disable=disable)

    def close(self) -> None:
        if "bar" in vars(self):
            self.bar.close()
        self.held.clear()

    def _inputs(self, parts: Sequence[Batch], bucket: Bucket) -> list[Inputs[np.ndarray]]:
        shape = (self.num_layers, self.bounds.block_size)
        pairs = zip(parts, bucket.halves, strict=True)
        return [padded_inputs_of(part, tables_of(part, room, *shape)) for part, room in pairs]

    def _prepare(self, bucket: Bucket, parts: list[Batch], host: list[Inputs[np.ndarray]]) -> Queued:
        packed = pack(host, self.device).to(self.device, non_blocking=True)
        inputs = unpack(packed, host)
        attentions = [self.attention(part.spans, of.tables) for part, of in zip(parts, inputs, strict=True)]
        return Queued(packed, partial(self.steps.queue, bucket, parts, inputs, attentions, self.previous))

    def _first(self, key: Key, queued: Queued) -> list[Tensor]:
        """Queue the step, and remember that it came."""
        logits = queued.queue()
        rows = sum(map(len, logits))
        if self.logits is None or len(self.logits) < rows:
            self.logits = logits[0].new_empty(rows, *logits[0].shape[1:])
        self.seen[key] = None
        if len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return logits

    def _capture(self, key: Key, queued: Queued) -> list[Tensor]:
        """Capture the step and launch it; or queue it, where there is no memory to capture it."""
        logits = self._room_for(key[0])

        def run() -> None:
            for out, half in zip(logits, queued.queue(), strict=True):
                out.copy_(half)

        self.steps.synchronize()  # bounded, as torch's own wait at the start of a capture is not
        if len(self.held) == self.most:
            old, _ = self.held.popitem(last=False)
            self.seen.pop(old, None)  # it is to come twice before it is captured again
        replay = self.steps.everywhere("capturing a CUDA graph", partial(self.capturer.capture, run))
        if replay is None:
            self.full = True
            self.held.clear()
            return queued.queue()
        self.held[key] = Graph(queued, logits, replay)
        self.bar.update()
        replay()
        return logits

    def _launch(self, key: Key, host: list[Inputs[np.ndarray]]) -> list[Tensor]:
        graph = self.held[key]
        self.held.move_to_end(key)
        graph.step.packed.copy_(pack(host, self.device), non_blocking=True)
        graph.replay()
        return graph.logits

    def _room_for(self, bucket: Bucket) -> list[Tensor]:
        """Where its graph leaves each half's logits. All graphs share one memory, which has grown as steps first came;
        what is outgrown stays with the graphs that use it."""
        assert self.logits is not None
        counts = [half.rows for half in bucket.halves]
        return list(self.logits[: sum(counts)].split(counts))
