"""The paged KV cache: its storage (every rank), and the pool that hands out its blocks (rank 0)."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

INT64 = "q"  # as `array` calls it


def allocate_storage(
    num_blocks: int,
    num_layers: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[block, layer, 2, token, kv_head, head_dim]: block-major, so that a block of all layers is one piece."""
    return torch.empty(num_blocks, num_layers, 2, block_size, kv_heads, head_dim, dtype=dtype, device=device)


def block_digests(tokens: Sequence[int], block_size: int, salt: int, known: list[bytes]) -> list[bytes]:
    """A digest for each full block of `tokens`, of all tokens up to its end; `known` digests are extended."""
    digests = list(known)
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        parent = digests[-1] if digests else salt.to_bytes(8, "little")
        block = array(INT64, tokens[start : start + block_size]).tobytes()
        digests.append(hashlib.blake2b(parent + block, digest_size=16).digest())
    return digests


class BlockPool:
    """Which blocks are free, used, or free but still hold a prefix that a later request can take up.

    Free blocks are handed out least recently used first. A published block keeps its digest until it is handed out.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._users = [0] * num_blocks
        self._digest: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that already hold the longest cached run of `digests`."""
        found = []
        for digest in digests if self.caching else ():
            if digest not in self._block:
                break
            found.append(self._block[digest])
        return found

    def cost(self, cached: Sequence[int], fresh: int) -> int:
        """Free blocks it takes to use `cached` blocks again and to get `fresh` new ones."""
        return fresh + sum(block in self._free for block in cached)

    def reuse(self, blocks: Sequence[int]) -> None:
        """One more user of blocks that `match` found."""
        for block in blocks:
            self._free.pop(block, None)
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` fresh blocks; the caller has seen that there are as many."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._users[block] = 1
            self._forget(block)
        return taken

    def publish(self, block: int, digest: bytes) -> None:
        """A block is full and computed: later requests may match it. The first block of a digest keeps it."""
        if self.caching and digest not in self._block:
            self._forget(block)
            self._block[digest] = block
            self._digest[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """One user less. The last blocks of a sequence are reused first: its beginning is likelier to be shared."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None

    def _forget(self, block: int) -> None:
        digest = self._digest.pop(block, None)
        if digest is not None:
            del self._block[digest]
