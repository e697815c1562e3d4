"""Lightning: its Trainer and Fabric with our model, optimizer and loss."""

import pytest
import torch

import fastmp
from tests.interop.conftest import accuracy

lightning = pytest.importorskip(
    "lightning", reason="Lightning is not installed: pip install 'fastmp[interop]'"
)


def test_the_trainer_with_accumulation(model, optimizer, points, tmp_path):
    """It clips gradients itself only if asked: a fused optimizer with clipping is ours to do."""

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

    trainer = lightning.Trainer(
        max_epochs=6, accumulate_grad_batches=2, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(points, 24, shuffle=True)
    trainer.fit(Module(), loader)
    assert int(optimizer.applied_steps) == 6 * 10 / 2
    assert accuracy(model, points) > 0.95
    resumed = torch.load(
        next(tmp_path.rglob("*.ckpt")), weights_only=False
    )["optimizer_states"][0]  # fmt: skip
    twin = fastmp.optim.AdamW([p.detach().clone() for p in model.parameters()])
    twin.load_state_dict(resumed)
    assert int(twin.applied_steps) == int(optimizer.applied_steps)


def test_the_trainer_clips_too(model, points, tmp_path):
    """gradient_clip_val, by norm: on our 16-bit gradients, before our step."""
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=0.01)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return fastmp.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer

    trainer = lightning.Trainer(
        max_epochs=1, gradient_clip_val=0.25, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(points, 24))
    assert int(optimizer.applied_steps) == 10
    assert float(optimizer.grad_norm) <= 0.25 * 1.01


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
