"""Cost: what a model's parts and requests take on one rank of a machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from tokenweave.cost.collectives import AnalyticCollectives, Collectives, best_implementation, gather_s
from tokenweave.cost.hardware import Hardware
from tokenweave.cost.ops import Numbers
from tokenweave.cost.parts import ModelParts, Part
from tokenweave.cost.shape import ModelShape
from tokenweave.cost.work import Work

USUAL_SMS = 8  # of a sum beside GEMMs
ROUGH_SMS = (4, 16)  # of the same, where choices are ranked
TILE_EDGE = 64  # rows, of the smallest tile
MOST_TAKEN = 0.5  # of the memory's bandwidth, by a collective
INSTANT_S = 1e-30  # divides where nothing takes no time


def usual_sms(hardware: Hardware) -> list[int]:
    """The SM counts worth considering for a collective, the likeliest first."""
    return sorted(hardware.communication_sms, key=lambda count: abs(math.log(count / USUAL_SMS)))


class Cost:
    """Seconds on one of W ranks. What does not depend on the batch is done once, here; `Step` then asks about a batch.

    collectives: None = by data sheet. graph: kernels come from a CUDA graph, not one by one from the host.
    drops_rows: the last layer ends on the rows that make logits alone, as this runtime does it; False: on all rows.
    Raises ValueError for a world size that cannot share the model's heads.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        world_size: int,
        collectives: Collectives | None = None,
        *,
        drops_rows: bool = True,
        graph: bool = False,
    ):
        self.shape, self.hardware, self.world_size, self.graph = shape, hardware, world_size, graph
        self.parts = ModelParts(shape, hardware, world_size, drops_rows)
        self.row_bytes = shape.hidden_size * shape.dtype_bytes
        self.collectives = collectives or AnalyticCollectives(hardware, world_size, self.row_bytes)
        self.kernel_s = hardware.graph_kernel_s if graph else hardware.kernel_s
        self.bandwidth = hardware.memory_bandwidth * hardware.efficiency.memory
        # residual and partial in, residual and hidden out; a norm after a block (half of post_norms a sum): in and out
        self.norm_row_s = (4 + shape.post_norms) * self.row_bytes / self.bandwidth
        self.fused_norm_shows = best_implementation(hardware, world_size)[1] == "sharded"
        blocks = self.parts.blocks
        self.core = max(blocks, key=lambda block: block.repeats * len(block.parts))
        self.requests = sum(block.repeats * len(block.parts) for block in blocks)
        self.kernels = sum(block.repeats * sum(part.kernels for part in block.parts) for block in blocks)
        self._reached = 0
        self._rough: dict[Part, tuple[np.ndarray, np.ndarray]] = {}

    def host_s(self, strands: int) -> float:
        """What the host needs to launch every kernel: a step cannot be faster.

        A request is two launches: all-reduce and norm, or one kernel with, on a lane of its own, events around it: 3.
        """
        launches = self.kernels + (2 if strands == 1 else 3) * self.requests
        return 0.0 if self.graph else strands * launches * self.hardware.host_launch_s

    def reach(self, rows: int) -> None:
        """Be ready for steps of up to `rows` rows: milliseconds, once."""
        if rows > self._reached:
            self._reached = -(-rows // TILE_EDGE) * TILE_EDGE
            self._rough = {}
            for gemm in self.parts.gemms:
                gemm.reach(self._reached)

    def segment_s(self, part: Part, work: Work, sms: Numbers, crowding: Numbers = 1.0) -> Numbers:
        """A part's kernels on `sms` SMs, while others make the memory slower by a factor."""
        rows, live = work.coming(part), work.going(part)
        seconds = rows * (part.row_bytes / self.bandwidth) * crowding + part.kernels * self.kernel_s
        for gemm in part.gemms:
            seconds = seconds + gemm.seconds(rows, sms, crowding)
        for gemm in part.live_gemms:
            live_s = gemm.seconds(live, sms, crowding)
            seconds = seconds + (live_s * (live > 0) if part.goes_wanted else live_s)
        if part.attends:
            # by rows, as if all attended alike: exact but for the last layer, where few are alive
            attention_s = work.attention[part.window].seconds(self.hardware.sms / sms, crowding)
            seconds = seconds + (attention_s * (live / rows) if part.goes_wanted else attention_s)
        return seconds * (rows > 0) if part.comes_wanted else seconds

    def roughly_s(self, part: Part, work: Work) -> Numbers:
        """As segment_s on all SMs and beside each of ROUGH_SMS, [1 + counts, ...]; rows up to a tile's edge, and memory
        shared with nobody. Looked up, for ranking."""
        known = self._rough.get(part)
        if known is None:
            known = self._rough[part] = self._rough_tables(part)
        rows, live = work.coming(part), work.going(part)
        seconds = known[0].take((rows + (TILE_EDGE - 1)) // TILE_EDGE, axis=1)
        if part.goes_wanted and part.live_gemms:
            seconds = seconds + known[1].take((live + (TILE_EDGE - 1)) // TILE_EDGE, axis=1)
        if part.attends:
            attention_s = work.attention[part.window].seconds(self.hardware.sms / self.rough_sms)
            seconds += attention_s * (live / rows) if part.goes_wanted else attention_s
        return seconds

    def _rough_tables(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Seconds by tile edges: of what works on the rows that come, and, where fewer go on, on those that go."""
        rows, sms = np.arange(0, self._reached + 1, TILE_EDGE), self.rough_sms[:, 0]
        coming = rows * (part.row_bytes / self.bandwidth) + part.kernels * self.kernel_s
        coming = coming + sum(gemm.seconds(rows, sms) for gemm in part.gemms)
        live = np.zeros((len(sms), 1)) + sum(gemm.seconds(rows, sms) for gemm in part.live_gemms)
        coming = coming + (0.0 if part.goes_wanted else live)
        return np.broadcast_to(coming, (len(sms), len(rows))) * (rows > 0), live * (rows > 0)

    @functools.cached_property
    def rough_sms(self) -> np.ndarray:
        return self.slots(ROUGH_SMS)

    def slots(self, counts: Sequence[int]) -> np.ndarray:
        """SMs that compute alone, and beside requests that have so many: [1 + counts, 1, 1]."""
        left = np.concatenate(([self.hardware.sms], self.left(np.array(counts))))
        return left[:, np.newaxis, np.newaxis]

    def request_s(self, part: Part, work: Work, mode: str, sms: int | None = None) -> Numbers:
        """The sum or gather that ends a part, with residual and norm. sms: None = the best count. No rows take none."""
        rows = work.going(part)
        return self._request_s(part, rows, mode, sms) * (rows > 0)

    def _request_s(self, part: Part, rows: Numbers, mode: str, sms: int | None) -> Numbers:
        if part.gathers:
            return 0.0 if mode == "nocomm" else gather_s(rows * part.gather_bytes, self.world_size, self.hardware)
        if mode == "nocomm" or self.world_size == 1:
            return self.norm_s(rows)
        waited = self.hardware.efficiency.all_reduce
        if mode == "off":
            return waited * self.collectives.plain_s(rows) + self.norm_s(rows)
        return self.fused_s(rows, sms) * (waited if mode == "fused" else 1.0)

    def norm_s(self, rows: Numbers) -> Numbers:
        """Residual add and norm, as a kernel of its own."""
        return rows * self.norm_row_s + self.kernel_s

    def fused_s(self, rows: Numbers, sms: int | None) -> Numbers:
        """A sum with residual and norm of 1/W of the rows."""
        seconds = self.collectives.fused_s(rows, sms)
        return seconds + self.norm_s(-(-rows // self.world_size)) if self.fused_norm_shows else seconds

    def woven_request_s(self, part: Part, work: Work, counts: Sequence[int]) -> Numbers:
        """Of the request that ends a part of a woven step, [counts, ...], by the SM counts that it may get."""
        if part.gathers:
            return self.request_s(part, work, "weave")
        rows = work.going(part)
        seconds = np.array([self.fused_s(rows, sms) for sms in counts])
        return seconds * (rows > 0) if part.goes_wanted else seconds

    def crowding(self, part: Part, work: Work, seconds: Numbers) -> Numbers:
        """What a request of a woven step makes the memory slower by meanwhile: it moves partials in, hidden out, the
        shard's residual."""
        if part.gathers:
            return 1.0
        moved_s = work.going(part) * (self.taking * self.row_bytes * (2 + 2 / self.world_size) / self.bandwidth)
        return 1.0 / (1.0 - np.minimum(MOST_TAKEN, moved_s / np.maximum(seconds, INSTANT_S)))

    @property
    def taking(self) -> float:
        """What a sum takes of the memory's bandwidth, over what it moves."""
        return 1.0

    def left(self, sms: Numbers) -> Numbers:
        """SMs that compute beside a request that has `sms`."""
        return np.maximum(1, self.hardware.sms - sms)
