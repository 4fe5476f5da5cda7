"""Cost: what a model's parts and requests take on one rank of a machine."""

from __future__ import annotations

import math

from tokenweave.cost.collectives import AnalyticCollectives, Collectives, best_implementation, gather_s
from tokenweave.cost.hardware import Hardware
from tokenweave.cost.ops import AttentionTime
from tokenweave.cost.parts import ModelParts, Part
from tokenweave.cost.shape import ModelShape
from tokenweave.cost.work import Work

USUAL_SMS = 8  # of a sum beside GEMMs
TILE_EDGE = 64  # rows, of the smallest tile
MOST_TAKEN = 0.5  # of the memory's bandwidth, by a collective


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
        self.core = max(self.parts.blocks, key=lambda block: block.repeats * len(block.parts))
        self.requests = sum(block.repeats * len(block.parts) for block in self.parts.blocks)
        self._rows_s: dict[tuple[Part, int], float] = {}
        self._gemms_s: dict[int, float] = {}
        self.kernels = sum(block.repeats * sum(part.kernels for part in block.parts) for block in self.parts.blocks)

    def host_s(self, strands: int) -> float:
        """What the host needs to launch every kernel: a step cannot be faster.

        A request is two launches: all-reduce and norm, or one kernel with, on a lane of its own, events around it: 3.
        """
        launches = self.kernels + (2 if strands == 1 else 3) * self.requests
        return 0.0 if self.graph else strands * launches * self.hardware.host_launch_s

    def part_s(self, part: Part, work: Work, sms: int, taken: float = 0.0) -> float:
        """A segment on `sms` SMs, while the share `taken` of the memory's bandwidth is used by others."""
        return self.segment(part, work).seconds(sms, taken)

    def segment(self, part: Part, work: Work) -> Segment:
        """What `part` computes for `work`, ready to be asked what it takes beside anything."""
        return Segment(self, part, work)

    def rows_s(self, part: Part, rows: int) -> float:
        """A segment of the core without its attention, of at least so many rows: up to a tile's edge. Remembered."""
        key = (part, -(-rows // TILE_EDGE))
        seconds = self._rows_s.get(key)
        if seconds is None:
            rows = key[1] * TILE_EDGE
            seconds = part.kernels * self.kernel_s + rows * part.row_bytes / self.bandwidth
            seconds += sum(gemm.seconds(rows, self.hardware.sms) for gemm in (*part.gemms, *part.live_gemms))
            self._rows_s[key] = seconds
        return seconds

    def gemms_s(self, rows: int) -> float:
        """A round of the core's GEMMs with all SMs, and once more beside a usual collective, as rows_s: for ranking."""
        key = -(-rows // TILE_EDGE)
        seconds = self._gemms_s.get(key)
        if seconds is None:
            sms, rows = self.hardware.sms, key * TILE_EDGE
            gemms = [gemm for part in self.core.parts for gemm in (*part.gemms, *part.live_gemms)]
            left = max(1, sms - usual_sms(self.hardware)[0])
            seconds = sum(gemm.seconds(rows, sms) + gemm.seconds(rows, left) for gemm in gemms)
            self._gemms_s[key] = seconds
        return seconds

    def warm_up(self, most_rows: int) -> None:
        """Look up once what steps of up to `most_rows` rows ask for again and again."""
        for rows in range(TILE_EDGE, most_rows + TILE_EDGE, TILE_EDGE):
            for part in self.core.parts:
                self.rows_s(part, rows)
                for gemm in (*part.gemms, *part.live_gemms):
                    for sms in self.hardware.communication_sms:
                        gemm.compute_s(rows, max(1, self.hardware.sms - sms))
            self.gemms_s(rows)

    def request_s(self, part: Part, rows: int, mode: str, sms: int | None = None) -> float:
        """The sum or gather of `rows` rows that ends a part, with residual and norm. sms: None = the best count."""
        if rows == 0:
            return 0.0
        if part.gathers:
            return 0.0 if mode == "nocomm" else gather_s(rows * part.gather_bytes, self.world_size, self.hardware)
        if mode == "nocomm" or self.world_size == 1:
            return self.norm_s(rows)
        waited = self.hardware.efficiency.all_reduce
        if mode == "off":
            return waited * self.collectives.plain_s(rows) + self.norm_s(rows)
        return self.fused_s(rows, sms) * (waited if mode == "fused" else 1.0)

    def norm_s(self, rows: int) -> float:
        """Residual add and norm, as a kernel of its own."""
        return rows * self.norm_row_s + self.kernel_s if rows else 0.0

    def fused_s(self, rows: int, sms: int | None) -> float:
        """A sum with residual and norm of 1/W of the rows."""
        norm_s = self.norm_s(-(-rows // self.world_size)) if self.fused_norm_shows else 0.0
        return self.collectives.fused_s(rows, sms) + norm_s

    def taken(self, rows: int, sum_s: float) -> float:
        """The share of the memory's bandwidth that a fused sum uses: partials in, hidden out, the shard's residual."""
        moved = rows * self.row_bytes * (2 + 2 / self.world_size)
        return min(MOST_TAKEN, moved / (sum_s * self.bandwidth)) if sum_s else 0.0


class Segment:
    """A part's kernels for one half or a whole batch. What SMs and bandwidth do not change is computed once."""

    def __init__(self, cost: Cost, part: Part, work: Work):
        rows, live = work.coming(part), work.going(part)
        self.empty = rows == 0
        if self.empty:
            return
        self.sms = cost.hardware.sms
        self.launch_s = part.kernels * cost.kernel_s
        self.moving_s = rows * part.row_bytes / cost.bandwidth
        self.gemms = [(gemm, rows, gemm.memory_s(rows)) for gemm in part.gemms]
        self.gemms += [(gemm, live, gemm.memory_s(live)) for gemm in part.live_gemms if live]
        # by rows, as if all attended alike: exact but for the last layer, where few are alive
        self.attending = live / rows if part.attends else 0.0
        self.attention = work.attention[part.window] if part.attends else AttentionTime()

    def seconds(self, sms: int, taken: float = 0.0) -> float:
        """On `sms` SMs, while the share `taken` of the memory's bandwidth is used by others."""
        if self.empty:
            return 0.0
        left = 1.0 - taken
        seconds = self.launch_s + self.moving_s / left
        for gemm, rows, memory_s in self.gemms:
            compute_s = gemm.compute_s(rows, sms)
            memory_s /= left
            seconds += compute_s if compute_s > memory_s else memory_s
        if self.attending:
            seconds += self.attention.seconds(self.sms / sms, taken) * self.attending
        return seconds
