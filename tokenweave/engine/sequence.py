"""Sequence: one text being generated, and how far it is."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from tokenweave.engine.batch import INT32, Span
from tokenweave.engine.kv_cache import BlockPool, block_digests


@dataclass(eq=False)
class Sequence:
    """tokens: prompt and output, as far as they are known here. computed: how many have their keys and values in the
    cache. late: how many more there are, drawn by steps in flight, whose ids the device alone knows yet.

    Steps run in order: what a step computes or draws is there for every step that is launched after it.
    """

    prompt: Items[int]
    arrival: int  # requests in order of arrival
    salt: int = 0  # sequences with different salts share no cached prefix
    max_tokens: int | None = None  # of output; None: nobody knows before it ends
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    late: int = 0
    drawn_at: int = 0  # where its token is among those that the step before draws, if one is late
    block_table: array[int] = field(default_factory=lambda: array(INT32))
    published: int = 0  # blocks whose prefix others may take up
    digests: list[bytes] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def length(self) -> int:
        """Tokens there are, late ones among them."""
        return len(self.tokens) + self.late

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) + self.late - self.computed

    @property
    def full(self) -> bool:
        """It has all the tokens that it may have."""
        return self.max_tokens is not None and len(self.tokens) + self.late >= len(self.prompt) + self.max_tokens

    def span(self, count: int) -> Span:
        """The next `count` tokens to compute; 0 stands for a late one."""
        stop = self.computed + count
        known = tuple(self.tokens[self.computed : stop])
        tokens = known if len(known) == count else known + (0,) * (count - len(known))
        wanted = 1 if count == self.left else 0
        return Span(tokens, self.computed, self.block_table[:], len(self.prompt), wanted)

    def advance(self, count: int) -> None:
        """A step that computes `count` tokens more is launched; after the last of them it draws another."""
        self.computed += count
        if self.left == 0:
            self.late += 1

    def digest(self, block_size: int) -> list[bytes]:
        """A digest for each full block of the tokens that are known."""
        self.digests = block_digests(self.tokens, block_size, self.salt, self.digests)
        return self.digests

    def publish(self, pool: BlockPool) -> None:
        """Let others take up the blocks that are full of known tokens and computed."""
        full = min(self.computed, len(self.tokens)) // pool.block_size
        if pool.caching and full > self.published:
            digests = self.digest(pool.block_size)
            for i in range(self.published, full):
                pool.publish(self.block_table[i], digests[i])
            self.published = full

    def release(self, pool: BlockPool) -> None:
        """Give the blocks back; what they held has to be computed again (or found cached)."""
        pool.release(self.block_table)
        self.block_table, self.computed, self.published = array(INT32), 0, 0
