"""Fusing the linear layers of a model with the activations that follow them.

An activation moves into its linear layer only where that changes no value. In an ``nn.Sequential``
neighbours follow each other. Elsewhere ``torch.fx`` traces the forward, in training and in
evaluation, and both graphs must show that the activation takes nothing but the output of the layer
and that nothing else takes this output. A module further up could call the two one by one: its
graphs must show the pair too, or must not contain it. Where the forward of such a module cannot be
traced, its source decides: see ``_may_reach``.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastmp.nn import Linear

Place = tuple[
    nn.Module, str
]  # a submodule, by its parent and its name there; shared ones have several


def fuse_linear(model: nn.Module) -> nn.Module:
    """Make every ``nn.Linear`` a ``fastmp.nn.Linear`` that applies its activation too, in place.

    Layers and parameters stay the same objects, and an activation that moved (``nn.ReLU``,
    ``nn.GELU``, ``nn.SiLU``) leaves an ``nn.Identity``: ``state_dict`` keys do not change.
    Subclasses, parametrized layers and modules from ``torch.compile`` or ``torch.jit`` are left
    alone; activations stay where a layer is shared or one of the two has hooks, and where the
    forward that calls them has optional arguments. Code outside the model that calls a fused layer
    by itself gets its activation too.

    Args:
        model: any module.

    Returns:
        The same module.
    """
    modules = _open_modules(model)
    for module in modules:
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_real(module.weight):
            module.__class__ = Linear  # as torch's parametrize does: same object, same hooks
            cast(Linear, module).activation = "none"
    for (parent, name), layers in _FusionAnalysis(model, modules).fusable_pairs().items():
        activation = cast(nn.Module, parent._modules[name])
        for owner, layer in layers:
            cast(Linear, owner._modules[layer]).activation = cast(str, _kind(activation))
        parent._modules[name] = nn.Identity().train(activation.training)
    return model


# ---- which pairs can be fused ----


def _open_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, except compiled and scripted ones and their descendants."""
    closed = {inner for m in model.modules() if _is_closed(m) for inner in m.modules()}
    return [module for module in model.modules() if module not in closed]


def _is_closed(module: nn.Module) -> bool:
    # torch.compile's wrapper by its attribute: importing its class costs a second.
    return isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules


def _is_real(weight: Tensor) -> bool:
    """Whether the operation supports such a weight: not complex, no subclass of torch's types."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def _kind(module: nn.Module | None) -> str | None:
    """The name of this activation in ``fastmp.nn.Linear``; None for any other module."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(cast(Any, type(module)))


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    forward = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return not (forward or module._backward_hooks or module._backward_pre_hooks)


class _FusionAnalysis:
    """Candidates, by place; the pairs that forwards show, and the candidates that must stay."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self._layers: set[Place] = set()
        self._activations: set[Place] = set()
        self._pairs: set[tuple[Place, Place]] = set()
        self._blocked: set[Place] = set()
        count = Counter(id(child) for m in model.modules() for child in m._modules.values())
        for parent in modules:
            for name, child in parent._modules.items():
                if child is None or not _is_plain(child):
                    continue
                if type(child) is Linear and child.activation == "none" and count[id(child)] == 1:
                    self._layers.add((parent, name))
                elif _kind(child) is not None:
                    self._activations.add((parent, name))
        self._parents = {p for p, _ in self._layers} & {p for p, _ in self._activations}
        for module in modules:
            if not self._parents.isdisjoint(module.modules()):
                self._add(module)

    def fusable_pairs(self) -> dict[Place, set[Place]]:
        """The activations to move, each with the layers it moves into."""
        layers, activations = defaultdict(set), defaultdict(set)
        for layer, activation in self._pairs:
            if layer in self._layers and activation in self._activations:
                layers[activation].add(layer)
                activations[layer].add(activation)
        return {
            activation: group
            for activation, group in layers.items()
            if self._blocked.isdisjoint({activation, *group})
            and all(len(activations[layer]) == 1 for layer in group)
        }

    def _add(self, module: nn.Module) -> None:
        """Add the calls of candidates in the forward of this module."""
        if type(module) is nn.Sequential and "forward" not in vars(module):
            self._pairs.update(pairwise((module, name) for name in module._modules))
        elif type(module) not in (nn.ModuleList, nn.ModuleDict):
            try:
                graphs = [_graph(module, training, self._activations) for training in (True, False)]
            except Exception:  # a forward may raise anything when symbols go in
                self._block(module)
            else:
                for graph in graphs:
                    self._read(graph, module)

    def _read(self, graph: fx.Graph, module: nn.Module) -> None:
        """Pair an activation with the layer whose output it takes and nothing else takes."""
        called: dict[fx.Node, Place] = {}
        for node in graph.find_nodes(op="call_module"):
            owner, _, name = cast(str, node.target).rpartition(".")
            called[node] = module.get_submodule(owner), name
        paired = set()
        for node, place in called.items():
            source: Any = node.args[0] if node.args else None
            layer = called.get(source) if isinstance(source, fx.Node) else None
            if (
                place in self._activations
                and layer in self._layers
                and layer[0] is place[0]
                and list(source.users) == [node]
                and source.meta["grad"] == node.meta["grad"]
            ):
                self._pairs.add((layer, place))
                paired |= {node, source}
        self._blocked |= {place for node, place in called.items() if node not in paired}

    def _block(self, module: nn.Module) -> None:
        """Without graphs: every candidate that the module may use by itself must stay."""
        for path, parent in module.named_modules(remove_duplicate=False):
            for name in parent._modules if parent in self._parents else ():
                if _may_reach(module, f"{path}.{name}".lstrip(".")):
                    self._blocked.add((parent, name))


# ---- a forward as a graph ----


class _Tracer(fx.Tracer):
    """Every submodule is one symbol, and so is every parameter and buffer."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        result.node.meta["grad"] = torch.is_grad_enabled()  # a graph does not show no_grad
        return result


