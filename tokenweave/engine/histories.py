"""Histories: the tokens that penalties count, kept on each rank's device from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tokenweave.engine.sampling_row import History


class Histories:
    """tokens: int32 [slots, most], on the device. Every row says which of them it needs, and what is new among them:
    what is told twice does no harm, and what a slot held before its first row is not read.
    """

    def __init__(self, device: torch.device):
        self.tokens = torch.zeros(0, 0, dtype=torch.int32, device=device)

    def take_in(self, told: Sequence[History], on: Mapping[str, Tensor], previous: Tensor | None) -> None:
        """on: `history_arrays` of them on the device. previous: int64, the tokens of the step before."""
        self._make_room(1 + max(one.slot for one in told), max(one.length for one in told))
        if "new_tokens" in on:
            self.tokens[on["new_slots"], on["new_places"]] = on["new_tokens"].int()
        if "late_sources" in on:
            assert previous is not None  # or there was no step before
            self.tokens[on["late_slots"], on["late_places"]] = previous[on["late_sources"]].int()

    def read(self, slots: Tensor, length: int) -> Tensor:
        """The first `length` tokens of each slot, int64 [rows, length]; where a history is shorter, any token ids."""
        return self.tokens[:, :length].index_select(0, slots).long()

    def _make_room(self, slots: int, length: int) -> None:
        """At least; twice as much as before where it is not enough."""
        have = self.tokens
        if slots > have.shape[0] or length > have.shape[1]:
            rooms = (max(old, power_of_2(new)) for old, new in zip(have.shape, (slots, length), strict=True))
            self.tokens = have.new_zeros(*rooms)
            self.tokens[: have.shape[0], : have.shape[1]] = have


class Slots:
    """Rank 0's: which slots are free. The lowest is taken first, so that histories stay small."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.most = 0  # that were ever taken at once

    def take(self) -> int:
        if self.free:
            return heappop(self.free)
        self.most += 1
        return self.most - 1

    def give_back(self, slot: int) -> None:
        """Steps run in order: the next one may tell of other tokens in this slot."""
        heappush(self.free, slot)


def power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length() if least > 0 else 1


def history_arrays(told: Sequence[History]) -> dict[str, np.ndarray]:
    """What `take_in` and penalties need on the device."""
    arrays = {"histories": np.array([(one.slot, one.length, one.prompt_len) for one in told], np.int64)}
    if any(one.token_ids for one in told):
        counts = [len(one.token_ids) for one in told]
        arrays["new_slots"] = np.repeat([one.slot for one in told], counts)
        arrays["new_places"] = np.concatenate([np.arange(one.start, one.known) for one in told])
        arrays["new_tokens"] = np.fromiter(chain.from_iterable(one.token_ids for one in told), np.int64, sum(counts))
    late = [(one.slot, one.known, one.late) for one in told if one.late is not None]
    if late:
        names = ("late_slots", "late_places", "late_sources")
        arrays |= dict(zip(names, np.array(late, np.int64).T, strict=True))
    return arrays
