"""Activations move into their linear layers, and no value changes."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import fastmp
from fastmp import models
from fastmp.amp.fusion import fuse_linear
from tests.amp.fusion_cases import Block, assert_unchanged, chain, fused

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


# ---- what is fused ----


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("make", [chain, Block])
def test_values_and_gradients_stay(name, make):
    model = make(ACTIVATIONS[name])
    assert_unchanged(model, torch.randn(5, 4))
    assert list(fused(model).values()) == [name]
    assert not any(isinstance(m, type(ACTIVATIONS[name])) for m in model.modules())


@pytest.mark.parametrize(("name", "count"), [("mlp", 2), ("vit", 4), ("convnet", 0)])
def test_our_own_models(name, count):
    model = models.build(name, (1, 8, 8), 10)
    keys, params = list(model.state_dict()), list(model.parameters())
    assert_unchanged(model, torch.randn(3, 1, 8, 8))
    assert len(fused(model)) == count
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(type(m) is fastmp.nn.Linear for m in linears)
    left = sum(isinstance(m, (nn.ReLU, nn.GELU)) for m in model.modules())
    assert left == (4 if name == "convnet" else 0)  # those after its batch norms
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [chain, Block])
def test_checkpoints_travel_in_either_direction(make):
    torch.manual_seed(1)
    plain, other = make(), fuse_linear(make())
    x = torch.randn(5, 4)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(x), plain(x))
    trained = fuse_linear(make())
    plain.load_state_dict(trained.state_dict())
    torch.testing.assert_close(plain(x), trained(x))


def test_convert_fuses_unless_told_not_to():
    model = fastmp.convert(chain(), torch.bfloat16)
    assert fused(model) == {"0": "gelu"}
    assert model(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    kept = fastmp.convert(Block(), torch.bfloat16, fuse=False)
    assert [type(m) for m in kept.children()] == [nn.Linear, nn.GELU, nn.Linear]


def test_a_linear_layer_alone():
    model = nn.Linear(4, 3)
    assert fastmp.convert(model, torch.float32) is model
    assert type(model) is fastmp.nn.Linear
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_twice_is_once():
    model = fuse_linear(nn.Sequential(chain(), Block(), nn.ReLU()))
    before = repr(model), [id(m) for m in model.modules()]
    fuse_linear(model)
    assert (repr(model), [id(m) for m in model.modules()]) == before
    model = fuse_linear(nn.Sequential(fuse_linear(chain())[0], nn.ReLU()))
    assert isinstance(model[1], nn.ReLU)  # the layer has its activation already


def test_our_own_layer_takes_an_activation_too():
    model = nn.Sequential(fastmp.nn.Linear(4, 4), nn.SiLU())
    assert_unchanged(model, torch.randn(3, 4))
    assert fused(model) == {"0": "silu"}


@pytest.mark.parametrize("make", [chain, Block])
def test_copies_and_pickles(make):
    model, x = fuse_linear(make()), torch.randn(3, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert fused(twin) == fused(model) != {}
        assert torch.equal(twin(x), model(x))


def test_modes_stay():
    model = chain().eval()
    assert not any(m.training for m in fuse_linear(model).modules())


def test_an_activation_shared_by_many():
    act = nn.GELU()
    model = nn.Sequential(Block(act), nn.LayerNorm(3), act, nn.Linear(3, 4), act, Block(act))
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"0.fc": "gelu", "3": "gelu", "5.fc": "gelu"}
    assert model[2] is act


def test_an_activation_under_two_names():
    class Twice(Block):
        def __init__(self):
            super().__init__()
            self.again = self.act

        def forward(self, x):
            return self.again(F.normalize(self.out(self.act(self.fc(x)))))

    model = Twice()
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"fc": "gelu"}
    assert isinstance(model.again, nn.GELU)


def test_one_activation_after_two_layers():
    class Two(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.act(self.fc(x)) * self.act(self.other(x)))

    model = Two()
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"fc": "gelu", "other": "gelu"}
    half = Two()
    half.other.register_forward_hook(lambda *_: None)
    assert_unchanged(half, torch.randn(5, 4))
    assert fused(half) == {}


def test_a_block_used_twice():
    block = Block()
    model = nn.Sequential(block, nn.Linear(3, 4), block)
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"0.fc": "gelu"}


def test_a_list_of_layers_called_in_turn():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(chain())

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Listed()
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"layers.0": "gelu"}


class Masked(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(9, 3))

    def forward(self, x):
        return self.out(self.act(self.fc(x))) * self.mask[: x.shape[0]]


class WithoutNorm(Block):
    def __init__(self):
        super().__init__()
        self.register_module("norm", None)


class Helped(Block):
    def forward(self, x):
        h = self.first(x)
        return self.out(F.dropout(h, 0.0, self.training))

    def first(self, x):
        rows, _ = x.shape
        return self.act(self.fc(x.view(rows, 4)))


@pytest.mark.parametrize("kind", [Masked, WithoutNorm, Helped])
def test_forwards_that_do_more(kind):
    model = kind()
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {"fc": "gelu"}


# ---- layers left alone ----


def test_other_kinds_of_linear_layers():
    class Mine(nn.Linear):
        pass

    lazy, attention = nn.LazyLinear(4), nn.MultiheadAttention(4, 2)
    plain = orthogonal(nn.Linear(4, 4))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x + 1
    wave = nn.Linear(4, 4, dtype=torch.complex64)
    kept = [Mine(4, 4), lazy, plain, patched, attention.out_proj, wave]
    kinds = [type(m) for m in kept]
    for module in kept:
        model = fuse_linear(nn.Sequential(module, nn.ReLU()))
        assert isinstance(model[1], nn.ReLU)
    fuse_linear(attention)
    assert [type(m) for m in kept] == kinds
    assert nn.Sequential(patched)(torch.ones(4)).tolist() == [2.0] * 4
    wave(torch.ones(2, 4, dtype=torch.complex64))


def test_a_tensor_subclass_as_weight():
    class Special(torch.Tensor):
        pass

    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Special))
    assert type(fuse_linear(model)) is nn.Linear


def test_parametrized_later():
    model = fuse_linear(chain())
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    x = torch.randn(3, 4)
    torch.testing.assert_close(model[0](x), F.gelu(F.linear(x, model[0].weight, model[0].bias)))


def test_compiled_and_scripted_modules():
    compiled = torch.compile(chain(), backend="eager")
    scripted = torch.jit.script(chain())
    inner = [type(m) for m in compiled.modules()]
    model = fastmp.convert(nn.Sequential(compiled, nn.Linear(3, 4), scripted), torch.float32)
    assert [type(m) for m in compiled.modules()] == inner
    assert type(model[1]) is fastmp.nn.Linear
    assert model[2](torch.ones(2, 4)).shape == (2, 3)
    fastmp.convert(compiled, torch.float32)
    fastmp.convert(scripted, torch.float32)
    assert [type(m) for m in compiled.modules()] == inner


def test_a_compiled_or_scripted_part_of_a_block():
    for close in (lambda m: torch.compile(m, backend="eager"), torch.jit.script):
        model = Block()
        model.out = close(nn.Sequential(model.out))
        inside = list(map(id, model.out.modules()))
        assert fused(fuse_linear(model)) == {"fc": "gelu"}
        assert list(map(id, model.out.modules())) == inside
        assert model(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["relu", nn.GELU()])
def test_torchs_transformer_layers(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 8), nn.ReLU())
    assert_unchanged(model, torch.randn(2, 5, 8), lambda m: fastmp.convert(m, torch.float32))
    assert fused(model) == {"1": "relu"}
    with torch.no_grad():  # torch's own fast path
        assert model.eval()(torch.randn(2, 5, 8)).isfinite().all()
    assert type(model[0].layers[0].linear1) is fastmp.nn.Linear


# ---- running a forward leaves no trace ----


def test_nothing_lands_on_the_module():
    class Busy(Block):
        def __init__(self):
            super().__init__()
            self.calls, self.log, self.table = 0, [], {}
            self.plain = torch.zeros(2)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.log.append(x)
            self.table["x"] = x
            self.fc.seen = True
            self.plain.add_(1)
            self.steps.add_(1)
            for p in self.parameters():
                p.data.mul_(0)
            torch.rand(3), random.random()
            return self.out(self.act(self.fc(x)))

    model = nn.Sequential(Busy())
    before = copy.deepcopy(model.state_dict())
    chance = torch.get_rng_state(), random.getstate()
    fuse_linear(model)
    busy = model[0]
    assert (busy.calls, busy.log, busy.table, busy.plain.sum()) == (0, [], {}, 0)
    assert not hasattr(busy.fc, "seen")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert random.getstate() == chance[1]


def test_warnings_of_a_forward_wait_for_its_first_call(recwarn):
    class Warns(Block):
        def forward(self, x):
            import warnings

            warnings.warn("slow", UserWarning, stacklevel=1)
            return super().forward(x)

    assert fused(fuse_linear(Warns())) == {"fc": "gelu"}
    assert not [w for w in recwarn if "slow" in str(w.message)]
