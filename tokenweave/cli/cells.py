"""Cells: how figures and columns are written for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Cells = Sequence[str]


def aligned(rows: Sequence[Cells], left: tuple[int, ...] = ()) -> Iterator[str]:
    """Columns, right-aligned but for those in `left`, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        yield "  ".join(cells).rstrip()


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
