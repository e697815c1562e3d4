"""16-bit formats and split masters, in C++ and in Python, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmp.backends import cpu
from fastmp.backends.abi import ROW, Hyperparameters, record_field
from fastmp.ops import update
from fastmp.ops.update import TensorRow
from fastmp.ops.update.step_table import StepTable

needs_library = pytest.mark.skipif(
    cpu.load()[0] is None, reason="there is no native library: it was built without a compiler"
)


def through_kernel(values, dtype):
    """The weights the kernel writes for these fp32 masters: an SGD step with learning rate 0."""
    param = torch.zeros(len(values), dtype=dtype)
    if dtype == torch.bfloat16:
        param, master = update.split_master(values)
    else:
        master = values.clone()
    row = TensorRow(param, master, (), torch.zeros(()), 0, 0, 2)
    table = StepTable([row], [torch.zeros(len(values), dtype=dtype)])
    assert table.fallback is None
    record = update.new_record(torch.device("cpu"))
    update.run(table, np.array([Hyperparameters(2, lr=0.0)]), record)
    assert record_field(record, "applied") == 1
    return row.param, row.master


def all_floats_of_interest():
    """Every fp16 value, the midpoints between neighbours, their neighbours, and random bits."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = halves[halves.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    inf = torch.tensor(torch.inf)
    edges = torch.cat([middles, middles.nextafter(inf), middles.nextafter(-inf)])
    special = torch.tensor([65519.996, 65520.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0])
    random = torch.randint(-(2**31), 2**31 - 1, (200_003,), dtype=torch.int32).view(torch.float32)
    values = torch.cat([finite, edges, special, random])
    return values[values.isfinite()]


@needs_library
def test_kernel_rounds_to_fp16_as_torch_does():
    values = all_floats_of_interest()
    weight, master = through_kernel(values, torch.float16)
    assert torch.equal(master.view(torch.int32), values.view(torch.int32))
    assert torch.equal(weight.view(torch.int16), values.half().view(torch.int16))


@needs_library
def test_kernel_keeps_split_masters_to_the_bit():
    values = all_floats_of_interest()
    weight, remainder = through_kernel(values, torch.bfloat16)
    joined = update.join_master(weight, remainder)
    assert torch.equal(joined.view(torch.int32), values.view(torch.int32))


@needs_library
@pytest.mark.parametrize("offset", [0, 1, 16])
def test_weights_written_past_the_caches_are_the_same(offset):
    """From 4 Mi parameters on the fp16 weights are streamed, where they are aligned."""
    values = torch.randn(2**22 + 37)
    weight = torch.full((len(values) + offset,), torch.nan, dtype=torch.float16)[offset:]
    row = TensorRow(weight, values.clone(), (), torch.zeros(()), 0, 0, 2)
    table = StepTable([row], [torch.zeros_like(weight)])
    record = update.new_record(weight.device)
    update.run(table, np.array([Hyperparameters(2, lr=0.0)]), record)
    assert torch.equal(weight, values.half())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_widens_every_16_bit_gradient_exactly(dtype):
    grads = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    grads = grads[grads.isfinite()]
    param = torch.zeros(len(grads))
    table = StepTable([TensorRow(param, None, (), torch.zeros(()), 0, 0, 2)], [grads])
    record = update.new_record(param.device)
    update.run(table, np.array([Hyperparameters(2, lr=-1.0)]), record)
    assert torch.equal(param, grads.float())


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_split_masters_are_exact_and_their_weight_is_a_nearest_bf16(bits):
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight, remainder = update.split_master(values)
    joined = update.join_master(weight, remainder)
    number = ~values.isnan()
    assert torch.equal(joined[number].view(torch.int32), values[number].view(torch.int32))
    assert bool(joined[~number].isnan().all())
    assert bool(weight[~number].isnan().all())
    finite = values.isfinite()
    ours = (weight[finite].double() - values[finite].double()).abs()
    torchs = (values[finite].bfloat16().double() - values[finite].double()).abs()
    assert torch.equal(ours, torchs)  # the same distance: the same value but for ties


def test_split_master_ties_go_away_from_zero():
    tie = torch.tensor([0x3F808000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    weight, remainder = update.split_master(tie)
    assert torch.equal(weight.abs(), torch.tensor([1.0078125] * 2, dtype=torch.bfloat16))
    assert torch.equal(update.join_master(weight, remainder), tie)


@needs_library
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
