"""Which implementation forms the sums: a vote. Every rank states what it can; the group takes what all can."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenweave.kernels.fused import why_not

COMMS = ("auto", "multimem", "peer", "sharded")


@dataclass(frozen=True)
class Facts:
    """What one rank reports of itself. host_id tells hosts apart; host is for people. uuid, reachable: this GPU, and
    the GPUs of this host that it can address."""

    host: str
    host_id: str
    device: str  # "cpu" | "cuda"
    uuid: str = ""
    capability: tuple[int, int] = (0, 0)
    multicast: bool = False
    reachable: tuple[str, ...] = ()
    missing: str = ""  # what the kernel needs and this rank has not


@dataclass(frozen=True)
class Choice:
    """implementation: "multimem" | "peer" | "sharded"; reason: for the log."""

    implementation: str
    reason: str


def choose(asked: str, facts: list[Facts], dtype: torch.dtype, hidden_size: int) -> Choice:
    """The implementation for a group. Pure: the same on every rank.

    asked: one of COMMS; one that is named is taken, or refused with a ValueError that says why it cannot be.
    """
    obstacles = {"multimem": no_multimem(facts, dtype, hidden_size), "peer": no_peer(facts, dtype, hidden_size)}
    if asked in obstacles:
        if obstacles[asked]:
            raise ValueError(f"comm={asked!r} cannot be: {obstacles[asked]}; use comm='auto'")
        return Choice(asked, "asked for")
    if asked == "sharded" or len(facts) == 1:
        return Choice("sharded", "asked for" if asked == "sharded" else "one rank has nothing to sum")
    if len(facts) == 2 and not obstacles["peer"]:
        return Choice("peer", "two ranks read each other's values: N bytes a link, where multicast needs 1.5 N")
    for implementation, obstacle in obstacles.items():
        if not obstacle:
            return Choice(implementation, "every rank can" if implementation == "multimem" else obstacles["multimem"])
    return Choice("sharded", obstacles["peer"])


def no_peer(facts: list[Facts], dtype: torch.dtype, hidden_size: int) -> str:
    """Why these ranks cannot use the kernel over peer pointers; "" if they can."""
    if len(facts) == 1:
        return "there is one rank, and nothing to sum"
    for rank, each in enumerate(facts):
        if each.device != "cuda":
            return f"rank {rank} computes on the {each.device.upper()}, and the fused kernel needs CUDA"
        if each.missing:
            return f"rank {rank}: {each.missing}"
        if each.capability < (8, 0):
            return f"rank {rank} has compute capability {dotted(each.capability)}, and the fused kernel needs 8.0"
    if len({each.host_id for each in facts}) > 1:
        return f"the ranks are on several hosts ({spread_of(facts)}), and no pointer crosses hosts"
    for rank, each in enumerate(facts):
        for peer, other in enumerate(facts):
            if each.uuid != other.uuid and other.uuid not in each.reachable:
                return f"the GPU of rank {rank} cannot address that of rank {peer} (no P2P, or hidden from its process)"
    return why_not(dtype, hidden_size, len(facts)) or ""


def no_multimem(facts: list[Facts], dtype: torch.dtype, hidden_size: int) -> str:
    """The same for multicast addresses, on top."""
    if obstacle := no_peer(facts, dtype, hidden_size):
        return obstacle
    for rank, each in enumerate(facts):
        if each.capability < (9, 0):
            return f"rank {rank} has compute capability {dotted(each.capability)}, and multicast needs 9.0"
        if not each.multicast:
            return f"rank {rank} has no NVLink multicast (NVSwitch with SHARP)"
    if len({each.uuid for each in facts}) < len(facts):
        return "ranks share a GPU, and multicast joins different ones"
    return ""


def spread_of(facts: list[Facts]) -> str:
    """Which ranks are where: a host by its name, and by its id too where another has the same name."""
    names = {each.host_id: each.host for each in facts}
    places = []
    for host_id, name in names.items():
        ranks = [str(rank) for rank, each in enumerate(facts) if each.host_id == host_id]
        label = name if list(names.values()).count(name) == 1 else f"{name} {host_id[:8]}"
        places.append(f"{label}: {', '.join(ranks)}")
    return "; ".join(places)


def dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def facts_of(device: torch.device, alone: bool = False) -> Facts:
    """What this rank has. alone: it is the only one and has nothing to vote on, so its GPU is not looked at."""
    if device.type != "cuda" or alone:
        return Facts(socket.gethostname(), host_id(), device.type)
    properties = torch.cuda.get_device_properties(device)
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    return Facts(
        host=socket.gethostname(),
        host_id=host_id(),
        device="cuda",
        uuid=str(properties.uuid),
        capability=(properties.major, properties.minor),
        multicast=has_multicast(device),
        reachable=tuple(
            str(torch.cuda.get_device_properties(index).uuid)
            for index in others
            if torch.cuda.can_device_access_peer(device.index, index)
        ),
        missing=missing_compiler((properties.major, properties.minor)),
    )


def host_id() -> str:
    """The same for all processes of a host since it started, and of no other: Linux's boot id, since hosts may share a
    name, as containers do. Elsewhere the name must do."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.is_file() else socket.gethostname()


def has_multicast(device: torch.device) -> bool:
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index))


def missing_compiler(capability: tuple[int, int]) -> str:
    """What is missing to compile the kernel at first use, and to load it; "" if nothing is."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-python is not installed: pip install tokenweave[cuda]"
    from tokenweave.kernels.compiler import (
        CompileError,
        CompilerMissing,
        arch_of,
        check_arch,
        nvrtc_archs,
        nvrtc_version,
    )
    from tokenweave.kernels.driver import DriverError, driver_refusal, driver_version, open_driver

    try:
        check_arch(arch_of(capability), nvrtc_archs(), nvrtc_version())
        return driver_refusal(nvrtc_version(), driver_version(open_driver())) or ""
    except (CompilerMissing, CompileError, DriverError) as error:
        return str(error)
