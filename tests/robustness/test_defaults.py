"""A default device or dtype of the user's is for tensors of the user's.

Tensors on "meta" have no values, so that one in the wrong place is an error.
"""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import fastmp
from fastmp import amp, optim, transfer
from fastmp.data.mixup import Mixup
from fastmp.functional import cross_entropy, linear_cross_entropy, mix
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import OneCycle


@pytest.fixture
def _elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cpu").to(dtype)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "Muon"])
def test_optimizers(name, dtype, state_dtype):
    param = torch.nn.Parameter(random(80, 70, dtype=dtype))
    options = {"momentum": 0.9} if name == "SGD" else {}
    options |= {"state_dtype": state_dtype, "master": "split", "max_grad_norm": 1.0}
    optimizer = getattr(optim, name)([param], lr=0.01, ema=[0.5, 0.9], **options)

    def step():
        param.grad = random(80, 70, dtype=dtype)
        optimizer.step()

    step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.torch_state_dict()
    optimizer.load_averages(optimizer.averages())
    optimizer.load_masters(optimizer.masters())
    with optimizer.averaged():
        copy.deepcopy(optimizer.param_groups)
    pickle.loads(pickle.dumps(optimizer))
    optimizer.bind_schedule(OneCycle(0.1, 10))
    param.data.mul_(2)
    step()
    optimizer.state_dtype = torch.bfloat16
    step()
    assert optimizer.applied_steps == 3
    assert param.isfinite().all()


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("lam", [None, 0.25, "tensor"])
def test_losses(dtype, reduction, lam):
    x, weight = (random(*s, dtype=dtype).requires_grad_() for s in ((6, 5), (9, 5)))
    a, b = torch.arange(6, device="cpu"), torch.arange(3, 9, device="cpu")
    pair = {} if lam is None else {"target_b": b, "lam": 0.25}
    if lam == "tensor":
        pair["lam"] = torch.tensor(0.25, dtype=dtype, device="cpu")
    logits = F.linear(x, weight)
    expected = F.cross_entropy(logits, a, reduction=reduction)
    if pair:
        expected = 0.25 * expected + 0.75 * F.cross_entropy(logits, b, reduction=reduction)
    gradients = torch.autograd.grad(expected.sum(), (x, weight), retain_graph=True)
    losses = [cross_entropy(logits, a, reduction=reduction, **pair)]
    losses += [
        linear_cross_entropy(x, weight, a, reduction=reduction, chunk=c, **pair) for c in (2, 9)
    ]
    for loss in losses:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), (x, weight), retain_graph=True), gradients
        )


@pytest.mark.usefixtures("_elsewhere")
def test_mixup():
    images, labels = random(8, 3, 4, 4), torch.arange(8, device="cpu")
    mixed, target = Mixup(0.2, 0.3)(images, labels)
    assert (mixed.device, target.a.device) == (images.device, labels.device)
    scaled = mix(images, 0.25, labels.flip(0), mean=[0.5] * 3, std=[2.0] * 3)
    torch.testing.assert_close(scaled, (images.lerp(images.flip(0), 0.75) - 0.5) / 2)


@pytest.mark.usefixtures("_elsewhere")
def test_a_training_run(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 80), torch.nn.GELU(), torch.nn.Linear(80, 3)
    ).to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(random(*param.shape) * 0.1)
    amp.convert(model, torch.float16)
    optimizer = optim.AdamW(transfer.layerwise_lr(model, 0.01, 0.5), lr=0.01)
    data = [
        (random(8, 12, dtype=torch.float16), torch.arange(8, device="cpu") % 3) for _ in range(3)
    ]
    trainer = fastmp.Trainer(
        model, optimizer, CrossEntropyLoss(), scaler=amp.GradScaler("cpu", init_scale=64.0),
        ema=0.9, folder=tmp_path, progress=False,
    )  # fmt: skip
    trainer.fit(data, data, 2)
    trainer.load_state_dict(trainer.state_dict())
    assert optimizer.applied_steps == 6


def results_of_everything(state_dtype):
    """Of an optimizer, the losses and mixup, on the same inputs."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    params = [torch.nn.Parameter(drawn(80, 70, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.Muon(
        [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}],
        lr=0.01, ema=0.5, state_dtype=state_dtype, max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(2):
        for param in params:
            param.grad = drawn(80, 70, dtype=torch.bfloat16)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    found = [*optimizer.masters(), *optimizer.averages(), optimizer.grad_norm]
    x, weight = (drawn(*s, dtype=torch.float16).requires_grad_() for s in ((6, 5), (9, 5)))
    for loss in (
        linear_cross_entropy(x, weight, torch.arange(6), chunk=2),
        linear_cross_entropy(x, weight, torch.arange(6), chunk=9),
        cross_entropy(x @ weight.t(), torch.arange(6), target_b=torch.arange(6), lam=0.3),
    ):
        found += [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
    mixup = Mixup(0.2, prob=0.5, per_sample=True, generator=generator)
    for _ in range(4):
        mixed, target = mixup(drawn(8, 3, 4, 4), torch.arange(8))
        found += [mixed, target.lam]
    return found


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_nothing_depends_on_the_default_dtype(default, state_dtype):
    expected = results_of_everything(state_dtype)
    torch.set_default_dtype(default)
    try:
        found = results_of_everything(state_dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