def _graph(module: nn.Module, training: bool, activations: set[Place]) -> fx.Graph:
    """The graph of forward in training or in evaluation.

    Raises:
        Exception: forward cannot be traced, or its graph would not show all of its effects.
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.default is not p.empty or p.kind in variadic for p in parameters):
        raise ValueError("several ways to call forward")
    if "forward" in vars(module):
        raise ValueError("not the forward of the class")
    graph = _trace(_meta_copy(module, training, set()))
    if str(graph) != str(_trace(_meta_copy(module, training, activations))):
        raise ValueError("forward does more with its activations than call them")
    return graph


def _trace(shell: nn.Module) -> fx.Graph:
    states = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(shell)
        drew = not torch.equal(torch.get_rng_state(), states[0]) or random.getstate() != states[1]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if drew:
        raise ValueError("random numbers may have chosen the branch")
    if any(_holds_symbol(vars(module)) for module in shell.modules()):
        raise ValueError("a value is kept where other code may read it")
    return graph


def _holds_symbol(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, set, deque)):
        return any(map(_holds_symbol, value.values() if isinstance(value, dict) else value))
    return isinstance(value, fx.Proxy)


def _meta_copy(module: nn.Module, training: bool, hidden: set[Place]) -> nn.Module:
    """A copy for its forward to change as it likes, with an identity in every hidden place.

    Every place has a module of its own, so that the graph tells places apart. Tensors are on the
    meta device: no memory, and no values to decide by.
    """
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update({name: _copy(value) for name, value in vars(module).items()})
    twin.training = training
    for name, child in module._modules.items():
        if (module, name) in hidden or (child is not None and _is_closed(child)):
            twin._modules[name] = nn.Identity()
        elif child is not None:
            twin._modules[name] = _meta_copy(child, training, hidden)
    return twin


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        meta = value.detach().to("meta")
        return nn.Parameter(meta, False) if isinstance(value, nn.Parameter) else meta
    if isinstance(value, dict):
        return value | {key: _copy(inner) for key, inner in value.items()}
    return copy.copy(value) if isinstance(value, (list, set, deque)) else value


# ---- a forward as source ----


def _may_reach(module: nn.Module, path: str) -> bool:
    """Whether a module that cannot be traced may call the descendant at ``path`` by itself.

    It may if the source of its class has ``.name`` or ``"name"`` with the last name of the path;
    where the path ends in numbers, other than as ``self.net(x)`` or ``self.net = ...``; and if its
    forward lists submodules. Functions outside the class are taken to call the modules they get.
    """
    path, numbered = re.subn(r"(\.\d+)+$", "", path)
    name = path.rpartition(".")[2]
    source = None
    if "forward" not in vars(module) and not name.isdigit():
        source = _source(cast(Any, type(module)))
    mention = rf"[.\"']{name}\b" + r"(?!\s*[(=])" * numbered
    return source is None or re.search(mention, source) is not None


@lru_cache(64)
def _source(kind: Any) -> str | None:
    """The source of a class; None if there is none, or if its forward lists submodules."""
    try:
        forward = inspect.getsource(kind.forward)
        bases = (base for base in kind.__mro__ if base not in nn.Module.__mro__)
        source = "\n".join(map(inspect.getsource, bases))
    except (OSError, TypeError):
        return None
    lists = re.search(r"\b(_modules|get_submodule|(named_)?(modules|children))\b", forward)
    return None if lists else source
