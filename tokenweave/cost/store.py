"""Store: JSON files of the user's own, under the cache folder. Whole or not at all, and refused by name when broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tokenweave.kernels.cache import cache_folder, write_at_once

T = TypeVar("T")


def user_folder(kind: str) -> Path:
    """`kind` in TOKENWEAVE_CACHE, else in XDG_CACHE_HOME/tokenweave, else in ~/.cache/tokenweave."""
    return cache_folder().parent / kind


def slug(text: str) -> str:
    """A file name from any text."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def write_json(path: Path, value: Any) -> None:
    """Other processes see the old file or the new one, also while several write it. Raises OSError naming the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, parse: Callable[[Any], T], remedy: str) -> T | None:
    """What `parse` makes of the file; None where there is none.

    Raises ValueError naming the file, what is wrong in it and what to do (`remedy`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be used: it is no text; {remedy}") from error
    try:
        return parse(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} cannot be used: {said}; {remedy}") from error
