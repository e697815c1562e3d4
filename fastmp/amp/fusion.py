"""Joining the linear layers of a model with the activations that follow them.

An activation moves into its linear layer only where that is certain to change no value. In an
``nn.Sequential`` it is: neighbours follow each other. Elsewhere the forward is run on symbols
(``torch.fx``), and its graph must show that the activation is called on nothing but what the layer
returns, which goes nowhere else. Modules further up could call the two one by one: their graphs
must show the same, or, where a forward does not run on symbols, its source must not name them.
"""

from __future__ import annotations

import ast
import copy
import inspect
import random
import textwrap
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastmp.nn import Linear

Place = tuple[nn.Module, str]  # a submodule by its parent and its name there; it may have several
_MAX_OPTIONAL = 3  # every subset of the optional arguments of a forward costs four graphs


def fuse_linear(model: nn.Module) -> nn.Module:
    """Make every ``nn.Linear`` a ``fastmp.nn.Linear`` that applies its activation too, in place.

    Layers and parameters stay the same objects, and an activation that moved (``nn.ReLU``,
    ``nn.GELU``, ``nn.SiLU``) leaves an ``nn.Identity``: ``state_dict`` keys do not change.
    Subclasses, parametrized layers and what ``torch.compile`` or ``torch.jit`` made are left alone;
    activations stay where a layer is shared or one of the two has hooks. The model is judged by its
    forwards as they stand; other code that calls a layer by itself gets its activation too.

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
    for (parent, name), layers in _joints(model, modules).items():
        activation = cast(nn.Module, parent._modules[name])
        for owner, layer in layers:
            cast(Linear, owner._modules[layer]).activation = cast(str, _kind(activation))
        parent._modules[name] = nn.Identity().train(activation.training)
    return model


# ---- what may be joined ----


def _open_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, but for those compiled or scripted and what is in them."""
    closed = {inner for m in model.modules() if _is_closed(m) for inner in m.modules()}
    return [module for module in model.modules() if module not in closed]


def _is_closed(module: nn.Module) -> bool:
    # torch.compile's wrapper by what it holds: importing its class costs a second.
    return isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules


def _is_real(weight: Tensor) -> bool:
    """Whether the operation knows such a weight: no complex one, no subclass of torch's types."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def _kind(module: nn.Module | None) -> str | None:
    """What ``fastmp.nn.Linear`` calls this activation; None for any other module."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(cast(Any, type(module)))


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    forward = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return not (forward or module._backward_hooks or module._backward_pre_hooks)


def _joints(model: nn.Module, modules: list[nn.Module]) -> dict[Place, set[Place]]:
    """The activations to move, each with the layers it moves into."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    evidence = _Evidence()
    for parent in modules:
        for name, child in parent._modules.items():
            if child is None or not _is_plain(child):
                continue
            if type(child) is Linear and child.activation == "none" and places[id(child)] == 1:
                evidence.layers.add((parent, name))
            elif _kind(child) is not None:
                evidence.activations.add((parent, name))
    parents = {p for p, _ in evidence.layers} & {p for p, _ in evidence.activations}
    for module in modules:
        if not parents.isdisjoint(module.modules()):
            evidence.examine(module, parents)
    return evidence.joints()


class _Evidence:
    """Candidates, by place, and what the forwards say of them: which pairs, and who must stay."""

    def __init__(self) -> None:
        self.layers: set[Place] = set()
        self.activations: set[Place] = set()
        self._pairs: set[tuple[Place, Place]] = set()
        self._staying: set[Place] = set()

    def examine(self, module: nn.Module, parents: set[nn.Module]) -> None:
        """Add what this module does with the candidates among its descendants."""
        if type(module) is nn.Sequential and "forward" not in vars(module):
            self._pairs.update(pairwise((module, name) for name in module._modules))
        elif type(module) not in (nn.ModuleList, nn.ModuleDict):
            try:
                for graph in list(_graphs(module, self.activations)):
                    self._read(graph, module)
            except Exception:  # anybody's forward may raise anything when symbols go in
                self._suspect(module, parents)

    def joints(self) -> dict[Place, set[Place]]:
        """The pairs of candidates that nothing speaks against, by activation."""
        layers, activations = defaultdict(set), defaultdict(set)
        for layer, activation in self._pairs:
            if layer in self.layers and activation in self.activations:
                layers[activation].add(layer)
                activations[layer].add(activation)
        return {
            activation: group
            for activation, group in layers.items()
            if self._staying.isdisjoint({activation, *group})
            and all(len(activations[layer]) == 1 for layer in group)
        }

    def _read(self, graph: fx.Graph, module: nn.Module) -> None:
        called: dict[fx.Node, Place] = {}
        for node in graph.find_nodes(op="call_module"):
            owner, _, name = cast(str, node.target).rpartition(".")
            called[node] = module.get_submodule(owner), name
        joined = set()
        for node, place in called.items():
            source = _only_source(node)
            layer = called.get(source) if source is not None else None
            if place in self.activations and layer in self.layers and layer[0] is place[0]:
                self._pairs.add((layer, place))
                joined |= {node, source}
        self._staying |= {place for node, place in called.items() if node not in joined}

    def _suspect(self, module: nn.Module, parents: set[nn.Module]) -> None:
        """Without graphs, whatever the module might use by itself must stay."""
        for path, parent in module.named_modules(remove_duplicate=False):
            for name in parent._modules if parent in parents else ():
                if _may_reach(module, f"{path}.{name}".lstrip(".")):
                    self._staying.add((parent, name))


def _only_source(node: fx.Node) -> fx.Node | None:
    """The node that this one takes as its first argument, if no other node takes it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or list(source.users) != [node]:
        return None
    return source if source.meta.get("grad") == node.meta["grad"] else None


