"""A backend of fastmp in one file, for the device of ``torch_dummy``.

Its kernels are the references on the tensors in main memory behind the handles.
"""

from collections import Counter

import torch
from torch.utils import _pytree as pytree

from fastmp.backends import native_table, registry
from fastmp.ops import linear, loss, mix, update
from fastmp.ops.update.step_table import StepTable
from tests.backends.torch_dummy import to_dummy, to_host

#: Calls of each kernel.
calls = Counter()

REFERENCES = {
    "linear": linear.linear_reference,
    "linear_backward": linear.backward_reference,
    "loss_forward": loss.forward_reference,
    "loss_backward": loss.backward_reference,
    "mix": mix.mix_reference,
}


def supports(*args):
    """Any dtype but fp64."""
    dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
    return "no kernel for fp64" if torch.float64 in dtypes else None


def on_host(name, reference):
    """The kernel ``name``."""

    def kernel(*args):
        calls[name] += 1
        return pytree.tree_map(to_dummy, reference(*pytree.tree_map(to_host, args)))

    return kernel


#: Problems of one row are left to torch; the forward of the loss writes the gradient.
POLICIES = {
    "linear": {"worthwhile": lambda input, weight, activation: input.shape[:-1].numel() > 1},
    "loss_forward": {"precomputes_grad": lambda logits, assumed_grad_output: True},
}


class Step:
    """The kernel of update: the reference on the tensors behind the handles."""

    addresses = None  # it takes the tensors

    def __init__(self, rows, grads):
        self.rows = [
            row._replace(
                param=to_host(row.param),
                master=to_host(row.master),
                states=tuple(map(to_host, row.states)),
                step=to_host(row.step),
            )
            for row in rows
        ]

    def matches(self, params):
        return True

    def bind_gradients(self, grads):
        self.grads = [to_host(grad) for grad in grads]

    def step(self, hypers, record, options, lrs):
        calls["update"] += 1
        table = StepTable([], [])
        table.rows, table.grads, self.grads = self.rows, self.grads, []
        update.run(
            table,
            hypers,
            to_host(record),
            options._replace(**{name: to_host(value) for name, value in options._asdict().items()}),
        )


registry.mark_available("dummy", "references in main memory")
for name, reference in REFERENCES.items():
    policies = POLICIES.get(name, {})
    registry.register(
        name, "dummy", on_host(name, reference), backend="dummy", supports=supports, **policies
    )
registry.register("update", "dummy", Step, backend="dummy", supports=native_table.supports)
