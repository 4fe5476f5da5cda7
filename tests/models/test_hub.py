from pathlib import Path

import huggingface_hub
import pytest

from tokenweave.models.hub import resolve
from tokenweave.models.shards import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def downloads(folder, monkeypatch) -> list[str]:
    """The ids that were asked of the hub, which here has every model."""
    asked: list[str] = []

    def snapshot_download(hub_id: str, **options) -> str:
        asked.append(hub_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_folder_is_itself(folder, downloads):
    assert resolve(folder) == folder == resolve(str(folder))
    assert downloads == []


def test_a_relative_folder_wins_over_the_hub(folder, downloads, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve(folder.name).samefile(folder)
    assert downloads == []


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}") == folder


@pytest.mark.parametrize("hub_id", ["gpt2", "org/name"])
def test_an_id_is_downloaded(folder, downloads, hub_id):
    assert resolve(hub_id) == folder
    assert downloads == [hub_id]


@pytest.mark.parametrize("weights", [True, False])
def test_weights_can_be_left_out_of_a_download(folder, weights, monkeypatch):
    ignored = []

    def snapshot_download(hub_id: str, **options) -> str:
        ignored.extend(options["ignore_patterns"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("org/name", weights=weights)
    assert ("*.safetensors" in ignored) is not weights


@pytest.mark.parametrize("path", ["/no/such", "./no", "../no", "~/no", "a/b/c", "no/", Path("no")], ids=str)
def test_a_path_that_does_not_exist(downloads, path):
    with pytest.raises(CheckpointError, match=r"\Amodel folder '.*' does not exist; give a folder or a hub id"):
        resolve(path)
    assert downloads == []


def test_a_file(folder):
    with pytest.raises(CheckpointError, match=r"config.json' is a file; give the folder"):
        resolve(folder / "config.json")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(
        CheckpointError, match=rf"'{tmp_path}' has no config.json; expected a Hugging Face model folder"
    ):
        resolve(tmp_path)


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot_download(hub_id: str, **options) -> str:
        raise ConnectionError("no route\n\n  to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"'org/name' .*\(ConnectionError: no route to host\); check the id.*\Z"):
        resolve("org/name")


def test_the_real_client_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"\Amodel 'org/name' is no folder here and could not be.*[^\n]*\Z"):
        resolve("org/name")


def test_an_id_that_the_hub_cannot_have():
    with pytest.raises(CheckpointError, match=r"'a b' is no folder here.*HFValidationError.*check the id"):
        resolve("a b")
