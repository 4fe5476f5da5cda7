"""Triton kernels on emulated tensors: a launch is checked as Triton's launcher checks it, and then computed in torch
(references.py), in Triton's interpreter, or by both, which must agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.emulated.device import CudaTensor, Device
from tests.emulated.references import REFERENCES
from tests.kernels.interpreter import mend_loops
from tokenweave.weave.accesses import byte_range

LARGEST_GRID = (2**31 - 1, 65535, 65535)
Kernel = Callable[..., None]


class Launch:
    """One launch, as an operator of the tensors that hold its arguments' values: see tokenweave.weave.accesses."""

    namespace = "triton"

    def __init__(self, name: str, writes: tuple[str, ...], run: Kernel, arguments: dict[str, Any]):
        """arguments: by name, all; tensors come anew with each call. writes: which of them the kernel writes."""
        self._opname = name
        self.run = run
        self.tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        self.others = {name: value for name, value in arguments.items() if name not in self.tensors}
        aliases = [SimpleNamespace(is_write=True) if name in writes else None for name in self.tensors]
        pairs = zip(self.tensors, aliases, strict=True)
        listed = [SimpleNamespace(name=name, alias_info=alias) for name, alias in pairs]
        self._schema = SimpleNamespace(arguments=listed, returns=[])

    def __call__(self, *tensors: Tensor) -> None:
        with _disable_current_modes():
            self.run(**dict(zip(self.tensors, tensors, strict=True)), **self.others)

    def __str__(self) -> str:
        return f"triton.{self._opname}"


@contextmanager
def launches_on(device: Device, by: str) -> Iterator[None]:
    """Inside, launches go by way of the device's queue. by: "torch" | "interpreter" | "both"."""
    from triton.runtime.interpreter import GridExecutor

    mend_loops()
    interpret = GridExecutor.__call__

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        name, arguments = executor.fn.__name__, bound(executor.fn, args, kwargs)
        grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
        check(grid, arguments)
        if 0 in grid:
            return
        writes, run = REFERENCES.get(name, (tuple(arguments), None))
        interpreted: Kernel = lambda **given: interpret(executor, **given)  # noqa: E731
        if run is None or by == "interpreter":
            run = interpreted
        elif by == "both":
            run = compared(run, interpreted, writes)
        device.run(Launch(name, writes, run, arguments), tuple(filter(is_tensor, arguments.values())), {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        yield


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def bound(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name. KeyError for a keyword that is neither a parameter nor an option of Triton's compiler for CUDA."""
    from triton.backends.nvidia.compiler import CUDAOptions

    signature = inspect.signature(kernel)
    if unknown := kwargs.keys() - signature.parameters.keys() - {field.name for field in fields(CUDAOptions)}:
        raise KeyError(f"Keyword argument {', '.join(unknown)} was specified but unrecognised")
    given = {name: value for name, value in kwargs.items() if name in signature.parameters}
    return dict(signature.bind(*args, **given).arguments)


def check(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """ValueError, where Triton or CUDA would refuse the launch."""
    for size, most in zip(grid, LARGEST_GRID, strict=False):
        if type(size) is not int or not 0 <= size <= most:
            raise ValueError(f"a grid of {grid}: CUDA takes whole numbers up to {LARGEST_GRID}")
    for place, value in enumerate(arguments.values()):
        if is_tensor(value) and not isinstance(value, CudaTensor):
            raise ValueError(f"Pointer argument (at {place}) cannot be accessed from Triton (cpu tensor?)")


def compared(run: Kernel, interpreted: Kernel, writes: tuple[str, ...]) -> Kernel:
    """`run`, once `interpreted` has given the same on copies of all tensors, and written no others."""

    def both(**arguments: Any) -> None:
        copies = copied(arguments)
        with watched(copies) as written:
            interpreted(**copies)
        run(**arguments)
        stated = {addresses(copies[name]) for name in writes if is_tensor(copies[name])}
        unstated = {name for name in written if addresses(copies[name]) not in stated}
        assert not unstated, f"{run.__name__} does not say that it writes {unstated}"
        for name in written:
            torch.testing.assert_close(arguments[name], copies[name], rtol=1e-5, atol=1e-5, equal_nan=True)

    return both


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """With copies of tensors, which share memory where these do."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage() for value in arguments.values() if is_tensor(value)
    }
    clones = {address: storage.clone() for address, storage in storages.items()}

    def copy(value: Tensor) -> Tensor:
        storage = clones[value.untyped_storage().data_ptr()]
        return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())

    return {name: copy(value) if is_tensor(value) else value for name, value in arguments.items()}


@contextmanager
def watched(arguments: dict[str, Any]) -> Iterator[set[str]]:
    """The names of those that the kernel which is interpreted inside writes. IndexError where it leaves all of them."""
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    places = {name: addresses(value) for name, value in arguments.items() if is_tensor(value)}
    written: set[str] = set()

    def touched(pointers: Any, mask: Any) -> set[str]:
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not used.size:
            return set()
        first, last = int(used.min()), int(used.max()) + np.dtype(_get_np_dtype(pointers.get_element_ty())).itemsize
        found = {name for name, (start, stop) in places.items() if start <= first and last <= stop}
        if not found:
            raise IndexError(f"a kernel touches {first:#x} to {last:#x}, in no tensor that it was given")
        return found

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_load(self: Any, pointers: Any, mask: Any, *more: Any, **options: Any) -> Any:
        touched(pointers, mask)
        return load(self, pointers, mask, *more, **options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any, **options: Any) -> Any:
        written.update(touched(pointers, mask))
        return store(self, pointers, value, mask, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        yield written


def addresses(tensor: Tensor) -> tuple[int, int]:
    """Of its first byte, and behind its last."""
    place = byte_range(tensor)
    return place.storage + place.first, place.storage + place.last
