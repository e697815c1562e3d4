"""A compiled kernel on a device, and its launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from fastmp.backends.abi import StepArgs
from fastmp.backends.cuda import nvrtc
from fastmp.backends.cuda.nvrtc import BLOCK_SIZE

#: Words of a step in the argument of a launch, 8 KB.
MOST_WORDS = 1024


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {driver.cuGetErrorString(status)[1].decode()}")
    return values[0] if values else None


def current_stream(device: torch.device) -> int:
    """Its CUDA handle. ``torch.cuda.current_stream`` makes an object: 8 µs on an H200's host."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """In the block it is the current device; nothing is entered where it already is."""
    current = torch._C._cuda_getDevice() == device.index
    return nullcontext() if current else torch.cuda.device(device)


def _early(shape: tuple[int, ...]) -> Any:
    """The configuration of a launch that may begin before the one ahead of it has ended."""
    from cuda.bindings import driver

    config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    kinds = driver.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = shape[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = shape[3:6]
    config.sharedMemBytes, config.hStream = shape[6], driver.CUstream(shape[7])
    config.attrs, config.numAttrs = [attribute], 1
    return config


class Function:
    """A compiled kernel, loaded on one device; its argument is one struct.

    Args:
        file: its source, in ``csrc``.
        name: a C++ name with its template arguments.
        device: a CUDA device, with its index.
        shared: bytes of shared memory that a launch may ask for.
    """

    def __init__(self, file: str, name: str, device: torch.device, shared: int = 0) -> None:
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability(device)
        image = nvrtc.build(file, name, nvrtc.target(major * 10 + minor))
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # makes torch's context this thread's
            self._context = _check(driver.cuCtxGetCurrent())
            self._module = _check(driver.cuModuleLoadData(image.code))
            self._function = _check(driver.cuModuleGetFunction(self._module, image.kernel.encode()))
            if shared:
                kinds = driver.CUfunction_attribute
                size = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                carveout = kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _check(driver.cuFuncSetAttribute(self._function, size, shared))
                _check(driver.cuFuncSetAttribute(self._function, carveout, 100))  # % of L1

    def at_once(self, threads: int) -> int:
        """Blocks of so many threads that run on a multiprocessor at a time."""
        from cuda.bindings import driver

        query = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        with torch.cuda.device(self.device):
            return int(_check(query(self._function, threads, 0)))

    def launch(
        self,
        blocks: int,
        threads: int,
        args: ctypes.Structure,
        *,
        shared: int = 0,
        early: bool = False,
    ) -> None:
        """Launch on the current stream; ``args`` is copied.

        Args:
            blocks: of the grid.
            threads: of a block.
            args: the kernel's argument.
            shared: bytes of shared memory of a block, beside what the kernel declares.
            early: blocks may begin before the kernel ahead of this one in the stream has ended, if
                that allows it; this one must wait for it (``csrc/cuda/async.h``).
        """
        from cuda.bindings import driver

        call = driver.cuLaunchKernel
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        given = ctypes.addressof(parameters)
        with _on(self.device):
            shape = (blocks, 1, 1, threads, 1, 1, shared, current_stream(self.device))
            launch: tuple[Any, ...] = (self._function, *shape, given, 0)
            if early:
                call, launch = driver.cuLaunchKernelEx, (_early(shape), self._function, given, 0)
            (status,) = call(*launch)
            if status != driver.CUresult.CUDA_SUCCESS:
                self._launch_again(status, call, launch)

    def prepare(self, blocks: int, threads: int, args: ctypes.Structure) -> Callable[[], None]:
        """A function that launches on the current stream, with ``args`` as they are then.

        All blocks run at a time, or the launch fails.
        """
        from cuda.bindings import driver

        call, index = driver.cuLaunchCooperativeKernel, self.device.index
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        shape = (self._function, blocks, 1, 1, threads, 1, 1, 0)
        given = ctypes.addressof(parameters)
        success = driver.CUresult.CUDA_SUCCESS

        def launch(_held: Any = (args, parameters)) -> None:
            if torch._C._cuda_getDevice() != index:
                with torch.cuda.device(index):
                    return launch()
            stream = torch._C._cuda_getCurrentRawStream(index)
            (status,) = call(*shape, stream, given)
            if status != success:
                self._launch_again(status, call, (*shape, stream, given))
            return None

        return launch

    def _launch_again(self, status: Any, call: Callable[..., Any], launch: tuple[Any, ...]) -> None:
        """In torch's context, which the first call of a thread lacks; other errors are raised."""
        from cuda.bindings import driver

        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _check(driver.cuCtxSetCurrent(self._context))
            (status,) = call(*launch)
        _check((status,))


@cache
def function(file: str, name: str, device: torch.device, shared: int = 0) -> Function:
    """A kernel, compiled and loaded at the first call; arguments as ``Function``."""
    return Function(file, name, device, shared)


class Kernel:
    """``update.cu``, compiled for some cases and loaded on one device."""

    def __init__(self, cases: tuple[str, ...], device: torch.device) -> None:
        self.device = device
        #: That its argument has room for.
        self.words = words_in_argument()
        self._function = function("cuda/update.cu", kernel_name(cases, self.words), device)
        properties = torch.cuda.get_device_properties(device)
        at_once = self._function.at_once(BLOCK_SIZE)
        #: All of a grid run at once: its barrier waits for them.
        self.max_blocks = at_once * int(properties.multi_processor_count)

    def prepare(self, blocks: int, args: StepArgs) -> Callable[[], None]:
        """A function that makes one cooperative launch, with ``args`` as they are then."""
        return self._function.prepare(blocks, BLOCK_SIZE, args)

    def is_capturing(self) -> bool:
        """Whether launches are going into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def host_memory(self, size: int) -> torch.Tensor:
        """Page-locked bytes, from torch's allocator: it does not reuse them before a copy ended."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Upload bytes on the current stream, past torch's allocator: a graph repeats the copy."""
        from cuda.bindings import driver

        stream = current_stream(self.device)
        _check(
            driver.cuMemcpyHtoDAsync(target.data_ptr(), source.data_ptr(), source.numel(), stream)
        )


def words_in_argument() -> int:
    """Words of a step that the kernel's argument has room for.

    4 KB hold 480; 32 KB are allowed since CUDA 12.1, of which 8 are used: 32 took 25 µs more a
    launch on an H200.
    """
    from cuda.bindings import driver

    allowed = _check(driver.cuDriverGetVersion()) >= 12010 and nvrtc.version() >= (12, 1)
    return MOST_WORDS if allowed else 480


def kernel_name(cases: tuple[str, ...], words: int = MOST_WORDS) -> str:
    """The C++ name of the kernel for these cases, with room for so many words of a step."""
    return f"fastmp::update<{', '.join((str(words), *cases))}>"


@cache
def kernel(cases: tuple[str, ...], device: torch.device) -> Kernel:
    """The kernel for these cases, compiled and loaded at the first call."""
    return Kernel(cases, device)
