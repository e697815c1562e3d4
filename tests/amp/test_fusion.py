"""Layers and activations of a converted model are one operation, and each alone is torch's."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import fastmp
from fastmp import models, transfer
from fastmp.amp.fusion import fuse_linear
from tests.amp.fusion_cases import Block, assert_unchanged, chain, fused, results

pytestmark = pytest.mark.usefixtures("every_size")

ACTIVATIONS = {
    "relu": nn.ReLU(), "relu inplace": nn.ReLU(inplace=True), "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(),
}  # fmt: skip
X = torch.linspace(-2, 2, 20).view(5, 4)


# ---- what is fused ----


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_a_sequential_they_are_one_operation(name):
    assert assert_unchanged(chain(ACTIVATIONS[name]), X) == [name.split()[0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_elsewhere_they_share_a_pass(name):
    # For relu torch's pass takes less than a call, and in place there is no other way.
    expected = [] if name.startswith("relu") else [f"after {name}"]
    assert assert_unchanged(Block(ACTIVATIONS[name]), X) == expected


@pytest.mark.parametrize(("name", "expected"), [("mlp", ["relu"] * 2), ("vit", ["after gelu"] * 4)])
def test_our_own_models(name, expected):
    model = models.build(name, (1, 8, 8), 10)
    keys, parts = list(model.state_dict()), list(model.modules())
    params = list(model.parameters())
    assert assert_unchanged(model, torch.randn(3, 1, 8, 8)) == expected
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert all(m is n for m, n in zip(parts, model.modules(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [chain, Block])
def test_16_bit_gradients_are_within_torchs_error(make, dtype):
    torch.manual_seed(0)
    plain = make().to(dtype)
    model, x = fastmp.convert(copy.deepcopy(plain), dtype), torch.randn(50, 4).to(dtype)
    exact = results(copy.deepcopy(plain).double(), x.double())
    for ours, theirs, truth in zip(results(model, x), results(plain, x), exact, strict=True):
        tiny = 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 3 * (theirs - truth).abs().max() + tiny


@pytest.mark.parametrize("make", [chain, Block])
def test_there_and_back(make):
    plain = make()
    model = fastmp.convert(copy.deepcopy(plain), torch.bfloat16)
    for _ in range(2):
        fastmp.convert(model, torch.float16)
    fastmp.convert(model, torch.float32, fuse=False)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    mine = fastmp.nn.Linear(4, 4, activation="gelu")  # with torch's class it would lose its gelu
    assert type(fastmp.convert(mine, torch.float32, fuse=False)) is fastmp.nn.Linear


# ---- what other code does with a model ----


class LoRA(nn.Module):
    """y = base(x) + B(A(x)), as peft wraps a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Tapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.inner(x)


def wrap_layer(model, layer, act):
    model.set_submodule(layer, LoRA(model.get_submodule(layer)))


def wrap_activation(model, layer, act):
    model.set_submodule(act, Tapped(model.get_submodule(act)))


def other_activation(model, layer, act):
    model.set_submodule(act, nn.Tanh())


def no_activation(model, layer, act):
    model.set_submodule(act, nn.Identity())


def other_layer(model, layer, act):
    model.set_submodule(layer, nn.Linear(4, 4))


def new_head(model, layer, act):
    transfer.replace_head(model, 4, layer)


def patched_layer(model, layer, act):
    module = model.get_submodule(layer)
    module.forward = lambda x: F.linear(x, module.weight, module.bias) * 2


def parametrized(model, layer, act):
    parametrize.register_parametrization(model.get_submodule(layer), "weight", nn.Tanh())


def hook_that_changes(model, layer, act):
    model.get_submodule(layer).register_forward_hook(lambda m, args, y: y * 3)


def hook_in_place(model, layer, act):
    def triple(m, args, y):
        y.mul_(3)

    model.get_submodule(layer).register_forward_hook(triple)


def backward_hook(model, layer, act):
    model.get_submodule(act).register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))


def tensor_hook(model, layer, act):
    def double(m, args, y):
        y.register_hook(lambda grad: grad * 2)

    model.get_submodule(layer).register_forward_hook(double)


CHANGES = [
    wrap_layer, wrap_activation, other_activation, no_activation, other_layer, new_head,
    patched_layer, parametrized, hook_that_changes, hook_in_place, backward_hook, tensor_hook,
]  # fmt: skip


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("make", [chain, Block])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_after_conversion(change, make, act):
    plain = make(act)
    model = fuse_linear(copy.deepcopy(plain))
    layer, name = [n for n, _ in plain.named_children()][:2]
    for each in (plain, model):
        torch.manual_seed(1)
        change(each, layer, name)
    torch.testing.assert_close(results(model, X), results(plain, X))


HOOKS = {
    "register_forward_hook": lambda m, args, y: (*args, y),
    "register_forward_pre_hook": lambda m, args: args,
    "register_full_backward_hook": lambda m, dx, dy: (*dx, *dy),
    "register_full_backward_pre_hook": lambda m, dy: dy,
}


