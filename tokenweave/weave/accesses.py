"""Accesses: which bytes an operator reads and writes, as the dispatcher shows it on its way to a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Report = Callable[[str, list[Tensor], list[Tensor]], None]  # (operator, reads, writes)

# These take a tensor for its shape, dtype and device alone.
SHAPE_ONLY = frozenset(f"{name}_like" for name in ("empty", "zeros", "ones", "full")) | frozenset(
    f"new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")
)
# c10d's schemas do not say what is written, so it stands here.
C10D_WRITES: dict[str, tuple[str, ...]] = {
    "send": (),
    "recv_": ("tensors",),
    "broadcast_": ("tensors",),
    "allreduce_": ("tensors",),
    "_allgather_base_": ("output_tensor",),
    "_reduce_scatter_base_": ("output_tensor",),
    "barrier": (),
}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes first..last (exclusive) of the storage at address `storage`."""

    storage: int
    first: int
    last: int

    def overlaps(self, other: ByteRange) -> bool:
        return self.storage == other.storage and self.first < other.last and other.first < self.last

    def __str__(self) -> str:
        return f"bytes {self.first}-{self.last} of storage {self.storage:#x}"


def byte_range(tensor: Tensor) -> ByteRange:
    """The range that bounds a tensor's elements; what lies between those of a strided tensor counts as its own."""
    storage = storage_address(tensor)
    first = tensor.data_ptr() - storage
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return ByteRange(storage, first, first + (steps + 1) * tensor.element_size() if tensor.numel() else first)


class AccessMode(TorchDispatchMode):
    """While entered, reports what every operator of this thread reads and writes."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.report(str(func), *accesses(func, args, kwargs or {}, result))
        return result


def accesses(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(reads, writes) of one call. A view touches nothing; a result in memory of its own is written."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for value, written in given_to(func, args, kwargs):
        (writes if written else reads).extend(tensors_in(value))
    given = {storage_address(tensor) for tensor in (*reads, *writes)}
    returned = list(tensors_in(result))
    if func._opname in SHAPE_ONLY:
        reads = []
    elif is_view(func):
        viewed = {storage_address(tensor) for tensor in returned}
        reads = [tensor for tensor in reads if storage_address(tensor) not in viewed]
    return reads, writes + [tensor for tensor in returned if storage_address(tensor) not in given]


def given_to(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """(value, whether it is written) of every argument."""
    listed = c10d_writes(func) if func.namespace == "c10d" else ()
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        yield value, argument.name in listed or (argument.alias_info is not None and argument.alias_info.is_write)


def c10d_writes(func: Any) -> tuple[str, ...]:
    name = func._opname
    if name not in C10D_WRITES:
        raise NotImplementedError(f"what {func} writes is not known; list it in tokenweave.weave.accesses.C10D_WRITES")
    return C10D_WRITES[name]


def is_view(func: Any) -> bool:
    """Whether a result may be another view of an argument; where it was copied instead, the addresses tell."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument or a result: itself, in lists and tuples, in the fields of a record."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(tuple(vars(value).values()))
