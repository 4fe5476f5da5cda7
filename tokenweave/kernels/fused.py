"""The fused AllReduce + RMSNorm kernel seen from Python: its variants, how each is laid out, what a launch is given.

The kernel itself is csrc/fused_allreduce_rmsnorm/kernel.cuh, whose head says what it computes.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

NAME = "fused_allreduce_rmsnorm"
MAX_RANKS = 8
MAX_BLOCKS = 256
HIDDEN_SIZES = range(64, 16384 + 1, 8)
ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "F16", torch.float32: "F32"}
SUMS = {"multimem": "MULTIMEM", "two_shot": "TWO_SHOT", "one_shot": "ONE_SHOT"}
FLAGS = ("residual", "listed", "bias", "post_norm", "norm", "keep")  # bit 0, bit 1, ... of kernel.cuh's Flag

BLOCK_THREADS = 512  # at most
REGISTERS = 65536  # of an SM, on every GPU since compute capability 3.5
BYTES_IN_FLIGHT = 64 << 10  # of a block, where its rows have so many: with fewer, few blocks cannot fill a link
GROUPS = 3  # of threads, for a block: while one waits for its row's sum, others compute
SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
LEAST_SHARED_BYTES = (
    99 << 10
)  # of a block on any GPU since compute capability 8.0 (CUDA C++ programming guide, table 30)


@dataclass(frozen=True)
class Variant:
    """What is fixed when the kernel is compiled. Flags as in kernel.cuh; the world size is the number of ranks."""

    dtype: torch.dtype
    hidden_size: int
    world_size: int
    sum: str  # "multimem" | "two_shot" | "one_shot"
    residual: bool = False
    listed: bool = False
    bias: bool = False
    post_norm: bool = False
    norm: bool = False
    keep: bool = True

    def __post_init__(self) -> None:
        refusal = why_not(self.dtype, self.hidden_size, self.world_size)
        if refusal:
            raise ValueError(refusal)

    @property
    def row_vectors(self) -> int:
        """16-byte vectors of a row."""
        return self.hidden_size * self.dtype.itemsize // 16

    @property
    def sources(self) -> int:
        """Loads for each vector: one of the switch, or one of each peer."""
        return 1 if self.sum == "multimem" else self.world_size

    @property
    def flags(self) -> int:
        return sum(getattr(self, flag) << bit for bit, flag in enumerate(FLAGS))


def why_not(dtype: torch.dtype, hidden_size: int, world_size: int) -> str | None:
    """Why the kernel cannot be used, or None."""
    if dtype not in ELEMENTS:
        return f"the fused kernel takes {', '.join(map(str, ELEMENTS))}, not {dtype}; choose another dtype"
    if hidden_size not in HIDDEN_SIZES:
        return (
            f"the fused kernel takes a hidden size that is a multiple of 8 from {HIDDEN_SIZES.start} to "
            f"{HIDDEN_SIZES.stop - 1}, not {hidden_size}; use comm='sharded' or 'reference'"
        )
    if not 1 <= world_size <= MAX_RANKS:
        return f"the fused kernel joins up to {MAX_RANKS} ranks, not {world_size}; use comm='sharded' or 'reference'"
    return None


@dataclass(frozen=True)
class Geometry:
    """How a block is shared out: groups of `threads_per_row` threads, one row each at a time.

    ahead: how many of its vectors a thread has in flight; 0: as many as bring a block to BYTES_IN_FLIGHT.
    """

    threads_per_row: int
    rows_per_block: int
    ahead: int = 0

    @property
    def threads(self) -> int:
        return self.threads_per_row * self.rows_per_block

    def vectors(self, variant: Variant) -> int:
        """16-byte vectors of a row for each thread; the last ones of a row may be missing."""
        return -(-variant.row_vectors // self.threads_per_row)

    def vectors_ahead(self, variant: Variant) -> int:
        """How many of its vectors a thread has in flight, each with one load for each source; divides `vectors`."""
        if self.ahead:
            return self.ahead
        vectors, loads = self.vectors(variant), -(-bytes_wanted(variant) // 16 // self.threads)
        least = -(-loads // variant.sources)
        return next((n for n in range(1, vectors) if vectors % n == 0 and n >= least), vectors)

    def bytes_in_flight(self, variant: Variant) -> int:
        """Reduction loads that a block has in flight."""
        share = variant.row_vectors / (self.vectors(variant) * self.threads_per_row)
        return int(16 * self.threads * self.vectors_ahead(variant) * variant.sources * share)

    def shared_bytes(self, variant: Variant) -> int:
        ahead = self.vectors_ahead(variant)
        peers = 0 if variant.sum == "multimem" else ahead * variant.world_size
        residual = 0 if not variant.residual else self.vectors(variant) if variant.post_norm else ahead
        return 16 * self.threads * (peers + residual) + 2 * 4 * self.rows_per_block * (self.threads_per_row // 32)

    def registers(self, variant: Variant) -> int:
        """Registers that ptxas needs for a thread so as not to spill: a line above what was seen of NVRTC 13.0 for
        sm_80, sm_90a and sm_100a, in all of some 1,500 variants but a few wide ones in fp32 with a bias (8 bytes)."""
        vectors, wide = self.vectors(variant), variant.dtype == torch.float32
        if variant.sum == "multimem":
            in_flight = self.vectors_ahead(variant)
            return 7 * (vectors + in_flight) + 56 + 32 * variant.bias if wide else 5 * vectors + 4 * in_flight + 56
        return 7 * vectors + 6 * variant.world_size + (84 + 16 * variant.bias if wide else 48)

    def fits(self, variant: Variant, shared_bytes: int) -> bool:
        quarters = -(-self.threads // 128)  # an SM's registers are dealt to four warps at a time, by eights
        available = min(255, REGISTERS // (128 * quarters) // 8 * 8)
        return self.registers(variant) <= available and self.shared_bytes(variant) <= shared_bytes


@functools.cache
def geometry(variant: Variant, shared_bytes: int = 227 << 10) -> Geometry:
    """The geometry for a GPU whose blocks may have `shared_bytes`.

    Of those that fit: enough bytes in flight, then enough groups, then most threads, then fewest vectors for each.
    Raises ValueError if none fits.
    """
    widths = range(32, BLOCK_THREADS + 1, 32)
    blocks = [Geometry(width, rows) for width in widths for rows in range(1, BLOCK_THREADS // width + 1)]
    candidates = [replace(each, ahead=n) for each in blocks for n in divisors(each.vectors(variant))]
    fitting = [each for each in candidates if each.fits(variant, shared_bytes)]
    if not fitting:  # wide rows with all that can be added to them: better some spills than nothing
        fitting = [each for each in candidates if each.shared_bytes(variant) <= shared_bytes]
    if not fitting:
        raise ValueError(f"{variant} does not fit into {shared_bytes} bytes of shared memory; use comm='sharded'")

    def merit(each: Geometry) -> tuple[int, ...]:
        in_flight = min(each.bytes_in_flight(variant), bytes_wanted(variant))
        return in_flight, min(each.rows_per_block, GROUPS), each.threads, -each.vectors(variant), -each.ahead

    return max(fitting, key=merit)


def bytes_wanted(variant: Variant) -> int:
    """In flight, of a block. Two peers' values arrive in shared memory, which has room for twice as many; with more
    peers, or in fp32, ptxas would spill."""
    twice = variant.sum != "multimem" and variant.world_size == 2 and variant.dtype.itemsize == 2
    return BYTES_IN_FLIGHT * (2 if twice else 1)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def shared_bytes_of(capability: tuple[int, int]) -> int:
    """Shared memory that a block may have on a GPU of this compute capability."""
    return SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)


def shape(variant: Variant, layout: Geometry) -> str:
    """The arguments of kernel.cuh's template Shape."""
    return (
        f"{ELEMENTS[variant.dtype]}, {variant.hidden_size}, {variant.world_size}, Sum::{SUMS[variant.sum]}, "
        f"{variant.flags}, {layout.threads_per_row}, {layout.rows_per_block}, {layout.vectors_ahead(variant)}"
    )


