"""fastmp.functional.linear under autograd, torch.func, torch.compile and autocast."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from fastmp.functional import linear
from fastmp.functional.linear import _WITHOUT_AUTOCAST
from fastmp.nn import Linear
from fastmp.ops import linear as operation
from fastmp.ops.linear import ACTIVATIONS
from tests.functional.linear_cases import B, W, X, product, torch_linear, value_and_grads

pytestmark = pytest.mark.usefixtures("every_size")

WORTHWHILE = operation.worthwhile


# ---- autograd: saved tensors, computed gradients ----


def flags(*needed):
    """X, W and B, each with its requires_grad."""
    return [t.clone().requires_grad_(need) for t, need in zip((X, W, B), needed, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
)
@pytest.mark.parametrize("own", [True, False])
def test_gradients_only_where_asked(needed, activation, own):
    needed = [bool(need) for need in needed]
    masks = []
    backward = torch.ops.fastmp.linear_backward
    with product(own):
        tensors = flags(*needed)
        y = linear(*tensors, activation)
        with mock.patch.object(
            torch.ops.fastmp, "linear_backward", lambda *a: masks.append(a[-1]) or backward(*a)
        ):
            y.square().sum().backward()
    assert masks == [needed]
    theirs = flags(*needed)
    torch_linear(*theirs, activation).square().sum().backward()
    for ours, t, need in zip(tensors, theirs, needed, strict=True):
        assert (ours.grad is not None) == need
        torch.testing.assert_close(ours.grad, t.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gradient_no_graph(activation):
    assert linear(X, W, B, activation).grad_fn is None
    with torch.no_grad():
        assert linear(*flags(True, True, True), activation).grad_fn is None
    with torch.inference_mode():
        assert linear(*flags(True, True, True), activation).is_inference()
    assert linear(X, *flags(True, True, True)[1:]).requires_grad


def kept_by(fn):
    """Shapes of what the graph of fn() keeps, beside tensors that live on anyway."""
    kept = []

    def pack(t):
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fn()
    return kept, y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_graph_keeps_only_what_it_needs(activation):
    x, w, b = torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)
    trained = [t.clone().requires_grad_() for t in (x, w, b)]
    extra = [] if activation == "none" else [(6, 3)]  # z, or y for relu
    for tensors, expected in [
        (trained, [(6, 5), (3, 5), (3,)]),
        ((trained[0], w, b), [(3, 5), (3,)]),
        ((x, trained[1], None), [(6, 5)] + [(3, 5)] * (activation != "none")),
        ((x, w, trained[2]), [(3,)]),
    ]:
        kept, _y = kept_by(lambda t=tensors: linear(*t, activation))
        assert sorted(s for s in kept if s != (0,)) == sorted(expected + extra)


def test_a_frozen_weight_lets_the_input_go():
    for frozen in (True, False):
        leaf = torch.randn(6, 5, requires_grad=True)
        x = leaf * 1
        storage = StorageWeakRef(x.untyped_storage())
        y = linear(x, torch.randn(3, 5, requires_grad=not frozen), None, "gelu")
        del x
        assert storage.expired() == frozen
        y.sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_may_be_written_to(activation, shape, own):
    """As torch's: its own memory, no view; only relu's backward needs the value."""
    x, w, b = torch.randn(shape, requires_grad=True), *flags(True, True, True)[1:]
    results = []
    for fn in (linear, torch_linear):
        with product(own):
            y = fn(x, w, b, activation)
            y.mul_(2)
            if activation == "relu":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.sum().backward()
            else:
                results.append(torch.autograd.grad(y.sum(), (x, w, b)))
    torch.testing.assert_close(*results or (0, 0))


def test_a_changed_weight_is_noticed():
    x, w, b = flags(True, True, True)
    y = linear(x, w, b, "gelu")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_twice(activation):
    tensors = flags(True, True, True)
    y = linear(*tensors, activation)
    first = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors, torch.ones_like(y))


# ---- second derivatives ----


def away_from_kinks(activation):
    """fp64 leaves; for relu every z is at least 0.1 away from 0."""
    generator = torch.Generator().manual_seed(3)
    while True:
        x, w, b = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2), (4, 2), (4,))
        )
        if activation != "relu" or F.linear(x, w, b).abs().min() > 0.1:
            return [t.requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = away_from_kinks(activation)
    for arguments in (tensors, tensors[:2]):
        assert torch.autograd.gradcheck(lambda *t: linear(*t, activation=activation), arguments)
        assert torch.autograd.gradgradcheck(lambda *t: linear(*t, activation=activation), arguments)


def penalty(fn, tensors, activation):
    """The loss of a gradient penalty, and its gradients."""
    x, w, b = (t.detach().requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(fn(x, w, b, activation).square().sum(), x, create_graph=True)
    loss = (grad.norm(dim=-1) - 1).square().mean()
    grads = torch.autograd.grad(loss, (x, w, b), allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-4),
                                                     (torch.bfloat16, 0.05, 0.5)])  # fmt: skip
def test_gradient_penalty(dtype, rtol, atol, activation):
    tensors = [t.to(dtype) for t in (X, W, B)]
    ours, theirs = (penalty(fn, tensors, activation) for fn in (linear, torch_linear))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative_of_an_input_that_depends_on_the_weight(activation):
    """d²/dw² must not count the path from input to weight twice, nor drop it."""
    w, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def second(fn):
        weight, bias = w.clone().requires_grad_(), b.clone().requires_grad_()
        x = torch.tanh(weight @ weight.t() + bias)
        loss = fn(x, weight, bias, activation).pow(3).sum()
        grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (weight, bias))

    torch.testing.assert_close(second(linear), second(torch_linear))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", ["input", "weight", "all but bias"])
def test_second_derivative_with_something_frozen(frozen, activation):
    leaves = flags(frozen == "weight", frozen == "input", True)
    x, w, b = (t.detach().double().requires_grad_(t.requires_grad) for t in leaves)
    wanted = [t for t in (x, w, b) if t.requires_grad]
    y = linear(x, w, b, activation).square().sum()
    if activation == "none" or frozen == "input":
        ours = torch.autograd.grad(y, wanted, create_graph=True)
        y = torch_linear(x, w, b, activation).square().sum()
        theirs = torch.autograd.grad(y, wanted, create_graph=True)
        torch.testing.assert_close(ours, theirs)
        ours, theirs = (
            torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
            for grads in (ours, theirs)
        )
        torch.testing.assert_close(ours, theirs)
    else:
        with pytest.raises(RuntimeError, match=f"second derivative.*'{activation}'.*torch.nn.func"):
            torch.autograd.grad(y, wanted, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode_derivatives(activation):
    tensors = away_from_kinks(activation)
    for leaves in (tensors, [t.detach() for t in tensors], [t.detach().float() for t in tensors]):
        tangents = [torch.randn_like(t) for t in leaves]
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(t, d)
                for t, d in zip(leaves, tangents, strict=True)
            ]
            ours, theirs = (
                torch.autograd.forward_ad.unpack_dual(fn(*duals, activation)).tangent
                for fn in (linear, torch_linear)
            )
        torch.testing.assert_close(ours, theirs)


# ---- torch.func, compile, autocast ----


def test_small_problems_are_torchs():
    """Bitwise, and with torch's own backward."""
    wide = torch.randn(512, 512)
    for x, w, ours in [
        (X, W, False),
        (X.bfloat16(), W.bfloat16(), False),
        (X.half(), W.half(), True),  # torch's fp16 is slow at any size
        (X.double(), W.double(), True),
        (wide, wide, True),
        (wide[:3].repeat(1, 64), wide.repeat(1, 64), False),  # too few rows
        (wide.repeat(1, 64), wide[:3].repeat(1, 64), False),
    ]:
        x = x.clone().requires_grad_()
        with mock.patch.object(operation, "worthwhile", WORTHWHILE):
            y = linear(x, w, None, "silu")
        assert (type(y.grad_fn).__name__ == "_LinearBackward") == ours
        assert ours or torch.equal(y, torch_linear(x, w, None, "silu"))


