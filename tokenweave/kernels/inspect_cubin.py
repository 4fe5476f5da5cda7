"""What a cubin holds, by NVIDIA's own tools and without a GPU: its resources and its machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOOL_TIMEOUT_S = 60.0


class ToolMissing(RuntimeError):
    """cuobjdump or nvdisasm is not on this machine."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes, as cuobjdump tells. Spilled registers are part of the stack frame: 0 means none.

    registers, local_bytes, stack_bytes: per thread. shared_bytes: static, per block; from sm_90 on a kernel with static
    shared memory has the 1024 bytes in it that the system reserves.
    """

    registers: int
    shared_bytes: int
    local_bytes: int
    stack_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether registers are spilled, or arrays indexed at run time: both live in local memory."""
        return self.local_bytes > 0 or self.stack_bytes > 0


def resources(cubin: bytes, kernel: str | None = None) -> Resources:
    """Of that kernel, or of the only one. Raises ToolMissing, and ValueError where there is no such kernel."""
    found = parse_resources(run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin))
    names = [kernel] if kernel else list(found)
    if len(names) != 1 or names[0] not in found:
        raise ValueError(f"expected {kernel or 'one kernel'} in the cubin, which has {', '.join(found) or 'none'}")
    return found[names[0]]


def sass(cubin: bytes) -> str:
    """The machine code of all kernels, one instruction a line, each kernel after its label. Raises ToolMissing."""
    return run_tool("nvdisasm", "--print-code", cubin=cubin)


def parse_resources(listing: str) -> dict[str, Resources]:
    """From lines `Function NAME:`, each followed by `REG:10 STACK:0 SHARED:0 LOCAL:0 ...`."""
    found = {}
    for name, line in re.findall(r"Function (\S+):\n(.*)", listing):
        value = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Resources(value["REG"], value["SHARED"], value["LOCAL"], value["STACK"])
    return found


def find_tool(name: str) -> Path | None:
    """Where it is: in Triton's wheel, which brings both, on PATH, or in CUDA_HOME."""
    folders = [triton_folder(), *map(Path, os.get_exec_path()), cuda_folder()]
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    found = shutil.which(name, path=path)
    return Path(found) if found else None


def triton_folder() -> Path | None:
    triton = importlib.util.find_spec("triton")  # found, not imported: that takes long
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None


def cuda_folder() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    return Path(home) / "bin" if home else None


def run_tool(name: str, option: str, *, cubin: bytes) -> str:
    tool = find_tool(name)
    if tool is None:
        raise ToolMissing(f"{name} was not found in Triton's wheel, on PATH or in CUDA_HOME/bin: pip install triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    if done.returncode:
        raise ValueError(f"{name} does not take this cubin: {(done.stderr or done.stdout).strip()}")
    return done.stdout
