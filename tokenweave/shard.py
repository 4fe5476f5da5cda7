"""Ragged shards: how a count of things is shared out over ranks."""


def shard(count: int, rank: int, world_size: int) -> range:
    """The contiguous part of `count` items that `rank` owns; parts differ by at most one item, so none is padded."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


def shards(count: int, world_size: int) -> list[range]:
    """`shard` for every rank."""
    return [shard(count, rank, world_size) for rank in range(world_size)]
