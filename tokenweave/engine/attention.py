"""Which attention runs: torch's operators, Triton kernels of our own, or FlashInfer's. The choice, and its opening."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenweave.comm.norm import Norm
from tokenweave.engine.tables import Tables
from tokenweave.models.attention import Options, PagedAttention, Span
from tokenweave.weave.request import Rows

ATTENTIONS = ("auto", "torch", "triton", "flashinfer")
FLASHINFER_HEAD_DIMS = (64, 128, 256)


class HalfAttention(Protocol):
    """What a strand calls as `half.attention`. See PagedAttention, whose maths it is."""

    def __call__(
        self,
        layer: int,
        qk: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        options: Options,
        rows: Rows | None = None,
        norms: tuple[Norm, Norm] | None = None,
    ) -> Tensor: ...


class Backend(Protocol):
    """Opened once for a cache; called once per half and step for the half's attention.

    reads_tables: it needs the half's tables. graphs: what it queues may be captured, and is right for whatever the
    tables hold when the graph is launched.
    """

    reads_tables: bool
    graphs: bool

    def __call__(self, spans: Sequence[Span], tables: Tables[Tensor] | None) -> HalfAttention: ...


class TorchBackend:
    reads_tables = False
    graphs = False

    def __init__(self, storage: Tensor):
        self.storage = storage

    def __call__(self, spans: Sequence[Span], tables: Tables[Tensor] | None) -> HalfAttention:
        return PagedAttention(spans, self.storage)


@dataclass(frozen=True)
class Site:
    """What decides which attention can run. capability: 90 for compute capability 9.0, 0 on a CPU.

    triton, flashinfer: whether they are installed. kernels: whether FlashInfer has its kernels, or an nvcc to make them
    with at first use. interpreted: Triton's kernels run on a CPU (TRITON_INTERPRET).
    """

    device: str
    capability: int
    dtype: torch.dtype
    head_dim: int
    triton: bool
    flashinfer: bool
    kernels: bool = True
    interpreted: bool = False


@dataclass(frozen=True)
class Backends:
    """eager: of steps that are queued one by one. captured: of those in a CUDA graph; None: nothing can be captured."""

    eager: Backend
    captured: Backend | None


def open_attention(asked: str, storage: Tensor) -> Backends:
    """The attention over this cache: [block, layer, 2, token, kv_head, head_dim]. ValueError: it cannot be had here."""
    site = site_of(storage.device, storage.dtype, storage.shape[-1])
    chosen = choose(asked, site)
    if chosen == "torch":
        return Backends(TorchBackend(storage), None)
    from tokenweave.engine.triton_attention import TritonBackend, gpu_of

    triton = TritonBackend(storage, gpu_of(storage.device))
    if chosen == "triton":
        return Backends(triton, triton)
    import flashinfer

    from tokenweave.engine.flashinfer_attention import FlashInferBackend

    return Backends(FlashInferBackend(storage, flashinfer), triton)


def check_attention(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises ValueError, where open_attention would for such a cache."""
    choose(asked, site_of(device, dtype, head_dim))


def site_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> Site:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    installed = {name: importlib.util.find_spec(name) is not None for name in ("triton", "flashinfer")}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernels = importlib.util.find_spec("flashinfer_jit_cache") is not None or has_nvcc()
    return Site(device.type, 10 * major + minor, dtype, head_dim, kernels=kernels, interpreted=interpreted, **installed)


def has_nvcc() -> bool:
    """Where FlashInfer looks for it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which("nvcc") is not None or any(shutil.which("nvcc", path=folder) for folder in folders)


def choose(asked: str, site: Site) -> str:
    """ "torch", "triton" or "flashinfer". ValueError: what was asked for cannot run here."""
    if asked == "auto":
        fastest_first = ("flashinfer", "triton", "torch") if site.device == "cuda" else ("torch",)
        return next(name for name in fastest_first if obstacle(name, site) is None)
    if reason := obstacle(asked, site):
        raise ValueError(f"attention={asked!r} cannot run here: {reason}; attention='auto' takes what can")
    return asked


def obstacle(name: str, site: Site) -> str | None:
    """Why this attention cannot run; None: it can."""
    if name == "torch":
        return None
    if name == "triton":
        return triton_obstacle(site)
    if site.device != "cuda":
        return f"FlashInfer needs a CUDA device, this is {site.device}"
    if not site.flashinfer:
        return "FlashInfer is not installed: pip install tokenweave[flashinfer]"
    if not site.kernels:
        return "FlashInfer compiles its kernels with nvcc, which is not found: pip install flashinfer-jit-cache"
    if site.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer takes bfloat16 and float16, the cache is {site.dtype}"
    if site.head_dim not in FLASHINFER_HEAD_DIMS:
        return f"FlashInfer takes heads of {FLASHINFER_HEAD_DIMS} elements, the model's have {site.head_dim}"
    return triton_obstacle(site)  # its keys and values are written by a Triton kernel


def triton_obstacle(site: Site) -> str | None:
    if not site.triton:
        return "Triton is not installed: pip install tokenweave[cuda]"
    if site.device != "cuda":
        return None if site.interpreted else f"Triton's kernels need a CUDA device, this is {site.device}"
    if site.capability < 80:
        return f"the kernels need compute capability 8.0 or later, this GPU has {site.capability / 10}"
    return None
