"""The safetensors files of a model folder: which there are, and which tensors they hold."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A model folder or checkpoint that cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. `dtype` is safetensors' own word for it ("F32", "BF16", "F8_E4M3", ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def open_shard(file: Path) -> safe_open:
    """safetensors' handle on `file`, a context manager. Raises CheckpointError for every way in which it can be broken:
    safetensors checks the header and that the data that it describes fill the file exactly."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file} ({_one_line(error)}): {_advice(file)}") from error


def find_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of `folder`: those of model.safetensors, else of the files that model.safetensors.index.json names,
    else of all *.safetensors (transformers' order). Reads headers, no data. Raises CheckpointError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _tensors_of(single)
    if index.exists():
        return _indexed_tensors(index)
    return _unindexed_tensors(folder)


def _tensors_of(file: Path) -> dict[str, Entry]:
    with open_shard(file) as shard:
        names = shard.keys()
        slices = [shard.get_slice(name) for name in names]
        return {name: Entry(file, tuple(s.get_shape()), s.get_dtype()) for name, s in zip(names, slices, strict=True)}


def _indexed_tensors(index: Path) -> dict[str, Entry]:
    weight_map = _weight_map(index)
    held = {shard: _tensors_of(_existing(index, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(
                f"{index} says that tensor {name!r} is in {shard}, which does not hold it; download or copy both again"
            )
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read {index} ({type(error).__name__}: {_one_line(error)}): expected JSON with a 'weight_map' from "
            "tensor names to files; download or copy it again"
        ) from error


def _existing(index: Path, shard: str) -> Path:
    file = index.parent / shard
    if not file.exists():
        raise CheckpointError(f"{index} names the file {shard}, which is not there; download or copy the missing file")
    return file


def _unindexed_tensors(folder: Path) -> dict[str, Entry]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_no_weights(folder))
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _tensors_of(file).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name!r} is in {entries[name].file} and in {file.name}; expected it in one file, or a "
                    "model.safetensors.index.json that says which"
                )
            entries[name] = entry
    return entries


def _no_weights(folder: Path) -> str:
    others = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))
    if not others:
        return (
            f"{folder} holds no *.safetensors file; download or copy the weights into it, or measure the shape with "
            "random ones: load_format='dummy'"
        )
    return (
        f"{folder} holds no *.safetensors file, only {', '.join(others[:3])}; convert it with transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), and the tokenizer likewise"
    )


def _advice(file: Path) -> str:
    if not file.exists():
        return "the file is missing; download or copy the whole model folder again"
    if not file.is_file() or not os.access(file, os.R_OK):
        return "expected a safetensors file that may be read; check what it is and its permissions"
    with file.open("rb") as data:
        if data.read(24).startswith(b"version https://git-lfs"):
            return "it is a git-lfs pointer, not the weights; run `git lfs pull` in the model folder"
    return f"with {file.stat().st_size} bytes it is truncated or not a safetensors file; download or copy it again"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
