"""Pairwise coverage: a short list of combinations in which every pair of values of any two axes occurs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def everything(axes: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]) -> list[Case]:
    """The full product, without what is not allowed."""
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [case for case in cases if allowed(case)]


def pairwise(axes: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]) -> list[Case]:
    """Greedily: always the allowed combination that covers the most pairs not seen so far. Deterministic."""
    candidates = [(case, pairs(case)) for case in everything(axes, allowed)]
    missing = set().union(*(found for _, found in candidates))
    chosen = []
    while missing:
        case, found = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        chosen.append(case)
        missing -= found
    return chosen


def pairs(case: Case) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(sorted(case.items()), 2))
