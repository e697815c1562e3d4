"""Lightning: its Trainer and Fabric with our model, optimizer and loss."""

import pytest
import torch

import fastmp
from tests.compat.conftest import accuracy, assert_learnt_over_overflows

lightning = pytest.importorskip(
    "lightning", reason="Lightning is not installed: pip install 'fastmp[interop]'"
)


@pytest.fixture
def module(model, optimizer):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)

        def training_step(self, batch, _):
            x, y = batch
            return self.criterion(self.model(x), y)

        def configure_optimizers(self):
            return optimizer

    return Module()


@pytest.fixture
def fit(module, points, tmp_path):
    """Six epochs of ten batches with the arguments of Lightning's Trainer."""

    def run(**more):
        trainer = lightning.Trainer(
            max_epochs=6, accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, **more,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(points, 24, shuffle=True))

    return run


def test_the_trainer_with_accumulation(fit, model, optimizer, points, tmp_path):
    fit(accumulate_grad_batches=2)
    assert int(optimizer.applied_steps) == 6 * 10 / 2
    assert accuracy(model, points) > 0.95
    resumed = torch.load(
        next(tmp_path.rglob("*.ckpt")), weights_only=False
    )["optimizer_states"][0]  # fmt: skip
    twin = fastmp.optim.AdamW([p.detach().clone() for p in model.parameters()])
    twin.load_state_dict(resumed)
    assert int(twin.applied_steps) == int(optimizer.applied_steps)


def test_the_trainer_clips_too(fit, model, optimizer, points):
    """gradient_clip_val, by norm: on our 16-bit gradients, before our step."""
    fit(accumulate_grad_batches=2, gradient_clip_val=0.25)
    assert int(optimizer.applied_steps) == 6 * 10 / 2
    assert float(optimizer.grad_norm) <= 0.25 * 1.01
    assert accuracy(model, points) > 0.95


@pytest.mark.parametrize("dtype", [torch.float16])
def test_fp16_with_our_scaler(fit, model, optimizer, points, scaler):
    """With a scaler Lightning refuses to clip for a fused optimizer; ours clips in the step."""
    precision = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(plugins=precision, gradient_clip_val=0.25)
    fit(plugins=precision, accumulate_grad_batches=2)
    assert_learnt_over_overflows(model, optimizer, points)


def test_fabric(model, optimizer, points):
    fabric = lightning.Fabric(accelerator="cpu")
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(points, 24, shuffle=True))
    prepared, wrapped = fabric.setup(model, optimizer)
    for _ in range(6):
        for x, y in loader:
            wrapped.zero_grad()
            fabric.backward(fastmp.functional.cross_entropy(prepared(x), y, label_smoothing=0.1))
            wrapped.step()
    assert int(optimizer.applied_steps) == 60
    assert accuracy(model, points) > 0.95
