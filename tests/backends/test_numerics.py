"""16-bit formats and split masters, in C++ and in Python, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmp.backends.abi import ROW, Hyperparameters, record_field
from fastmp.ops import update
from fastmp.ops.update import TensorRow
from fastmp.ops.update.step_table import StepTable
from tests.native import needs_native


def sgd(row, grad, lr):
    """A step of the kernel with one row, without momentum: master - lr grad."""
    table = StepTable([row], [grad])
    assert table.fallback is None
    record = update.new_record(row.param.device)
    update.run(table, np.array([Hyperparameters(2, lr=lr)]), record)
    assert record_field(record, "applied") == 1


def through_kernel(values, dtype):
    """The weights and masters that the kernel writes for these fp32 values: -0 + values."""
    param = torch.full((len(values),), -0.0, dtype=dtype)
    master = (
        torch.zeros_like(values, dtype=torch.int16)
        if dtype == torch.bfloat16
        else -0.0 * values.abs()
    )
    sgd(TensorRow(param, master, (), torch.zeros(()), 0, 0, 2), values, lr=-1.0)
    return param, master


def all_floats_of_interest():
    """Every fp16 value, the midpoints between neighbours, their neighbours, and random bits."""
    halves = every_weight(torch.float16).float()
    finite = halves[halves.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    inf = torch.tensor(torch.inf)
    edges = torch.cat([middles, middles.nextafter(inf), middles.nextafter(-inf)])
    special = torch.tensor([65519.996, 65520.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0])
    random = torch.randint(-(2**31), 2**31 - 1, (200_003,), dtype=torch.int32).view(torch.float32)
    values = torch.cat([finite, edges, special, random])
    return values[values.isfinite()]


def as_split(values):
    """Masters whose bf16 weight is 0 or inf are 0 or inf themselves."""
    values = torch.where(values.abs() < 2.0**-134, 0 * values, values)
    return torch.where(values.abs() >= (2 - 2.0**-8) * 2.0**127, values * torch.inf, values)


@needs_native
def test_kernel_rounds_to_fp16_as_torch_does():
    values = all_floats_of_interest()
    weight, master = through_kernel(values, torch.float16)
    assert torch.equal(master.view(torch.int32), values.view(torch.int32))
    assert torch.equal(weight.view(torch.int16), values.half().view(torch.int16))


@needs_native
def test_kernel_keeps_split_masters_to_the_bit():
    values = all_floats_of_interest()
    weight, remainder = through_kernel(values, torch.bfloat16)
    joined = update.join_master(weight, remainder)
    assert torch.equal(joined.view(torch.int32), as_split(values).view(torch.int32))


def every_weight(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


REMAINDERS = [-(2**15), 1 - 2**15, -1, 0, 1, 2**15 - 2, 2**15 - 1]


def test_every_remainder_beside_every_weight_joins_to_a_master_of_that_weight():
    """A weight changed from outside meets the remainder of another: never NaN, never off."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**15), 2**15, (2**16,), generator=generator).to(torch.int16)
    weight = every_weight(torch.bfloat16)
    for remainder in [*(torch.full((2**16,), r, dtype=torch.int16) for r in REMAINDERS), random]:
        joined = update.join_master(weight, remainder)
        again, _ = update.split_master(joined)
        number = ~weight.isnan()
        assert torch.equal(again[number].view(torch.int16), weight[number].view(torch.int16))
        assert bool(joined[~number].isnan().all())
        assert not joined[weight == 0].any()
        assert bool(joined[weight.isinf()].isinf().all())


@needs_native
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_kernel_joins_every_weight_with_a_stale_remainder(remainder):
    param = every_weight(torch.bfloat16)
    param = param[~param.isinf()]  # 0 * inf, for the weight decay, is NaN
    master = torch.full_like(param, remainder, dtype=torch.int16)
    expected = update.join_master(param, master)
    sgd(TensorRow(param, master, (), torch.zeros(()), 0, 0, 2), torch.zeros_like(param), lr=0.0)
    torch.testing.assert_close(
        update.join_master(param, master), expected, rtol=0, atol=0, equal_nan=True
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_takes_every_weight_that_its_fp32_master_does_not_round_to(dtype):
    """Beside fp32 masters; the last elements are fewer than a vector."""
    some = every_weight(dtype)
    some = some[~some.isinf()]
    weight = torch.cat([some, some, torch.ones(5, dtype=dtype)])
    fine = torch.cat([some.float() * (1 + 2**-13), torch.full((len(some) + 5,), 4.1)])
    expected = torch.where(fine.to(dtype) == weight, fine, weight.float())
    assert torch.equal(
        update.current_master(weight, fine).view(torch.int32), expected.view(torch.int32)
    )
    sgd(TensorRow(weight, fine, (), torch.zeros(()), 0, 0, 2), torch.zeros_like(weight), lr=0.0)
    torch.testing.assert_close(fine, expected, rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_widens_every_16_bit_gradient_exactly(dtype):
    grads = every_weight(dtype)
    grads = grads[grads.isfinite()]
    param = torch.zeros(len(grads))
    sgd(TensorRow(param, None, (), torch.zeros(()), 0, 0, 2), grads, lr=-1.0)
    assert torch.equal(param, grads.float())


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_split_masters_are_exact_and_their_weight_is_a_nearest_bf16(bits):
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight, remainder = update.split_master(values)
    joined = update.join_master(weight, remainder)
    number = ~values.isnan()
    kept = as_split(values[number])
    assert torch.equal(joined[number].view(torch.int32), kept.view(torch.int32))
    assert bool(joined[~number].isnan().all())
    assert bool(weight[~number].isnan().all())
    assert not remainder[(weight == 0) | ~weight.isfinite()].any()
    finite = values.isfinite()
    ours = (weight[finite].double() - values[finite].double()).abs()
    torchs = (values[finite].bfloat16().double() - values[finite].double()).abs()
    assert torch.equal(ours, torchs)  # the same distance: the same value but for ties


def test_split_master_ties_go_away_from_zero():
    tie = torch.tensor([0x3F808000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    weight, remainder = update.split_master(tie)
    assert torch.equal(weight.abs(), torch.tensor([1.0078125] * 2, dtype=torch.bfloat16))
    assert torch.equal(update.join_master(weight, remainder), tie)


@needs_native
@pytest.mark.parametrize(
    ("field", "value"),
    [("param_dtype", 3), ("grad_dtype", 9), ("group", 1), ("master_kind", 2), ("numel", -1)]
    + [(name, 0) for name in ("param", "grad", "state0", "state1", "step")],
)
def test_the_library_refuses_rows_it_cannot_read(field, value):
    param, m, v = torch.ones(3, 20)
    before = param.clone()
    table = StepTable([TensorRow(param, None, (m, v), torch.zeros(()), 0, 0, 0)], [torch.ones(20)])
    table.kernel.rows[field] = np.array(value).astype(ROW[field])
    hypers = np.array([Hyperparameters(0, lr=1.0)])
    record = update.new_record(param.device)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        update.run(table, hypers, record)
    assert torch.equal(param, before)
