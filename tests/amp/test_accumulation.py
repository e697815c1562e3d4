"""Accumulation: parts weighted as one batch; 16-bit gradients summed in fp32 and rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastmp
from fastmp.amp.accumulation import Accumulator, batch_weights, weighted

HALVES = [torch.float16, torch.bfloat16]


def passes(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(257, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", HALVES)
@given(count=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_sum_is_rounded_once(dtype, count, seed):
    param = torch.nn.Parameter(torch.zeros(257, dtype=dtype))
    accumulator = Accumulator([param])
    grads = passes(count, dtype, seed)
    for i, grad in enumerate(grads):
        param.grad = grad.clone()
        if i < count - 1:
            accumulator.stash()
            assert param.grad is None
    accumulator.finish()
    expected = grads[0].float()
    for grad in grads[1:]:
        expected = expected + grad.float()
    assert torch.equal(param.grad, expected.to(dtype))


def test_sixty_four_passes_beat_autograd():
    param = torch.nn.Parameter(torch.zeros(257, dtype=torch.bfloat16))
    accumulator = Accumulator([param])
    grads = passes(64, torch.bfloat16)
    naive = torch.zeros(257, dtype=torch.bfloat16)
    for i, grad in enumerate(grads):
        naive += grad
        param.grad = grad.clone()
        if i < 63:
            accumulator.stash()
    accumulator.finish()
    exact = torch.stack(grads).double().sum(0)
    ours = (param.grad.double() - exact).abs().max()
    assert ours < (naive.double() - exact).abs().max() / 4


def test_fp32_gradients_are_left_to_autograd():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    accumulator = Accumulator([param])
    accumulator.stash()
    assert torch.equal(param.grad, torch.ones(3))


def test_a_parameter_that_the_last_pass_missed_keeps_its_sum():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    accumulator = Accumulator([param])
    for value in (1.0, 2.0):
        param.grad = torch.full((2,), value, dtype=torch.float16)
        accumulator.stash()
    accumulator.finish()
    assert torch.equal(param.grad, torch.full((2,), 3.0, dtype=torch.float16))
    param.grad = None
    accumulator.finish()  # nothing is left over for the next step
    assert param.grad is None


def test_an_overflow_stays_one():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    accumulator = Accumulator([param])
    for values in ([torch.inf, 60000.0], [-torch.inf, 60000.0], [0.0, 0.0]):
        param.grad = torch.tensor(values, dtype=torch.float16)
        if values[0]:
            accumulator.stash()
    accumulator.finish()
    assert not param.grad.isfinite().any()  # inf - inf, and 120000 is beyond fp16


# ---- weights of the parts ----

WEIGHT = torch.tensor([0.5, 2.0, 1.0])


class Wrapped(torch.nn.Module):
    """A loss of one's own around torch's."""

    def __init__(self):
        super().__init__()
        self.loss = torch.nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)

    def forward(self, logits, target):
        return 2 * self.loss(logits, target)


class Own(torch.nn.Module):
    """A loss that tells its divisor: the targets of class 2."""

    def forward(self, logits, target):
        chosen = target == 2
        return (logits[:, 0] * chosen).sum() / self.divisor(target)

    def divisor(self, target):
        return (target == 2).sum(dtype=torch.float64)


CRITERIA = {
    "wrapped": Wrapped(),
    "own": Own(),
    "ours": fastmp.nn.CrossEntropyLoss(label_smoothing=0.1),
    "ours weighted": fastmp.nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
    "torch weighted": torch.nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
    "ours sum": fastmp.nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"),
    "torch nll": torch.nn.NLLLoss(weight=WEIGHT),
    "mse": torch.nn.MSELoss(),
    "mse sum": torch.nn.MSELoss(reduction="sum"),
    "bce": torch.nn.BCEWithLogitsLoss(),
    "foreign": torch.nn.MultiMarginLoss(),
}
SIZES = [(5, 1), (1, 5), (2, 3, 1), (6,)]


def target_for(criterion, logits, kind):
    generator = torch.Generator().manual_seed(4)
    shape = logits.shape[:1] + logits.shape[2:]
    if isinstance(criterion, torch.nn.MSELoss | torch.nn.BCEWithLogitsLoss):
        return torch.rand(logits.shape, generator=generator)
    if kind == "probabilities":
        return torch.rand(logits.shape, generator=generator).softmax(1)
    target = torch.randint(0, 3, shape, generator=generator)
    target[-1] = 1  # ignored by some, with it a whole part
    if isinstance(criterion, Own):
        target[1::2] = 2
    return target


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "classes") for name in CRITERIA),
        ("ours weighted", "maps"), ("torch weighted", "maps"), ("ours", "probabilities"),
        ("mse", "maps"),
    ],
)  # fmt: skip
def test_weighted_losses_of_parts_are_the_loss_of_the_whole(name, kind, sizes):
    criterion = CRITERIA[name]
    shape = (6, 3, 4, 5) if kind == "maps" else (6, 3)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    target = target_for(criterion, logits, kind)
    parts = list(zip(logits.split(sizes), target.split(sizes), strict=True))
    weights = batch_weights(criterion, [y for _, y in parts])
    total = sum(weighted(criterion(z, y), w) for (z, y), w in zip(parts, weights, strict=True))
    torch.testing.assert_close(float(total), float(criterion(logits, target)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", [CRITERIA["ours"], CRITERIA["mse"]])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_equal_parts_have_exactly_one_kth(criterion, count):
    target = target_for(criterion, torch.zeros(4, 3), "classes")
    weights = batch_weights(criterion, [target] * count)
    assert [float(w) for w in weights] == [1 / count] * count
    scales = torch.tensor([1.0, 2.0**16, 3.7e4, 0.1])  # what a loss scale was divided by before
    for weight in weights:
        assert torch.equal(weighted(scales, weight).float(), scales / count)


@pytest.mark.parametrize("kind", [torch.nn.CrossEntropyLoss, fastmp.nn.CrossEntropyLoss])
def test_a_part_whose_targets_are_all_ignored_adds_nothing(kind):
    criterion = kind()
    logits = torch.randn(3, 4, requires_grad=True)
    parts = [torch.tensor([-100, -100, -100]), torch.tensor([0, -100, 1])]
    nothing, everything = batch_weights(criterion, parts)
    assert (float(nothing), float(everything)) == (0.0, 1.0)
    weighted(criterion(logits, parts[0]), nothing).backward()
    assert weighted(criterion(logits, parts[0]), nothing) == 0
    assert not logits.grad.any()
