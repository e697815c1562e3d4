"""A device for torch, "dummy", without hardware: its tensors are handles without memory.

torch's operations on a handle run on a tensor in main memory. It is contiguous like its handle:
a view that is not contiguous is a copy, and writing to it does not reach its base. torch gets its
device once and for the whole process, so importing this is for a process of its own.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("dummy")

# By the address of the handle's storage, which a handle shares with its shallow copies. The storage
# is kept with it: the address stays taken.
_memory = {}


def to_dummy(tensor):
    """A new handle for a tensor in main memory; anything else as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.contiguous()
    handle = torch._C._acc.create_empty_tensor(tensor.shape, tensor.dtype)
    storage = handle.untyped_storage()
    _memory[storage._cdata] = tensor, storage
    return handle


def to_host(handle):
    """The tensor in main memory; anything else as it is."""
    if isinstance(handle, torch.device):
        return torch.device("cpu")
    if not isinstance(handle, torch.Tensor) or handle.device.type != "dummy":
        return handle
    tensor, _ = _memory[handle.untyped_storage()._cdata]
    return tensor.view(handle.dtype).view(handle.shape)


def _run(op, *args, **kwargs):
    """Any operation of torch, in main memory. What it changes in place keeps its handle."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    on_host = [to_host(leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(on_host, structure)
    if op is torch.ops.aten.as_strided.default:  # a handle has the offset 0
        tensor, size, stride, *offset = args
        args = tensor, size, stride, tensor.storage_offset() + sum(filter(None, offset))
    handles = {id(host): leaf for host, leaf in zip(on_host, leaves, strict=True)}
    out = op(*args, **kwargs)
    return pytree.tree_map(lambda t: handles[id(t)] if id(t) in handles else to_dummy(t), out)


_library = torch.library.Library("_", "IMPL", "PrivateUse1")
_library.fallback(_run)
_aten = torch.library.Library("aten", "IMPL", "PrivateUse1")


@torch.library.impl(_aten, "logsumexp")
def _logsumexp(tensor, dim, keepdim=False):  # torch's own resizes a handle
    return _run(torch.ops.aten.logsumexp.default, tensor, dim, keepdim)


@torch.library.impl(_aten, "_copy_from")
def _copy_from(source, target, non_blocking=False):
    to_host(target).copy_(to_host(source))
    return target
