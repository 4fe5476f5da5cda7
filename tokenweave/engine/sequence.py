"""Sequence: one text being generated, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from tokenweave.engine.batch import Span
from tokenweave.engine.kv_cache import BlockPool, block_digests


@dataclass(eq=False)
class Sequence:
    """tokens: prompt and output. computed: how many of them have their keys and values in the cache."""

    prompt: Items[int]
    arrival: int  # requests in order of arrival
    salt: int = 0  # sequences with different salts share no cached prefix
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    published: int = 0  # blocks whose prefix others may take up
    digests: list[bytes] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def span(self, count: int) -> Span:
        """The next `count` tokens to compute."""
        stop = self.computed + count
        return Span(
            tokens=tuple(self.tokens[self.computed : stop]),
            context=self.computed,
            block_table=tuple(self.block_table),
            prompt_len=len(self.prompt),
            wanted=int(stop == len(self.tokens)),
        )

    def digest(self, block_size: int) -> list[bytes]:
        """A digest for each full block of the tokens there are."""
        self.digests = block_digests(self.tokens, block_size, self.salt, self.digests)
        return self.digests

    def publish(self, pool: BlockPool) -> None:
        """Let others take up the blocks that are full and computed."""
        full = self.computed // pool.block_size
        if pool.caching and full > self.published:
            digests = self.digest(pool.block_size)
            for i in range(self.published, full):
                pool.publish(self.block_table[i], digests[i])
            self.published = full

    def release(self, pool: BlockPool) -> None:
        """Give the blocks back; what they held has to be computed again (or found cached)."""
        pool.release(self.block_table)
        self.block_table, self.computed, self.published = [], 0, 0
