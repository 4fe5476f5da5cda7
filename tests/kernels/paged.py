"""Half attentions on tables, as `Texts` takes them: padded to more tokens and spans than there are, or exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenweave.engine.attention import Backend
from tokenweave.engine.batch import Batch, Span
from tokenweave.engine.tables import Capacity, Tables, capacity_of, tables_of
from tokenweave.models.attention import Options
from tokenweave.models.rope import rotate
from tokenweave.weave.request import Rows

Open = Callable[[torch.Tensor], Backend]


@dataclass(frozen=True)
class Padding:
    """Room that a half's tables have and do not need."""

    tokens: int = 0
    rows: int = 0
    spans: int = 0
    blocks: int = 0
    mixed: bool = False  # room for spans of one token and of several, whatever there is


EXACT = Padding()


def tables_on(
    spans: Sequence[Span], storage: torch.Tensor, padding: Padding = EXACT
) -> tuple[Capacity, Tables[torch.Tensor]]:
    """(what exactly the spans need, their tables on the storage's device)."""
    layers, block_size = storage.shape[1], storage.shape[3]
    exact = capacity_of(Batch(tuple(spans)), block_size)
    room = replace(
        exact,
        tokens=exact.tokens + padding.tokens,
        rows=exact.rows + padding.rows,
        spans=exact.spans + padding.spans,
        blocks=exact.blocks + padding.blocks,
        **({"shortest": 1, "longest": max(2, exact.tokens + padding.tokens)} if padding.mixed else {}),
    )
    host = tables_of(Batch(tuple(spans)), room, layers, block_size)
    arrays = {
        name: getattr(host, name) for name in ("slots", "query_starts", "tail_starts", "kv_lengths", "block_tables")
    }
    return exact, Tables(room, **{name: torch.from_numpy(array).to(storage.device) for name, array in arrays.items()})


class Padded:
    """Calls a half's attention with rows of NaN for padding, expects zeros for them, and returns the others."""

    def __init__(self, backend: Backend, spans: Sequence[Span], storage: torch.Tensor, padding: Padding):
        self.exact, tables = tables_on(spans, storage, padding)
        self.room = tables.capacity
        self.wanted = Batch(tuple(spans)).wanted_rows()
        self.attention = backend(spans, tables)

    def __call__(
        self, layer: int, qk: torch.Tensor, v: torch.Tensor, rotary: Any, options: Options, rows: Rows | None = None
    ) -> torch.Tensor:
        qk, v, cos, sin = (pad(x, self.room.tokens) for x in (qk, v, *rotary))
        count = self.exact.tokens
        if rows is not None:
            assert rows.host == self.wanted
            count, index = self.exact.rows, torch.zeros(self.room.rows, dtype=torch.long, device=v.device)
            index[:count] = rows.index
            rows = Rows(rows.host, index)
        attended = self.attention(layer, qk, v, (cos, sin), options, rows)
        assert not attended[count:].any(), "padding is not zero"
        return attended[:count]


def pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((x, x.new_full((rows - len(x), *x.shape[1:]), float("nan"))))


class PaddedBackend:
    """attend of `Texts`."""

    def __init__(self, open: Open, padding: Padding = EXACT):
        self.open, self.padding = open, padding

    def __call__(self, spans: Sequence[Span], storage: torch.Tensor) -> Padded:
        return Padded(self.open(storage), spans, storage, self.padding)


def rotate_and_write(qk, v, cos, sin, slots, rows, layer, block_size, heads, norms=None) -> torch.Tensor:
    """In torch what the kernel of that name does, which takes the interpreter longer than all attention."""
    rotated, key = rotate(qk, (cos, sin)), slots + 2 * layer * block_size
    written = slots >= 0
    rows[key[written]] = rotated[written, heads:].flatten(1)
    rows[key[written] + block_size] = v[written].flatten(1)
    return rotated[:, :heads]
