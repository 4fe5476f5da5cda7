"""Noting a step's requests, to submit them again without the step: communication alone, where a kernel communicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Noted = list[tuple[dict[str, Any], list[Any]]]  # by channel: how it was opened, and the requests that it served


class NotingCommunicator:
    """The runtime's own; what its channels are asked for is noted."""

    def __init__(self, communicator: Any):
        self.communicator = communicator
        self.noted: Noted = []

    def open(self, rows: int, half: int, lane: Any, form: str, sms: Any) -> Any:
        requests: list[Any] = []
        arguments = {"rows": rows, "half": half, "lane": lane, "form": form, "sms": sms}
        self.noted.append((arguments, requests))
        return NotingChannel(self.communicator.open(**arguments), requests)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.communicator, name)


class NotingChannel:
    def __init__(self, channel: Any, requests: list[Any]):
        self.channel = channel
        self.requests = requests

    def reduce(self, request: Any) -> Any:
        self.requests.append(request)
        return self.channel.reduce(request)

    def gather(self, request: Any) -> Any:
        self.requests.append(request)
        return self.channel.gather(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.channel, name)


def note_requests(runner: Any, run: Callable[[], Any]) -> Callable[[], None]:
    """Let `run` make one step that is not split, and return what repeats its sums alone on this rank."""
    own = runner.communicator
    runner.communicator = noting = NotingCommunicator(own)
    try:
        run()
    finally:
        runner.communicator = own

    @torch.inference_mode()  # as was the step
    def replay() -> None:
        runner.communicator = own
        for arguments, requests in noting.noted:
            channel = own.open(**arguments)
            channel.partial(arguments["rows"]).zero_()  # sums in place must not grow from run to run
            for request in requests:
                request.submit(channel).wait()
        runner.synchronize()

    return replay
