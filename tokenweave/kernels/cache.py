"""Cubins on disk, under a key of all that they are made from."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """`kernels` in TOKENWEAVE_CACHE, else in XDG_CACHE_HOME/tokenweave, else in ~/.cache/tokenweave."""
    chosen = os.environ.get("TOKENWEAVE_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "tokenweave" / "kernels"


def content_key(
    source: str, arch: str, include: Path | None, options: tuple[str, ...], nvrtc_version: tuple[int, int]
) -> str:
    """A hex digest of all that decides a cubin. Every file of the folder counts: no nested header is missed."""
    digest = hashlib.sha256()
    parts = [source, arch, str(nvrtc_version), str(options)]
    for part in [*(part.encode() for part in parts), *folder_content(include)]:
        digest.update(len(part).to_bytes(8))  # so that no two lists of parts make the same stream
        digest.update(part)
    return digest.hexdigest()


def folder_content(folder: Path | None) -> Iterator[bytes]:
    """The relative path and the content of each file, in a fixed order."""
    if folder is None:
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"the include folder {folder} does not exist: is the package installed completely?")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield path.relative_to(folder).as_posix().encode()
        yield path.read_bytes()


@dataclass(frozen=True)
class CubinCache:
    """One file per cubin: its bytes, then their SHA-256, so that a damaged or half-written file counts as none."""

    folder: Path

    def load(self, key: str) -> bytes | None:
        """The cubin, or None where there is no sound file: then it is compiled, and `store` says what is wrong."""
        try:
            stored = self.path(key).read_bytes()
        except OSError:
            return None
        cubin, digest = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
        return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None

    def store(self, key: str, cubin: bytes) -> None:
        """Keeps the cubin; warns once per process and folder if the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_at_once(self.path(key), cubin + hashlib.sha256(cubin).digest())
        except OSError as error:
            warn_unwritable(self.folder, error.strerror or str(error))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.cubin"


def write_at_once(path: Path, content: bytes) -> None:
    """Other processes see the whole file or none, also while several write it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@functools.cache  # once, however many kernels are compiled
def warn_unwritable(folder: Path, reason: str) -> None:
    # No other folder instead: one that others can write to could hand this process their code.
    warnings.warn(
        f"compiled kernels cannot be kept in {folder} ({reason}), so every start compiles them again: "
        "set TOKENWEAVE_CACHE to a folder that can be written",
        stacklevel=2,
    )