@pytest.mark.parametrize("make", [chain, Block])
@pytest.mark.parametrize("where", [0, 1])  # the layer, the activation
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_what_torchs_would(hook, where, make):
    plain = make()
    seen = []
    for model in (plain, fuse_linear(copy.deepcopy(plain))):
        values = []
        module = list(model.children())[where]
        getattr(module, hook)(lambda *a, values=values: values.extend(HOOKS[hook](*a)))
        results(model, X)
        seen.append([v for v in values if v is not None])
    assert seen[0]
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("make", [chain, Block])
def test_global_hooks_see_every_module(make):
    model, names = fuse_linear(make()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: names.append(type(m).__name__)
    )
    with handle:
        model(X)
    assert names[:3] == ["Linear", "GELU", "Linear"]


def test_each_part_alone_and_the_gradient_between_them():
    plain = Block()
    model, found = fuse_linear(copy.deepcopy(plain)), []
    for each in (plain, model):
        h = each.fc(X)
        y = each.act(h)
        (between,) = torch.autograd.grad(y.sum(), h, retain_graph=True)
        h.retain_grad()
        (y.square().sum() + h.sum()).backward()  # used twice
        found.append((h, y, between, h.grad, each.fc.bias.grad, each.fc.weight.grad))
    torch.testing.assert_close(found[1], found[0])


class Depends(Block):
    """Its forward depends on what no analysis sees: a flag that is set later."""

    skip = False

    def forward(self, x):
        h = self.fc(x)
        return self.out(h if self.skip else self.act(h) + h)


def test_a_forward_that_changes_its_mind():
    plain = Depends()
    model = fuse_linear(copy.deepcopy(plain))
    for each in (plain, model):
        each.skip = True
    torch.testing.assert_close(results(model, X), results(plain, X))


def test_changed_in_place_or_used_twice():
    class Busy(Block):
        def forward(self, x):
            h = self.fc(x)
            y = self.act(h) * 2 + self.act(h) + h
            g = self.fc(x)
            g += 1
            return self.out(y + self.act(g))

    assert_unchanged(Busy(), X)


@pytest.mark.parametrize("name", ["gelu", "silu", "relu"])
def test_a_second_derivative(name):
    found = []
    plain = Block(copy.deepcopy(ACTIVATIONS[name])).double()
    for model in (plain, fuse_linear(copy.deepcopy(plain))):
        x = X.double().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("make", [chain, Block])
def test_many_gradients_at_once(make):
    plain = make()
    model = fuse_linear(copy.deepcopy(plain))
    for f in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(f(model)(X[0]), f(plain)(X[0]))
    jacobians = [
        torch.autograd.functional.jacobian(m, X[0], vectorize=True) for m in (plain, model)
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("make", [chain, Block])
def test_copies_pickles_and_programs(make, tmp_path):
    model = fuse_linear(make())
    expected = model(X)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
        torch.fx.symbolic_trace(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (X,)).module(),
        torch.jit.trace(model, X),
    ):
        torch.testing.assert_close(twin(X), expected)
    program = torch.export.export(model.eval(), (X,))
    torch.export.save(program, tmp_path / "model.pt2")
    assert "fastmp" not in str(program.graph)  # it runs where fastmp is not installed


def test_a_part_of_a_sequential():
    model = fuse_linear(nn.Sequential(*chain(), nn.ReLU()))
    assert fused(model[:2](X)) == ["gelu"]
    torch.testing.assert_close(model[1:3](X), model[2](F.gelu(X)))
    assert len(fused(model.append(nn.Linear(3, 3))(X))) == 2


# ---- layers left alone ----


def test_other_kinds_of_linear_layers():
    class Mine(nn.Linear):
        pass

    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x + 1
    attention, wave = nn.MultiheadAttention(4, 2), nn.Linear(4, 4, dtype=torch.complex64)
    kept = [Mine(4, 4), nn.LazyLinear(4), orthogonal(nn.Linear(4, 4)), patched, wave]
    kept.append(attention.out_proj)
    kinds = [type(m) for m in kept]
    for module in kept:
        fuse_linear(nn.Sequential(module, nn.ReLU()))
    fuse_linear(attention)
    assert [type(m) for m in kept] == kinds
    assert nn.Sequential(patched)(torch.ones(4)).tolist() == [2.0] * 4


def test_a_tensor_subclass_as_weight():
    class Special(torch.Tensor):
        pass

    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Special))
    assert type(fuse_linear(model)) is nn.Linear


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


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["relu", nn.GELU()])
def test_torchs_transformer_layers(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 8), nn.ReLU())
    assert assert_unchanged(model, torch.randn(2, 5, 8))[-1] == "relu"
    with torch.no_grad():  # torch's own fast path
        assert model.eval()(torch.randn(2, 5, 8)).isfinite().all()
