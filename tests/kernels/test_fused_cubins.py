"""The fused kernel as compiled, variant by variant: its resources, and what its machine code does. Needs no GPU.

The row loop is where a row is summed, normed and stored. The checkers below take the code and the variant, and return
what is wrong with it, so that the last tests can show that they notice planted faults.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
    (),  # the plain all-reduce
)
AXES = {
    "arch": tuple(CAPABILITIES),
    "sum": tuple(fused.SUMS),
    "dtype": tuple(fused.ELEMENTS),
    "hidden_size": (64, 104, 896, 3584, 5120, 8192, 12288, 16384),
    "world_size": tuple(range(2, 9)),
    "flags": FLAGS,
}


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    layout: Geometry
    arch: str
    resources: Resources
    before: list[Instruction]
    loop: list[Instruction]
    after: list[Instruction]

    @property
    def code(self) -> list[Instruction]:
        return self.before + self.loop + self.after


def build(variant: Variant, arch: str, headers: Path | None = None) -> Compiled:
    layout = fused.geometry(variant, fused.shared_bytes_of(CAPABILITIES[arch]))
    cubin = jit.cubin(fused.source(variant, layout), arch, headers or fused.headers())
    code = instructions(cubin)
    loop = row_loop(code)
    first, end = code.index(loop[0]), code.index(loop[-1]) + 1
    return Compiled(variant, layout, arch, resources(cubin), code[:first], loop, code[end:])


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
    expected = Counter(
        {COPY: copies, STORE: stores, WEIGHT: vectors * (variant.bias + variant.post_norm + variant.norm)}
    )
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
    return count(compiled.before, COPY) - (
        compiled.layout.vectors(compiled.variant) if compiled.variant.post_norm and residual else residual
    )


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

    cp.async is exempt: DEPBAR.LE waits for the oldest copies alone. With a post_norm and fp32 or a bias ptxas runs out
    of scoreboards and lets several kinds of loads share one: slower, but not wrong.
    """
    variant = compiled.variant
    if variant.post_norm and (variant.bias or variant.dtype == torch.float32):
        return []
    pending: set[int | None] = set()
    wrong = []
    for each in compiled.loop:
        if each.waits_for & pending and not each.opcode.startswith("CALL"):  # the division of numbers near the limits
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


# -- the kernel as it is ----------------------------------------------------------------------------------------------


def is_drawn(case: dict[str, Any]) -> bool:
    """Where the arch has multicast, and of those one in 16, to choose among few: every pair is in many."""
    can = case["sum"] != "multimem" or case["arch"] != "sm_80"
    return can and zlib.crc32(repr(case).encode()) % 16 == 0


def test_every_pair_of_what_a_variant_may_be():
    cases = pairwise(AXES, is_drawn)
    assert all({case[axis] for case in cases} == set(values) for axis, values in AXES.items())
    findings = {(each.arch, each.variant): wrong(each) for each in build_all(cases)}
    assert {variant: found for variant, found in findings.items() if found} == {}


LLAMA = {"dtype": torch.bfloat16, "hidden_size": 8192, "flags": ("residual", "norm", "keep")}


def test_64_kb_are_in_flight_at_hidden_8192():
    ways = [("multimem", 8), ("two_shot", 2), ("two_shot", 4), ("two_shot", 8), ("one_shot", 2), ("one_shot", 8)]
    cases = [{**LLAMA, "arch": "sm_90a", "sum": sum_, "world_size": world_size} for sum_, world_size in ways]
    for compiled in build_all(cases):
        assert wrong(compiled) == []
        vectors = compiled.layout.threads_per_row * compiled.layout.vectors(compiled.variant)
        share = compiled.variant.row_vectors / vectors  # the last vectors of a row may be missing
        assert 16 * compiled.layout.threads * loads_ahead(compiled) * share >= 64 << 10


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("flags", FLAGS)
def test_64_kb_are_planned_at_hidden_8192(arch, flags):
    for world_size in range(2, 9):
        for sum_ in fused.SUMS:
            variant = variant_of({**LLAMA, "sum": sum_, "world_size": world_size, "flags": flags})
            layout = fused.geometry(variant, fused.shared_bytes_of(CAPABILITIES[arch]))
            assert layout.bytes_in_flight(variant) >= 64 << 10, (variant, layout)


@pytest.mark.parametrize("hidden_size", [2048, 8192])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_what_needs_most_registers_does_not_spill(arch, hidden_size):
    variant = Variant(torch.float32, hidden_size, 8, "multimem", residual=True, bias=True, norm=True)
    assert wrong_resources(build(variant, arch)) == []


# -- faults that the checkers must notice -----------------------------------------------------------------------------

