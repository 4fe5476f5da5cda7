"""The fused kernel as compiled, variant by variant: its resources, and what its machine code does. Needs no GPU.

The row loop is where a row is summed, normed and stored. The checkers below take the code and the variant, and return
what is wrong with it, so that the last tests can show that they notice planted faults.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pairwise import pairwise
from tokenweave.kernels import fused, jit
from tokenweave.kernels.fused import Geometry, Variant
from tokenweave.kernels.inspect_cubin import Instruction, Resources, find_tool, instructions, resources, row_loop

CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
SYSTEM_SHARED_BYTES = 1024  # reserved by the system since sm_90; reported as the kernel's, but not part of its limit
REGISTERS_OF_SM = 65536
FLAGS = (
    ("norm", "keep"),  # no residual came in
    ("residual", "norm", "keep"),
    ("residual", "post_norm", "norm", "keep"),
    ("residual", "listed", "norm"),
    ("residual", "listed", "bias", "post_norm", "norm", "keep"),
    ("residual", "bias", "norm", "keep"),
    ("residual", "post_norm", "keep"),
    (),  # the plain all-reduce
)
AXES = {
    "arch": tuple(CAPABILITIES),
    "sum": tuple(fused.SUMS),
    "dtype": tuple(fused.ELEMENTS),
    "hidden_size": (64, 104, 896, 2880, 3584, 5120, 8192, 12288, 16384),
    "world_size": tuple(range(1, 9)),
    "flags": FLAGS,
}


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    layout: Geometry
    arch: str
    resources: Resources
    code: list[Instruction]

    @property
    def loop(self) -> list[Instruction]:
        return row_loop(self.code)

    @property
    def before(self) -> list[Instruction]:
        return [each for each in self.code if each.address < self.loop[0].address]

    @property
    def after(self) -> list[Instruction]:
        return [each for each in self.code if each.address > self.loop[-1].address]


def build(variant: Variant, arch: str, headers: Path | None = None) -> Compiled:
    layout = fused.geometry(variant, fused.shared_bytes_of(CAPABILITIES[arch]))
    cubin = jit.cubin(fused.source(variant, layout), arch, headers or fused.headers())
    return Compiled(variant, layout, arch, resources(cubin), instructions(cubin))


def variant_of(case: dict[str, Any]) -> Variant:
    flags = {flag: flag in case["flags"] for flag in fused.FLAGS}
    return Variant(case["dtype"], case["hidden_size"], case["world_size"], case["sum"], **flags)


def build_all(cases: list[dict[str, Any]]) -> list[Compiled]:
    """Two at a time: NVRTC works without the GIL, and the tools are processes."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: build(variant_of(case), case["arch"]), cases))


@pytest.fixture(autouse=True)
def _tools(nvrtc, kernel_cache) -> None:
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, from Triton's wheel or a CUDA toolkit")


# -- what to look for -------------------------------------------------------------------------------------------------

REDUCE = {
    ("sm_90a", torch.bfloat16): "LDGMC.E.F32ADD.BF16x8.RN.STRONG.SYS",
    ("sm_90a", torch.float16): "LDGMC.E.F32ADD.F16x8.RN.STRONG.SYS",
    ("sm_90a", torch.float32): "LDGMC.E.ADD.F32x4.RN.STRONG.SYS",
    ("sm_100a", torch.bfloat16): "LDGMC.E.HPADD.BF16x8.RN.STRONG.SYS",  # what acc::f32 becomes; without it: ADD
    ("sm_100a", torch.float16): "LDGMC.E.HPADD.F16x8.RN.STRONG.SYS",
    ("sm_100a", torch.float32): "LDGMC.E.ADD.F32x4.RN.STRONG.SYS",
}
COPY = "LDGSTS.E.BYPASS.128"  # cp.async.cg
STORE = "STG.E.128"
STORE_TO_ALL = "STG.E.128.STRONG.SYS"  # multimem.st: the address alone says that it is multicast
WEIGHT = "LDG.E.128.CONSTANT"
INDEX = "LDG.E"
GLOBAL_MEMORY = re.compile(r"(LD|ST|LDG|STG|LDGSTS|LDGMC|ATOM|ATOMG|RED|REDG|LDL|STL|CCTL|UBLKCP|UTMALDG)(\.|$)")


def count(code: list[Instruction], wanted: str) -> int:
    return sum(each.opcode == wanted for each in code)


def opcodes(code: list[Instruction], pattern: str) -> Counter[str]:
    return Counter(each.opcode for each in code if re.match(pattern, each.opcode))


