"""Hardware: what a machine can do by its data sheet, and what kernels really reach of that."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tile:
    """Output rows and columns that one SM computes at a time, and what it reaches of the best tile's rate."""

    rows: int
    columns: int
    efficiency: float


# cuBLAS' usual tiles on Hopper. The rates relative to the largest are those of shared memory traffic a multiply-add
# (small tiles load more for each), rounded; none is fitted.
TILES = (
    Tile(128, 256, 1.0),
    Tile(256, 128, 1.0),
    Tile(128, 192, 0.97),
    Tile(192, 128, 0.97),
    Tile(128, 128, 0.9),
    Tile(64, 256, 0.85),
    Tile(64, 128, 0.75),
    Tile(64, 64, 0.5),
)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's figures that kernels reach; `all_reduce` is a factor on a collective's time.

    Fitted on Figure 11a of the TokenWeave paper (Llama-3.3-70B, 8x H100), by `python -m perf.figure_11 --fit`: gemm,
    attention (and Hardware.step_s) on its column without communication, all_reduce on its baseline column. The others
    are read off single figures, or assumed, as stated. Other machines are taken to reach the same shares.
    """

    gemm: float = 0.6425
    attention: float = 0.554
    all_reduce: float = 0.875  # of sums that the device waits for: GEMMs clock higher after the pause
    memory: float = 0.90  # the paper's Figure 4: RMSNorm of 32768 x 8192 moves 3.01 of 3.35 TB/s
    grouped_gemm: float = 0.75  # of `gemm`: Triton's grouped GEMM of experts against cuBLAS; an assumption, not fitted
    link: float = 0.69  # Figure 4: multimem all-reduce, 1.125 x 537 MB at 450 GB/s in 1957 us
    ring_link: float = 0.87  # Figure 4: NCCL all-reduce, 1.75 x 537 MB at 450 GB/s in 2402 us


@dataclass(frozen=True)
class Hardware:
    """One accelerator of a machine. Peaks are dense (no sparsity), bandwidths bytes/s, sizes bytes, times seconds."""

    name: str
    sms: int
    flops: Mapping[str, float]  # by dtype
    memory_bandwidth: float
    memory_bytes: float
    l2_bytes: float
    link_bandwidth: float  # per direction, of one accelerator to all others
    multicast: bool  # the switch sums and broadcasts (NVLink SHARP)
    kernel_s: float = 2e-6  # between two dependent kernels of a stream: launch, ramp up and drain
    graph_kernel_s: float = 1.2e-6  # the same inside a CUDA graph
    host_launch_s: float = 20e-6  # of the host, in Python, for an eager kernel: 32 layers take some 10 ms; graphs none
    step_s: float = 2.2e-3  # once a step: schedule, upload, sample; fitted, see Efficiency
    collective_s: float = 12e-6  # of a multimem or peer collective: two barriers and the launch (Figure 4, 64 rows)
    ring_s: float = 26e-6  # of NCCL at 8 ranks (Figure 4, 64 rows)
    sm_link_bandwidth: float = 89e9  # bytes reduced per s and SM, multimem at W = 8 (Figure 7, 2 CTAs)
    fused_sm_link_bandwidth: float = 43e9  # the same with the norm fused (Figure 10, 2 CTAs)
    communication_sms: tuple[int, ...] = (2, 4, 8, 16, 32)  # worth considering for a collective
    tiles: tuple[Tile, ...] = TILES  # () = GEMMs have no waves
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def device(self) -> str:
        """What a rank has of its own, in words: all ranks share one CPU."""
        return "GPU" if self.tiles else "rank"

    def peak(self, dtype: str) -> float:
        """FLOP/s. Raises ValueError naming the known dtypes."""
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no peak for {dtype!r}; it has {', '.join(self.flops)}")
        return self.flops[dtype]


KNOWN = (
    # NVIDIA H100 data sheet (SXM5): 989.4 TFLOPS BF16 dense, 1978.9 FP8 dense, 67 FP32, 80 GB HBM3 at 3.35 TB/s, NVLink
    # 900 GB/s in both directions. Hopper white paper: 132 SMs, 50 MB L2.
    Hardware(
        name="h100-sxm",
        sms=132,
        flops={"bfloat16": 989.4e12, "float16": 989.4e12, "float8": 1978.9e12, "float32": 67e12},
        memory_bandwidth=3.35e12,
        memory_bytes=80e9,
        l2_bytes=50e6,
        link_bandwidth=450e9,
        multicast=True,
    ),
    # NVIDIA H200 data sheet (SXM): H100's compute, 141 GB HBM3e at 4.8 TB/s, NVLink 900 GB/s.
    Hardware(
        name="h200",
        sms=132,
        flops={"bfloat16": 989.4e12, "float16": 989.4e12, "float8": 1978.9e12, "float32": 67e12},
        memory_bandwidth=4.8e12,
        memory_bytes=141e9,
        l2_bytes=50e6,
        link_bandwidth=450e9,
        multicast=True,
    ),
    # NVIDIA A100 data sheet (SXM 80 GB): 312 TFLOPS BF16 dense, 19.5 FP32, 2039 GB/s, NVLink 600 GB/s. Ampere white
    # paper: 108 SMs, 40 MB L2. Its NVSwitch does not sum.
    Hardware(
        name="a100",
        sms=108,
        flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
        memory_bandwidth=2.039e12,
        memory_bytes=80e9,
        l2_bytes=40e6,
        link_bandwidth=300e9,
        multicast=False,
    ),
    # NVIDIA HGX B200 data sheet, an eighth: 2.25 PFLOPS BF16 dense, 4.5 FP8 dense, 75 TFLOPS FP32, 180 GB HBM3e at
    # 7.7 TB/s, NVLink 5 1.8 TB/s. 148 SMs and 126 MB L2 as the CUDA device properties state them.
    Hardware(
        name="b200",
        sms=148,
        flops={"bfloat16": 2250e12, "float16": 2250e12, "float8": 4500e12, "float32": 75e12},
        memory_bandwidth=7.7e12,
        memory_bytes=180e9,
        l2_bytes=126e6,
        link_bandwidth=900e9,
        multicast=True,
    ),
    # NVIDIA L40S data sheet: 362.05 TFLOPS BF16 dense, 733 FP8 dense, 91.6 FP32, 48 GB GDDR6 at 864 GB/s, PCIe 4.0 x16
    # 64 GB/s in both directions. Ada white paper (AD102): 142 SMs, 96 MB L2.
    Hardware(
        name="l40s",
        sms=142,
        flops={"bfloat16": 362.05e12, "float16": 362.05e12, "float8": 733e12, "float32": 91.6e12},
        memory_bandwidth=864e9,
        memory_bytes=48e9,
        l2_bytes=96e6,
        link_bandwidth=32e9,
        multicast=False,
    ),
    # Intel Xeon Platinum 8480+ (ark.intel.com): 56 cores at 2.0 GHz, two AVX-512 units (64 FP32 operations a cycle),
    # AMX (2048 BF16), 105 MB cache, eight DDR5-4800 channels. "SMs" are cores. The link is loopback through gloo, about
    # 3 GB/s a direction, and a rough guess: `tokenweave calibrate` measures it.
    Hardware(
        name="cpu",
        sms=56,
        flops={"float32": 7.2e12, "bfloat16": 229e12, "float16": 7.2e12},
        memory_bandwidth=307e9,
        memory_bytes=256e9,
        l2_bytes=105e6,
        link_bandwidth=3e9,
        multicast=False,
        kernel_s=5e-6,
        graph_kernel_s=5e-6,
        host_launch_s=0.0,  # the calling thread is the compute lane
        step_s=1e-3,
        collective_s=100e-6,
        ring_s=100e-6,
        sm_link_bandwidth=3e9,
        fused_sm_link_bandwidth=3e9,
        communication_sms=(1,),
        tiles=(),
        efficiency=Efficiency(all_reduce=1.0),
    ),
)


def find_hardware(hardware: str | Path | Hardware) -> Hardware:
    """A record by known name, or from a JSON file of the user's own. Raises ValueError, FileNotFoundError: one line."""
    if isinstance(hardware, Hardware):
        return hardware
    by_name = {known.name: known for known in KNOWN}
    if str(hardware).lower() in by_name:
        return by_name[str(hardware).lower()]
    if str(hardware).endswith(".json"):
        return read_hardware(Path(hardware))
    wanted = str(hardware).lower()
    begun = [name for name in by_name if name.startswith(wanted) or wanted.startswith(name)]
    near = begun or difflib.get_close_matches(wanted, by_name, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"unknown hardware {str(hardware)!r}{hint}; known: {', '.join(by_name)}, or a .json file of your own"
    )


