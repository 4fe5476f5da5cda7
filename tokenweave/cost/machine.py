"""Machine: what this machine is called, and the record of what it can do."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import torch

from tokenweave.comm.link import Link
from tokenweave.cost.hardware import KNOWN, Hardware, find_hardware, read_hardware
from tokenweave.cost.store import slug, user_folder

# In a GPU's own name -> the known record. The first that fits counts.
GPUS = {"H100": "h100-sxm", "H200": "h200", "A100": "a100", "B200": "b200", "L40S": "l40s"}
REMEDY = "delete it and run `tokenweave calibrate` again"
RING_RANKS = 8  # Hardware.ring_s is of so many


def machine_name(device: torch.device) -> str:
    """A GPU's name; a CPU's model, its cores and the threads that torch computes with."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return slug(f"{cpu_model()}-{usable_cores()}-cores-{torch.get_num_threads()}-threads")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def hardware_key(device: torch.device, link: Link | None = None) -> str:
    """What tuned plans are kept under: the machine, and its simulated link if it has one."""
    if link is None:
        return machine_name(device)
    return f"{machine_name(device)}-link-{link.bandwidth_bytes_per_s * 8e-9:g}-gbit-{link.latency_s * 1e6:g}-us"


def data_sheet(device: torch.device) -> Hardware | None:
    """The known record of this device; None for a GPU that there is none of."""
    if device.type == "cpu":
        return find_hardware("cpu")
    gpu = torch.cuda.get_device_name(device)
    names = [record for part, record in GPUS.items() if part in gpu]
    return next((known for known in KNOWN if names and known.name == names[0]), None)


def calibration_path(device: torch.device) -> Path:
    return user_folder("calibration") / f"{machine_name(device)}.json"


def calibrated(device: torch.device) -> Hardware | None:
    """What `tokenweave calibrate` measured of this machine; None where it has not run.

    Raises ValueError naming the file where it is broken.
    """
    path = calibration_path(device)
    if not path.is_file():
        return None
    try:
        return read_hardware(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error


def hardware_at_hand(device: torch.device) -> Hardware:
    """The calibrated record, else the data sheet's. Raises ValueError for a GPU that has neither."""
    hardware = calibrated(device) or data_sheet(device)
    if hardware is None:
        raise ValueError(f"nothing is known of {machine_name(device)}; run `tokenweave calibrate` first")
    return hardware


def with_link(hardware: Hardware, link: Link, world_size: int) -> Hardware:
    """The same machine with a simulated wire: no faster than the real one. The wire's latency counts once for each of
    a sum's two collectives."""
    slower = min(link.bandwidth_bytes_per_s, hardware.link_bandwidth * hardware.efficiency.ring_link)
    return replace(
        hardware,
        name=f"{hardware.name}, simulated link",
        link_bandwidth=slower,
        ring_s=hardware.ring_s + link.latency_s * (RING_RANKS - 1) / max(1, world_size - 1),
        efficiency=replace(hardware.efficiency, ring_link=1.0),
    )