FENCE = "if (S::SUM == Sum::MULTIMEM) ptx::fence_alias();\n  "
STORE_PTX = """asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\""""
HALVES_PTX = """asm volatile("st.global.v2.u32 [%0], {%1, %2}; st.global.v2.u32 [%0+8], {%3, %4};\""""
SWITCH = "Element::ld_reduce(flight[i % S::AHEAD], launch.partial_multicast + place, wanted);"
FAULTS: tuple[tuple[str, str, str, str, Callable[[Compiled], list[str]]], ...] = (
    ("no fence at the entry", "kernel.cuh", FENCE + "group.run();", "group.run();", wrong_fences),
    ("no fence at the exit", "kernel.cuh", FENCE + "meeting.leave();", "meeting.leave();", wrong_fences),
    (
        "a fence for each row",
        "kernel.cuh",
        "float squares = take_row();",
        "float squares = take_row(); ptx::fence_alias();",
        wrong_barriers,
    ),
    ("fewer loads ahead", "kernel.cuh", "AHEAD = AHEAD_;", "AHEAD = AHEAD_ / 2;", wrong_flight),
    ("a branch around the load", "kernel.cuh", SWITCH, f"if (wanted) {SWITCH}", wrong_waits),
    ("all threads wait", "kernel.cuh", "sync_some(1 + group, S::THREADS_PER_ROW)", "sync_block()", wrong_barriers),
    ("stores of 8 bytes", "ptx.cuh", STORE_PTX, HALVES_PTX, wrong_accesses),
    ("sums in bf16", "ptx.cuh", "acc::f32.v4.bf16x2", "v4.bf16x2", wrong_accesses),
    (
        "a sum as a signal",
        "ptx.cuh",
        "return atomicCAS(address, 0ull, 1ull) == 0",
        "return atomicAdd(address, 1ull) == 0",
        wrong_atomics,
    ),
)


def planted(folder: Path, name: str, sound: str, faulty: str) -> Path:
    """A copy of the headers in which one place is changed."""
    copy = Path(shutil.copytree(fused.headers(), folder / "planted"))
    text = (copy / name).read_text()
    assert text.count(sound) == 1, f"{name} has no longer one {sound!r}: write this fault anew"
    (copy / name).write_text(text.replace(sound, faulty))
    return copy


@pytest.mark.parametrize(
    ("name", "sound", "faulty", "check"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_planted_fault_is_noticed(name, sound, faulty, check, tmp_path):
    # No residual, so that its shared memory stays as planned.
    variant = Variant(torch.bfloat16, 8192, 8, "multimem", norm=True)
    compiled = build(variant, "sm_90a", planted(tmp_path, name, sound, faulty))
    assert check(compiled)


def test_a_spill_and_too_much_shared_memory_are_noticed():
    compiled = build(Variant(torch.bfloat16, 4096, 8, "two_shot", norm=True), "sm_90a")
    assert not wrong_resources(compiled)
    assert wrong_resources(replace(compiled, resources=Resources(64, 1024, 0, 8)))
    assert wrong_resources(replace(compiled, resources=Resources(64, 200 << 10, 0, 0)))
    assert wrong_resources(replace(compiled, layout=Geometry(256, 2), resources=Resources(255, 0, 0, 0)))


def test_python_and_the_headers_cannot_disagree_on_the_loads_ahead(tmp_path):
    less = planted(tmp_path, "kernel.cuh", "AHEAD = AHEAD_;", "AHEAD = 1;")
    with pytest.raises(jit.CompileError, match=r"as kernels/fused\.py has it"):
        build(Variant(torch.bfloat16, 8192, 2, "two_shot", norm=True), "sm_90a", less)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_size", [56, 100, 16392, 20000])
def test_a_hidden_size_that_does_not_fit_is_refused_by_python_and_by_the_compiler(hidden_size):
    with pytest.raises(ValueError, match=f"multiple of 8 from 64 to 16384, not {hidden_size}; use comm="):
        Variant(torch.bfloat16, hidden_size, 8, "two_shot")
    variant = Variant(torch.bfloat16, 8192, 8, "two_shot")
    text = fused.source(variant, fused.geometry(variant)).replace(", 8192,", f", {hidden_size},")
    with pytest.raises(jit.CompileError, match="hidden must be a multiple of 8 from 64 to 16384"):
        jit.cubin(text, "sm_90a", fused.headers())


# -- where the headers lie --------------------------------------------------------------------------------------------


def test_headers_of_an_editable_install():
    assert fused.headers().samefile(Path(fused.__file__).parents[2] / "csrc" / fused.NAME)


def test_headers_of_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "tokenweave"
    monkeypatch.setattr(fused, "__file__", str(package / "kernels" / "fused.py"))
    with pytest.raises(FileNotFoundError, match="install tokenweave again"):
        fused.headers()
    installed = package / "csrc" / fused.NAME
    installed.mkdir(parents=True)
    (installed / "kernel.cuh").touch()
    assert fused.headers() == installed