def source(variant: Variant, layout: Geometry) -> str:
    """The translation unit that makes the template one kernel."""
    return f"""#include "kernel.cuh"
using namespace tokenweave;
using Fused = Shape<{shape(variant, layout)}>;
static_assert(Fused::SHARED_BYTES == {layout.shared_bytes(variant)}, "as kernels/fused.py has it");
static_assert(sizeof(Launch) == {ctypes.sizeof(Launch)}, "as kernels/fused.py has it");
extern "C" __global__ void __launch_bounds__(Fused::THREADS, 1) {NAME}(const __grid_constant__ Launch launch) {{
  fused_allreduce_rmsnorm<Fused>(launch);
}}
"""


def headers() -> Path:
    """The folder of the kernel's headers: in the installed package, or in the repository of an editable install."""
    package = Path(__file__).parents[1]
    folders = [package / "csrc" / NAME, package.parent / "csrc" / NAME]
    for folder in folders:
        if (folder / "kernel.cuh").is_file():
            return folder
    raise FileNotFoundError(f"kernel.cuh is in neither {folders[0]} nor {folders[1]}; install tokenweave again")


def without_norm(variant: Variant) -> Variant:
    """The plain all-reduce of the same kernel, to compare with."""
    return replace(variant, residual=False, listed=False, bias=False, post_norm=False, norm=False, keep=False)


# -- what a launch is given: the structs of barrier.cuh and kernel.cuh -------------------------------------------------

Pointers = ctypes.c_uint64 * MAX_RANKS


class Pad(ctypes.Structure):
    _fields_ = (("signal", ctypes.c_uint64 * (MAX_BLOCKS * MAX_RANKS)), ("epoch", ctypes.c_uint64 * MAX_BLOCKS))


class Abort(ctypes.Structure):
    _fields_ = (("raised", ctypes.c_uint64), ("claimed", ctypes.c_uint64))


REASONS = {1: "timeout", 2: "mismatch", 3: "aborted", 4: "asked"}


class Report(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("rank", "peer", "channel", "block", "expected", "seen", "told_by", "reason", "asked")
    )


class Place(ctypes.Structure):
    _fields_ = (
        ("pad", Pointers),
        ("abort", Pointers),
        ("report", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_uint64),
        ("rank", ctypes.c_int),
        ("channel", ctypes.c_int),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("place", Place),
        ("partial", Pointers),
        ("hidden", Pointers),
        ("partial_multicast", ctypes.c_uint64),
        ("hidden_multicast", ctypes.c_uint64),
        ("residual_in", ctypes.c_uint64),
        ("residual_out", ctypes.c_uint64),
        ("residual_stride", ctypes.c_uint64),
        ("residual_rows", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("post_weight", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("post_eps", ctypes.c_float),
        ("post_offset", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("first_row", ctypes.c_int * (MAX_RANKS + 1)),
        ("row_vectors", ctypes.c_int),
        ("first_residual", ctypes.c_int * MAX_RANKS),
    )
