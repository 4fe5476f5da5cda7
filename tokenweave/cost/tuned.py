"""Tuned: the plans that `tokenweave tune` found, and the files that keep them."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tokenweave.cost.choice import Choice
from tokenweave.cost.shape import ModelShape
from tokenweave.cost.store import read_json, slug, user_folder, write_json

VERSION = 1  # of the files
REMEDY = "delete it and run `tokenweave tune` again"
REACH = 2.0  # a tuned step speaks for row counts up to this factor away
GRAIN = 128  # a cut found at a tile's edge stays at one


@dataclass(frozen=True)
class Key:
    """What a tuned plan is for. hardware: the machine's name, with the simulated link if there is one."""

    hardware: str
    shape: str
    world_size: int
    hidden_size: int
    num_layers: int

    @property
    def folder(self) -> Path:
        return Path(slug(self.hardware)) / f"{slug(self.shape)}-w{self.world_size}"

    def distance(self, other: Key) -> float:
        """How unlike another model and W are."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("hidden_size", "num_layers", "world_size")]
        return sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)


def make_key(shape: ModelShape, world_size: int, hardware: str) -> Key:
    """The key of a model on W ranks of the machine named `hardware`. Every size of the shape counts."""
    sizes = {name: value for name, value in asdict(shape).items() if name != "max_len"}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{shape.hidden_size}x{len(shape.layers)}-{shape.dtype}-{digest}"
    return Key(hardware, name, world_size, shape.hidden_size, len(shape.layers))


@dataclass(frozen=True)
class Measurement:
    """One step of a prompt of `rows` tokens, run as `choice`."""

    rows: int
    choice: Choice
    seconds: float


@dataclass(frozen=True)
class TunedStep:
    """The best way found to run a step of `rows` rows, its time, the best unsplit one's, and all that was measured,
    which tells its spread."""

    rows: int
    choice: Choice
    seconds: float
    unsplit: str  # the faster of "off" and "fused"
    unsplit_s: float
    measured: tuple[Measurement, ...] = ()

    @property
    def spread(self) -> float:
        """Of one measurement, relative: the standard deviation over all ways that were measured more than once."""
        by_choice: dict[Choice, list[float]] = defaultdict(list)
        for one in self.measured:
            by_choice[one.choice].append(math.log(one.seconds))
        squares = sum(sum((x - statistics.fmean(logs)) ** 2 for x in logs) for logs in by_choice.values())
        return math.sqrt(squares / max(1, len(self.measured) - len(by_choice)))


@dataclass(frozen=True)
class TunedLimits:
    """split_threshold: rows from which on splitting pays, None = never. chunk_tokens: of a long prompt, one step's."""

    split_threshold: int | None
    chunk_tokens: int


@dataclass(frozen=True)
class Tuned:
    """All that was tuned for one key."""

    key: Key
    steps: tuple[TunedStep, ...]
    limits: TunedLimits | None = None

    def lookup(self, rows: int) -> Choice | None:
        """How to run a step of `rows` rows: as the nearest tuned one, its cut scaled. None where none is near; a step
        of more rows than were ever tuned is run as the largest."""
        step = self.nearest(rows, split=self._splits(rows))
        if step is None:
            return None
        if step.choice.mode == "weave" and (rows < 2 or self._splits(rows) is False):
            return Choice(step.unsplit)
        return scaled(step.choice, step.rows, rows)

    @property
    def summary(self) -> str:
        """For people."""
        return f"what was tuned at {', '.join(str(step.rows) for step in self.steps)} rows"

    def nearest(self, rows: int, split: bool | None = None) -> TunedStep | None:
        """The step tuned for about so many rows. split: True = of the woven ones alone."""
        if rows < 1:
            return None
        steps = [step for step in self.steps if step.choice.mode == "weave" or not split]
        step = min(steps, key=lambda step: (abs(math.log2(rows / step.rows)), step.rows), default=None)
        return step if step is None or rows * REACH >= step.rows else None

    def _splits(self, rows: int) -> bool | None:
        """Whether the limits say that a step of `rows` rows is split; None: there are none."""
        if self.limits is None:
            return None
        return self.limits.split_threshold is not None and rows >= self.limits.split_threshold


def scaled(choice: Choice, tuned_rows: int, rows: int) -> Choice:
    """The choice for another row count: the same share of rows before the cut, at a tile's edge if it was at one."""
    if choice.mode != "weave" or rows == tuned_rows:
        return choice
    assert choice.cut is not None
    share = choice.cut * rows / tuned_rows
    cut = round(share / GRAIN) * GRAIN if choice.cut % GRAIN == 0 else round(share)
    if not 0 < cut < rows:
        cut = min(rows - 1, max(1, round(share)))
    return replace(choice, cut=cut)


