"""The gradient of the true class where softmax is close to 1, a small difference, is accurate."""

import pytest
import torch

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.ops.loss import forward_reference
from tests.functional.confident_cases import CONFIDENT, check_confident_rows, gradient_on


def reference_gradient(z, a, b, lam, smoothing):
    lam = None if lam is None else lam.float()
    spec = LossSpec(a, b, lam, None, -100, Reduction.SUM, smoothing)
    return forward_reference(z, None, True, spec)[2]


# Rows of one block, of several, and with odd ends; the gradient of the forward, and the backward's.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [10, 1001, 2048, 4099, 33003])
@pytest.mark.parametrize("p", CONFIDENT)
def test_the_true_class_of_a_confident_row(p, classes, dtype):
    for gradient in (gradient_on("cpu", None), gradient_on("cpu", 3.0), reference_gradient):
        check_confident_rows(p, classes, dtype, gradient)
