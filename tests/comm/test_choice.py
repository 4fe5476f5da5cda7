"""The vote: what a group of ranks takes, and why it does not take the rest."""

import socket
from dataclasses import replace

import pytest
import torch

from tokenweave.comm.choice import Facts, choose, facts_of

NAMES = [f"gpu{i}" for i in range(8)]
H100 = [
    Facts("host", "id", "cuda", name, (9, 0), True, tuple(other for other in NAMES if other != name)) for name in NAMES
]
A100 = [replace(facts, capability=(8, 0), multicast=False) for facts in H100]
BF16 = torch.bfloat16
# The same names and GPUs on two hosts that have the same name, as containers may; ranks go round.
SAME_NAME = [replace(facts, host_id=f"{i % 2}-the-boot-id") for i, facts in enumerate(H100[:4])]
TWO_HOSTS = [replace(facts, host=f"node{i // 4}", host_id=f"boot{i // 4}") for i, facts in enumerate(H100)]


@pytest.mark.parametrize(
    ("facts", "implementation", "reason"),
    [
        (H100, "multimem", "every rank can"),
        (H100[:2], "peer", "two ranks read each other's values"),
        (A100, "peer", "rank 0 has compute capability 8.0, and multicast needs 9.0"),
        ([*H100[:3], A100[3]], "peer", "rank 3 has compute capability 8.0"),
        ([replace(each, multicast=False) for each in H100], "peer", "rank 0 has no NVLink multicast"),
        (
            [*H100[:3], replace(H100[3], missing="cuda-python is not installed")],
            "sharded",
            "rank 3: cuda-python is not",
        ),
        ([*H100[:3], replace(H100[3], reachable=("gpu0", "gpu1"))], "sharded", "rank 3 cannot address that of rank 2"),
        (TWO_HOSTS, "sharded", "the ranks are on several hosts (node0: 0, 1, 2, 3; node1: 4, 5, 6, 7), and no pointer"),
        (TWO_HOSTS[3:5], "sharded", "the ranks are on several hosts (node0: 0; node1: 1)"),
        (SAME_NAME, "sharded", "(host 0-the-bo: 0, 2; host 1-the-bo: 1, 3)"),
        ([replace(each, host=f"alias{i}") for i, each in enumerate(H100)], "multimem", "every rank can"),
        ([*H100[:3], replace(H100[0])], "peer", "ranks share a GPU"),
        ([replace(each, capability=(7, 5)) for each in A100], "sharded", "7.5, and the fused kernel needs 8.0"),
        ([facts_of(torch.device("cpu"))] * 2, "sharded", "rank 0 computes on the CPU"),
        (H100[:1], "sharded", "one rank has nothing to sum"),
        ([*H100, *H100], "sharded", "joins up to 8 ranks, not 16"),
    ],
)
def test_the_group_takes_what_all_can(facts, implementation, reason):
    choice = choose("auto", facts, BF16, 8192)
    assert choice.implementation == implementation
    assert reason in choice.reason


def test_a_host_is_told_by_its_boot_id_not_by_its_name(monkeypatch):
    mine = facts_of(torch.device("cpu"))
    monkeypatch.setattr(socket, "gethostname", lambda: "another-name")
    other = facts_of(torch.device("cpu"))
    assert (mine.host != other.host, mine.host_id) == (True, other.host_id)
    assert len(mine.host_id) > 8


def test_a_hidden_size_that_the_kernel_has_not():
    assert choose("auto", H100, BF16, 8190).implementation == "sharded"
    with pytest.raises(ValueError, match=r"^comm='multimem' cannot be: .* multiple of 8 from 64 to 16384, not 8190"):
        choose("multimem", H100, BF16, 8190)


@pytest.mark.parametrize("asked", ["multimem", "peer", "sharded"])
def test_what_is_asked_for_is_taken(asked):
    assert choose(asked, H100[:2], BF16, 8192).implementation == asked


@pytest.mark.parametrize(
    ("asked", "facts", "message"),
    [
        ("multimem", A100, r"^comm='multimem' cannot be: rank 0 has compute capability 8\.0, .*; use comm='auto'$"),
        ("peer", [facts_of(torch.device("cpu"))] * 2, r"^comm='peer' cannot be: rank 0 computes on the CPU, "),
        ("multimem", [facts_of(torch.device("cpu"))] * 2, r"^comm='multimem' cannot be: rank 0 computes on the CPU, "),
        ("peer", H100[:1], "there is one rank"),
        (
            "peer",
            TWO_HOSTS,
            r"^comm='peer' cannot be: the ranks are on several hosts \(node0: .*\), .*; use comm='auto'$",
        ),
        ("multimem", TWO_HOSTS, r"^comm='multimem' cannot be: the ranks are on several hosts "),
    ],
)
def test_what_cannot_be_is_refused(asked, facts, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, facts, BF16, 8192)
