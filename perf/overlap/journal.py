"""Journal: what has been measured, a line of JSON a point, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """Appended to by rank 0 of each session, read by the driver. A line that a kill cut short does not count."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, key: str, result: dict[str, Any]) -> None:
        line = json.dumps({"key": key, "result": result})
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            file.write(("\n" if torn else "") + line + "\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """Results by key; of a key measured twice, the last."""
        if not self.path.exists():
            return {}
        records = filter(None, map(parsed, self.path.read_text().splitlines()))
        return {record["key"]: record["result"] for record in records}


def parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # cut short: its point is measured again
        return None


def digest(folders: Iterable[Path]) -> str:
    """Names and contents of all Python files below: results of other code are not taken up."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
