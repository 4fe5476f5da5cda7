"""A half's attention by Triton kernels of our own. All that varies between steps is read from tables on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenweave.comm.norm import Norm
from tokenweave.engine.tables import Tables
from tokenweave.kernels.attention import Pages, paged_attention
from tokenweave.kernels.attention_sizes import Gpu
from tokenweave.kernels.rotary import rotate_and_write
from tokenweave.models.attention import Options, Span
from tokenweave.weave.request import Rows

INTERPRETED = Gpu(sms=4, capability=90)  # as if, where Triton's kernels are interpreted on a CPU


def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_properties(device).multi_processor_count, 10 * major + minor)


class TritonBackend:
    reads_tables = True
    graphs = True

    def __init__(self, storage: Tensor, gpu: Gpu):
        """storage: [block, layer, 2, token, kv_head, head_dim]."""
        self.storage = storage
        self.rows = storage.view(-1, storage.shape[4] * storage.shape[5])
        self.block_size = storage.shape[3]
        self.gpu = gpu

    def __call__(self, spans: Sequence[Span], tables: Tables[Tensor] | None) -> TritonAttention:
        assert tables is not None
        return TritonAttention(self, tables)


class TritonAttention:
    """See PagedAttention, whose maths it is. Tokens of padding are attended to as zeros, and not written."""

    def __init__(self, backend: TritonBackend, tables: Tables[Tensor]):
        room = tables.capacity
        common = (tables.kv_lengths, tables.block_tables)
        self.backend = backend
        self.slots = tables.slots
        self.whole = Pages(tables.query_starts, *common, room.shortest, room.longest)
        self.tail = Pages(tables.tail_starts, *common, 1, room.most_wanted)

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
        pages = self.whole
        if rows is not None:
            q, pages = q.index_select(0, rows.index), self.tail
        keys, values = cache.storage[:, layer, 0], cache.storage[:, layer, 1]
        return paged_attention(q, keys, values, pages, options.scale, options.window, options.softcap, cache.gpu)
