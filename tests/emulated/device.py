"""A GPU's tensors on a CPU: they say that they are on cuda:0, and hold their values in the host's memory.

Every operator of a thread that has entered a Device comes by here. It is refused where a GPU would refuse it, for its
devices or for the host's waiting, and runs on the CPU otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulated.memory import Memory
from tests.emulated.queue import Queue
from tests.emulated.values import changed, tensors_of
from tests.waits import waits

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WHOLE = ("scaled_dot_product_attention",)  # its parts would ask for a GPU's kernels
# Where a number may be a tensor without dimensions on the CPU, beside the pointwise operators.
TAKE_NUMBERS = ("fill", "fill_", "masked_fill", "masked_fill_", "where")


class CudaTensor(Tensor):
    """held: its values, a tensor of the CPU of the same shape and strides."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(held.is_inference()):
            tensor = Tensor._make_wrapper_subclass(cls, held.shape, device=CUDA, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of an emulated tensor, outside of its device")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.held})"


class Generator(torch.Generator):
    """torch.Generator. One of the GPU's gives a CPU's numbers."""

    of_gpu: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.of_gpu.add(made._cdata)
        return made


class OnlyGpu(TorchFunctionMode):
    """Takes "cuda" for "cuda:0", which torch would ask CUDA for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.device:
            args = [numbered(value) for value in args]
            kwargs = {name: numbered(value) for name, value in kwargs.items()} if "device" in kwargs else kwargs
        return func(*args, **kwargs)


class Device(TorchDispatchMode):
    def __init__(self, queue: Queue, memory: Memory):
        super().__init__()
        self.queue = queue
        self.memory = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._opname
        if name in ("pin_memory", "_pin_memory"):
            return self.pinned_copy(*args)
        if name == "is_pinned":
            return self.is_pinned(*args)
        asked = kwargs.get("device")
        devices = {each.device.type for each in tensors_of((args, kwargs))} | ({asked.type} if asked else set())
        if "cuda" not in devices:
            return self.on_host(func, args, kwargs)
        if name not in WHOLE and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        if name == "copy_" and len(devices) > 1:
            return self.copy(*args, **kwargs)
        if name == "_to_copy" and asked is not None and asked.type != args[0].device.type:
            return self.moved(*args, **kwargs)
        return self.on_device(func, args, kwargs)

    # -- within one device -----------------------------------------------------------------------------------------

    def on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        pin = kwargs.get("pin_memory")
        result = func(*args, **{**kwargs, "pin_memory": False} if pin else kwargs)
        return self.pin(result) if pin else result

    def on_device(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        check(func, tensors_of((args, kwargs)), kwargs)
        if waits(func, args):
            self.queue.host_waits(str(func))
        asked = kwargs.get("device")
        kwargs = {**kwargs, "device": CPU} if asked else kwargs
        return self.run(func, args, kwargs, asked is None or asked.type == "cuda")

    def run(self, func: Any, args: Any, kwargs: Any, wrapped: bool = True) -> Any:
        """On the values. A tensor that was given comes back as itself; `wrapped`: others are the device's."""
        given = {id(each.held): each for each in tensors_of((args, kwargs)) if isinstance(each, CudaTensor)}
        result = self.queue.run(func, *changed((args, kwargs), held))
        for each in given.values():
            assert each.shape == each.held.shape, f"{func} gave a tensor another shape, which is not emulated"
        self.memory.note(tensors_of(result))

        def wrap(value: Any) -> Any:
            if id(value) in given:
                return given[id(value)]
            return CudaTensor(value) if wrapped else value

        return changed(result, wrap)

    # -- between host and device -----------------------------------------------------------------------------------

    def moved(self, source: Tensor, *, device: torch.device, non_blocking: bool = False, **options: Any) -> Tensor:
        """_to_copy: to the host without waiting, it allocates pinned memory, as torch does."""
        dtype = options.get("dtype") or source.dtype
        with self:
            pin = non_blocking and source.is_cuda
            return torch.empty(source.shape, dtype=dtype, device=device, pin_memory=pin).copy_(source, non_blocking)

    def copy(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            self.queue.host_waits("a copy between host and device")
            held(into).copy_(held(source))
            return into
        host = into if source.is_cuda else source
        if not self.is_pinned(host):
            raise RuntimeError("a copy with non_blocking=True that waits all the same: the host's memory is not pinned")
        if into.dtype != source.dtype or not (into.is_contiguous() and source.is_contiguous()):
            raise RuntimeError("a copy with non_blocking=True that waits all the same: it changes dtype or strides")
        (self.copy_to_host if source.is_cuda else self.copy_to_device)(into, source)
        return into

    def copy_to_host(self, into: Tensor, source: Tensor) -> None:
        value = held(source).clone()
        into.fill_(float("nan") if into.is_floating_point() else torch.iinfo(into.dtype).max)
        self.queue.later(lambda: into.copy_(value))

    def copy_to_device(self, into: Tensor, source: Tensor) -> None:
        value = source.clone()
        self.queue.run(torch.ops.aten.copy_.default, (held(into), source), {})

        def end() -> None:
            assert torch.equal(source.view(torch.uint8), value.view(torch.uint8)), "written while it was being copied"

        self.queue.later(end)

    # -- pinned memory ---------------------------------------------------------------------------------------------

    def pin(self, tensor: Tensor) -> Tensor:
        self.memory.pinned.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def is_pinned(self, tensor: Tensor, device: Any = None) -> bool:
        return not tensor.is_cuda and StorageWeakRef(tensor.untyped_storage()) in self.memory.pinned

    def pinned_copy(self, tensor: Tensor, device: Any = None) -> Tensor:
        if tensor.is_cuda:
            raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
        return tensor if self.is_pinned(tensor) else self.pin(tensor.clone())


def numbered(value: Any) -> Any:
    return CUDA if type(value) in (str, torch.device) and str(value) == "cuda" else value


def held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, CudaTensor) else value


def check(func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> None:
    """RuntimeError where a GPU would raise one."""
    takes_numbers = torch.Tag.pointwise in func.tags or func._opname in TAKE_NUMBERS
    for each in given:
        if not each.is_cuda and not (takes_numbers and each.dim() == 0):
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"
            )
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    if (device := kwargs.get("device")) is not None and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in Generator.of_gpu:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
