"""The operations of linear_cross_entropy: schema and fake, rows of the second sweep, chunks."""

import pytest
import torch
from torch.nn import functional as F

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.torch_matmul import rows_at_once
from fastmp.ops.linear_loss_columns import gradient_of_rows
from tests.functional.linear_loss_cases import C, problem


def test_the_operation_is_a_good_citizen():
    """Schema, fake and autograd registration, by torch's own check."""
    x, w, b, a, _, _ = problem(torch.float32)
    x, w, b = (t.detach() for t in (x, w, b))
    spec = (a, None, None, None, -100, 2, 0.0)
    torch.library.opcheck(
        torch.ops.fastmp.linear_loss, (x, w, b, None, 32, [True, True, True], *spec)
    )


def test_the_operations_of_all_rows_are_good_citizens():
    x, w, b, a, _, _ = problem(torch.float32)
    x, w, b = (t.detach() for t in (x, w, b))
    operations, spec = torch.ops.fastmp, (a, None, None, None, -100, 1, 0.0)
    torch.library.opcheck(operations.linear_loss_all_rows, (x, w, b, torch.tensor(8.0), *spec))
    _, grad = operations.linear_loss_all_rows(x, w, b, None, *spec)
    arguments = (grad, x, w, torch.tensor(8.0), [True, True, True])
    torch.library.opcheck(operations.linear_loss_products, arguments)
    torch.library.opcheck(operations.linear_loss_scale_, (x.bfloat16(), x, torch.tensor(1 / 3)))


def test_the_operations_of_two_sweeps_are_good_citizens():
    x, w, b, a, _, _ = problem(torch.float32)
    x, w, b = (t.detach() for t in (x, w, b))
    operations, spec = torch.ops.fastmp, (a, None, None, None, -100, 2, 0.0)
    torch.library.opcheck(operations.linear_loss_first_sweep, (x, w, b, 32, *spec))
    _, stats = operations.linear_loss_first_sweep(x, w, b, 32, *spec)
    arguments = (x, w, b, stats, torch.tensor(8.0), 32, [True, True, True], *spec)
    torch.library.opcheck(operations.linear_loss_second_sweep, arguments)
    rows, _ = gradient_of_rows(torch.tensor(8.0), stats, C, LossSpec(*spec))
    arguments = (F.linear(x, w[8:24], b[8:24]), rows, 8, a, None, None, -100)
    torch.library.opcheck(operations.loss_columns_, arguments)


def test_class_weights_of_16_bits_are_summed_in_fp32():
    """53.6; in bf16 the sum would be 53.5."""
    weight = torch.full((C,), 1.0, dtype=torch.bfloat16)
    weight[0] = 1.6
    spec = LossSpec(torch.tensor([3]), None, None, weight, -100, Reduction.SUM, 1.0)
    _, q = gradient_of_rows(torch.ones(()), torch.ones(1, 4), C, spec)
    torch.testing.assert_close(q * C, weight.double().sum().float()[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [-1, C, 2**40])
def test_a_target_out_of_range_makes_its_row_nan_in_the_second_sweep(bad):
    """As on a GPU, which cannot refuse it; an ignored row full of NaN stays 0."""
    spec = LossSpec(torch.tensor([3, bad, -100]), None, None, None, -100, Reduction.SUM, 0.1)
    stats = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0], [torch.nan] * 4])
    rows, _ = gradient_of_rows(torch.ones(()), stats, C, spec)
    z = torch.zeros(3, 8)
    z[2] = torch.nan
    torch.ops.fastmp.loss_columns_(z, rows, 0, *spec[:2], None, -100)
    assert z[0].isfinite().all()
    assert z[1].isnan().all()
    assert (z[2] == 0).all()


def test_rows_at_once_on_a_device_that_sums_the_weights_gradient():
    """H 4096, C 128256: all up to 2 H + 4096 rows of 16 bits, then equal chunks of at most 4096."""
    half = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    assert [rows_at_once(n, half, True) for n in (0, 1, 8192, 12288)] == [1, 1, 8192, 12288]
    assert [rows_at_once(n, half, True) for n in (12289, 16384, 20000)] == [3073, 4096, 4000]
    assert rows_at_once(8192, half, False) == 512
    assert rows_at_once(8192, half.float(), True) == 8192
    assert rows_at_once(8193, half.float(), True) == 2731
