"""A compiled kernel on a device, and its launch."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from fastmp.backends.abi import StepArgs
from fastmp.backends.cuda import nvrtc
from fastmp.backends.cuda.nvrtc import BLOCK_SIZE


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {driver.cuGetErrorString(status)[1].decode()}")
    return values[0] if values else None


class Kernel:
    """``update.cu``, compiled for some cases and loaded on one device."""

    def __init__(self, cases: tuple[str, ...], device: torch.device) -> None:
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability(device)
        architecture = nvrtc.target(major * 10 + minor)
        image = nvrtc.build("cuda/update.cu", kernel_name(cases), architecture)
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # makes torch's context this thread's
            self._context = _check(driver.cuCtxGetCurrent())
            self._module = _check(driver.cuModuleLoadData(image.code))
            self._function = _check(driver.cuModuleGetFunction(self._module, image.kernel.encode()))
            at_once = _check(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, BLOCK_SIZE, 0)
            )
        properties = torch.cuda.get_device_properties(device)
        #: All of a grid run at once: its barrier waits for them.
        self.max_blocks = int(at_once) * int(properties.multi_processor_count)

    def launch(self, blocks: int, args: StepArgs) -> None:
        """One cooperative launch on the current stream; ``args`` is copied."""
        from cuda.bindings import driver

        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            launch = (self._function, blocks, 1, 1, BLOCK_SIZE, 1, 1, 0, stream)
            where = ctypes.addressof(parameters)
            (status,) = driver.cuLaunchCooperativeKernel(*launch, where)
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # the first call of a thread
                _check(driver.cuCtxSetCurrent(self._context))
                (status,) = driver.cuLaunchCooperativeKernel(*launch, where)
        _check((status,))

    def is_capturing(self) -> bool:
        """Whether launches are going into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def host_memory(self, size: int) -> torch.Tensor:
        """Page-locked bytes, from torch's allocator: it does not reuse them before a copy ended."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Upload bytes on the current stream, past torch's allocator: a graph repeats the copy."""
        from cuda.bindings import driver

        stream = torch.cuda.current_stream(self.device).cuda_stream
        _check(
            driver.cuMemcpyHtoDAsync(target.data_ptr(), source.data_ptr(), source.numel(), stream)
        )


def kernel_name(cases: tuple[str, ...]) -> str:
    """The C++ name of the kernel for these cases."""
    return f"fastmp::update<{', '.join(cases)}>"


@cache
def kernel(cases: tuple[str, ...], device: torch.device) -> Kernel:
    """The kernel for these cases, compiled and loaded at the first call."""
    return Kernel(cases, device)
