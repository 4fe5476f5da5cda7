"""Which part of which checkpoint tensor goes where, and the copying."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tokenweave.models.checkpoint import Checkpoint, Index
from tokenweave.models.shards import CheckpointError, open_shard

CHUNK_BYTES = 64 << 20

Where = tuple[str, Index] | tuple[str, Index, tuple[int, ...]]  # the fields of a Source


@dataclass(frozen=True)
class Source:
    """Values of a checkpoint: tensor `name` at `index`.

    index: ints and step-1 slices for the leading dimensions, as in `tensor[index]`; () is the whole tensor.
    shape: of the whole tensor, checked if given; without it a slice of a tensor that is too large passes unnoticed.
    """

    name: str
    index: Index = ()
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Load:
    """Fill `into` with tensor `name` of a checkpoint at `index`; `shape` is that of the whole tensor (see Source).

    into: a view of a parameter, of any float dtype, device and strides, and of the shape of `tensor[index]`.
    alternatives: other sources (name, index[, shape]) of the same values, for checkpoints laid out in another way; the
        first source that the checkpoint holds is read.
    """

    into: Tensor
    name: str
    index: Index = ()
    alternatives: tuple[Where, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source(self.name, self.index, self.shape), *(Source(*other) for other in self.alternatives))


@dataclass(frozen=True)
class Copy:
    """A Load found in a checkpoint: `box` bounds every dimension of the tensor, `into` has as many dimensions."""

    into: Tensor
    name: str
    box: tuple[slice, ...]
    file: Path
    itemsize: int

    @property
    def size_bytes(self) -> int:
        return self.into.numel() * self.itemsize


def load(loads: Iterable[Load], checkpoint: Checkpoint, progress: bool = False) -> None:
    """Fill every `into`, converting dtypes, file by file; a file is mapped while its tensors are copied.

    Everything is found and checked before the first byte is copied. Besides the destinations this takes at most
    CHUNK_BYTES of memory, plus clean pages of one mapped file, which the system takes back when it needs them.
    progress: show a bar, in bytes of the checkpoint, on a terminal. Raises CheckpointError.
    """
    copies = sorted((_find(wanted, checkpoint) for wanted in loads), key=lambda copy: copy.file)
    total_bytes, hidden = sum(copy.size_bytes for copy in copies), None if progress else True
    with tqdm(total=total_bytes, desc="loading weights", unit="B", unit_scale=True, disable=hidden) as bar:
        for file, group in groupby(copies, key=lambda copy: copy.file):
            with open_shard(file) as shard, torch.no_grad():
                for piece in (piece for copy in group for piece in _pieces(copy)):
                    piece.into.copy_(shard.get_slice(piece.name)[piece.box])
                    bar.update(piece.size_bytes)


def unused(loads: Iterable[Load], checkpoint: Checkpoint) -> list[str]:
    """The tensors that no load names, unexpected biases say. Rotary frequencies do not count: they are computed."""
    asked = {source.name for wanted in loads for source in wanted.sources}
    return [name for name in checkpoint.names if name not in asked and not name.endswith("rotary_emb.inv_freq")]


def _find(wanted: Load, checkpoint: Checkpoint) -> Copy:
    source = next((s for s in wanted.sources if s.name in checkpoint), wanted.sources[0])
    entry, dtype = checkpoint.entry(source.name), checkpoint.dtype(source.name)
    box, into = _box(source.index, entry.shape), _keep_dims(wanted.into, source.index)
    if (source.shape or entry.shape) != entry.shape or tuple(s.stop - s.start for s in box) != tuple(into.shape):
        raise CheckpointError(
            f"tensor {source.name!r} in {entry.file} has shape {list(entry.shape)}, expected "
            f"{_expected(source, wanted)}; check that config.json belongs to these weights"
        )
    return Copy(into, source.name, box, entry.file, dtype.itemsize)


def _expected(source: Source, wanted: Load) -> str:
    if source.shape or all(i == slice(None) for i in source.index):
        return str(list(source.shape or wanted.into.shape))
    at = ", ".join(f"{i.start or 0}:{i.stop or ''}" if isinstance(i, slice) else str(i) for i in source.index)
    return f"one with {list(wanted.into.shape)} at [{at}]"


def _box(index: Index, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """`index` as a slice with start and stop for every dimension of `shape`, cut off at its end."""
    full = (*index, *[slice(None)] * (len(shape) - len(index)))
    slices = [slice(i, i + 1) if isinstance(i, int) else i for i in full]
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape, strict=False))


def _keep_dims(into: Tensor, index: Index) -> Tensor:
    """`into` with a dimension of 1 for each that an int of `index` drops."""
    for dim in (dim for dim, i in enumerate(index) if isinstance(i, int)):
        into = into.unsqueeze(dim)
    return into


def _pieces(copy: Copy) -> Iterator[Copy]:
    """`copy` in parts of at most CHUNK_BYTES, by halving the first dimension that can be halved."""
    if copy.size_bytes <= CHUNK_BYTES or copy.into.numel() == 1:
        yield copy
        return
    dim = next(dim for dim, size in enumerate(copy.into.shape) if size > 1)
    middle = copy.into.shape[dim] // 2
    yield from _pieces(_narrow(copy, dim, 0, middle))
    yield from _pieces(_narrow(copy, dim, middle, copy.into.shape[dim]))


def _narrow(copy: Copy, dim: int, start: int, stop: int) -> Copy:
    first = copy.box[dim].start
    box = (*copy.box[:dim], slice(first + start, first + stop), *copy.box[dim + 1 :])
    return replace(copy, into=copy.into.narrow(dim, start, stop - start), box=box)
