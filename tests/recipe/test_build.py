"""From a recipe to model, optimizer, schedule and trainer."""

import pytest
import torch

import fastmp
from fastmp import data, recipe
from fastmp.recipe import TrainConfig
from fastmp.schedule import Constant, OneCycle, Warmup


def build(config, dtype=torch.float32):
    digits = data.load("digits")
    config = config.resolved()
    model = recipe.build_model(config, digits)
    return recipe.build_trainer(
        config, digits, model, dtype, torch.device("cpu"), total_steps=100, progress=False
    )


@pytest.mark.parametrize(("name", "layers"), [("mlp", 3), ("vit", 17)])
def test_the_trained_model_has_fused_layers(name, layers):
    trainer = build(TrainConfig(model=name), torch.bfloat16)
    kinds = [type(m) for m in trainer.model.modules()]
    assert kinds.count(fastmp.nn.Linear) == layers
    assert {fastmp.nn.ReLU, fastmp.nn.GELU} & set(kinds)


def test_every_setting_is_used():
    trainer = build(
        TrainConfig(
            optimizer="adam",
            lr=0.5,
            momentum=0.7,
            peak_momentum=0.6,
            beta2=0.9,
            weight_decay=0.125,
            max_grad_norm=3.0,
            mixup=0.3,
            cutmix=0.4,
            label_smoothing=0.25,
            warmup=0.5,
            accumulate=2,
        )
    )
    decayed, plain = trainer.optimizer.param_groups
    assert type(trainer.optimizer).__name__ == "Adam"
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.125, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert decayed["betas"] == (0.7, 0.9)
    assert trainer.optimizer.max_grad_norm == 3.0
    assert trainer.schedule == OneCycle(0.5, 100, 0.5, base_momentum=0.6, max_momentum=0.7)
    assert (trainer.mixup.alpha, trainer.mixup.cutmix_alpha) == (0.3, 0.4)
    assert trainer.criterion.label_smoothing == 0.25
    assert trainer.accumulate == 2
    assert not trainer.scaler.is_enabled()

    trainer = build(
        TrainConfig(
            optimizer="sgd",
            schedule="constant",
            max_grad_norm=float("inf"),
            loss_scale=8.0,
            scale_growth_interval=5,
        ),
        torch.float16,
    )
    assert trainer.optimizer.param_groups[0]["nesterov"]
    assert trainer.optimizer.max_grad_norm is None
    assert trainer.schedule == Warmup(Constant(0.1 * 64 / 256, 0.95), 25)
    assert trainer.scaler.get_scale() == 8.0
    assert trainer.scaler.get_growth_interval() == 5
    assert next(trainer.model.parameters()).dtype == torch.float16
