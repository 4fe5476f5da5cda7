"""Conflicts: accesses to the same bytes, one of them a write, in no order by the clocks of their lanes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tokenweave.weave.accesses import ByteRange

Clock = Mapping[str, int]  # how far a lane has come, and how far it knows each other lane to have come


class Clocks:
    """A vector clock for each lane."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}

    def now(self, lane: str) -> Clock:
        return self._clocks.setdefault(lane, {lane: 1})

    def send(self, lane: str) -> Clock:
        """All that the lane did so far, for another lane to merge; what it does from here on is not part of it."""
        sent = self.now(lane)
        self._clocks[lane] = {**sent, lane: sent[lane] + 1}
        return sent

    def merge(self, lane: str, sent: Clock) -> None:
        """What the lane does from here on comes after what was sent."""
        known = self.now(lane)
        self._clocks[lane] = {name: max(known.get(name, 0), sent.get(name, 0)) for name in {**known, **sent}}


@dataclass(frozen=True, slots=True)
class Access:
    """One read or write. op: the operator; where: what the lane was at; clock: the lane's at that time."""

    lane: str
    op: str
    where: str
    bytes: ByteRange
    write: bool
    clock: Clock

    @property
    def epoch(self) -> int:
        return self.clock[self.lane]

    def __str__(self) -> str:
        return f"{self.op} on the {self.lane} lane ({self.where}) {'writes' if self.write else 'reads'} {self.bytes}"


@dataclass(frozen=True)
class Hazard:
    """Two accesses in conflict."""

    first: Access
    second: Access

    def __str__(self) -> str:
        return f"{self.first}, {self.second}, and nothing orders the two"


def find_hazards(accesses: Sequence[Access]) -> list[Hazard]:
    """All conflicts. `accesses`: those of one lane in the order in which they were made."""
    by_storage: dict[int, dict[str, list[Access]]] = defaultdict(lambda: defaultdict(list))
    for access in accesses:
        by_storage[access.bytes.storage][access.lane].append(access)
    return [
        Hazard(one, other)
        for lanes in by_storage.values()
        for some, others in combinations(lanes.values(), 2)
        for one, other in unordered(some, others)
        if (one.write or other.write) and one.bytes.overlaps(other.bytes)
    ]


def unordered(some: Sequence[Access], others: Sequence[Access]) -> Iterator[tuple[Access, Access]]:
    """The pairs of two lanes' accesses of which neither comes before the other.

    Along a lane its own epoch never falls, nor what it knows of another's; so those in no order with one access of
    `some` lie side by side in `others`, between the last that came before it and the first that comes after.
    """
    lane, other_lane = some[0].lane, others[0].lane
    epochs = [other.epoch for other in others]
    known = [other.clock.get(lane, 0) for other in others]
    for one in some:
        window = slice(bisect_right(epochs, one.clock.get(other_lane, 0)), bisect_left(known, one.epoch))
        yield from ((one, other) for other in others[window])