def wrong_resources(compiled: Compiled) -> list[str]:
    found, layout = compiled.resources, compiled.layout
    registers = -(-found.registers // 8) * 8 * layout.threads  # a warp gets them eight at a time for each thread
    reserved = SYSTEM_SHARED_BYTES if compiled.arch != "sm_80" else 0
    shared = max(0, found.shared_bytes - reserved) + layout.shared_bytes(compiled.variant)
    limit = fused.shared_bytes_of(CAPABILITIES[compiled.arch])
    wrong = [f"local memory: {found}"] if found.uses_local_memory else []
    wrong += [f"{found.registers} registers for {layout.threads} threads"] if registers > REGISTERS_OF_SM else []
    return wrong + ([f"{shared} bytes of shared memory, of {limit}"] if shared > limit else [])


def wrong_accesses(compiled: Compiled) -> list[str]:
    """The loop's loads and stores, all of 16 bytes, are as many as a thread's vectors need: nothing is read twice."""
    variant, vectors = compiled.variant, compiled.layout.vectors(compiled.variant)
    multimem, peers = variant.sum == "multimem", variant.world_size
    copies = vectors * (variant.residual + (0 if multimem else peers))
    stores = vectors * (variant.keep + {"multimem": 0, "two_shot": peers, "one_shot": 1}[variant.sum])
    expected = Counter({COPY: copies, STORE: stores, WEIGHT: vectors * (variant.bias + variant.post_norm + variant.norm)})
    if multimem:
        expected += Counter({REDUCE[compiled.arch, variant.dtype]: vectors, STORE_TO_ALL: vectors})
    found = Counter(each.opcode for each in compiled.loop if GLOBAL_MEMORY.match(each.opcode))
    indices = found.pop(INDEX, 0)  # residual_rows[row]
    wrong = [f"{indices} index loads in the loop"] if indices > vectors * (variant.residual and variant.listed) else []
    return wrong + ([f"the loop has {dict(found)}, not {dict(+expected)}"] if found != +expected else [])


def loads_ahead(compiled: Compiled) -> int:
    """16-byte loads of partial sums that a thread has issued before it first waits for one."""
    residual = compiled.layout.vectors_ahead(compiled.variant) if compiled.variant.residual else 0
    if compiled.variant.sum == "multimem":
        return sum(opcodes(compiled.before, "LDGMC").values())
    return count(compiled.before, COPY) - (compiled.layout.vectors(compiled.variant) if compiled.variant.post_norm and residual else residual)


def wrong_flight(compiled: Compiled) -> list[str]:
    """As many loads are in flight as kernels/fused.py promises, at the loop's start and at every wait in it."""
    variant, layout = compiled.variant, compiled.layout
    ahead = layout.vectors_ahead(variant)
    loads = ahead * (1 if variant.sum == "multimem" else variant.world_size)
    waits = {int(each.text.split()[-1], 16) for each in compiled.loop if each.opcode == "DEPBAR.LE"}
    wrong = [f"{loads_ahead(compiled)} loads ahead, not {loads}"] if loads_ahead(compiled) != loads else []
    return wrong + ([f"waits leave {waits} copies pending, not {ahead - 1}"] if waits - {ahead - 1} else [])


def wrong_waits(compiled: Compiled) -> list[str]:
    """A wait for a scoreboard is a wait for all loads that count on it: no loop may wait for those it has just issued.

    cp.async is exempt: DEPBAR.LE waits for the oldest copies alone.
    """
    pending: set[int | None] = set()
    wrong = []
    for each in compiled.loop:
        if each.waits_for & pending:
            wrong.append(f"{each.address:#x} {each.text} waits for loads of the next row")
        if each.opcode.startswith("LDGMC"):
            pending.add(each.sets)
    return wrong


def wrong_barriers(compiled: Compiled) -> list[str]:
    """One barrier for each norm, and of the row's own threads; none where one warp has the row. No fences."""
    variant, layout = compiled.variant, compiled.layout
    wanted = (variant.norm + variant.post_norm) * (layout.threads_per_row > 32)
    barriers = [each.text for each in compiled.loop if each.opcode.startswith("BAR")]
    own = rf"BAR\.SYNC\S* (R\d+|UR\d+|0x[1-9a-f]), {layout.threads_per_row:#x}$"
    wrong = [f"{len(barriers)} barriers in the loop, not {wanted}"] if len(barriers) != wanted else []
    wrong += [f"{text} stops more than a row's threads" for text in barriers if not re.match(own, text)]
    fences = opcodes(compiled.loop, "MEMBAR|FENCE|CCTL|ERRBAR")
    return wrong + ([f"fences in the loop: {dict(fences)}"] if fences else [])


def wrong_fences(compiled: Compiled) -> list[str]:
    """fence.proxy.alias is MEMBAR.SC.GPU or MEMBAR.SC.SYS, as a bit of the driver's has it, and then CCTL.IVALL."""
    wanted = compiled.variant.sum == "multimem"
    entry = after_last(compiled.before, r"BAR\.RED\.AND")
    entry = entry[: next((k for k, each in enumerate(entry) if each.opcode.startswith("LDGMC")), len(entry))]
    leave = compiled.after[: next(k for k, each in enumerate(compiled.after) if each.opcode.startswith("BAR"))]
    everywhere = sum(opcodes(compiled.code, r"MEMBAR\.SC").values())
    wrong = [f"{everywhere} fences in all, not {4 * wanted}"] if everywhere != 4 * wanted else []
    for place, code in (("after the entry", entry), ("before the exit", leave)):
        fences = [each.opcode for each in code if re.match(r"MEMBAR\.SC|CCTL\.IVALL", each.opcode)]
        if fences != ["MEMBAR.SC.GPU", "MEMBAR.SC.SYS", "CCTL.IVALL"] * wanted:
            wrong.append(f"{place}: {fences}")
    return wrong


def after_last(code: list[Instruction], pattern: str) -> list[Instruction]:
    return code[max(k for k, each in enumerate(code) if re.match(pattern, each.opcode)) + 1 :]


def wrong_atomics(compiled: Compiled) -> list[str]:
    """Only the claim of the report, on this GPU's own memory, is a read-modify-write."""
    found = opcodes(compiled.code, r"(ATOM|RED)(G|S)?\.")
    return [f"read-modify-writes: {dict(found)}"] if set(found) != {"ATOMG.E.CAS.64.STRONG.GPU"} else []


CHECKERS = (
    wrong_resources,
    wrong_accesses,
    wrong_flight,
    wrong_waits,
    wrong_barriers,
    wrong_fences,
    wrong_atomics,
)


def wrong(compiled: Compiled) -> list[str]:
    return [finding for check in CHECKERS for finding in check(compiled)]
