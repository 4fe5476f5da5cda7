"""A half's attention by FlashInfer's kernels (tested with its calls recorded, and their maths done in torch).

They need a plan, made on the host from the lengths of a step's sequences, one for each window. It fixes what is
launched, so a step with them is not captured: CUDA graphs take our own kernels (engine/triton_attention.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tokenweave.comm.norm import Norm
from tokenweave.engine.tables import Tables
from tokenweave.kernels.rotary import rotate_and_write
from tokenweave.models.attention import Options, Span
from tokenweave.weave.request import Rows

WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
HALVES_KEPT = 4  # of two woven steps: when the next one is queued, the host is done with the earlier


@dataclass(frozen=True)
class PageTable:
    """FlashInfer's form of which queries see which keys: int32, on the host.

    starts [spans + 1]: of each span's queries. page_starts [spans + 1]: of its pages in `pages`.
    last_page_lens [spans]: keys on its last page, 1 to page_size. Its last query sees all its keys, each one before it
    one key less.
    """

    starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last_page_lens: Tensor


def page_table(spans: Sequence[Span], block_size: int, pinned: bool) -> PageTable:
    """A block is a page."""
    keys = [span.context + len(span) for span in spans]
    counts = [-(-count // block_size) for count in keys]
    columns = (
        [0, *accumulate(map(len, spans))],
        [0, *accumulate(counts)],
        [block for span, count in zip(spans, counts, strict=True) for block in span.block_table[:count]],
        [(count - 1) % block_size + 1 for count in keys],
    )
    return PageTable(*(torch.tensor(column, dtype=torch.int32, pin_memory=pinned) for column in columns))


class FlashInferBackend:
    reads_tables = True  # the kernel that writes keys and values does
    graphs = False

    def __init__(self, storage: Tensor, flashinfer: Any):
        """storage: [block, layer, 2, token, kv_head, head_dim]. flashinfer: the module."""
        self.storage = storage
        self.rows = storage.view(-1, storage.shape[4] * storage.shape[5])
        self.block_size = storage.shape[3]
        self.flashinfer = flashinfer
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=storage.device)
        self.recent: deque[FlashInferAttention] = deque()
        self.free: list[Plan] = []

    def __call__(self, spans: Sequence[Span], tables: Tables[Tensor] | None) -> FlashInferAttention:
        assert tables is not None
        self.recent.append(FlashInferAttention(self, spans, tables.slots))
        if len(self.recent) > HALVES_KEPT:
            self.free.extend(self.recent.popleft().plans.values())
        return self.recent[-1]

    def plan(self, spans: Sequence[Span], options: Options, heads: int) -> Plan:
        """A wrapper, planned for these spans."""
        kv_heads, head_dim = self.storage.shape[4:]
        cuda = self.storage.is_cuda
        table = page_table(spans, self.block_size, pinned=cuda)
        wrapper = self._wrapper()
        wrapper.plan(
            table.starts,
            table.page_starts,
            table.pages,
            table.last_page_lens,
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            head_dim_qk=head_dim,
            page_size=self.block_size,
            causal=True,
            sm_scale=options.scale,
            window_left=-1 if options.window is None else options.window - 1,  # keys before the query's own
            logits_soft_cap=options.softcap or 0.0,
            q_data_type=self.storage.dtype,
            kv_data_type=self.storage.dtype,
        )
        copied = torch.cuda.current_stream(self.storage.device).record_event() if cuda else None
        return Plan(wrapper, table, copied)

    def _wrapper(self) -> Any:
        """One whose plan has left the host, which a new plan overwrites there; another if there is none."""
        for plan in self.free:
            if plan.copied is None or plan.copied.query():
                self.free.remove(plan)
                return plan.wrapper
        return self.flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD")


@dataclass(frozen=True, eq=False)
class Plan:
    """table: kept until its copy to the device is done. copied: recorded behind that copy; None on a CPU."""

    wrapper: Any
    table: PageTable
    copied: Any


class FlashInferAttention:
    """See PagedAttention, whose maths it is. A plan for each window, made when its first layer comes."""

    def __init__(self, backend: FlashInferBackend, spans: Sequence[Span], slots: Tensor):
        self.backend = backend
        self.slots = slots
        self.spans = spans
        self.tails = [span.narrow(len(span) - span.wanted, len(span)) for span in spans if span.wanted]
        self.plans: dict[tuple[Options, bool], Plan] = {}

    def __call__(
        self,
        layer: int,
        qk: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        options: Options,
        rows: Rows | None = None,
        norms: tuple[Norm, Norm] | None = None,
    ) -> Tensor:
        cache, heads = self.backend, qk.shape[1] - v.shape[1]
        q = rotate_and_write(qk, v, *rotary, self.slots, cache.rows, layer, cache.block_size, heads, norms)
        tail = rows is not None
        if rows is not None:
            q = q.index_select(0, rows.index)
        if len(q) == 0:
            return q.flatten(1)
        keys, values = cache.storage[:, layer, 0], cache.storage[:, layer, 1]
        return self._planned(options, tail, heads).run(q, (keys, values)).flatten(1)

    def _planned(self, options: Options, tail: bool, heads: int) -> Any:
        if (options, tail) not in self.plans:
            self.plans[options, tail] = self.backend.plan(self.tails if tail else self.spans, options, heads)
        return self.plans[options, tail].wrapper
