"""Function: a kernel of a cubin, loaded on the current GPU."""

from __future__ import annotations

import ctypes
from typing import Any

from tokenweave.kernels.compiler import nvrtc_version
from tokenweave.kernels.driver import DriverError, bind_context, call, driver_refusal, driver_version, open_driver

# kernelParams: an array of pointers, one for each parameter
StructPointer = ctypes.c_void_p * 1
BytesPointer = ctypes.c_char_p * 1
PARAMETER_SIZES_SINCE = (12, 4)  # cuFuncGetParamInfo


class Function:
    """A kernel with one parameter, a struct by value, in torch's context of the current device.

    cubin: from jit.cubin, in this process, for this GPU's arch. name: as declared with `extern "C"`. max_shared_bytes:
    the most dynamic shared memory that a launch will ask for. It stays loaded as long as the process lives.

    registers: per thread. local_bytes: stack and spills per thread. static_shared_bytes: per block.
    argument_bytes: the size of the struct; None with drivers older than CUDA 12.4, which do not tell.

    Raises DriverError, also where the driver is too old for this NVRTC.
    """

    def __init__(self, cubin: bytes, name: str, max_shared_bytes: int = 0):
        self._driver = driver = open_driver()
        refusal = driver_refusal(nvrtc_version(), driver_version(driver))
        if refusal:
            raise DriverError(refusal)
        bind_context()
        self.name = name
        module = call(driver.cuModuleLoadData, cubin, hint="the cubin may be for another arch than this GPU's")
        self._handle = call(driver.cuModuleGetFunction, module, name.encode(), hint=f'no kernel extern "C" {name}')
        # Asking for attributes also loads the code. A lazy load at the first launch can wait for the whole GPU, and so
        # for kernels that spin until this one runs.
        attribute = driver.CUfunction_attribute
        self.registers = self._attribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local_bytes = self._attribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.static_shared_bytes = self._attribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        self.argument_bytes = self._argument_bytes()
        self._allow_shared(max_shared_bytes)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        argument: ctypes.Structure | bytes,
        cooperative: bool = False,
    ) -> None:
        """Queues one launch, also into a CUDA graph that `stream` is capturing.

        stream: a handle, such as torch.cuda.current_stream().cuda_stream. argument: copied during the call, so the
        caller may change and reuse it at once. cooperative: refused unless all blocks are resident at a time.
        """
        # An array of its own for each launch, not one kept here: lanes launch from several threads.
        size = len(argument) if isinstance(argument, bytes) else ctypes.sizeof(argument)
        pointers = BytesPointer(argument) if isinstance(argument, bytes) else StructPointer(ctypes.addressof(argument))
        if self.argument_bytes is not None and size != self.argument_bytes:
            raise ValueError(f"kernel {self.name} takes a struct of {self.argument_bytes} bytes, got {size}")
        launched = (self._handle, *grid, *block, shared_bytes, stream, ctypes.addressof(pointers))
        if cooperative:
            (result,) = self._driver.cuLaunchCooperativeKernel(*launched)
        else:
            (result,) = self._driver.cuLaunchKernel(*launched, 0)
        if result:
            raise DriverError(self._launch_failure(result, f"{grid=}, {block=}, {shared_bytes=}, {cooperative=}"))

    def max_resident_blocks(self, block_threads: int, shared_bytes: int) -> int:
        """How many blocks of this size, with this much dynamic shared memory, fit on one SM at a time."""
        occupancy = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        return int(call(occupancy, self._handle, block_threads, shared_bytes))

    def _attribute(self, attribute: object) -> int:
        return int(call(self._driver.cuFuncGetAttribute, attribute, self._handle))

    def _argument_bytes(self) -> int | None:
        if driver_version(self._driver) < PARAMETER_SIZES_SINCE:
            return None
        hint = f"kernel {self.name} must take one struct by value"
        _, size = call(self._driver.cuFuncGetParamInfo, self._handle, 0, hint=hint)
        return int(size)

    def _allow_shared(self, max_shared_bytes: int) -> None:
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        hint = f"kernel {self.name} may not have {max_shared_bytes} bytes of dynamic shared memory on this GPU"
        call(self._driver.cuFuncSetAttribute, self._handle, attribute, max_shared_bytes, hint=hint)

    def _launch_failure(self, result: Any, launch: str) -> str:
        lost = result == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        hint = ": this thread has no CUDA context, call bind_context() in it first" if lost else ""
        return f"launching kernel {self.name} failed: {result.name}{hint} ({launch})"
