"""A whole training step as one CUDA graph: the host says "again" instead of launching kernels.

The first steps run as they are, on the stream the capture will use, so that libraries set
themselves up, the optimizer allocates its state and nothing is computed that is not training. Then
the step is recorded, which runs nothing, and replayed from there on. Inputs of another shape get a
graph of their own; all graphs share one pool of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

WARMUP = 3
WARMUP_PARALLEL = 11  # DistributedDataParallel settles its buckets in the first ten

Key = tuple[TreeSpec, tuple[Any, ...]]


class Unsupported(RuntimeError):
    """Why a step cannot be a graph."""


class _Captured:
    """One recorded step: where its inputs lie, and where its outputs will."""

    def __init__(
        self, step: Callable[[Any], Any], leaves: list[Any], spec: TreeSpec, pool: Any
    ) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = step(tree_unflatten(self._inputs, spec))

    def replay(self, leaves: list[Any]) -> Any:
        for held, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(leaf, non_blocking=True)
        self._graph.replay()
        return self.outputs


class Graphed:
    """Calls ``step``, and replays it once it has been recorded.

    The tensors that a call returns are overwritten by the next call.

    Args:
        step: a function of a tree of tensors (and None) to a tree of tensors; waits for nothing.
        device: where it runs.
        warmup: calls before the recording.

    Raises:
        Unsupported: the device has no graphs.
    """

    def __init__(
        self, step: Callable[[Any], Any], device: torch.device, warmup: int = WARMUP
    ) -> None:
        if device.type != "cuda":
            raise Unsupported(f"CUDA graphs need a CUDA device, the model is on {device}")
        self._step = step
        self._warmup = warmup
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.forget()

    def forget(self) -> None:
        """Record anew, for instance because other parameters are trained from now on."""
        self._calls = 0
        self._captured: dict[Key, _Captured] = {}

    def __call__(self, inputs: Any) -> Any:
        """The step on these inputs.

        Raises:
            Unsupported: it cannot be recorded; nothing of this call has happened.
        """
        leaves, spec = tree_flatten(inputs)
        key = (spec, tuple(map(_kind, leaves)))
        self._calls += 1
        if self._calls <= self._warmup:
            return self._beside(inputs)
        if key not in self._captured:
            torch.cuda.synchronize()
            try:
                self._captured[key] = _Captured(self._step, leaves, spec, self._pool)
            except RuntimeError as error:
                raise Unsupported(str(error).splitlines()[0]) from error
        return self._captured[key].replay(leaves)

    def _beside(self, inputs: Any) -> Any:
        """On the side stream, which memory of the default stream may not be reused behind."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs


def _kind(leaf: Any) -> Any:
    """What two calls must share to share a graph."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
