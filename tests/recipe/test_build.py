"""From a recipe to model, optimizer, schedule and trainer."""

import copy

import pytest
import torch

import fastmp
from fastmp import data, recipe
from fastmp.distributed.rendezvous import World
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


@pytest.mark.parametrize(("name", "kind"), [("muon", "Muon"), ("lion", "Lion")])
def test_muon_and_lion_train(name, kind):
    settings = {"layer_decay": 0.5, "weight_decay": 0.125, "momentum": 0.9}
    trainer = build(TrainConfig(model="vit", optimizer=name, **settings), torch.bfloat16)
    optimizer = trainer.optimizer
    assert type(optimizer).__name__ == kind
    matrices = [g for g in optimizer.param_groups if g.get("rule") == "muon"]
    assert len({g["lr_scale"] for g in matrices}) == (5 if name == "muon" else 0)
    for group in matrices:
        assert (group["adjust_lr_fn"], group["weight_decay"]) == ("match_rms_adamw", 0.125)
        assert all(p.ndim >= 2 and p.shape[0] > 10 for p in group["params"])
    batch = torch.rand(16, 1, 8, 8).bfloat16(), torch.arange(16) % 10
    before = optimizer.masters()
    for _ in range(2):
        trainer.train_step([batch])
    assert optimizer.applied_steps == 2
    assert not any(map(torch.equal, before, optimizer.masters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_muon_with_every_setting_of_an_optimizer_resumes_to_the_bit(dtype, state_dtype):
    config = TrainConfig(
        model="mlp", optimizer="muon", schedule="cyclic", warmup=0.0, layer_decay=0.5, ema=0.75,
        accumulate=2, unfreeze_every=1, max_grad_norm=0.5, state_dtype=state_dtype,
        master="split" if dtype == torch.float16 else "auto",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [(torch.rand(16, 1, 8, 8, generator=generator), torch.arange(16) % 10) for _ in range(4)]
    whole, resumed = build(config, dtype), build(config, dtype)
    found = whole.fit(data, data, 1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    last = [trainer.fit(data, data, 4)[-1].val_loss for trainer in (whole, resumed)]
    assert last[0] == last[1] < found[0].val_loss
    saved = [trainer.state_dict() for trainer in (whole, resumed)]
    states = [[state["model"], state["optimizer"]["state"], state["ema"]] for state in saved]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert whole.optimizer.applied_steps == 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "lion"])
def test_the_default_rates_learn_the_digits(name):
    digits = data.load("digits")
    trainer = build(TrainConfig(optimizer=name, epochs=8))
    train, test = recipe.loaders(TrainConfig().resolved(), digits, torch.device("cpu"), World())
    assert trainer.fit(train, test, 4)[-1].val_accuracy > 0.96


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
