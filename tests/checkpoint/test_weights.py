"""The weights that a run leaves: fp32, of the masters or of the averages."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastmp
from fastmp import amp, optim
from fastmp.checkpoint import weights
from fastmp.nn import CrossEntropyLoss
from fastmp.training.trainer import Trainer
from fastmp.transfer import load_pretrained

BATCHES = [(torch.rand(8, 6), torch.arange(8) % 3) for _ in range(3)]


def tied():
    """Two layers with one weight, and a norm with statistics."""
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
    )
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_leaves_the_validated_weights_in_fp32(tmp_path, dtype, ema):
    model = amp.convert(tied(), dtype, fuse=False)
    scaler = fastmp.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    # parameters without names, in an order of their own
    params = list(reversed(list(model.parameters())))
    optimizer = optim.AdamW(params, lr=0.01)
    batches = [(x.to(dtype), y) for x, y in BATCHES]
    trainer = Trainer(
        model, optimizer, CrossEntropyLoss(), scaler=scaler, ema=ema, folder=tmp_path,
        progress=False,
    )  # fmt: skip
    trainer.fit(batches, batches, 2)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert {w.dtype for n, w in weights.items() if n != "1.num_batches_tracked"} == {torch.float32}
    masters = dict(zip(params, optimizer.masters(), strict=True))
    averages = trainer.ema.state_dict() if ema else {}
    for name, param in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weights[name], averages.get(name, masters[param])), name
        if not ema:
            assert torch.equal(
                weights[name].to(dtype if param.dtype == dtype else param.dtype), param
            )
    if dtype != torch.float32 and not ema:
        assert not torch.equal(weights["3.weight"], model[3].weight.float())  # more bits
    fresh = tied()
    for source in (tmp_path, tmp_path / "checkpoints", trainer.checkpoints.newest(),
                   trainer.checkpoints.newest() / "manifest.json",
                   next(trainer.checkpoints.newest().glob("tensors-*"))):  # fmt: skip
        again = copy.deepcopy(fresh)
        assert len(load_pretrained(again, source, strict=True).loaded) == len(weights)
        best = source in (tmp_path, tmp_path / "checkpoints")
        if not best:
            assert all(torch.equal(v, weights[n]) for n, v in again.state_dict().items())
    assert not best


def test_equal_weights_are_equal_files(tmp_path):
    """safetensors writes the metadata in a new order every time."""
    kept = {"b": torch.arange(6.0).view(2, 3), "ä": torch.ones(1, dtype=torch.int64)}
    about = {"step": "3", "epoch": "1", "name": "ß"}
    written = set()
    for _ in range(20):
        weights.write(tmp_path / "x.safetensors", kept, about)
        written.add((tmp_path / "x.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **about}
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