def test_compiled_code_takes_other_sizes():
    def fn(x, w):
        return linear(x, w, None, "gelu")

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randn(256, 256)
    with mock.patch.object(operation, "worthwhile", WORTHWHILE):
        for rows in (5, 300, 7, 301):
            x, grad = torch.randn(rows, 256), torch.randn(rows, 256)
            ours, eager = (value_and_grads(f, (x, w), grad) for f in (compiled, fn))
            assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_transforms(activation):
    def loss(fn):
        return lambda x, w, b: fn(x, w, b, activation).square().sum()

    for transform in (
        lambda fn: torch.func.grad(fn, (0, 1, 2)),
        lambda fn: torch.func.vmap(torch.func.grad(fn, (1, 2)), (0, None, None)),
        lambda fn: torch.func.jacrev(fn),
        lambda fn: torch.func.vmap(fn, (0, None, None)),
    ):
        ours, theirs = (transform(loss(fn))(X, W, B) for fn in (linear, torch_linear))
        torch.testing.assert_close(ours, theirs)


def test_functional_call():
    module = Linear(7, 4, activation="silu")
    state = {"weight": W.clone().requires_grad_(), "bias": B}
    y = torch.func.functional_call(module, state, (X,))
    torch.testing.assert_close(y, torch_linear(X, W, B, "silu"))
    (grad,) = torch.autograd.grad(y.sum(), state["weight"])
    expected = torch.func.grad(
        lambda w: torch.func.functional_call(module, {"weight": w, "bias": B}, (X,)).sum()
    )(W)
    torch.testing.assert_close(grad, expected)
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_compiles_into_one_graph(dtype, activation):
    def fn(x, w, b):
        return linear(x * 2, w, b, activation) * 3

    tensors = [t.to(dtype) for t in (X, W, B)]
    grad = torch.randn(3, 5, 4).to(dtype)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_grads(f, tensors, grad) for f in (compiled, fn))
    assert all(map(torch.equal, ours, eager))


def test_a_module_with_a_frozen_weight_compiles_under_autocast():
    module = Linear(7, 4, activation="relu")
    module.weight.requires_grad_(False)
    x = X.clone().requires_grad_()

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, module.bias))

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, step(compiled), step(module)))


def test_device_types_without_autocast():
    """Dynamo of torch 2.11 cannot ask torch itself."""
    assert not any(map(torch.amp.is_autocast_available, _WITHOUT_AUTOCAST))
    others = ["cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia", "privateuseone"]
    assert all(map(torch.amp.is_autocast_available, others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation, dtype):
    tensors, explicit = flags(True, True, True), flags(True, True, True)
    with torch.autocast("cpu", dtype):
        y = linear(*tensors, activation)
        untouched = linear(*(t.double() for t in tensors), activation)
        with torch.autocast("cpu", enabled=False):
            assert linear(*tensors, activation).dtype == torch.float32
    expected = linear(*(t.to(dtype) for t in explicit), activation)
    assert y.dtype == dtype
    assert untouched.dtype == torch.float64
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(tensors, explicit, strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad)
