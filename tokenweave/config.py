"""EngineConfig: what a user may set, every default stated once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenweave.comm.choice import COMMS
from tokenweave.comm.link import Link
from tokenweave.engine.attention import ATTENTIONS
from tokenweave.engine.policy import Policy
from tokenweave.keywords import known_keywords

OVERLAPS = ("auto", "off", "fused", "weave")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
LONGEST_TIMEOUT_S = 1e9  # what clocks of torch and of the system can count


@known_keywords
@dataclass(frozen=True)
class EngineConfig:
    """Options of one LLM. Raises ValueError for a value that cannot be, TypeError for an unknown option."""

    model: str
    overlap: str = "auto"  # "off": plain all-reduce | "fused": sharded sums, no split | "weave": two halves | "auto"
    dtype: str = "auto"  # "auto": what the checkpoint states, and float32 on a CPU
    comm: str = "auto"  # the sums of "fused" and "weave": "multimem" | "peer" (one kernel) | "sharded" (collectives)
    device: str = "auto"  # "auto": CUDA where there is one
    attention: str = "auto"  # "flashinfer" | "triton" | "torch"; "auto": on CUDA the first that is there, else torch
    load_format: str = "auto"  # "auto": the folder's safetensors | "dummy": random weights, config.json is enough
    max_num_batched_tokens: int = 2048  # tokens of one step, prefill and decode together
    max_num_seqs: int = 64  # sequences that run at once
    block_size: int = 16  # tokens of one KV block
    num_kv_blocks: int | None = None  # None: by gpu_memory_utilization; on a CPU what can be needed, within free memory
    # Share of a GPU's memory for weights, activations, CUDA graphs and KV cache: so much must be free at the start, and
    # what other processes use is not counted. Plays no part where num_kv_blocks is given.
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None  # None: what the model was made for
    # Launch a step before the tokens of the last are read. None: on CUDA. A CPU gains nothing: launching is computing.
    async_scheduling: bool | None = None
    enforce_eager: bool = False  # queue every step anew, with no CUDA graphs
    # The largest prefill step that is captured in a CUDA graph. None: the largest that is predicted to take longer to
    # queue, at 20 us a launch, than to compute. Llama on H100s: 8B on one 192, on eight 3840; 70B on eight 1024.
    cuda_graph_max_tokens: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0  # of requests that bring none
    tensor_parallel_size: int | None = None  # None: torchrun's world size, 1 without it
    timeout_s: float = 600.0  # the bound on every wait for another rank
    link: Link | None = None  # simulate a wire of this speed under the comm lane (CPU; tests and perf)
    trace: str | None = None  # write a timeline here, and a picture of it beside; on CUDA steps are then not captured
    progress: bool = True  # bars on rank 0, while loading and generating
    policy: Policy | None = None  # the scheduler's order, budget and preempt functions; None: first come, first served

    def __post_init__(self) -> None:
        one_of("overlap", self.overlap, OVERLAPS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("device", self.device, DEVICES)
        one_of("attention", self.attention, ATTENTIONS)
        one_of("load_format", self.load_format, LOAD_FORMATS)
        one_of("comm", self.comm, COMMS)
        for name in ("max_num_batched_tokens", "max_num_seqs", "block_size"):
            whole_number(name, getattr(self, name))
        for name in ("num_kv_blocks", "max_model_len", "tensor_parallel_size", "cuda_graph_max_tokens"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        for name in ("enforce_eager", "enable_prefix_caching", "progress"):
            of_type(name, getattr(self, name), bool)
        if self.async_scheduling is not None:
            of_type("async_scheduling", self.async_scheduling, bool)
        of_type("seed", self.seed, int)
        of_type("timeout_s", self.timeout_s, int, float)
        if not 0 < self.timeout_s <= LONGEST_TIMEOUT_S:
            raise ValueError(f"timeout_s must be > 0 and at most {LONGEST_TIMEOUT_S:g} seconds, got {self.timeout_s!r}")
        of_type("gpu_memory_utilization", self.gpu_memory_utilization, int, float)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be > 0 and <= 1, got {self.gpu_memory_utilization!r}")
        if self.trace is not None and not (isinstance(self.trace, str) and self.trace.endswith(".json")):
            raise ValueError(
                f"trace must name a .json file (its picture is written beside it as .png), got {self.trace!r}"
            )
        if self.link is not None and not isinstance(self.link, Link):
            raise ValueError(f"link must be a tokenweave.comm.link.Link or None, got {self.link!r}")
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a tokenweave.engine.policy.Policy or None, got {self.policy!r}")


def of_type(name: str, value: Any, *kinds: type) -> None:
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be of type {expected}, got {value!r}")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def whole_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
