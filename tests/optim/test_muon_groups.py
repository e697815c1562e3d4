"""Muon's groups: a model sorted into them, options and parameters that are refused."""

import pytest
import torch
from torch import nn

from fastmp import optim
from fastmp.transfer import layerwise_lr
from tests.optim.optim_cases import parameters

# ---- a model's parameters ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.patch = nn.Conv2d(3, 8, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 11)


def test_muon_groups_sort_a_model():
    muon, matrices, vectors = optim.muon_groups(Net(), adamw={"lr": 3e-4})
    names = [[name for name, _ in group["params"]] for group in (muon, matrices)]
    layers = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert names[0] == ["patch.weight", *layers]
    assert names[1] == ["pos_embed", "tokens.weight", "depthwise.weight", "last.weight"]
    assert all(p.ndim == 1 for _, p in vectors["params"])
    assert (vectors["weight_decay"], vectors["lr"], vectors["rule"]) == (0.0, 3e-4, "adamw")
    optimizer = optim.Muon([muon, matrices, vectors], lr=0.02)
    assert [g.get("lr_scale") for g in optimizer.param_groups] == [None, *[3e-4 / 0.02] * 2]
    tied = Net()
    tied.last.weight = tied.tokens.weight
    assert [n for n, _ in optim.muon_groups(tied)[0]["params"]] == names[0]
    excluded = optim.muon_groups(Net(), exclude=["attention.*"])[0]
    assert [name for name, _ in excluded["params"]] == ["patch.weight"]
    with pytest.raises(ValueError, match="no trainable parameter's name fits 'nothing"):
        optim.muon_groups(Net(), exclude=["nothing*"])


def test_a_wrapped_model_is_sorted_as_the_model():
    model = Net()
    model.head, model.after = nn.Linear(8, 11), nn.Linear(8, 8)  # the head is known by its name
    expected = optim.muon_groups(model, groups=layerwise_lr(model, 0.1, 0.5))
    assert "head.weight" in [n for g in expected if g["rule"] == "adamw" for n, _ in g["params"]]
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        torch.compile(nn.DataParallel(model)),
    ):
        for of in (model, wrapped):
            found = optim.muon_groups(wrapped, groups=layerwise_lr(of, 0.1, 0.5))
            for group, other in zip(found, expected, strict=True):
                assert (group["rule"], group["lr"]) == (other["rule"], other["lr"])
                pairs = zip(group["params"], other["params"], strict=True)
                assert all(p is q for (_, p), (_, q) in pairs)
    with pytest.raises(ValueError, match=r"the model has no trainable parameter 'tokens\.weight'"):
        optim.muon_groups(nn.Linear(2, 2), groups=layerwise_lr(model, 0.1))


def test_groups_of_layerwise_lr_keep_their_rates():
    groups = layerwise_lr(Net(), 0.1, 0.5, weight_decay=0.3)
    made = optim.muon_groups(Net(), groups=groups)
    count = sum(len(group["params"]) for group in groups)
    assert sum(len(group["params"]) for group in made) == count
    for group in made:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
        assert all(group["rule"] == "adamw" or p.ndim >= 2 for _, p in group["params"])
    optim.Muon(made, lr=0.1)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"momentum": 1.0}, "momentum should be >= 0 and below 1"),
        ({"weight_decay": -1.0}, "weight decay should be >= 0"),
        ({"adjust_lr_fn": "x"}, "Adjust learning rate function x is not supported"),
        ({"ns_steps": 0}, r"ns_steps: expected a whole number in \[1, 100\), got 0"),
        ({"ns_steps": 100}, "ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients: expected three numbers"),
        ({"ns_coefficients": (1.0, 2.0, float("nan"))}, "ns_coefficients"),
        ({"eps": -1e-7}, "eps should be >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Muon(parameters(shapes=[(3, 4)]), **options)


def test_bad_parameters_are_named_and_leave_no_group():
    matrix, vector = parameters(shapes=[(3, 4), (5,)])
    optimizer = optim.Muon([("m", matrix)])
    for group, message in (
        ({"params": [("v", vector)]}, r"got v of shape \(5,\).*muon_groups"),
        ({"params": [("v", vector)], "rule": "lamb"}, 'expected "muon" or "adamw", got \'lamb\''),
        ({"params": [("v", vector)], "rule": "adamw", "betas": (2.0, 0.9)}, "Invalid beta"),
        (
            {"params": [("v", vector)], "rule": "adamw", "weight_decay": -1.0},
            "Invalid weight_decay",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    odd = torch.randn(3, 4, 5).permute(1, 0, 2).requires_grad_()
    with pytest.raises(ValueError, match=r"call \.contiguous"):
        optim.Muon([odd.detach().requires_grad_()])
