"""What fastmp.functional.cross_entropy refuses, with what it says."""

import pytest
import torch

from fastmp.backends import cpu
from fastmp.backends.cpu.structs import LossArgs, Status
from fastmp.functional import MixedTarget, cross_entropy
from tests.functional.loss_cases import DTYPES

Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
_GRAD = torch.ones((), requires_grad=True)
BAD = {
    "batch": (ValueError, "batch_size", (Z, Y[:2]), {}),
    "target size": (RuntimeError, "target size", (Z[..., None], Y[:, None, None]), {}),
    "target int32": (RuntimeError, "Long or Byte", (Z, Y.int()), {}),
    "target float": (RuntimeError, "Long or Byte", (Z, Y.float()), {}),
    "scalar input": (RuntimeError, "scalar", (torch.zeros(()), Y[0]), {}),
    "two for one": (RuntimeError, "one class index", (Z[0], Y[:2]), {}),
    "integer logits": (NotImplementedError, "floating", (Z.long(), Y), {}),
    "smoothing above": (RuntimeError, "between 0.0 and 1.0", (Z, Y), {"label_smoothing": 1.5}),
    "smoothing nan": (RuntimeError, "got: nan", (Z, Y), {"label_smoothing": float("nan")}),
    "reduction": (ValueError, "not a valid value", (Z, Y), {"reduction": "avg"}),
    "weight size": (RuntimeError, "all 4 classes", (Z, Y, torch.ones(3)), {}),
    "weight dtype": (RuntimeError, "weight", (Z, Y, torch.ones(4).double()), {}),
    "weight grad": (RuntimeError, "detach", (Z, Y, torch.ones(4, requires_grad=True)), {}),
    "lam alone": (ValueError, "belong together", (Z, Y), {"lam": 0.5}),
    "b alone": (ValueError, "belong together", (Z, Y), {"target_b": Y}),
    "mixed twice": (ValueError, "already", (Z, MixedTarget(Y, Y, 0.5)), {"lam": 0.5}),
    "mixed dense": (TypeError, "class indices", (Z, MixedTarget(Z, Z + 1, 0.5)), {}),
    "lam number": (ValueError, r"\[0, 1\]", (Z, MixedTarget(Y, Y, 1.1)), {}),
    "lam nan": (ValueError, r"\[0, 1\]", (Z, MixedTarget(Y, Y, float("nan"))), {}),
    "lam tensor": (ValueError, r"\[0, 1\]", (Z, MixedTarget(Y, Y, torch.tensor(-0.1))), {}),
    "lam row": (ValueError, r"\[0, 1\]", (Z, MixedTarget(Y, Y, torch.tensor([0, 0.5, 2]))), {}),
    "lam shape": (ValueError, "shape", (Z, MixedTarget(Y, Y, torch.ones(2))), {}),
    "lam integer": (TypeError, "floating", (Z, MixedTarget(Y, Y, torch.ones(3).long())), {}),
    "lam grad": (ValueError, "detach", (Z, MixedTarget(Y, Y, _GRAD)), {}),
    "scale shape": (ValueError, "one value", (Z, Y), {"grad_scale": torch.ones(2)}),
    "b size": (ValueError, "target_b", (Z, Y), {"target_b": Y[:2], "lam": 0.5}),
    "device": (RuntimeError, "device", (Z, Y.to("meta")), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    error, text, arguments, options = BAD[name]
    with pytest.raises(error, match=f"(?i){text}"):
        cross_entropy(*arguments, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("value", [4, -1, 2**40])
@pytest.mark.parametrize("which", ["target", "target_b"])
def test_a_target_out_of_range_is_named(dtype, value, which):
    good, bad = torch.tensor([0, 1, 2]), torch.tensor([0, value, 2])
    targets = (bad, good) if which == "target" else (good, bad)
    z = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    with pytest.raises(IndexError) as caught:
        cross_entropy(z, targets[0], target_b=targets[1], lam=0.5)
    message = str(caught.value)
    assert f"Target {value} is out of bounds" in message
    assert "[0, 4)" in message
    assert f"row 1 of {which}" in message
    assert caught.value.args


def test_a_bad_target_is_found_before_anything_is_written():
    native, _ = cpu.load()
    if native is None:
        pytest.skip("no native library")
    z, y = torch.zeros(3, 4), torch.tensor([0, 1, 9])
    out = [torch.full(shape, 7.0) for shape in ((), (3, 2), (3, 4))]
    args = LossArgs(
        logits=z.data_ptr(), reduction=1, rows=3, classes=4, row_stride=4, ignore_index=-100,
        target_a=y.data_ptr(), loss=out[0].data_ptr(), stats=out[1].data_ptr(),
        grad=out[2].data_ptr(),
    )  # fmt: skip
    assert cpu.call("fastmp_loss_forward", args) == Status.BAD_TARGET
    assert (args.bad_row, args.bad_target) == (2, 9)
    assert all((t == 7.0).all() for t in out)
