"""The gradient of the true class where softmax is close to 1, a small difference, is accurate."""

import pytest
import torch

from fastmp.backends.abi import REDUCTION_CODES, LossSpec
from fastmp.functional import linear_cross_entropy
from fastmp.ops.loss import forward_reference
from tests.functional.confident_cases import GRAD_OUTPUT, check_confident_rows, gradient_on
from tests.functional.loss_cases import DTYPES, value_and_grad


def reference(z, a, b, lam, weight, ignore_index, reduction, smoothing):
    spec = LossSpec(a, b, lam, weight, ignore_index, REDUCTION_CODES[reduction], smoothing)
    loss, _, grad = forward_reference(z, torch.tensor(GRAD_OUTPUT), True, spec)
    return loss, grad


def differentiated_reference(z, a, b, lam, weight, ignore_index, reduction, smoothing):
    spec = LossSpec(a, b, lam, weight, ignore_index, REDUCTION_CODES[reduction], smoothing)
    return value_and_grad(lambda z: forward_reference(z, None, False, spec)[0], z, GRAD_OUTPUT)


def linear(z, a, b, lam, weight, ignore_index, reduction, smoothing):
    """The last layer is the identity: the gradient of the logits, rounded, scaled, rounded."""
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
    options |= {"target_b": b, "lam": lam, "weight": weight}
    layer = torch.eye(z.shape[1], dtype=z.dtype)
    return value_and_grad(
        lambda z: linear_cross_entropy(z, layer, a, chunk=5, **options), z, GRAD_OUTPUT
    )


# Rows of one block, of several, and with odd ends; the gradient of the forward, and the backward's.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 10, 1001, 2048, 4099, 33003])
def test_the_true_class_of_a_confident_row(classes, dtype):
    ways = [gradient_on("cpu", GRAD_OUTPUT), gradient_on("cpu", None), reference]
    for way in (*ways, differentiated_reference):
        check_confident_rows(classes, dtype, way)
    if classes <= 1001:
        check_confident_rows(classes, dtype, linear, roundings=2)
