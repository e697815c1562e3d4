"""A whole training step as one CUDA graph: one launch replays all of its kernels.

The first steps run as kernels: libraries initialize, code is loaded, the optimizer allocates its
state, and these steps train too. The last of them is watched: a step that waits for the device, or
draws random numbers on the host, is not recorded. Then the step is captured, which runs nothing,
and replayed from there on. Every input shape has a graph of its own, captured when it has run as
kernels twice; all graphs share one memory pool. Whatever else a graph holds, hyperparameters and
addresses, is compared before every replay: where it has changed all graphs are dropped, and the
step runs as kernels until it is captured again.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastmp.training import rng

WARMUP = 3
WARMUP_PARALLEL = 11  # DistributedDataParallel rebuilds its buckets within the first ten
MAX_CHANGES = 10  # from outside, in a row without a replay: then the step stays as kernels
RUNS = 2  # as kernels, of a kind of input, before it is captured: one that loads code, one watched

Step = Callable[[Any], Any]
Replay = Callable[[list[Any]], Any]
Signature = tuple[TreeSpec, tuple[Any, ...], Hashable]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Unsupported(RuntimeError):
    """Why a step cannot be a graph."""


class Recorder(Protocol):
    """The device's part: runs a step as kernels, watches one, captures one."""

    def run(self, step: Step, inputs: Any) -> Any:
        """The step as kernels."""

    def watch(self, step: Step, inputs: Any) -> tuple[Any, str]:
        """Likewise, and why the step cannot be captured; empty: no reason was seen."""

    def capture(self, step: Step, leaves: list[Any], spec: TreeSpec) -> Replay:
        """The step as a graph, not run yet. Raises ``Unsupported``; nothing has changed then."""

    def new_pool(self) -> None:
        """No graph is in use: the next one begins a pool of its own, those after it share that."""


class Outside(Protocol):
    """What a graph holds besides its inputs, as it was when it was captured."""

    def stable(self) -> Any:
        """Hyperparameters and addresses, comparable: other ones make the graph invalid."""

    def versions(self) -> Any:
        """Of the weights, comparable; a step may change them."""

    def without_grad(self) -> Hashable:
        """Which parameters have no gradient: a step may add to the others."""

    def restore_point(self) -> Callable[[], None]:
        """Undoes, when called, what a step that was captured in vain left on the host."""


class Graphed:
    """Calls ``step``, and after the warm-up replays its graph.

    The tensors that a call returns are overwritten by the next call.

    Args:
        step: a function of a tree of tensors (and None) to a tree of tensors; waits for nothing.
        recorder: of the device where it runs.
        outside: of the objects that the step uses.
        warmup: calls before the first capture.
    """

    def __init__(
        self, step: Step, recorder: Recorder, outside: Outside, warmup: int = WARMUP
    ) -> None:
        self._step, self._recorder, self._outside = step, recorder, outside
        self._warmup = warmup
        self.reset()

    def reset(self) -> None:
        """Drop the graphs and warm up again, for instance because other parameters train now."""
        self._calls = self._changes = 0
        self._refusal = ""
        self._held: Any = None  # constants after the last call
        self._drop()

    def _drop(self) -> None:
        self._runs: Counter[Signature] = Counter()
        self._captured: dict[Signature, Replay] = {}
        self._recorder.new_pool()

    def __call__(self, inputs: Any) -> Any:
        """The step on these inputs.

        Raises:
            Unsupported: the step cannot be captured; this call has had no effect.
        """
        if self._refusal:
            raise Unsupported(self._refusal)
        leaves, spec = tree_flatten(inputs)
        signature = signature_of(leaves, spec, self._outside.without_grad())
        self._drop_if_changed()
        if signature not in self._captured:
            self._calls += 1
            self._runs[signature] += 1
            runs = self._runs[signature]
            if self._calls <= self._warmup or runs <= RUNS:
                try:
                    return self._run(inputs, watched=self._calls >= self._warmup and runs >= RUNS)
                finally:  # what the step itself changes is no change from outside
                    self._held = self._now()
            self._capture(signature, leaves, spec)
        self._changes = 0
        return self._captured[signature](leaves)

    def _now(self) -> Any:
        return self._outside.stable(), self._outside.versions()

    def _run(self, inputs: Any, *, watched: bool) -> Any:
        if not watched:
            return self._recorder.run(self._step, inputs)
        before = self._outside.stable()
        outputs, self._refusal = self._recorder.watch(self._step, inputs)
        if not self._refusal and self._outside.stable() != before:
            self._refusal = (
                "the step changes hyperparameters, parameters, state or flags on the host, which a "
                "graph would not: change them between steps, or on the device"
            )
        return outputs

    def _capture(self, signature: Signature, leaves: list[Any], spec: TreeSpec) -> None:
        restore = self._outside.restore_point()
        try:
            self._captured[signature] = self._recorder.capture(self._step, leaves, spec)
        except Unsupported:
            restore()
            raise
        self._held = self._now()

    def _drop_if_changed(self) -> None:
        if self._held is None or self._now() == self._held:
            return
        self._changes += 1
        if self._changes > MAX_CHANGES:
            raise Unsupported(
                "hyperparameters, parameters or state change between all steps: change them within "
                "the step, or on the device (bind the schedule to the optimizer)"
            )
        self._drop()


