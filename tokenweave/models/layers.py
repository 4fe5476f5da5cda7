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
    """x W^T + b, for x [rows, in] and weight [out, in]; written into `out` [rows, out] if given (then without bias)."""
    if by_onednn(x, weight):
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result if out is None else out.copy_(result)
    return F.linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether to compute by oneDNN's operator (the one that torch.compile takes) what torch leaves to MKL.

    That is fp32 on x86. On one core of an AMD EPYC with AVX-512, MKL does 112 GFLOP/s, which is what AVX2 allows, and
    oneDNN 260: it takes 0.4-0.6 of the time from 8 rows on, and 0.6-1.2 below, where small matrices gain nothing.
    Products of other dtypes go to oneDNN anyway.
    """
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and weight.numel() > 0
    return plain and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


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
        self.gated = gated_function(activation, place.device)
        parts = [("gate_proj", owned, intermediate_size), ("up_proj", owned, intermediate_size)]
        self.gate_up = ColumnLinear(place, hidden_size, parts, bias)
        self.down = RowLinear(place, "down_proj", owned, intermediate_size, hidden_size, bias)

    @property
    def bias(self) -> Tensor | None:
        return self.down.bias

    def __call__(self, x: Tensor, half: Any) -> Tensor:
        return self.down(self.gated(self.gate_up(x)), half.partial(len(x)))

    def loads(self, prefix: str) -> Iterator[Load]:
        yield from self.gate_up.loads(f"{prefix}.mlp")
        yield from self.down.loads(f"{prefix}.mlp")


def gated_function(activation: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """[rows, 2 * width] -> act(gate) * up, [rows, width], for gate and up side by side; on CUDA in one kernel.

    Raises ValueError for an activation that is not known.
    """
    act = activation_function(activation)
    if device.type == "cuda":
        from tokenweave.kernels.activation import KINDS
        from tokenweave.kernels.gated import gated

        return partial(gated, kind=KINDS[activation])
    return partial(apply_gated, act)


def apply_gated(act: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate).mul_(up)


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
