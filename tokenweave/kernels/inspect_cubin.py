"""What a cubin holds, by NVIDIA's own tools and without a GPU: its resources and its machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

TOOL_TIMEOUT_S = 60.0
LABEL = re.compile(r"(\.L_\w+):")
LOWER_HALF = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
UPPER_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
TARGET = re.compile(r"`\((\.L_\w+)\)")


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


@dataclass(frozen=True)
class Instruction:
    """A line of SASS with the scheduling that ptxas fixed for it, which nvdisasm does not print.

    NVIDIA does not document the encoding; it has been the same from compute capability 7.0 to 10.0. A load counts its
    scoreboard (0 to 5) up when issued and down when its data is there; who waits for a scoreboard waits until it is 0.
    """

    address: int
    text: str  # such as "@!P0 BRA 0x1a0"
    stall_clocks: int  # before this warp may issue its next instruction
    sets: int | None  # the scoreboard of what it loads
    waits_for: frozenset[int]

    @property
    def opcode(self) -> str:
        """With its modifiers, such as "LDG.E.128"."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r" (0x[0-9a-f]+)$", self.text) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None


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


def instructions(cubin: bytes) -> list[Instruction]:
    """The machine code of a cubin with one kernel, in the order of addresses. Raises ToolMissing."""
    return parse_instructions(run_tool("nvdisasm", "--print-code", "--print-instruction-encoding", cubin=cubin))


def row_loop(code: list[Instruction]) -> list[Instruction]:
    """The one loop that stores 16 bytes at a time: of a kernel that works row by row, what it does for a row."""
    spans = [(each.target, each.address) for each in code if each.target is not None and each.target < each.address]
    loops = [[each for each in code if first <= each.address <= last] for first, last in spans]
    found = [loop for loop in loops if stores_vectors(loop) and not any(each.opcode == "EXIT" for each in loop)]
    if len(found) != 1:
        raise ValueError(f"expected one loop with 16-byte stores, found {len(found)}")
    return found[0]


def stores_vectors(code: list[Instruction]) -> bool:
    return any(each.opcode.startswith("STG.E.128") for each in code)


def parse_instructions(listing: str) -> list[Instruction]:
    """From lines `/*0010*/ @!P0 BRA `(.L_x_1) ; /* 0x... */`, each followed by the encoding's upper half."""
    found, labels, waiting = [], {}, []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif lower := LOWER_HALF.match(line):
            address, text = int(lower[1], 16), lower[2]
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
        elif upper := UPPER_HALF.match(line):
            found.append(scheduled(address, text, int(upper[1], 16)))
    return [replace(each, text=TARGET.sub(lambda label: hex(labels[label[1]]), each.text)) for each in found]


def scheduled(address: int, text: str, upper: int) -> Instruction:
    """The scheduling is in the upper half, from bit 41 on: stall 4 bits, yield 1, sets 3, read 3, waits for 6."""
    stall, sets, waits = upper >> 41 & 15, upper >> 46 & 7, upper >> 52 & 63
    return Instruction(
        address, text, stall, None if sets == 7 else sets, frozenset(n for n in range(6) if waits >> n & 1)
    )


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


def run_tool(name: str, *options: str, cubin: bytes) -> str:
    tool = find_tool(name)
    if tool is None:
        raise ToolMissing(f"{name} was not found in Triton's wheel, on PATH or in CUDA_HOME/bin: pip install triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, *options, file.name], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    if done.returncode:
        raise ValueError(f"{name} does not take this cubin: {(done.stderr or done.stdout).strip()}")
    return done.stdout
