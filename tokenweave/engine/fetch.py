"""Fetch: what the host reads from the device, and the one place where it waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenweave.waiting import wait_until


class Fetch:
    """Tensors of one device on their way to the host, behind all that is queued there when this is made.

    What is queued afterwards is not waited for. On a CPU the tensors are there already.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        device: torch.device,
        look: Callable[[], None],
        timeout_s: float,
        what: str = "a step",
    ):
        """look: called while waiting, and once more at the end; raises where a launch gave up on a rank.

        what: is waited for, in the words of the error after `timeout_s`.
        """
        self.look = look
        self.what = what
        self.timeout_s = timeout_s
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        self.tensors = [on_its_way(tensor) for tensor in tensors]
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The tensors, on the host. Raises what `look` raises, and TimeoutError after `timeout_s` without either."""
        done = self.done.query if self.done is not None else lambda: True
        wait_until(done, self.timeout_s, self.look, self.what)
        return self.tensors


def on_its_way(tensor: Tensor) -> Tensor:
    """A copy on the host that is valid once what is queued now is done; of a tensor of the host itself, that."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
