"""Activations that a forward, a hook or a module further up needs stay where they are."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmp
from fastmp.amp.fusion import fuse_linear
from tests.amp.fusion_cases import Block, assert_unchanged, chain, fused

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


class WithAnOption(Block):
    """No value speaks against it, but one graph does not show both ways to call it."""

    def forward(self, x, bias=None):
        y = self.out(self.act(self.fc(x)))
        return y if bias is None else y + bias


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
    WithAnOption, Variadic, ByChance, ByTorchsChance, ByKind, Remembers,
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


class WalksAfterAQuestion(Outer):
    def forward(self, x):
        *_, layers = [m for m in self.modules() if len(list(m.children())) > 1]
        x = x if x.sum() > 0 else -x
        return next(layers.children())(x).sum() + self.net(x)


class Loops(Outer):
    def __init__(self, net):
        super().__init__(nn.ModuleList([net]))

    def forward(self, x, mask=None):
        for layer in self.net:
            x = layer(x)
        return x


class LoopsAndReaches(Loops):
    def forward(self, x, mask=None):
        for layer in self.net:
            x = layer.fc(x)
        return x


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
        (WalksAfterAQuestion, Block, {}),
        (WalksAfterAQuestion, chain, {}),
        (Loops, Block, {"net.0.fc": "gelu"}),
        (Loops, chain, {}),
        (LoopsAndReaches, Block, {}),
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
