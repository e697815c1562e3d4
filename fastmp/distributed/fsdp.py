"""Weights, gradients and optimizer state split over the ranks, by torch's ``fully_shard`` (FSDP2).

    shards = fsdp.shard(model, torch.bfloat16)
    optimizer = fastmp.optim.AdamW(shards.named_parameters(), lr=1e-3, max_grad_norm=1.0)
    shards.attach(optimizer)
    trainer = Trainer(model, optimizer, criterion, shards=shards)

The shards are fp32: they are the masters. A layer is gathered in 16 bits while it runs, its
gradients arrive as the fp32 shard of their mean, and the optimizer's kernels update the shards as
plain tensors. With P parameters on N ranks each holds 16 P / N bytes for Adam, and one layer in 16
bits, where data parallel holds 16 P.

One all-reduce per step makes it the same on all ranks: the squared norm of every gradient. The
global norm and the overflow check follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmp import amp
from fastmp.amp.convert import is_fp32_norm
from fastmp.optim.base import FusedOptimizer
from fastmp.optim.step_reducer import GroupReducer


def shard(model: nn.Module, dtype: torch.dtype) -> Shards:
    """Split a model over the ranks of the process group, in place; the first rank's weights count.

    Every entry of a ``Sequential`` or ``ModuleList`` is gathered on its own, the rest together.
    Norms with running statistics compute in fp32, the rest in ``dtype``, as after ``amp.convert``.

    Args:
        model: the same on every rank, on its device.
        dtype: of the weights when they are gathered, and of gradients on the wire.

    Raises:
        RuntimeError: there is no process group.
        ValueError: another dtype than ``amp.convert`` takes, or a parameter without dimensions.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "expected a process group; start with torchrun, see rendezvous.torchrun_group"
        )
    for name, param in model.named_parameters():
        if param.ndim == 0:
            raise ValueError(f"{name}: expected at least one dimension to split, got a scalar")
    exact = [param.detach().float() for param in model.parameters()]
    amp.convert(model, dtype)  # dtypes of the buffers, and fused layers
    for param, weight in zip(model.parameters(), exact, strict=True):
        param.data = weight.contiguous()  # fully_shard takes no other layout
    for tensor in chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.detach(), 0)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    usual = MixedPrecisionPolicy(param_dtype=dtype)
    norm = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    for module in _units(model):
        fully_shard(module, mesh=mesh, mp_policy=norm if is_fp32_norm(module) else usual)
    fully_shard(model, mesh=mesh, mp_policy=usual)
    return Shards(model)


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules to gather one by one, inner ones first: fp32 norms, entries of containers."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield from (m for m in module if _is_unit(m))
        else:
            yield from (m for m in module.children() if is_fp32_norm(m) and _is_unit(m))


def _is_unit(module: nn.Module) -> bool:
    is_container = isinstance(module, nn.Sequential | nn.ModuleList)
    return not is_container and any(True for _ in module.parameters())


class Shards:
    """This rank's shards of a model, for an optimizer to update; full state for checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own: dict[str, nn.Parameter] = {}
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            own = nn.Parameter(param.to_local().detach(), requires_grad=param.requires_grad)
            self._own[name] = own
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(_move_grad_to(own))  # type: ignore[no-untyped-call]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The shards as plain fp32 tensors that share the model's memory, by name."""
        yield from self._own.items()

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._own[name]

    def attach(self, optimizer: FusedOptimizer) -> None:
        """Steps of ``optimizer`` clip and skip by the gradients of all ranks from now on.

        Raises:
            ValueError: one that orthogonalises whole matrices, ``Muon``. To gather them would take
                a second all-gather a step, and all ranks would compute the same.
        """
        if optimizer.needs_whole_parameters:
            raise ValueError(
                f"{type(optimizer).__name__} needs whole matrices, and a rank has some rows of "
                "each; train with DistributedDataParallel, or with another optimizer"
            )
        optimizer.step_context.reduce_step = GroupReducer()

    def reshard(self) -> None:
        """Drop the gathered weights: the next forward gathers the shards as they are then.

        The root stays gathered after a forward without a backward, such as an evaluation. In a loop
        of your own call it in a block of ``optimizer.averaged()``, first, and again after it.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def state_tensors(self) -> dict[str, Tensor]:
        """The model's ``state_dict``, not copied, each parameter as its plain shard."""
        state = self.model.state_dict(keep_vars=True)  # which reshards
        own = {id(param): self._own[name] for name, param in self.model.named_parameters()}
        return {name: own.get(id(value), value) for name, value in state.items()}

    # ---- full state, for checkpoints; every rank must call these ----

    def full_model_state(self) -> dict[str, Any]:
        """The model's ``state_dict`` with full tensors."""
        state = self.model.state_dict()
        return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}

    def load_full_model_state(self, state: dict[str, Any]) -> None:
        """Load this rank's shard of each tensor."""
        held = self.model.state_dict()
        shards = {k: _shard_of(v, held[k]) if k in held else v for k, v in state.items()}
        self.model.load_state_dict(shards)

    def full_tensors(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """``values``, by names and in the shapes of ``state_tensors``, with full tensors."""
        like = self.model.state_dict()
        return {
            k: _full_tensor(v, like[k]) if isinstance(like[k], DTensor) else v
            for k, v in values.items()
        }

    def own_parts(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``full_tensors``."""
        like = self.model.state_dict()
        parts = {k: _shard_of(v, like[k]) for k, v in values.items()}
        return {k: v.to_local() if isinstance(v, DTensor) else v for k, v in parts.items()}

    def full_optimizer_state(self, optimizer: FusedOptimizer) -> dict[str, Any]:
        """The optimizer's ``state_dict`` with full tensors, moments in fp32."""
        return self._map_state(optimizer, optimizer.fp32_state_dict(), _full_tensor)

    def load_full_optimizer_state(self, optimizer: FusedOptimizer, state: dict[str, Any]) -> None:
        """Load this rank's shard of each tensor."""
        own = self._map_state(optimizer, state, lambda v, p: _shard_of(v, p).to_local())
        optimizer.load_state_dict(own)

    def _map_state(
        self,
        optimizer: FusedOptimizer,
        state: dict[str, Any],
        change: Callable[[Tensor, DTensor], Tensor],
    ) -> dict[str, Any]:
        """``state`` with ``change`` applied to every tensor of its parameter's shape."""
        self.reshard()  # named_parameters has the gathered ones, where there are some
        sharded = {id(self._own[name]): p for name, p in self.model.named_parameters()}
        params = [sharded[id(p)] for group in optimizer.param_groups for p in group["params"]]
        changed = {
            i: {k: change(v, params[i]) if v.ndim else v for k, v in entry.items()}
            for i, entry in state["state"].items()
        }
        return {**state, "state": changed}


def _move_grad_to(own: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook: the reduced gradient goes to the plain tensor ``own``, accumulated in fp32."""

    def hook(param: Tensor) -> None:
        assert isinstance(param.grad, DTensor)
        grad = param.grad.to_local()
        own.grad = grad if own.grad is None else own.grad.add_(grad)
        param.grad = None

    return hook


def _shard_of(value: Tensor, like: Any) -> Any:
    """This rank's shard of a full tensor that every rank has; no exchange."""
    if not isinstance(like, DTensor):
        return value
    if value.shape != like.shape:
        return value  # load_state_dict raises, with the name
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _full_tensor(own: Tensor, like: DTensor) -> Tensor:
    mesh, placements = like.device_mesh, like.placements
    part = DTensor.from_local(own, mesh, placements, shape=like.shape, stride=like.stride())
    return part.full_tensor()
