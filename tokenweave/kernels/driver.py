"""The CUDA driver API: calls that name what failed, the context, and which cubins a driver takes."""

from __future__ import annotations

from typing import Any

LOWEST_DRIVER = {12: "525", 13: "580"}  # of each CUDA major version, on Linux


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, or there is no usable driver."""


def open_driver() -> Any:
    """The module cuda.bindings.driver, initialised. Raises ImportError without cuda-python, DriverError without GPU."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ImportError("running CUDA kernels needs cuda-python: pip install tokenweave[cuda]") from error
    try:
        call(driver.cuInit, 0)
    except DriverError:
        raise
    except RuntimeError as error:  # the library is not there
        reason = str(error).partition("\n")[0]
        raise DriverError(f"no NVIDIA driver was found: running CUDA kernels needs one ({reason})") from error
    return driver


def call(entry: Any, *arguments: Any, hint: str = "") -> Any:
    """What a driver function returns beside its status: None, one value or a list. Raises DriverError, with `hint`."""
    result, *values = entry(*arguments)
    if result:
        raise DriverError(f"{entry.__name__} failed: {result.name}{f': {hint}' if hint else ''}")
    return values[0] if len(values) == 1 else values or None


def driver_version(driver: Any) -> tuple[int, int]:
    """The newest CUDA version that the driver supports, such as (12, 8)."""
    number = call(driver.cuDriverGetVersion)
    return number // 1000, number % 1000 // 10


def driver_refusal(nvrtc_version: tuple[int, int], driver_version: tuple[int, int]) -> str | None:
    """Why a driver would not load what this NVRTC compiled, and what to install; None where it would.

    A driver loads cubins of its own CUDA major version, older or newer in the minor one, and of all before it.
    """
    major = nvrtc_version[0]
    if major <= driver_version[0]:
        return None
    needed = f" to {LOWEST_DRIVER[major]} or later" if major in LOWEST_DRIVER else ""
    return (
        f"NVRTC is of CUDA {major}.{nvrtc_version[1]}, but the driver takes CUDA {driver_version[0]}.x at most: "
        f"install a torch for CUDA {driver_version[0]}, or update the driver{needed}"
    )


def bind_context() -> None:
    """Makes the primary context of torch's current device current in this thread, unless a context already is.

    A new thread has none until the CUDA runtime, or this, gives it one.
    """
    import torch

    driver = open_driver()
    torch.cuda.init()
    if not int(call(driver.cuCtxGetCurrent)):
        device = call(driver.cuDeviceGet, torch.cuda.current_device())
        call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, device))
