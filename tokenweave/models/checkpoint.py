"""A Hugging Face checkpoint on disk, read slice by slice."""

import difflib
from pathlib import Path

import torch

from tokenweave.models.shards import CheckpointError, Entry, find_tensors, open_shard

Index = tuple[int | slice, ...]

# Anything else is quantised or not a weight: copying it without its scales would be silently wrong.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The tensors of a model folder (single file, sharded with index, or any *.safetensors).

    Opening reads all headers and no data, so that a missing, truncated or corrupt file shows before any memory is
    spent. No file stays open. Raises CheckpointError, as every method does.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries = find_tensors(folder)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"checkpoint {self.folder} has no tensor {name!r}; {self._nearest(name)}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk; integer and quantised tensors, which are no weights on their own, are an error."""
        entry = self.entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {entry.file} is {entry.dtype}; expected one of {', '.join(_DTYPES)}: quantised "
                "checkpoints are not supported, use the unquantised one"
            )
        return _DTYPES[entry.dtype]

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """The tensor at `index` (ints and step-1 slices for the leading dimensions), in the dtype on disk; only its
        bytes are read. It may be a view of the mapped file: copy it to let the mapping go."""
        self.dtype(name)
        with open_shard(self.entry(name).file) as shard:
            return shard.get_slice(name)[index]

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.6) or self.names[:3]
        return f"nearest are {', '.join(map(repr, near))}; check that config.json belongs to these weights"
