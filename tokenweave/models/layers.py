"""Tensor-parallel layers: each holds this rank's part of the weights and says what to load into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenweave.models.weights import Load
from tokenweave.shard import shard, shards

FEW_ROWS = 32


@dataclass(frozen=True)
class Place:
    """Where this rank stands, and what its weights are made of."""

    rank: int
    world_size: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` items; parts differ by at most one."""
        return shard(count, self.rank, self.world_size)


def as_slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b, for x [rows, in] and weight [out, in]; written into `out` [rows, out], if given (then without bias).

    A few rows on several CPU threads are computed as (W x^T)^T: BLAS then shares out the weight's rows over the
    threads: 0.6-0.9 of the time at 2-32 rows on 2 threads. On one thread, or with more rows, it gains nothing.
    """
    few = x.device.type == "cpu" and x.dtype == torch.float32 and 1 < len(x) <= FEW_ROWS
    if few and torch.get_num_threads() > 1:
        product = torch.mm(weight, x.t()).t()
        result = torch.empty(product.shape) if out is None else out
        return result.copy_(product) if bias is None else torch.add(product, bias, out=result)
    return F.linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)


class ColumnLinear:
    """Several linear layers of one input, merged; of each this rank holds a range of output rows. x W^T + b."""

    def __init__(self, place: Place, in_size: int, parts: Sequence[tuple[str, range, int]], bias: bool):
        """parts: for each layer its name, the rows this rank owns, and how many rows there are in all."""
        self.parts = parts
        rows = sum(len(owned) for _, owned, _ in parts)
        self.weight = place.empty(rows, in_size)
        self.bias = place.empty(rows) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in_size] -> [tokens, this rank's rows of all parts]."""
        return linear(x, self.weight, self.bias)

    def loads(self, prefix: str) -> Iterator[Load]:
        start = 0
        for name, owned, total in self.parts:
            into, index = slice(start, start + len(owned)), (as_slice(owned),)
            yield Load(self.weight[into], f"{prefix}.{name}.weight", index, shape=(total, self.weight.shape[1]))
            if self.bias is not None:
                yield Load(self.bias[into], f"{prefix}.{name}.bias", index, shape=(total,))
            start += len(owned)


class RowLinear:
    """A linear layer whose input is cut over the ranks: its output is a partial. The bias is added after the sum."""

    def __init__(self, place: Place, name: str, columns: range, in_size: int, out_size: int, bias: bool):
        self.name = name
        self.columns = columns
        self.shape = (out_size, in_size)
        self.weight = place.empty(out_size, len(columns))
        self.bias = place.empty(out_size) if bias else None

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """x: [tokens, this rank's columns]; writes the partial [tokens, out_size] into `out`, and returns it."""
        return linear(x, self.weight, out=out)

    def loads(self, prefix: str) -> Iterator[Load]:
        index = (slice(None), as_slice(self.columns))
        yield Load(self.weight, f"{prefix}.{self.name}.weight", index, shape=self.shape)
        if self.bias is not None:
            yield Load(self.bias, f"{prefix}.{self.name}.bias")


class Vocabulary:
    """This rank's rows of an embedding table or LM head. A vocabulary that W does not divide gives ragged shards."""

    def __init__(self, place: Place, size: int, hidden_size: int):
        self.owned = place.share(size)
        self.shape = (size, hidden_size)
        self.widths = tuple(map(len, shards(size, place.world_size)))
        self.weight = place.empty(len(self.owned), hidden_size)

    def embed(self, token_ids: Tensor, out: Tensor) -> Tensor:
        """[tokens] -> partial [tokens, hidden]: this rank's rows, zero for tokens that other ranks own."""
        if len(self.owned) == 0:
            return out.zero_()
        local = token_ids - self.owned.start
        foreign = (local < 0) | (local >= len(self.owned))
        torch.index_select(self.weight, 0, local.clamp(0, len(self.owned) - 1), out=out)
        return out.masked_fill_(foreign[:, None], 0.0)

    def logits(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, this rank's part of the vocabulary]."""
        return linear(x, self.weight)

    def loads(self, name: str) -> Iterator[Load]:
        yield Load(self.weight, name, (as_slice(self.owned),), shape=self.shape)


class Mlp:
    """down(act(gate(x)) * up(x)), the intermediate width cut over the ranks."""

    def __init__(self, place: Place, hidden_size: int, intermediate_size: int, activation: str, bias: bool):
        owned = place.share(intermediate_size)
        self.act = activation_function(activation)
        parts = [("gate_proj", owned, intermediate_size), ("up_proj", owned, intermediate_size)]
        self.gate_up = ColumnLinear(place, hidden_size, parts, bias)
        self.down = RowLinear(place, "down_proj", owned, intermediate_size, hidden_size, bias)

    @property
    def bias(self) -> Tensor | None:
        return self.down.bias

    def __call__(self, x: Tensor, half: Any) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate).mul_(up), half.partial(len(x)))

    def loads(self, prefix: str) -> Iterator[Load]:
        yield from self.gate_up.loads(f"{prefix}.mlp")
        yield from self.down.loads(f"{prefix}.mlp")


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Raises ValueError for a name that is not known."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "gelu_new": partial(F.gelu, approximate="tanh"),
    }
    if name not in functions:
        raise ValueError(f"the activation {name!r} is not supported; supported: {', '.join(functions)}")
    return functions[name]
