"""Checkpoints of commit dc3cc1d, before modules moved into packages, load and go on as they did.

``before/runs.tar.xz`` holds two runs of ``fastmp train --model tiny_net:net``, cut off in their
first epoch, with the log of the whole run, and the states of three optimizers.
"""

from __future__ import annotations

import math
import re
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no recipe to read")

import fastmp.optim
from fastmp import checkpoint, recipe
from fastmp.distributed.rendezvous import World
from fastmp.training import log

BEFORE = Path(__file__).parent / "before"
EXACT = ("epoch", "lr", "scale", "skipped")
ROUNDED = ("loss", "grad_norm", "train_loss", "val_loss", "val_accuracy")


@pytest.fixture
def before(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BEFORE)
    with tarfile.open(BEFORE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def resumed(folder):
    """The trainer that goes on with the run in ``folder``, and its loaders."""
    config = recipe.read_toml(folder / "config.toml").resolved()
    dataset = recipe.load_data(config)
    device = torch.device("cpu")
    loaders = recipe.loaders(config, dataset, device, World())
    trainer = recipe.build_trainer(
        config,
        dataset,
        recipe.build_model(config, dataset),
        recipe.DTYPES[config.dtype],
        device,
        total_steps=config.epochs * math.ceil(len(loaders[0]) / config.accumulate),
        folder=folder,
        progress=False,
    )
    assert trainer.resume_newest()
    return trainer, loaders


def leaves(value, path=""):
    """Every leaf of a state, by the path that leads to it."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in leaves(value[key], f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        parts = enumerate(value)
        return {k: v for i, part in parts for k, v in leaves(part, f"{path}.{i}").items()}
    return {path: value}


def assert_same(state, expected):
    state, expected = leaves(state), leaves(expected)
    newer = re.compile(r"\.remainders\.|^\.schedule\.|^\.param_index\.|^\.batches_an_epoch$")
    state = {k: v for k, v in state.items() if not newer.search(k)}
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert state[name].dtype == value.dtype, name
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_run_is_loaded_to_the_bit_and_goes_on(before, name):
    """To the bit also in losses on the CPU that wrote it; others round sums in another order."""
    folder = before / name
    expected = [log.read(folder / log.FILE, kind) for kind in ("step", "epoch")]
    trainer, (train, test) = resumed(folder)
    saved = checkpoint.load(folder / "checkpoints" / "step-000000004")
    del saved["checkpoint"]
    assert_same(trainer.state_dict(), saved)
    trainer.fit(train, test, 2)
    found = [log.read(folder / log.FILE, kind) for kind in ("step", "epoch")]
    for rows, wanted in zip(found, expected, strict=True):
        assert [row["step"] for row in rows] == [row["step"] for row in wanted]
        for row, want in zip(rows, wanted, strict=True):
            assert [row.get(k) for k in EXACT] == [want.get(k) for k in EXACT]
            assert [row.get(k) or 0 for k in ROUNDED] == pytest.approx(
                [want.get(k) or 0 for k in ROUNDED], rel=1e-3
            )


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("AdamW", torch.bfloat16, {"amsgrad": True}),
        ("SGD", torch.float32, {"momentum": 0.9, "nesterov": True}),
        ("Lion", torch.float16, {}),
    ],
)
def test_an_optimizer_is_loaded_to_the_bit_and_goes_on(before, name, dtype, options):
    saved = checkpoint.load(before / "optimizers")[name]
    params = [torch.nn.Parameter(weight) for weight in saved["weights"]]
    named = list(zip(("first", "second"), params, strict=True))
    optimizer = getattr(fastmp.optim, name)(named, max_grad_norm=1.0, **options)
    optimizer.load_state_dict(saved["state"])
    assert_same(optimizer.state_dict(), saved["state"])
    assert (int(optimizer.applied_steps), int(optimizer.skipped_steps)) == (3, 1)
    for param, grad in zip(params, saved["grads"], strict=True):
        assert param.dtype == dtype
        param.grad = grad
    optimizer.step()
    for master, wanted in zip(optimizer.masters(), saved["masters_after"], strict=True):
        torch.testing.assert_close(master, wanted, rtol=1e-6, atol=1e-7)
