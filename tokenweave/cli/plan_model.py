"""Which model `tokenweave plan` is asked about: its sizes, from a name, a folder, a config.json or the hub."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

from tokenweave.cost.published import PUBLISHED
from tokenweave.cost.shape import ModelShape, read_shape


def find_shape(model: str, dtype: str | None) -> tuple[str, ModelShape]:
    """(what to call it, its sizes). No weights are read; of a hub id nobody knows, config.json alone is downloaded.

    dtype: None = the model's own. Raises ValueError or FileNotFoundError, in one line.
    """
    path = Path(model).expanduser()
    if path.exists() or model.endswith(".json") or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return named(path), read_shape(checked(path), dtype)
    known = {name.lower(): name for name in PUBLISHED}
    name = known.get(without_suffix(model.rpartition("/")[2].lower(), known))
    if name is not None:
        shape = PUBLISHED[name]
        return name, shape if dtype is None else replace(shape, dtype=dtype)
    if "/" not in model:
        raise ValueError(f"unknown model {model!r}{nearest(model)}; {expected()}")
    return model.rpartition("/")[2], read_shape(download(model), dtype)


def checked(path: Path) -> Path:
    """A folder with a config.json, or that file."""
    if path.is_file() and path.name != "config.json":
        raise ValueError(f"{path} is not named config.json; give the model's config.json, or the folder that holds it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {expected()}")
    return path


def named(path: Path) -> str:
    return (path.resolve().parent if path.name == "config.json" else path.resolve()).name


def without_suffix(name: str, known: dict[str, str]) -> str:
    """Llama-3.3-70B-Instruct has the sizes of Llama-3.3-70B: variants end in a dash and their kind."""
    for kind in ("-instruct", "-it", "-base", "-chat", "-hf"):
        if name.removesuffix(kind) in known:
            return name.removesuffix(kind)
    return name


def download(hub_id: str) -> Path:
    """The config.json of a hub id. Raises ValueError saying why it cannot be had."""
    from huggingface_hub import hf_hub_download  # here, since a local file needs no hub and the import is slow

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # the hub's client and its http library share no base class below this
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"config.json of {hub_id!r} could not be downloaded ({why}){nearest(hub_id.rpartition('/')[2])}; "
            f"{expected()}"
        ) from None


def nearest(model: str) -> str:
    lower = {name.lower(): name for name in PUBLISHED}
    near = difflib.get_close_matches(model.lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]!r}?)" if near else ""


def expected() -> str:
    return f"give a folder, a config.json, a hub id 'org/name', or one of {', '.join(families())}"


def families() -> list[str]:
    """The published models in short, by name, then by size: Llama-2-7B/13B/70B."""
    sizes: dict[str, list[str]] = {}
    for name in PUBLISHED:
        family, size = re.fullmatch(r"(.+?)-((?:\d+x)?[\d.]+B.*)", name).groups()  # type: ignore[union-attr]
        sizes.setdefault(family, []).append(size)
    return [f"{family}-{'/'.join(sorted(each, key=in_figures))}" for family, each in sorted(sizes.items())]


def in_figures(size: str) -> list[float]:
    """8x22B: [8, 22]."""
    return [float(figure) for figure in re.findall(r"[\d.]+", size)]