def read_hardware(path: Path) -> Hardware:
    """A user's record: fields of Hardware, all of them or, with "like": a known name, those that differ.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the hardware file {path} does not exist")
    try:
        return parse_hardware(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the hardware file {path} cannot be used: {' '.join(str(error).split())}") from error


def as_json(hardware: Hardware) -> dict[str, Any]:
    """What read_hardware reads."""
    return {**asdict(hardware), "flops": dict(hardware.flops)}


def parse_hardware(values: Any) -> Hardware:
    if not isinstance(values, dict):
        raise ValueError(f"expected an object with the fields of a hardware record, got {type(values).__name__}")
    values = dict(values)
    base = find_hardware(_text("like", values.pop("like"))) if "like" in values else None
    _known_fields(values, Hardware)
    missing = [name for name in _REQUIRED if name not in values]
    if base is None and missing:
        raise ValueError(f'{", ".join(missing)} missing; state them, or start from a known record with "like"')
    parsed = {name: _value(name, value, base) for name, value in values.items()}
    return Hardware(**parsed) if base is None else replace(base, **parsed)


_REQUIRED = [f.name for f in fields(Hardware) if f.default is MISSING and f.default_factory is MISSING]
_MAY_BE_ZERO = ("kernel_s", "graph_kernel_s", "host_launch_s", "step_s", "collective_s", "ring_s")


def _value(name: str, value: Any, base: Hardware | None) -> Any:
    if name == "name":
        return _text(name, value)
    if name == "multicast":
        return _of_type(name, value, bool, "true or false")
    if name == "flops":
        peaks = _of_type(name, value, dict, 'an object such as {"bfloat16": 989e12}')
        return {**(base.flops if base else {}), **{dtype: _number(f"flops.{dtype}", x) for dtype, x in peaks.items()}}
    if name == "communication_sms":
        return _sm_counts(value)
    if name == "tiles":
        return tuple(_tile(x) for x in _of_type(name, value, list, "a list of tiles"))
    if name == "efficiency":
        return _efficiency(value, base)
    return _count(name, value) if name == "sms" else _number(name, value)


def _sm_counts(value: Any) -> tuple[int, ...]:
    counts = sorted({_count("communication_sms", x) for x in _of_type("communication_sms", value, list, "a list")})
    if not counts:
        raise ValueError("communication_sms must name at least one SM count")
    return tuple(counts)


def _efficiency(value: Any, base: Hardware | None) -> Efficiency:
    values = _of_type("efficiency", value, dict, "an object")
    _known_fields(values, Efficiency)
    shares = {name: _number(f"efficiency.{name}", x) for name, x in values.items()}
    return replace(base.efficiency if base else Efficiency(), **shares)


def _tile(value: Any) -> Tile:
    values = _of_type("tile", value, dict, "an object with rows, columns, efficiency")
    _known_fields(values, Tile)
    rows, columns = _count("tile rows", values.get("rows")), _count("tile columns", values.get("columns"))
    return Tile(rows, columns, _number("tile efficiency", values.get("efficiency")))


def _known_fields(values: Mapping[str, Any], record: Any) -> None:
    known = [f.name for f in fields(record)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"unknown field {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {known}")
            )


def _of_type(name: str, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    return _of_type(name, value, str, "text")


def _number(name: str, value: Any) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise ValueError(f"{name} must be a number {'>= 0' if name in _MAY_BE_ZERO else '> 0'}, got {value!r}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value
