"""Link: a simulated wire of a given speed under the comm lane, for tests and perf. Always label what it yields so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenweave.comm.transport import Finish, Transport


@dataclass(frozen=True)
class Link:
    """A wire that each collective holds for `latency + bytes sent by this rank / bandwidth`, or longer if it is slower.

    Measured figures under a Link are simulated: the bytes are really exchanged (over loopback, say), then the lane
    sleeps until the simulated wire would have been done.
    """

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth_bytes_per_s > 0 or not self.latency_s >= 0:
            raise ValueError(
                f"a link needs bandwidth_bytes_per_s > 0 and latency_s >= 0, got {self.bandwidth_bytes_per_s} "
                f"and {self.latency_s}"
            )

    def seconds(self, sent_bytes: int) -> float:
        return self.latency_s + sent_bytes / self.bandwidth_bytes_per_s


class PacedTransport(Transport):
    """Another transport, slowed down to a `Link`."""

    def __init__(self, transport: Any, link: Link):
        self.transport = transport
        self.link = link
        self.rank, self.world_size = transport.rank, transport.world_size

    def all_reduce(self, total: Tensor) -> int:
        return self._paced(self.transport.all_reduce, total)

    def reduce_scatter(self, partial: Tensor, owners: list[range], out: Tensor) -> int:
        return self._paced(self.transport.reduce_scatter, partial, owners, out)

    def all_gather_rows(self, rows: Tensor, owners: list[range]) -> int:
        return self._paced(self.transport.all_gather_rows, rows, owners)

    def sum_rows(self, partial: Tensor, owners: list[range], total: Tensor, finish: Finish, out: Tensor) -> int:
        return self._paced(self.transport.sum_rows, partial, owners, total, finish, out)

    def all_gather_columns(self, part: Tensor, outs: list[Tensor]) -> int:
        return self._paced(self.transport.all_gather_columns, part, outs)

    def close(self) -> None:
        self.transport.close()

    def _paced(self, collective: Any, *arguments: Any) -> int:
        start_s = time.perf_counter()
        sent_bytes = collective(*arguments)
        if sent_bytes:
            left_s = start_s + self.link.seconds(sent_bytes) - time.perf_counter()
            time.sleep(max(0.0, left_s))
        return sent_bytes
