"""Which device a rank takes: by its number on its own host, not among all ranks."""

from __future__ import annotations

import pytest
import torch

from tokenweave.comm.group import Rendezvous
from tokenweave.engine.rank import local_place, pick_device


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this host has so many GPUs; notes which one is made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device))

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return current

    return have


@pytest.mark.parametrize(
    ("rank", "local_rank", "local_ranks"), [(0, 0, 8), (3, 3, 8), (13, 5, 8), (4, 0, 4), (7, 3, 4)]
)
def test_on_two_hosts_with_eight_gpus(gpus, monkeypatch, rank, local_rank, local_ranks):
    sizes = {"WORLD_SIZE": 2 * local_ranks, "LOCAL_WORLD_SIZE": local_ranks}
    environment = {"RANK": rank, "LOCAL_RANK": local_rank, **sizes}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    current = gpus(8)
    device = pick_device("auto", *local_place(None))
    assert device == torch.device("cuda", local_rank)
    assert current == [device]


def test_ranks_that_an_llm_starts_are_on_its_own_host(gpus):
    gpus(4)
    assert pick_device("auto", *local_place(Rendezvous(1, 2, 4))) == torch.device("cuda", 2)


def test_more_ranks_than_gpus(gpus):
    gpus(2)
    with pytest.warns(UserWarning, match="4 ranks share 2 GPU: running on the CPU"):
        assert pick_device("auto", 0, 4) == torch.device("cpu")
    assert pick_device("cuda", 3, 4) == torch.device("cuda", 1)


def test_no_gpu(gpus):
    gpus(0)
    assert pick_device("auto", 1, 2) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device='cuda', but torch sees no CUDA device; install .*device='cpu'$"):
        pick_device("cuda", 0, 1)
