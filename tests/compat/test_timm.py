"""timm: what its Mixup gives goes into our loss, and our MixedTarget means the same."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastmp

# timm.data needs torchvision, its mixup.py alone does not
spec = importlib.util.find_spec("timm")
if spec is None:
    pytest.skip("timm is not installed: pip install 'fastmp[interop]'", allow_module_level=True)


@pytest.fixture(scope="module")
def mixup():
    path = Path(spec.origin).parent / "data" / "mixup.py"
    found = importlib.util.spec_from_file_location("timm_mixup", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_dense_targets_and_mixed_target_are_one_loss(mixup, mode, dtype):
    """timm draws λ and builds dense targets; the same λ as a MixedTarget gives the same loss."""
    import numpy as np

    np.random.seed(0)  # noqa: NPY002 - it is what timm draws from
    mix = mixup.Mixup(0.4, 0.0, mode=mode, label_smoothing=0.1, num_classes=10)
    torch.manual_seed(0)
    images, labels = torch.rand(32, 3, 8, 8), torch.randint(10, (32,))
    labels[labels == labels.flip(0)] = 3  # partners differ, so that λ can be read off
    before = labels.clone()
    _, dense = mix(images.clone(), labels)
    a, b = before, before.flip(0)
    differ = a != b
    on = dense.gather(1, a[:, None])[:, 0]
    lam = torch.where(differ, (on - 0.1 / 10) / 0.9, torch.ones(()))
    logits = torch.randn(32, 10, dtype=dtype, requires_grad=True)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
    ours = criterion(logits, fastmp.data.MixedTarget(a, b, lam))
    (grad,) = torch.autograd.grad(ours, logits)
    theirs = fastmp.nn.CrossEntropyLoss()(logits.float(), dense)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected)
    # and its dense targets go into our loss as they are
    same = fastmp.functional.cross_entropy(logits, dense.to(dtype))
    torch.testing.assert_close(same.float(), theirs.detach(), rtol=2e-2, atol=2e-2)
