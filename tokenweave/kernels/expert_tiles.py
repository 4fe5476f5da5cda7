"""How the rows of a grouped GEMM are cut into tiles: pure functions of counts that the host knows.

An assignment is one token at one of its top-k experts. Which expert has how many is known on the device alone, so the
host decides by the mean and launches as many tiles as there can be.
"""

from dataclasses import dataclass

TILE_ROWS = (16, 32, 64, 128)
WEIGHT_ROWS = 64  # what reading a tile's weights costs, in rows of arithmetic


@dataclass(frozen=True)
class Tile:
    """rows, columns: of the result. depth: of the sum, per turn of the loop."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile_rows(assignments: int, experts: int) -> int:
    """The rows of a tile that make all tiles together cheapest, at assignments / experts rows an expert.

    An expert with m rows on average takes m / rows + 1/2 tiles, and if any then one; a tile costs its rows, and its
    weights, which are read for each tile. So small groups get one tile that most of them fit into, whose empty rows
    cost less than a second look at the weights, and large ones large tiles.
    """
    mean = assignments / experts
    return min(TILE_ROWS, key=lambda rows: max(1.0, mean / rows + 0.5) * (rows + WEIGHT_ROWS))


def most_tiles(assignments: int, experts: int, rows: int) -> int:
    """How many tiles there can be, whatever is chosen: all but one row of the last tile of each expert may be empty."""
    used = min(assignments, experts)
    return used + (assignments - used) // rows


def gemm_tile(rows: int, gated: bool, itemsize: int) -> Tile:
    """gated: the kernel has two results of so many columns, gate and up. itemsize: bytes of an element."""
    columns = {16: 128, 32: 128, 64: 128, 128: 128}[rows] // (2 if gated else 1)
    return Tile(rows, columns, 128 // itemsize, num_warps=8 if rows == 128 else 4, num_stages=4 if rows < 64 else 3)