def signature_of(leaves: list[Any], spec: TreeSpec, without_grad: Hashable = None) -> Signature:
    """Calls of one signature share a graph: tree, shapes, dtypes, devices and plain values.

    Raises:
        Unsupported: an input that is neither a tensor nor a plain value: a graph would hold it.
    """
    kinds: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kinds.append((leaf.shape, leaf.dtype, leaf.device))
        elif isinstance(leaf, _PLAIN):
            kinds.append((type(leaf), leaf))
        else:
            raise Unsupported(
                "expected tensors and plain values, alone or in tuples, lists and dicts, as inputs "
                f"of the step, got {type(leaf).__name__}"
            )
    return spec, tuple(kinds), without_grad


# ---- on a GPU ----

#: Graphs whose capture failed: torch's host allocator may still ask them which memory is theirs.
_failed: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Runs, watches and captures on one stream of one GPU.

    Raises:
        Unsupported: the device has no graphs.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise Unsupported(f"CUDA graphs need a CUDA device, the model is on {device}")
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
        self.new_pool()

    def new_pool(self) -> None:
        """No graph is in use: the next one begins a pool of its own, those after it share that.

        torch forbids a capture into a pool whose graphs are all gone, and keeps that pool as long
        as a tensor of it lives, such as a loss that the user holds.
        """
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """In the block, work is queued on the stream of the recordings; the current one waits."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def run(self, step: Step, inputs: Any) -> Any:
        """The step as kernels; the current stream waits for its outputs."""
        with self.stream():
            return step(inputs)

    def watch(self, step: Step, inputs: Any) -> tuple[Any, str]:
        """Likewise, and why the step cannot be captured; empty: no reason was seen."""
        drawn, mode = _host_draws(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = self.run(step, inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if waits:
            place = f"{waits[0].filename}:{waits[0].lineno}"
            return outputs, f"the step waits for the device, at {place} for one"
        if _host_draws() != drawn:
            return outputs, "the step draws random numbers on the host, which a graph would repeat"
        return outputs, ""

    def capture(self, step: Step, leaves: list[Any], spec: TreeSpec) -> Replay:
        """The step as a graph, not run yet; on failure the process is as it was.

        Raises:
            Unsupported: the capture failed.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the pool is apart from the memory of eager steps
        before, graph = rng.state(self.device), torch.cuda.CUDAGraph()
        try:
            inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            with self.stream():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = step(tree_unflatten(inputs, spec))
                finally:
                    graph.capture_end()
        except BaseException as error:
            self._recover(graph)
            rng.restore(before, self.device)
            if not isinstance(error, Exception):
                raise
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            raise Unsupported((str(cause).splitlines() or [repr(cause)])[0]) from error

        def replay(leaves: list[Any]) -> Any:
            for static, leaf in zip(inputs, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf, non_blocking=True)
            with torch.cuda.device(self.device):
                graph.replay()
            return outputs

        return replay

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a failed capture leaves behind (torch 2.11 to 2.13).

        ``capture_end`` of a capture that the device has given up raises before it closes the
        allocator's pool and before the random generator leaves its capturing state: every later
        draw on this GPU would raise. An empty capture that succeeds takes the same generator
        through its end. Where ``capture_begin`` took no share of the pool, or ``capture_end`` has
        closed it (Python raised, or no graph could be made of what was captured), it is not open
        any more: then the graph gives back what is its own, and a second release would make every
        later ``empty_cache`` raise.
        """
        _failed.append(graph)
        with suppress(RuntimeError):  # it is not open
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        graph.reset()
        self.new_pool()
        torch.cuda.synchronize(self.device)
        empty = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            empty.capture_begin(capture_error_mode="thread_local")
            torch.zeros((), dtype=torch.float32, device=self.device)
            empty.capture_end()


def _host_draws() -> tuple[Any, ...]:
    """The states of the generators on the host."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users draw from it
    numpy = (name, np.asarray(keys).tobytes(), *rest)
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()
