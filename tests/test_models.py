"""Built-in models by name, and models by package.module:factory."""

from __future__ import annotations

import sys

import pytest
import torch

from fastmp import models
from fastmp.models import ModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 17, 5), (1, 1, 1)])
@pytest.mark.parametrize("name", models.MODELS)
def test_logits_and_gradients_of_every_shape(name, shape, dtype):
    model = models.build(name, shape, 7).to(dtype)
    logits = model(torch.randn(3, *shape).to(dtype))
    assert logits.shape == (3, 7)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", models.MODELS)
def test_samples_are_independent_in_evaluation(name):
    torch.manual_seed(0)
    model = models.build(name, (1, 8, 8), 10).eval()
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_follow_the_seed(name):
    def weights(seed):
        torch.manual_seed(seed)
        model = models.build(name, (1, 8, 8), 10)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_mlp_widths():
    assert models.mlp((1, 28, 28), 10)[1].weight.shape == (2048, 784)
    assert models.mlp((1, 8, 8), 10)[3].weight.shape == (256, 256)


def test_convnet_filters_are_channels_last():
    filters = models.convnet((1, 28, 28), 10)[4].weight
    assert filters.is_contiguous(memory_format=torch.channels_last)
    assert not filters.is_contiguous()


def test_vit_depends_on_positions():
    torch.manual_seed(0)
    model = models.vit((1, 8, 8), 10).eval()
    x = torch.randn(1, 1, 8, 8)
    moved = torch.roll(x, 2, dims=3)  # the same patches at other positions
    assert not torch.allclose(model(x), model(moved), atol=1e-4)


OWN_MODEL = """
import torch
def small(in_shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes))
def narrow(in_shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes - 1))
def nothing(in_shape, classes):
    return None
number = 3
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models_for_test.py").write_text(OWN_MODEL)
    (tmp_path / "needs_absent_module.py").write_text("import absent_module_for_test")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_models_for_test", None)


@pytest.mark.usefixtures("own_models")
def test_a_factory_in_the_current_folder_is_found():
    path = list(sys.path)
    model = models.build("own_models_for_test:small", (1, 8, 8), 4)
    assert model.training
    assert model[1].weight.shape == (4, 64)  # the lazy layer has its weights
    assert sys.path == path


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "unknown model 'resnet'; expected mlp, convnet, vit"),
        (":f", "unknown model ':f'"),
        ("m:", "unknown model 'm:'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("needs_absent_module:f", "there is no module 'absent_module_for_test'"),
        ("own_models_for_test:large", "expected 'large' .* found no such attribute"),
        ("own_models_for_test:number", "expected 'number' .* found an object of type int"),
        ("os:system", r"expected 'system' .* takes other arguments \(too many positional"),
        ("own_models_for_test:narrow", r"to logits \(N, 10\); for N = 2 it returned \(2, 9\)"),
        ("own_models_for_test:nothing", "must return a torch.nn.Module, got NoneType"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ModelError, match=message):
        models.build(name, (1, 8, 8), 10)
