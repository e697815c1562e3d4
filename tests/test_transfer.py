"""Transfer learning: loaded weights, new heads, frozen layers, layer-wise rates."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import fastmp
import fastmp.optim
from fastmp import amp, checkpoint, models, transfer
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import Constant
from fastmp.training.trainer import Trainer
from fastmp.transfer import GradualUnfreezing, TransferError, layerwise_lr, load_pretrained


def net(classes=3, seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 8)]
    layers += [torch.nn.BatchNorm1d(8)] if norm else []
    layers += [torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, classes))


def written(kind, model, path):
    """The weights of ``model`` as a source of this kind."""
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, path / "w.safetensors")
        return path / "w.safetensors"
    if kind == "checkpoint":
        checkpoint.save(path / "c", {"model": state, "progress": {"step": 3}})
        return path / "c"
    if kind == "module":
        return model
    if kind == "mapping":
        return {f"module.{name}": value for name, value in state.items()}  # of DDP
    content = {"torch": state, "nested": {"state_dict": state, "epoch": 4}}[kind]
    torch.save(content, path / "w.pt")
    return str(path / "w.pt")


@pytest.mark.parametrize(
    "kind", ["safetensors", "checkpoint", "module", "mapping", "torch", "nested"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_source(tmp_path, kind, dtype):
    source, model = net(seed=1), net(seed=2).to(dtype)
    report = load_pretrained(model, written(kind, source, tmp_path))
    assert len(report.loaded) == 6
    assert str(report) == "6 loaded"
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, source.state_dict()[name].to(dtype))


def test_the_report_names_entries_that_do_not_fit():
    source = {"backbone." + n: v for n, v in net(classes=8, seed=1).state_dict().items()}
    source["backbone.extra"] = torch.zeros(1)
    del source["backbone.2.bias"]
    model = net(classes=2)
    head = model[4].weight.clone()
    report = load_pretrained(model, source, prefix="backbone.")
    assert report.loaded == ("0.weight", "0.bias", "2.weight")
    assert report.missing == ("2.bias",)
    assert report.unexpected == ("extra",)
    assert report.reshaped == {"4.weight": ((2, 8), (8, 8)), "4.bias": ((2,), (8,))}
    assert "1 missing (2.bias); 1 unexpected (extra); 2 of another shape (4.weight" in str(report)
    assert torch.equal(model[4].weight, head)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_bad_sources_change_nothing(tmp_path, capsys):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"0.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    other = torch.nn.Linear(2, 2)
    for source, message in [
        (tmp_path / "absent.pt", "does not exist"),
        (tmp_path / "evil.pt", r"cannot be read: expected \.safetensors or a state_dict"),
        (tmp_path / "cut.safetensors", "cannot be read"),
        (tmp_path, "cannot be read"),
        (other, "no entry of the source fits the model: the source has weight, bias"),
        ({"epoch": 3}, "got dict without tensors"),
    ]:
        with pytest.raises(TransferError, match=message):
            load_pretrained(model, source)
    with pytest.raises(TransferError, match="expected every entry to fit, got: 4 loaded; 2 of"):
        load_pretrained(model, net(classes=5), strict=True)
    assert "executed" not in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_new_head(dtype):
    model = amp.convert(net(classes=10), dtype)
    old = model[-1]
    new = transfer.replace_head(model, 2)
    assert model[-1] is new
    assert type(new) is type(old)
    assert (new.in_features, new.out_features, new.weight.dtype) == (8, 2, dtype)
    assert model(torch.zeros(3, 4, dtype=dtype)).shape == (3, 2)
    gated = torch.nn.Sequential(fastmp.nn.Linear(4, 8, activation="relu"))
    assert transfer.replace_head(gated, 2).activation == "relu"
    vit = models.build("vit", (1, 28, 28), 10)
    assert transfer.replace_head(vit, 4) is vit.head
    with pytest.raises(TransferError, match="linear layer 'last'; the model has: 0, 2, 4"):
        transfer.replace_head(net(), 2, name="last")
    with pytest.raises(TransferError, match="the model has: none"):
        transfer.replace_head(torch.nn.Sequential(torch.nn.ReLU()), 2)


def test_freezing_by_name_module_and_pattern():
    model = net(norm=True)
    assert transfer.freeze(model, "0", "1.weight", "*.bias") == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.bias", "5.bias",
    ]  # fmt: skip
    assert transfer.freeze(model, "0") == []
    assert transfer.unfreeze(model, "0.bias", "5") == ["0.bias", "5.bias"]
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["0.bias", "3.weight", "5.weight", "5.bias"]
    with pytest.raises(
        TransferError, match=r"no parameter matches 'blocks\.\*'; the model has 0, 1"
    ):
        transfer.freeze(model, "blocks.*")


def test_frozen_norms_keep_their_statistics():
    model = net(norm=True)
    transfer.freeze(model, "1")
    transfer.train_mode(model)
    before = model[1].running_mean.clone()
    model(torch.randn(8, 4) + 3)
    assert torch.equal(model[1].running_mean, before)
    transfer.unfreeze(model, "1")
    transfer.train_mode(model)
    model(torch.randn(8, 4) + 3)
    assert not torch.equal(model[1].running_mean, before)


def test_rates_decay_from_the_head_down_and_schedules_keep_the_ratio():
    model = net()
    groups = layerwise_lr(model, 0.1, 0.5, weight_decay=0.3)
    shown = {
        name: (group["lr"], group["weight_decay"])
        for group in groups
        for name, _ in group["params"]
    }
    assert shown == {
        "0.weight": (0.025, 0.3), "0.bias": (0.025, 0.0), "2.weight": (0.05, 0.3),
        "2.bias": (0.05, 0.0), "4.weight": (0.1, 0.3), "4.bias": (0.1, 0.0),
    }  # fmt: skip
    optimizer = fastmp.optim.SGD(layerwise_lr(model, 0.1, 0.5), lr=0.1)
    Constant(0.4).bind(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [
        float((b - p.detach()).mean()) for b, p in zip(before, model.parameters(), strict=True)
    ]
    assert moved == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4, 0.4], rel=1e-5)
    transfer.freeze(model, "*")
    with pytest.raises(TransferError, match="all of them frozen"):
        layerwise_lr(model, 0.1)
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], got 0"):
        layerwise_lr(model, 0.1, 0)


@pytest.mark.parametrize("name", ["mlp", "convnet", "vit"])
def test_layers_cover_every_parameter_once(name):
    model = models.build(name, (1, 28, 28), 10)
    found = transfer.layers(model)
    params = [p for _, named in found for _, p in named]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    names = dict(model.named_parameters())
    assert all(names[n] is p for _, named in found for n, p in named)
    assert len(found) > 2


def test_shared_parameters_belong_to_the_last_layer_that_has_them():
    """A tied head trains first, with the head's rate."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5, bias=False)
    )
    model[2].weight = model[0].weight
    shown = [[name for name, _ in named] for _, named in transfer.layers(model)]
    assert shown == [["1.weight", "1.bias"], ["0.weight"]]
    rates = {n: g["lr"] for g in layerwise_lr(model, 0.1, 0.5) for n, _ in g["params"]}
    assert rates == {"1.weight": 0.05, "1.bias": 0.05, "0.weight": 0.1}
    fastmp.optim.AdamW(layerwise_lr(model, 0.1, 0.5), lr=0.1)
    GradualUnfreezing().plan(model, 0)
    assert [p.requires_grad for p in model.parameters()] == [True, False, False]


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_layers_are_unfrozen_one_by_one(name):
    model = net()
    groups = layerwise_lr(model, 0.01, 0.5)
    if name == "Muon":
        groups = fastmp.optim.muon_groups(model, groups=groups)
    optimizer = getattr(fastmp.optim, name)(groups, lr=0.01)
    trainer = Trainer(
        model,
        optimizer,
        CrossEntropyLoss(),
        unfreeze=GradualUnfreezing(every=2),
        progress=False,
    )
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(2)]
    moved = []
    for _ in range(6):
        before = [layer.weight.detach().clone() for layer in (model[0], model[2], model[4])]
        trainer.fit(data, data, 1)
        after = [layer.weight for layer in (model[0], model[2], model[4])]
        moved.append([not torch.equal(a, b) for a, b in zip(after, before, strict=True)])
    assert moved == 2 * [[False, False, True]] + 2 * [[False, True, True]] + 2 * [[True] * 3]
    with pytest.raises(ValueError, match="every must be at least 1 epoch, got 0"):
        GradualUnfreezing(every=0)
