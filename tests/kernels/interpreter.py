"""What runs in the process where Triton's kernels are interpreted (the fixture `interpreted` of conftest.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mend_loops()
    return fn(*args, **kwargs)


@functools.cache
def mend_loops() -> None:
    """Triton 3.6 takes a loop's bound from an array of one element as it is, which NumPy 2.4 no longer allows."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_and_mend
