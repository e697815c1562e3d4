"""Activations move into their linear layers, and only where no value can change."""

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
from fastmp.fusion import fuse_linear

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


def fused(model):
    """The activations that moved, by the name of their layer."""
    return {
        name: module.activation
        for name, module in model.named_modules()
        if isinstance(module, fastmp.nn.Linear) and module.activation != "none"
    }


class Block(nn.Module):
    """fc, act and out, for the tests to call in their ways."""

    def __init__(self, act=None):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = act or nn.GELU()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


def chain(act=None):
    return nn.Sequential(nn.Linear(4, 4), act or nn.GELU(), nn.Linear(4, 3))


def results(model, x):
    """The output and all gradients, in training mode."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    grads = torch.autograd.grad(y.square().mean(), [x, *model.parameters()])
    return [y.detach(), *grads]


def assert_unchanged(model, x, change=fuse_linear):
    """Fused and unfused, the model gives the same values, in both modes."""
    before = copy.deepcopy(model)
    assert change(model) is model
    torch.testing.assert_close(results(model, x), results(before, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(x), before.eval()(x), rtol=1e-5, atol=1e-5)


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


class Optional(Block):
    def forward(self, x, bias=None):
        y = self.out(self.act(self.fc(x)))
        return y if bias is None else y + bias


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


@pytest.mark.parametrize("kind", [Optional, Masked, WithoutNorm, Helped])
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


# ---- activations that must stay ----

HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["fc", "act"])
def test_hooks_see_what_they_saw(hook, name):
    model, seen = Block(), []
    getattr(model.get_submodule(name), hook)(lambda *args: seen.append(args))
    assert fused(fuse_linear(model)) == {}
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(seen) == 1
    assert isinstance(model.fc, fastmp.nn.Linear)


def test_an_activation_with_a_forward_of_its_own():
    model = chain()
    model[1].forward = lambda x: x + 1
    assert fused(fuse_linear(model)) == {}


@pytest.mark.parametrize("act", [nn.Tanh(), nn.LeakyReLU(), type("Mine", (nn.ReLU,), {})()])
def test_other_activations(act):
    assert fused(fuse_linear(chain(act))) == {}


def test_a_shared_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.GELU(), shared)
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {}
    assert model[0] is model[2]
    pair = nn.Sequential(nn.Sequential(shared, nn.GELU()), nn.Sequential(shared, nn.GELU()))
    assert fused(fuse_linear(pair)) == {}


class Tapped(Block):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h)) + h.sum()


class Added(Block):
    def forward(self, x):
        return self.out(self.act(self.fc(x) + 1))


class Twofold(Block):
    """The activation follows something else as well."""

    def forward(self, x):
        return self.act(F.normalize(self.out(self.act(self.fc(x)))))


class Bare(Block):
    """The layer is also called without the activation."""

    def forward(self, x):
        return self.out(self.act(self.fc(x))) + self.fc(x).sum()


class TrainingOnly(Block):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) if self.training else h)


class EvaluationOnly(Block):
    def forward(self, x):
        h = self.fc(x)
        return self.out(h if self.training else self.act(h))


class TwoActivations(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.ReLU()

    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) if self.training else self.other(h))


class ByValue(Block):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) if h.sum() > 0 else h)


class IfGiven(Block):
    """Symbols are never None: only the call without the argument shows the other way."""

    def forward(self, x, gate=None):
        h = self.fc(x)
        return self.out(h if gate is None else self.act(h) * gate)


class IfOneOfTwo(Block):
    def forward(self, x, gate=None, *, bias=None):
        h = self.fc(x)
        return self.out(h if gate is None and bias is not None else self.act(h))


class ManyOptions(Block):
    def forward(self, x, a=None, b=None, c=None, d=None):
        return self.out(self.act(self.fc(x)))


class Variadic(Block):
    def forward(self, *args, **options):
        h = self.fc(args[0])
        return self.out(h if options.get("raw") is None else self.act(h))


class ByChance(Block):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.act(h) if self.draw() < 2 else h)

    def draw(self):
        return random.random()


class ByTorchsChance(ByChance):
    def draw(self):
        return torch.rand(()).item()


class ByKind(Block):
    """Not only calls its activation, but asks what it is."""

    def forward(self, x):
        h = self.act(self.fc(x))
        return self.out(h * 2 if isinstance(self.act, nn.GELU) else h)


class Remembers(Block):
    def forward(self, x):
        self.raw = self.fc(x)
        return self.out(self.act(self.raw))


class RemembersInAList(Block):
    def __init__(self):
        super().__init__()
        self.raw = []

    def forward(self, x):
        self.raw.append(self.fc(x))
        return self.out(self.act(self.raw[-1]))

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin


class WithoutGradient(Block):
    def forward(self, x):
        h = self.fc(x)
        with torch.no_grad():
            y = self.act(h)
        return self.out(y) + self.fc.weight.sum() + self.fc.bias.sum() + x.sum()


class Unnamed(nn.Module):
    """Only one of its graphs can be had, and its source names no layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.out = Block().children()

    def forward(self, x):
        fc, act, out = self.children()
        h = fc(x)
        return out(act(h) if self.training or h.sum() < 0 else h)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * 2