# ---- a forward as graphs ----


class _Tracer(fx.Tracer):
    """Every submodule is one symbol, and so is every parameter and buffer."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        result.node.meta["grad"] = torch.is_grad_enabled()  # a graph does not show no_grad
        return result


def _graphs(module: nn.Module, activations: set[Place]) -> Iterator[fx.Graph]:
    """What forward does in training and in evaluation, with and without each optional argument.

    Raises:
        Exception: it does not run on symbols, or its graphs would not tell all that it does.
    """
    parameters = inspect.signature(type(module).forward).parameters.values()
    optional = [p for p in parameters if p.default is not p.empty]
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    if "forward" in vars(module) or variadic or len(optional) > _MAX_OPTIONAL:
        raise ValueError("not the forward of the class, or too many ways to call it")
    for training, *given in product((True, False), repeat=1 + len(optional)):
        defaults = {p.name: p.default for p, g in zip(optional, given, strict=True) if not g}
        graph = _trace(_shell(module, training, set()), defaults)
        fused = _trace(_shell(module, training, activations), defaults)
        if str(graph) != str(fused):
            raise ValueError("it does more with its activations than call them")
        yield graph


def _trace(shell: nn.Module, defaults: dict[str, Any]) -> fx.Graph:
    states = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(shell, defaults or None)
        drew = not torch.equal(torch.get_rng_state(), states[0]) or random.getstate() != states[1]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if drew:
        raise ValueError("random numbers may have chosen the way")
    if any(_holds_symbol(vars(module)) for module in shell.modules()):
        raise ValueError("a value is kept where others may read it")
    return graph


def _holds_symbol(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, set, deque)):
        return any(map(_holds_symbol, value.values() if isinstance(value, dict) else value))
    return isinstance(value, fx.Proxy)


def _shell(module: nn.Module, training: bool, hidden: set[Place]) -> nn.Module:
    """A copy for its forward to change as it likes, with an identity in every hidden place.

    Every place has a module of its own, so that the graph tells places apart. Tensors are on the
    meta device: no memory, and no values to decide by.
    """
    shell: nn.Module = object.__new__(type(module))
    vars(shell).update({name: _copy(value) for name, value in vars(module).items()})
    shell.training = training
    for name, child in module._modules.items():
        if (module, name) in hidden or (child is not None and _is_closed(child)):
            shell._modules[name] = nn.Identity()
        elif child is not None:
            shell._modules[name] = _shell(child, training, hidden)
    return shell


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        meta = value.detach().to("meta")
        return nn.Parameter(meta, False) if isinstance(value, nn.Parameter) else meta
    if isinstance(value, dict):
        return value | {key: _copy(inner) for key, inner in value.items()}
    return copy.copy(value) if isinstance(value, (list, set, deque)) else value


# ---- a forward as source ----


def _may_reach(module: nn.Module, path: str) -> bool:
    """Whether code of the module's class may use the descendant at ``path`` by itself.

    It would have to name every attribute on the way, and to do more than call the last one where
    from there the way goes on through numbers: ``self.net(x)`` does not reach ``net.0``.
    """
    names = [name for name in path.split(".") if not name.isdigit()]
    if "forward" in vars(module) or not names:
        return True
    try:
        named, used = _mentions(cast(Any, type(module)))
    except (OSError, TypeError, SyntaxError):  # no source
        return True
    return named.issuperset(names) and (path.endswith(names[-1]) or names[-1] in used)


@lru_cache(64)
def _mentions(kind: type[nn.Module]) -> tuple[set[str], set[str]]:
    """The attributes a class names outside ``__init__``, and those it does more with than call."""
    nodes = [
        node
        for base in kind.__mro__
        if base not in nn.Module.__mro__
        for part in cast(Any, ast.parse(textwrap.dedent(inspect.getsource(base)))).body[0].body
        if getattr(part, "name", None) != "__init__"
        for node in ast.walk(part)
    ]
    calls = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if id(node) not in calls}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.update(node.value.split("."))  # getattr(self, "net")
    return used.union(node.attr for node in attributes), used