class Store:
    """Files by key: one a row count and one for the limits, so that nobody rewrites what another one wrote."""

    def __init__(self, folder: Path | None = None):
        """folder: None = `tuned` in the user's cache folder."""
        self.folder = user_folder("tuned") if folder is None else folder

    def lookup(self, key: Key, rows: int) -> Choice | None:
        """See Tuned.lookup."""
        tuned = self.read(key)
        return None if tuned is None else tuned.lookup(rows)

    def read(self, key: Key) -> Tuned | None:
        """All that is stored for `key`; None: nothing. Raises ValueError naming a broken file."""
        tuned = self._read_folder(self.folder / key.folder)
        if tuned is not None and tuned.key != key:
            raise ValueError(f"{self.folder / key.folder} is of {tuned.key}, not of {key}; {REMEDY}")
        return tuned

    def nearest(self, key: Key) -> Tuned | None:
        """What is stored for `key`, or else for the model and W most like it on the same machine."""
        folders = sorted({path.parent for path in (self.folder / key.folder.parent).glob("*/rows-*.json")})
        found = [tuned for folder in folders if (tuned := self._read_folder(folder)) is not None]
        return min(found, key=lambda tuned: (tuned.key != key, key.distance(tuned.key)), default=None)

    def write_step(self, key: Key, step: TunedStep) -> Path:
        path = self.folder / key.folder / f"rows-{step.rows}.json"
        write_json(path, {"version": VERSION, "key": asdict(key), "step": asdict(step)})
        return path

    def write_limits(self, key: Key, limits: TunedLimits) -> Path:
        path = self.folder / key.folder / "limits.json"
        write_json(path, {"version": VERSION, "key": asdict(key), "limits": asdict(limits)})
        return path

    def _read_folder(self, folder: Path) -> Tuned | None:
        steps = sorted(self._steps(folder), key=lambda pair: pair[1].rows)
        if not steps:
            return None
        limits = read_json(folder / "limits.json", lambda value: parse_limits(_part(value, "limits")), REMEDY)
        keys = {key for key, _ in steps}
        if len(keys) > 1:
            raise ValueError(f"{folder} holds plans of different models: {keys}; {REMEDY}")
        return Tuned(steps[0][0], tuple(step for _, step in steps), limits)

    def _steps(self, folder: Path) -> Iterator[tuple[Key, TunedStep]]:
        for path in folder.glob("rows-*.json"):
            found = read_json(
                path, lambda value: (parse_key(_part(value, "key")), parse_step(_part(value, "step"))), REMEDY
            )
            if found is not None:
                yield found


# -- from JSON ---------------------------------------------------------------------------------------------------------


def _part(value: Any, name: str) -> dict[str, Any]:
    """A part of a file. Raises ValueError where the file is of another version or the part is no object."""
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise ValueError(f'expected an object with "version": {VERSION}')
    if not isinstance(value.get(name), dict):
        raise ValueError(f"{name!r} must be an object, got {value.get(name)!r}")
    return value[name]


def parse_key(values: Any) -> Key:
    _check_fields("key", values, Key)
    for name in ("world_size", "hidden_size", "num_layers"):
        _count(name, values[name])
    for name in ("hardware", "shape"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} must be text, got {values[name]!r}")
    return Key(**values)


def parse_step(values: Any) -> TunedStep:
    _check_fields("step", values, TunedStep)
    rows, choice = _count("rows", values["rows"]), parse_choice(values["choice"], values["rows"])
    if values["unsplit"] not in ("off", "fused"):
        raise ValueError(f"unsplit must be off or fused, got {values['unsplit']!r}")
    if not isinstance(values["measured"], list):
        raise ValueError(f"measured must be a list, got {values['measured']!r}")
    seconds, unsplit_s = _seconds(values["seconds"]), _seconds(values["unsplit_s"])
    measured = tuple(parse_measurement(each) for each in values["measured"])
    return TunedStep(rows, choice, seconds, values["unsplit"], unsplit_s, measured)


def parse_measurement(values: Any) -> Measurement:
    _check_fields("a measurement", values, Measurement)
    rows = _count("rows", values["rows"])
    return Measurement(rows, parse_choice(values["choice"], rows), _seconds(values["seconds"]))


def parse_limits(values: Any) -> TunedLimits:
    _check_fields("limits", values, TunedLimits)
    threshold = values["split_threshold"]
    return TunedLimits(
        None if threshold is None else _count("split_threshold", threshold),
        _count("chunk_tokens", values["chunk_tokens"]),
    )


def parse_choice(values: Any, rows: int) -> Choice:
    """Raises ValueError for what is no choice for a step of `rows` rows."""
    _check_fields("a choice", values, Choice)
    for name in ("cut", "attention_sms", "mlp_sms"):
        if values[name] is not None:
            _count(name, values[name])
    choice = Choice(**values)
    if choice.cut is not None and choice.cut >= rows:
        raise ValueError(f"a cut must leave rows on both sides of {rows}, got {choice.cut}")
    return choice


def _check_fields(what: str, values: Any, record: Any) -> None:
    expected = {field.name for field in fields(record)}
    if not isinstance(values, dict) or set(values) != expected:
        raise ValueError(f"{what} must be an object with {', '.join(sorted(expected))}, got {values!r:.200}")


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _seconds(value: Any) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not ok:
        raise ValueError(f"seconds must be a number > 0, got {value!r}")
    return float(value)
