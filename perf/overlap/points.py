"""Points: what is measured, as records. A point is one interleaved comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LINKS = ("real", "paced", "none")
MEASURES = ("prefill", "decode", "mix", "timeline")


@dataclass(frozen=True)
class Setting:
    """What the ranks are started for. shape: a model's full name. mbit_per_s is 0 with link "none": the ranks' own
    loopback or NVLink, unpaced."""

    shape: str
    link: str
    mbit_per_s: float
    ranks: int = 2
    threads: int = 1  # of each rank
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of the model: of a folder, the last part of its path."""
        return Path(self.shape).name

    @property
    def wire(self) -> str:
        if self.link == "none":
            return "unpaced"
        speed = f"{self.mbit_per_s:g} Mbit/s"
        return f"{speed} link" if self.link == "real" else f"simulated {speed} link"

    @property
    def title(self) -> str:
        return f"{self.name}, W={self.ranks}, {self.wire}"

    @property
    def stem(self) -> str:
        """For file names."""
        return f"{self.name.replace(' ', '-')}-{self.link}-{self.mbit_per_s:g}"


@dataclass(frozen=True)
class Point:
    """x: the prompt's tokens, the decode batch, or the name of a request mix.

    chunk_tokens: of a step of a mix. requests: of a mix, 0: as many as it says.
    """

    setting: Setting
    measure: str
    x: int | str
    rounds: int
    chunk_tokens: int = 2048
    requests: int = 0

    def key(self, code: str) -> str:
        """The same only for the same measurement of the same code."""
        return json.dumps(asdict(self) | {"code": code}, sort_keys=True)

    @property
    def label(self) -> str:
        chunks = f" in steps of {self.chunk_tokens}" if self.measure == "mix" else ""
        return f"{self.setting.title}: {self.measure} {self.x}{chunks}"


def point_from(fields: dict[str, Any]) -> Point:
    """What `asdict` took apart."""
    return Point(**fields | {"setting": Setting(**fields["setting"])})


def by_setting(points: list[Point]) -> dict[Setting, list[Point]]:
    """Points that the same ranks measure, in order."""
    groups: dict[Setting, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return groups
