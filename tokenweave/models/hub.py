"""From what the user calls a model to a folder on this machine."""

from pathlib import Path

from tokenweave.models.shards import CheckpointError

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Sub-folders hold other formats; consolidated*.safetensors repeats the same weights under other names.
_NOT_DOWNLOADED = ["*/*", "consolidated*"]


def resolve(model: str | Path, weights: bool = True) -> Path:
    """The Hugging Face folder of `model`: a folder, or a hub id ("org/name"), downloaded unless it is in the cache.

    weights: False leaves them out of a download.
    Raises CheckpointError: a path that is no folder, a folder without config.json, an id that cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _with_config(path)
    if path.exists():
        raise CheckpointError(f"model {str(path)!r} is a file; give the folder that holds it")
    if isinstance(model, Path) or _looks_like_path(model):
        raise CheckpointError(f"model folder {str(path)!r} does not exist; give a folder or a hub id 'org/name'")
    return _with_config(_download(model, weights))


def _looks_like_path(model: str) -> bool:
    """True where `model` cannot be meant as a hub id, which is 'name' or 'org/name'."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model folder {str(folder)!r} has no config.json; expected a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer files)"
        )
    return folder


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # here, since a local folder needs no hub and the import is slow

    try:
        ignored = _NOT_DOWNLOADED if weights else [*_NOT_DOWNLOADED, "*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED, ignore_patterns=ignored))
    except Exception as error:  # the hub's client, its http and its transfer library share no base class below this
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"model {hub_id!r} is no folder here and could not be downloaded ({why}); check the id, the network and, "
            "for a gated model, `hf auth login`, or give a local folder"
        ) from None  # the clients' own chains of tracebacks are a hundred lines that say no more
