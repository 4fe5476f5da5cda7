"""Scheduler: which sequences the next step computes, and how many tokens of each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass

from tokenweave.engine.batch import INT32
from tokenweave.engine.kv_cache import BlockPool
from tokenweave.engine.policy import Policy
from tokenweave.engine.sequence import Sequence


@dataclass(slots=True)  # as Span
class Scheduled:
    sequence: Sequence
    count: int  # tokens to compute in this step


class Scheduler:
    """Continuous batching: every step takes up what runs, then starts what waits, within a budget of tokens."""

    def __init__(self, pool: BlockPool, max_num_batched_tokens: int, max_num_seqs: int, policy: Policy | None = None):
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.policy = policy or Policy()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step, its blocks taken. Never empty while there is work."""
        waiting = len(self.waiting)
        scheduled = self._continue_running()
        budget = self.max_num_batched_tokens - sum(one.count for one in scheduled)
        if len(self.waiting) == waiting:  # else blocks are short: one that was preempted must not come back at once
            scheduled += self._start_waiting(budget)
        if self.busy and not scheduled:
            raise RuntimeError("nothing can be scheduled although requests wait; this is a bug in the scheduler")
        return scheduled

    def _continue_running(self) -> list[Scheduled]:
        scheduled: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        for sequence in list(self.running):
            if budget == 0 or not sequence.block_table:  # without blocks: it was preempted for one before it
                continue
            count = 1 if sequence.left == 1 else self._count(sequence, budget)  # with one left there is no choice
            if self._make_room(sequence, count, scheduled):
                scheduled.append(Scheduled(sequence, count))
                budget -= count
        return scheduled

    def _make_room(self, sequence: Sequence, count: int, scheduled: Items[Scheduled]) -> bool:
        """Take blocks for `count` more tokens, preempting others if need be; False if `sequence` itself had to go.

        The one that has run longest stays, so that it ends, and so do all others in turn, whatever the policy chooses.
        """
        missing = self.pool.blocks_for(sequence.computed + count) - len(sequence.block_table)
        while missing > self.pool.num_free:
            done = [one.sequence for one in scheduled]
            victim = self._choose("preempt", [one for one in self.running[1:] if one not in done])
            self.preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_table.extend(self.pool.take(missing))
        return True

    def _start_waiting(self, budget: int) -> list[Scheduled]:
        scheduled: list[Scheduled] = []
        computing: set[bytes] = set()  # digests of the first blocks that this step computes
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self._choose("order", self.waiting)
            cached = self._cached(sequence)
            first = sequence.digests[len(cached) : len(cached) + 1]
            if not computing.isdisjoint(first):
                break  # what it begins with is cached after this step: the n completions of a prompt compute it once
            computing.update(first)
            # Room for all its tokens, not only for a first chunk, or it would soon be preempted again.
            fresh = self.pool.blocks_for(len(sequence.tokens)) - len(cached)
            if self.pool.cost(cached, fresh) > self.pool.num_free:
                break
            count = self._start(sequence, cached, budget)
            scheduled.append(Scheduled(sequence, count))
            budget -= count
        return scheduled

    def _start(self, sequence: Sequence, cached: list[int], budget: int) -> int:
        """Make a waiting sequence run, on top of blocks that are cached; returns how many tokens it computes first."""
        sequence.computed = len(cached) * self.pool.block_size
        count = self._count(sequence, budget)
        self.pool.reuse(cached)
        sequence.block_table, sequence.published = array(INT32, cached), len(cached)
        self._make_room(sequence, count, [])
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return count

    def _choose(self, name: str, choices: list[Sequence]) -> Sequence:
        """What the policy `name` chooses. Raises ValueError when it chooses none of the choices."""
        if not choices:
            raise RuntimeError("one sequence alone does not fit into the cache; it should have been refused")
        chosen = getattr(self.policy, name)(choices)
        if chosen not in choices:
            raise ValueError(f"the {name} policy returned none of the {len(choices)} sequences that it may choose from")
        return chosen

    def _count(self, sequence: Sequence, budget: int) -> int:
        """What the budget policy gives. Raises ValueError when that is nothing, or more than there is."""
        most = min(sequence.left, budget)
        count = self.policy.budget(sequence, budget)
        if not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(f"the budget policy returned {count!r}; expected a whole number from 1 to {most}")
        return count

    def _cached(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning already; the last token is always computed, for its logits."""
        if not self.pool.caching:
            return []
        usable = (len(sequence.tokens) - 1) // self.pool.block_size
        return self.pool.match(sequence.digest(self.pool.block_size)[:usable])

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue; what was computed is computed again later, or found in the prefix cache."""
        self.running.remove(sequence)
        sequence.release(self.pool)
        sequence.preemptions += 1
        self.waiting.append(sequence)

    def launched(self, scheduled: Items[Scheduled]) -> None:
        """A step is on its way: to all that come after it, what it computes is in the cache.

        A sequence for which it draws the last token has ended here; its blocks may be another's from the next step on.
        """
        for one in scheduled:
            one.sequence.advance(one.count)
            one.sequence.publish(self.pool)
            if one.sequence.full:
                self.finish(one.sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it was; perhaps it was known to."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
                break
        sequence.release(self.pool)
