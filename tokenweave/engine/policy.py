"""Policy: the scheduler's three decisions, as small functions that can be swapped."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenweave.engine.sequence import Sequence


def first_come(waiting: Items[Sequence]) -> Sequence:
    """Order: who starts next."""
    return min(waiting, key=lambda sequence: sequence.arrival)


def whole_budget(sequence: Sequence, budget: int) -> int:
    """Budget: how many tokens a sequence gets of those left in the step. Long prompts are computed in chunks."""
    return min(sequence.left, budget)


def last_come(candidates: Items[Sequence]) -> Sequence:
    """Preempt: who gives its blocks back. The latest, and of one request's completions the one that started last."""
    return max(reversed(candidates), key=lambda sequence: sequence.arrival)


@dataclass(frozen=True)
class Policy:
    """The three decisions that can be swapped, each a pure function.

    order and preempt choose one of the sequences they are given. budget, given a sequence and the tokens left in the
    step, is a whole number from 1 to what is left of either. Any such choices come to an end: see
    `Scheduler._make_room`.
    """

    order: Callable[[Items[Sequence]], Sequence] = first_come
    budget: Callable[[Sequence, int], int] = whole_budget
    preempt: Callable[[Items[Sequence]], Sequence] = last_come
