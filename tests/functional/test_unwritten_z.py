"""Linear layers write no z where nothing needs it: no gradient, a checkpoint's first forward."""

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastmp.functional import linear
from tests.functional.linear_cases import product
from tests.functional.recomputed_cases import (
    M,
    N,
    check_close,
    forms,
    gradients,
    operands,
    sequence,
    smooth,
    torchs,
)
from tests.functional.test_saved_tensors import Created

pytestmark = pytest.mark.usefixtures("every_size", "recomputing")


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_the_output_is_all_that_is_made(context, own):
    x, w, b = (t.requires_grad_(context is not torch.enable_grad) for t in operands()[:3])
    created = Created(x, w, b)
    with product(own), context(), created:
        y = linear(x, w, b, "gelu")
    assert created.held() == y.untyped_storage().nbytes() == M * N * 4


@pytest.fixture
def saves():
    """Whether z was asked for, at each call of the operation."""
    found, op = [], torch.ops.fastmp.linear

    def recorded(*arguments):
        found.append(arguments[-1])
        return op(*arguments)

    recorded.default = op.default  # looked up at the first call under a dispatch mode
    with mock.patch.object(torch.ops.fastmp, "linear", recorded):
        yield found


@pytest.mark.parametrize("reentrant", [False, True])
@forms
@smooth
def test_the_first_forward_of_a_checkpoint(activation, form, reentrant, saves):
    tensors = operands()
    checkpoint(form, *tensors, activation, use_reentrant=reentrant).square().sum().backward()
    assert saves == [False, False, True, True]
    expected = gradients(torchs(*tensors, activation), tensors)
    check_close([t.grad for t in tensors], list(expected))


def test_a_checkpoint_in_a_checkpoint(saves):
    tensors = operands()

    def inner(*given):
        return checkpoint(sequence, *given, "gelu", use_reentrant=False)

    y = checkpoint(inner, *tensors, use_reentrant=False)
    check_close(gradients(y, tensors), gradients(torchs(*tensors, "gelu"), tensors))
    assert saves == [False] * 2 + [True] * 2


def test_a_checkpoint_that_keeps_results_of_the_operation(saves):
    """Its second forward gets what the first one made."""
    tensors = operands()

    def policy(context, op, *_args, **_options):
        kept = str(op) == "fastmp.linear.default"
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        sequence, *tensors, "gelu", use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    check_close(gradients(y, tensors), gradients(torchs(*tensors, "gelu"), tensors))
    assert saves == [True] * 4
