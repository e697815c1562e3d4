"""A whole training step as one CUDA graph: one launch replays all of its kernels.

The first steps run uncaptured on the capture stream: libraries initialize, the optimizer allocates
its state, and these steps train too. Then the step is captured, which runs nothing, and replayed
from there on. Every input shape has a graph of its own; all graphs share one memory pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

WARMUP = 3
WARMUP_PARALLEL = 11  # DistributedDataParallel rebuilds its buckets within the first ten

Signature = tuple[TreeSpec, tuple[Any, ...]]


class Unsupported(RuntimeError):
    """Why a step cannot be a graph."""


class _Captured:
    """One captured step with its static input and output tensors."""

    def __init__(
        self, step: Callable[[Any], Any], leaves: list[Any], spec: TreeSpec, pool: Any
    ) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = step(tree_unflatten(self._inputs, spec))

    def replay(self, leaves: list[Any]) -> Any:
        for static, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(static, Tensor):
                static.copy_(leaf, non_blocking=True)
        self._graph.replay()
        return self.outputs


class Graphed:
    """Calls ``step``, and after the warm-up replays its graph.

    The tensors that a call returns are overwritten by the next call.

    Args:
        step: a function of a tree of tensors (and None) to a tree of tensors; waits for nothing.
        device: where it runs.
        warmup: calls before the capture.

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
        self.reset()

    def reset(self) -> None:
        """Drop the graphs and warm up again, for instance because other parameters train now."""
        self._calls = 0
        self._captured: dict[Signature, _Captured] = {}

    def __call__(self, inputs: Any) -> Any:
        """The step on these inputs.

        Raises:
            Unsupported: the step cannot be captured; this call has had no effect.
        """
        self._calls += 1
        if self._calls <= self._warmup:
            return self._run_on_side_stream(inputs)
        leaves, spec = tree_flatten(inputs)
        signature = _signature(leaves, spec)
        if signature not in self._captured:
            torch.cuda.synchronize()
            try:
                self._captured[signature] = _Captured(self._step, leaves, spec, self._pool)
            except RuntimeError as error:
                raise Unsupported(str(error).splitlines()[0]) from error
        return self._captured[signature].replay(leaves)

    def _run_on_side_stream(self, inputs: Any) -> Any:
        """The step without a graph; the current stream waits for its outputs."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs


def _signature(leaves: list[Any], spec: TreeSpec) -> Signature:
    """Calls of one signature share a graph: tree, shapes, dtypes and constants."""
    kinds = (((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf) for leaf in leaves)
    return spec, tuple(kinds)
