"""A backend of fastmp in one file, for the device of ``torch_dummy``.

Its kernels are the references on the tensors in main memory behind the handles.
"""

from collections import Counter

import torch

from fastmp.backends import registry
from fastmp.ops.linear import backward_reference, linear_reference
from fastmp.ops.mix import mix_reference
from tests.backends.torch_dummy import to_dummy, to_host

#: Calls of each kernel.
calls = Counter()

TORCH_OPS = {
    "linear": linear_reference,
    "linear_backward": backward_reference,
    "mix": mix_reference,
}


def supports(*args):
    """Any dtype but fp64."""
    dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
    return "no kernel for fp64" if torch.float64 in dtypes else None


def on_host(name, reference):
    """The kernel ``name``."""

    def kernel(*args):
        calls[name] += 1
        out = reference(*map(to_host, args))
        return tuple(map(to_dummy, out)) if isinstance(out, tuple) else to_dummy(out)

    return kernel


def worthwhile(input, weight, activation):
    """Problems of one row are left to torch."""
    return input.shape[:-1].numel() > 1


registry.mark_available("dummy", "references in main memory")
for name, reference in TORCH_OPS.items():
    kernel = on_host(name, reference)
    policies = {"worthwhile": worthwhile} if name == "linear" else {}
    registry.register(name, "dummy", kernel, backend="dummy", supports=supports, **policies)
