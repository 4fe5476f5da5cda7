"""Woven: a batch cut in two, at each of some cuts at once, its sums on each of some SM counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tokenweave.cost.cost import INSTANT_S, Cost
from tokenweave.cost.parts import SITES, Part, Request, Turn
from tokenweave.cost.work import Work


class Beside(NamedTuple):
    """A turn of both halves, seconds [counts, 2, cuts]: the segments alone on all SMs, [2, cuts], and beside the other
    half's request, which takes sum_s."""

    alone_s: np.ndarray
    beside_s: np.ndarray
    sum_s: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """Until both the segment and the request beside it are done."""
        left = 1.0 - self.sum_s / np.maximum(self.beside_s, INSTANT_S)  # of the segment, when the request is done
        return self.sum_s + np.maximum(left, 0.0) * self.alone_s

    @property
    def hidden_s(self) -> np.ndarray:
        """Of the request, while the segment computed."""
        return np.minimum(self.beside_s, self.sum_s)


class Woven:
    """Nothing is laid out on lanes. Strands take turns, first in, first out: a segment starts when the other half's
    segment before it and its own sum are done, and just then the other half's sum starts. So every segment runs beside
    one whole sum, from the start of both, and the next turn begins when the longer of them ends: a step is the sum of
    its turns, and a sum's SMs count in the two turns that it runs beside alone.

    work: of both halves, [2, cuts]. site_s: (after attention, after the MLP), the turns beside such sums, seconds by
    [counts, cuts]; last_s: what the second half's last request takes, with nothing beside it, [cuts].
    """

    def __init__(self, cost: Cost, work: Work, counts: Sequence[int], rough: bool = False):
        self.cost, self.work, self.counts, self.rough = cost, work, counts, rough
        self._shape = (len(counts), *work.rows.shape)
        self._sms = cost.slots(counts)
        self._requests: dict[Request, tuple[np.ndarray, np.ndarray]] = {}
        self._others: dict[object, tuple[np.ndarray, np.ndarray]] = {}
        self.site_s = self._by_site((turn, beside.seconds) for turn, beside in self.turns())
        self.last_s = self._request(cost.parts.blocks[-1].parts[-1])[0][0, 1]

    def best_s(self) -> np.ndarray:
        """Seconds of the device by cut, with the best SM counts."""
        attention_s, mlp_s = self.site_s
        return attention_s.min(axis=0) + mlp_s.min(axis=0) + self.last_s

    def best_counts(self, cut: int) -> tuple[int, int]:
        """The indices of the SM counts that are best for the cut of that index."""
        attention_s, mlp_s = self.site_s
        return int(attention_s[:, cut].argmin()), int(mlp_s[:, cut].argmin())

    def device_s(self, cut: int, attention: int, mlp: int) -> float:
        """By indices."""
        attention_s, mlp_s = self.site_s
        return float(attention_s[attention, cut] + mlp_s[mlp, cut] + self.last_s[cut])

    def hidden_s(self, cut: int, attention: int, mlp: int) -> float:
        """Of requests, while the other half computed. By indices."""
        attention_s, mlp_s = self._by_site((turn, beside.hidden_s) for turn, beside in self.turns())
        return float(attention_s[attention, cut] + mlp_s[mlp, cut])

    def turns(self) -> Iterator[tuple[Turn, Beside]]:
        """Every kind of turn."""
        for turn in self.cost.parts.turns:
            sum_s, crowding = self._other(turn)
            if self.rough:
                seconds = self.cost.roughly_s(turn.part, self.work)
            else:
                seconds = self.cost.segment_s(turn.part, self.work, self._sms, crowding)
            if self.cost.world_size == 1:  # nothing to send: the norm stays on the compute lane
                seconds = seconds + self.cost.request_s(turn.part, self.work, "weave")
            yield turn, Beside(seconds[0], np.maximum(seconds[1:], seconds[0]), sum_s)  # never faster

    def _by_site(self, turns: Iterable[tuple[Turn, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """[counts, 2, cuts] of every turn, added up by the site of the sum that each half's segment runs beside."""
        sites = np.zeros((2, self._shape[0], self._shape[2]))
        for turn, seconds in turns:
            times_s = seconds if turn.times == 1 else turn.times * seconds
            sites[SITES[(turn.before or turn.part).site]] += times_s[:, 0]
            sites[SITES[turn.part.site]] += times_s[:, 1]
        return sites[0], sites[1]

    def _other(self, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
        """(seconds of the requests beside a turn, the second half's before it and the first half's own; what they make
        the memory slower by, 1 in front for alone)."""
        key = turn.before and turn.before.request, turn.part.request
        known = self._others.get(key)
        if known is None:
            sum_s, crowding = np.zeros(self._shape), np.ones((self._shape[0] + 1, *self._shape[1:]))
            sum_s[:, 1], crowding[1:, 1] = (each[:, 0] for each in self._request(turn.part))
            if turn.before is not None:
                sum_s[:, 0], crowding[1:, 0] = (each[:, 1] for each in self._request(turn.before))
            known = self._others[key] = sum_s, crowding
        return known

    def _request(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, what it makes the memory slower by) of the request that ends a part, [counts, 2, cuts]."""
        known = self._requests.get(part.request)
        if known is None:
            sum_s, crowding = np.zeros(self._shape), np.ones(self._shape)
            if self.cost.world_size > 1:
                sum_s[:] = self.cost.woven_request_s(part, self.work, self.counts)
                crowding = crowding if self.rough else crowding * self.cost.crowding(part, self.work, sum_s)
            known = self._requests[part.request] = sum_s, crowding
        return known