class AcrossLevels(Block):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        y = self.out(self.act(self.inner.fc(x)))
        return y + self.inner(x).sum() + self.fc(x).sum()


class Unused(Block):
    def forward(self, x):
        self.fc(x)
        return self.out(self.act(x))


STAYING = [
    Tapped, Added, Twofold, Bare, TrainingOnly, EvaluationOnly, TwoActivations, ByValue, IfGiven,
    IfOneOfTwo, ManyOptions, Variadic, ByChance, ByTorchsChance, ByKind, Remembers,
    RemembersInAList, WithoutGradient, Unnamed, AcrossLevels,
]  # fmt: skip


@pytest.mark.parametrize("kind", STAYING)
def test_a_forward_that_needs_its_activation(kind):
    model = kind()
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {}
    assert isinstance(model.act, nn.GELU)
    assert type(model.fc) is fastmp.nn.Linear


def test_a_layer_that_is_called_for_nothing():
    assert fused(fuse_linear(Unused())) == {}


def test_a_forward_put_on_the_module():
    model = Block()
    model.forward = lambda x: model.fc(x)
    assert fused(fuse_linear(model)) == {}
    steps = chain()
    steps.forward = lambda x: steps[0](x)
    assert fused(fuse_linear(steps)) == {}


def test_a_sequential_in_another_order():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    model = Backwards(nn.Linear(4, 4), nn.GELU())
    assert_unchanged(model, torch.randn(5, 4))
    assert fused(model) == {}


def test_a_sequential_that_stops_early():
    class Stops(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else self[0](x)

    model = Stops(nn.Linear(4, 4), nn.GELU())
    assert fused(fuse_linear(model)) == {}


# ---- modules further up ----


class Outer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Calls(Outer):
    def forward(self, x):
        return self.net(x)


class CallsAfterAQuestion(Outer):
    def forward(self, x):
        return self.net(x if x.sum() > 0 else -x)


class Collects(Outer):
    def forward(self, x):
        steps = []
        for layer in self.net:
            x = layer(x)
            steps.append(x)
        return sum(step.sum() for step in steps)


class CollectsAfterAQuestion(Outer):
    def forward(self, x):
        x = x if x.sum() > 0 else -x
        return self.net[0](x).sum() + self.net(x)


class Inherits(CollectsAfterAQuestion):
    pass


class Slices(Outer):
    def forward(self, x):
        return self.net[:1](x)


class ByName(Outer):
    def forward(self, x):
        x = x if x.sum() > 0 else -x
        return self.get_submodule("net.0")(x).sum() + self.net(x)


class Reaches(Outer):
    def forward(self, x):
        return self.net.fc(x).sum() + self.net(x)


class ReachesAfterAQuestion(Outer):
    def forward(self, x):
        x = x if x.sum() > 0 else -x
        return self.net.fc(x).sum() + self.net(x)


@pytest.mark.parametrize(
    ("kind", "net", "expected"),
    [
        (Calls, chain, {"net.0": "gelu"}),
        (Calls, Block, {"net.fc": "gelu"}),
        (CallsAfterAQuestion, chain, {"net.0": "gelu"}),
        (CallsAfterAQuestion, Block, {"net.fc": "gelu"}),
        (Collects, chain, {}),
        (CollectsAfterAQuestion, chain, {}),
        (Inherits, chain, {}),
        (Slices, chain, {}),
        (ByName, chain, {}),
        (Reaches, Block, {}),
        (ReachesAfterAQuestion, Block, {}),
    ],
)
def test_a_module_further_up(kind, net, expected):
    model = kind(net())
    x = torch.randn(5, 4)
    before = copy.deepcopy(model)
    assert fused(fuse_linear(model)) == expected
    torch.testing.assert_close(model(x), before(x))
    nested = fuse_linear(nn.Sequential(nn.Sequential(kind(net()))))
    assert list(fused(nested).values()) == list(expected.values())


def test_code_that_cannot_be_read():
    scope = {"nn": nn, "Outer": Outer}
    exec(
        "class Hidden(Outer):\n"
        "    def forward(self, x):\n"
        "        x = x if x.sum() > 0 else -x\n"
        "        return self.net[0](x).sum() + self.net(x)",
        scope,
    )
    assert fused(fuse_linear(scope["Hidden"](chain()))) == {}


def test_a_patched_module_further_up():
    model = Calls(chain())
    model.forward = lambda x: model.net[0](x)
    assert fused(fuse_linear(model)) == {}


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
