"""Run by test_function.py in a process whose libcuda is stub_driver.c: each step, then what it gave or raised."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch

from tokenweave.kernels import function, inspect_cubin, jit
from tokenweave.kernels.function import Function

assert jit, inspect_cubin
assert "cuda.bindings.nvrtc" not in sys.modules, "imported before it is needed"


class Argument(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("second", ctypes.c_uint64))


def main() -> None:
    torch.cuda.init = lambda: None
    torch.cuda.current_device = lambda: 3
    function.nvrtc_version = lambda: (13, 0)
    step("load", lambda: Function(b"\177ELF", "k", 1000))
    step("another arch", lambda: Function(b"other", "k"))
    step("another name", lambda: Function(b"\177ELF", "q"))
    step("too much shared", lambda: Function(b"\177ELF", "k", 10**6))
    loaded, one = Function(b"\177ELF", "k", 1000), (1, 1, 1)
    step("attributes", lambda: (loaded.registers, loaded.local_bytes, loaded.static_shared_bytes))
    step("argument bytes", lambda: loaded.argument_bytes)
    step("resident", lambda: loaded.max_resident_blocks(512, 65536))
    step("struct", lambda: loaded.launch((1, 2, 3), (4, 5, 6), 7, 0x8000, Argument(8, 9)))
    step("bytes", lambda: loaded.launch((1, 2, 3), (4, 5, 6), 7, 0, bytes(Argument(8, 9)), cooperative=True))
    step("size", lambda: loaded.launch(one, one, 0, 0, bytes(15)))
    step("too large", lambda: loaded.launch((720, 1, 1), one, 0, 0, Argument(), cooperative=True))
    step("no context", lambda: loaded.launch((201, 1, 1), one, 0, 0, Argument()))


def step(name: str, run: Callable[[], object]) -> None:
    print(f"-- {name}")
    try:
        print(run())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
