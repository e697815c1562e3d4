"""CUDA graphs for any training loop: a step in, the same step out, replayed as one launch."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from fastmp.optim.base import FusedOptimizer
from fastmp.training.cuda_graph import (
    WARMUP_PARALLEL,
    CudaRecorder,
    Graphed,
    Recorder,
    Unsupported,
)
from fastmp.training.graph_constants import GraphConstants


def graphed(step: Callable[..., Any]) -> GraphedStep:
    """``step``, replayed as a CUDA graph once it has run a few times; usable as a decorator.

        @fastmp.graphed
        def step(images, labels):
            loss = criterion(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

    The numbers are those of ``step`` itself. The first calls run as kernels and train; every input
    shape gets a graph of its own. Models and optimizers are seen when the step runs: when their
    hyperparameters, parameters, state or training flags have changed between two calls, the step
    runs as kernels and is captured again. A step that cannot be a graph (it waits for the device,
    draws random numbers on the host, changes a learning rate, returns a number) runs as it is, with
    one warning; the reason is in ``.reason``. Without a GPU every step does.

    A graph repeats kernels, no Python: what a step prints or counts happens while it is captured
    only, and draws like mixup's come in as arguments. Tensors on the host are moved to the GPU.

    Args:
        step: a function of tensors and plain values, in tuples, lists and dicts, that trains one
            step and returns a tensor, or several. It uses optimizers of ``fastmp.optim``, or
            torch's with ``capturable=True``.

    Returns:
        the step; results are detached, and its own from call to call.
    """
    return GraphedStep(step)


class GraphedStep:
    """A step that replays; see ``graphed``.

    Attributes:
        reason: why the step runs as kernels; empty while it is replayed, or is going to be.
    """

    def __init__(self, step: Callable[..., Any], recorder: Recorder | None = None) -> None:
        functools.update_wrapper(self, step)
        self.reason = ""
        self._step = step
        self._seen = _Seen()
        self._device: torch.device | None = None  # known after the first call
        self._recorder = recorder
        self._graph: Graphed | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The step on these inputs."""
        inputs = (args, kwargs)
        if self.reason:
            return tree_map(_detached, self._call(inputs))
        if self._graph is None:
            return self._first(inputs)
        if self._device is not None and self._device.type == "cuda":
            inputs = tree_map(self._to_device, inputs)
        try:
            return tree_map(_own, self._graph(inputs))
        except Unsupported as reason:
            self._stop(str(reason))
        return tree_map(_detached, self._call(inputs))

    def reset(self) -> None:
        """Drop the graphs, after a change that only the caller knows of; they are made again."""
        if self._graph is not None:
            self._graph.reset()
        self.reason = ""

    def _first(self, inputs: Any) -> Any:
        """Run the step, and see what it uses and where."""
        if self._recorder is None and torch.cuda.is_available():
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            on_gpu = (t.device for t in tensors if t.is_cuda)
            current = torch.device("cuda", torch.cuda.current_device())
            self._recorder = CudaRecorder(next(on_gpu, current))
        with self._seen.watching(self._step):
            run = self._call if self._recorder is None else self._run_on_stream
            outputs = run(inputs)
        self._device = self._seen.device()
        try:
            if self._recorder is None:
                self._recorder = CudaRecorder(self._device or torch.device("cpu"))
            self._check()
            parallel = any(isinstance(m, DistributedDataParallel) for m in self._seen.modules)
            warmup = {"warmup": WARMUP_PARALLEL} if parallel else {}
            self._graph = Graphed(self._call, self._recorder, self._seen, **warmup)
        except Unsupported as reason:
            self._stop(str(reason))
        return tree_map(_detached, outputs)

    def _run_on_stream(self, inputs: Any) -> Any:
        assert self._recorder is not None
        return self._recorder.run(self._call, inputs)

    def _check(self) -> None:
        recorded = getattr(self._recorder, "device", self._device)
        if self._device is not None and self._device != recorded:
            self._recorder = CudaRecorder(self._device)
        for optimizer in self._seen.optimizers:
            groups = optimizer.param_groups
            if not isinstance(optimizer, FusedOptimizer) and not all(
                group.get("capturable", True) for group in groups
            ):
                name = type(optimizer).__name__
                raise Unsupported(
                    f"{name} counts its steps on the host: pass capturable=True, or take "
                    f"fastmp.optim.{name}"
                )

    def _call(self, inputs: Any) -> Any:
        args, kwargs = inputs
        outputs = self._step(*args, **kwargs)
        for leaf in tree_leaves(outputs):
            if not isinstance(leaf, Tensor | None):
                self._seen.refusal = f"the step returns {type(leaf).__name__}, not a tensor"
        return outputs

    def _to_device(self, leaf: Any) -> Any:
        is_host = isinstance(leaf, Tensor) and not leaf.is_cuda
        return leaf.to(self._device, non_blocking=True) if is_host else leaf

    def _stop(self, reason: str) -> None:
        self.reason, self._graph = reason, None
        warnings.warn(f"fastmp.graphed: no CUDA graph, {reason}", UserWarning, stacklevel=3)


class _Seen(GraphConstants):
    """The constants of the objects that a step was seen to use."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal = ""

    @contextmanager
    def watching(self, step: Callable[..., Any]) -> Iterator[None]:
        """In the block, optimizers that step and modules that run are written down."""
        modules: dict[nn.Module, None] = {}
        optimizers: dict[int, torch.optim.Optimizer] = {}

        def see_module(module: nn.Module, _: Any) -> None:
            modules[module] = None

        def see_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            optimizers[id(optimizer)] = optimizer

        hooks = [
            register_module_forward_pre_hook(see_module),
            register_optimizer_step_pre_hook(see_optimizer),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.scalers = _scalers_of(step)
            # compiled code calls no hooks: the modules in a module are taken from it
            inner = chain.from_iterable(module.modules() for module in modules)
            self.modules, self.optimizers = list(dict.fromkeys(inner)), list(optimizers.values())

    def device(self) -> torch.device | None:
        """Of the parameters; None: there are none."""
        params = (p for module in self.modules for p in module.parameters())
        return next((p.device for p in (*self._params(), *params)), None)

    def without_grad(self) -> Hashable:
        """As of ``GraphConstants``; refuses a step whose results a graph would repeat."""
        if self.refusal:
            raise Unsupported(self.refusal)
        return super().without_grad()


def _scalers_of(step: Callable[..., Any]) -> list[torch.amp.GradScaler]:
    """The scalers that a function refers to, by its names or as attributes of its object."""
    function = inspect.unwrap(step)
    owner = getattr(function, "__self__", None)
    values = list(getattr(owner, "__dict__", {}).values())
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        with suppress(ValueError):  # a name that has no value
            names = inspect.getclosurevars(function)
            values += [*names.nonlocals.values(), *names.globals.values()]
    return [value for value in values if isinstance(value, torch.amp.GradScaler)]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
