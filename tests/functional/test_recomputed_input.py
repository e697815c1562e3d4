"""What the graph keeps of linear layers: no act(z) beside z."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from fastmp.functional import linear
from fastmp.functional.linear import linear_before
from fastmp.functional.linear_autograd import activate_after
from fastmp.ops.linear import ACTIVATIONS, activate
from tests.functional.linear_cases import torch_linear
from tests.functional.recomputed_cases import (
    K,
    M,
    N,
    assert_torchs,
    check_close,
    forms,
    gradients,
    kept_bytes,
    modules,
    operands,
    sequence,
    smooth,
    torchs,
)

pytestmark = pytest.mark.usefixtures("every_size", "recomputing")


@forms
@smooth
def test_one_tensor_of_the_hidden_size_is_kept(activation, form):
    tensors = operands()
    assert kept_bytes(form, *tensors, activation) == M * N * 4
    if (form, activation) == (sequence, "gelu"):
        assert kept_bytes(torchs, *tensors, activation) == 2 * M * N * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@forms
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_values_and_gradients(activation, form, dtype):
    eps = torch.finfo(dtype).eps
    for shape in ((M,), (), (2, 3), (0,)):
        assert_torchs(form, operands(dtype, shape), activation, rtol=8 * eps, atol=100 * eps)


def without(*names):
    """The operands, some of them None (a bias) or frozen."""
    given = dict(zip(("x", "w1", "b1", "w2", "b2"), operands(), strict=True))
    for name in names:
        given[name] = None if name.startswith("b") else given[name].detach()
    return list(given.values())


@forms
@pytest.mark.parametrize(
    "names", [["b1"], ["b2"], ["b1", "b2"], ["x"], ["w1"], ["w2"], ["x", "w1", "b1"], ["x", "w2"]]
)
def test_without_bias_or_gradient(names, form):
    assert_torchs(form, without(*names))


@forms
def test_tied_weights_and_strides(form):
    x, w1, b1, _, b2 = operands()
    assert_torchs(form, [x, w1, b1, w1.t(), b2])
    wide = torch.randn(M, 2 * K, requires_grad=True)
    tensors = [wide[:, ::2], w1, b1, torch.randn(N, K).t().requires_grad_(), b2]
    assert_torchs(form, tensors)


def test_three_layers():
    """The second keeps z of the first in place of its input, and its own z for the third."""
    x, w1, b1, w2, b2 = operands()

    def deep(layer):
        return layer(layer(layer(x, w1, b1, "gelu"), w2, b2, "silu"), w1, b1)

    assert kept_bytes(lambda *_: deep(linear), x, w1, b1, w2, b2) == M * (N + K) * 4
    tensors = x, w1, b1, w2, b2
    check_close(gradients(deep(linear), tensors), gradients(deep(torch_linear), tensors))


def test_activations_elsewhere():
    """Of the second layer, and two in a row: the first belongs to the layer's own operation."""
    x, w1, b1, w2, b2 = tensors = operands()
    results = []
    for layer in (linear, torch_linear):
        y = layer(layer(x, w1, b1, "gelu"), w2, b2, "silu")
        z = layer(F.silu(layer(x, w1, b1, "gelu")), w2, b2)
        results.append((gradients(y, tensors), gradients(z, tensors)))
    check_close(*results)


def dropout(p):
    return lambda y: F.dropout(y, p, training=True)


def hooked(y):
    y.register_hook(lambda grad: grad * 3)
    return y


def written_unseen(y):
    with torch.no_grad():
        return y.mul_(2)


BETWEEN = {
    "dropout of 0": (dropout(0.0), 1),
    "dropout in place": (lambda y: F.dropout(y, 0.0, True, inplace=True), 1),
    "identity": (torch.nn.Identity(), 1),
    "hook": (hooked, 1),
    "dropout": (dropout(0.5), 3),
    "view": (lambda y: y.view(2, M // 2, N), 2),
    "gate": (lambda y: y * y, 3),
    "in place": (lambda y: y.mul_(2), 2),
    "in place, not seen by autograd": (written_unseen, 2),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between(name):
    change, hidden = BETWEEN[name]

    tensors, results = operands(), []
    for layer, act in ((linear, activate_after), (F.linear, activate)):
        torch.manual_seed(1)
        y = layer(change(act(layer(*tensors[:3]), "gelu")), *tensors[3:])
        results.append((y, *gradients(y, tensors)))
    check_close(*results)

    def again(*_):
        return linear(change(activate_after(linear(*tensors[:3]), "gelu")), *tensors[3:])

    assert kept_bytes(again, *tensors) <= hidden * M * N * 4


def test_z_changed_after_the_activation():
    """The layer keeps its input; torch refuses the gradient of the activation, as without us."""
    x, w1, b1, w2, b2 = operands()
    z = linear_before(x, w1, b1, "gelu")
    y = activate_after(z, "gelu")
    with torch.no_grad():
        z.mul_(2)
    out = linear(y, w2, b2)
    (grad,) = torch.autograd.grad(out.sum(), w2, retain_graph=True)
    check_close(grad, F.gelu(F.linear(x, w1, b1)).sum(0).expand(K, N))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@forms
def test_used_twice_and_in_parts(form):
    """Gradients of the second layer alone, of all, and again; its input used elsewhere too."""
    x, w1, b1, w2, b2 = tensors = operands()
    y = form(*tensors, "gelu")
    (alone,) = torch.autograd.grad(y.square().sum(), w2, retain_graph=True)
    first = gradients(y, tensors, retain_graph=True)
    assert torch.equal(alone, first[3])
    assert all(map(torch.equal, first, gradients(y, tensors)))
    results = []
    for layer in (linear, torch_linear):
        hidden = layer(x, w1, b1, "gelu")
        y = layer(hidden, w2, b2) + layer(hidden, w2 * 2) + hidden[..., :K]
        (between,) = torch.autograd.grad(y.sum(), hidden, retain_graph=True)
        hidden.retain_grad()
        results.append((between, *gradients(y, tensors), hidden.grad))
    check_close(*results)


@forms
@smooth
def test_second_derivatives(form, activation):
    tensors = operands(torch.float64)
    fn = functools.partial(form, activation=activation)
    assert torch.autograd.gradcheck(fn, tensors)
    assert torch.autograd.gradgradcheck(fn, tensors)


@pytest.mark.parametrize("keep", [True, False])
def test_a_second_derivative_through_the_input(keep):
    """Of a penalty on the weight's gradient, in everything that it depends on."""
    results = []
    for layer in (linear, torch_linear):
        torch.manual_seed(0)
        x, w1, b1, w2, b2 = operands(torch.float64)
        hidden = layer(x, w1, b1, "gelu")
        y = layer(hidden, w2, b2)
        wanted = [x, w1, b1, *([hidden] if keep else [])]
        del hidden
        (grad,) = torch.autograd.grad(y.square().sum(), w2, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), wanted))
    check_close(*results)


@forms
def test_a_second_derivative_beside_a_frozen_first_layer(form):
    results = []
    for fn in (form, torchs):
        torch.manual_seed(0)
        tensors = without("w1", "b1")
        loss = fn(*tensors, "gelu").square().sum()
        (grad,) = torch.autograd.grad(loss, tensors[3], create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), tensors[3])))
    check_close(*results)


def test_hooks_on_saved_tensors_take_the_input():
    """Each saved tensor is packed by itself: z in place of act(z) would save nothing."""
    tensors, packed = operands(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = modules(*tensors, "gelu")
        expected = torchs(*tensors, "gelu")
    check_close(gradients(y, tensors), gradients(expected, tensors))
    hidden = [t.data_ptr() for t in packed if t.shape == (M, N)]
    assert len(set(hidden)) == len(hidden) == 4
    with save_on_cpu():
        y = modules(*tensors, "gelu")
    check_close(gradients(y, tensors), gradients(torchs(*tensors, "gelu"), tensors))


@forms
def test_under_a_checkpoint_whose_locals_hold_z(form):
    """First and second forward decide alike, although z may be alive in one of them only."""
    tensors, held = operands(), []

    def keeping(*given):
        z = linear_before(*given[:3], "gelu")
        held.append(z)
        if len(held) > 1:
            held.clear()
        return linear(activate_after(z, "gelu"), *given[3:])

    y = checkpoint(keeping, *tensors, use_reentrant=False)
    check_close(gradients(y, tensors), gradients(torchs(*tensors, "gelu"), tensors))


def test_z_of_a_checkpoint_that_ends_between():
    tensors = operands()
    hidden = checkpoint(linear, *tensors[:3], "gelu", use_reentrant=False)
    y = linear(hidden, *tensors[3:])
    check_close(gradients(y, tensors), gradients(torchs(*tensors, "gelu"), tensors))


@forms
def test_transforms_and_many_gradients_at_once(form):
    x, *parameters = (t.detach() for t in operands())

    def fn(form):
        return lambda x: form(x, *parameters, "gelu")

    for transform in (torch.func.jacrev, torch.func.hessian):
        check_close(transform(fn(form))(x[0]), transform(fn(torchs))(x[0]))
    trained = [t.requires_grad_() for t in parameters]
    ours, theirs = (
        torch.autograd.grad(
            f(x, *trained, "gelu").sum(0), trained, torch.eye(K), is_grads_batched=True
        )
        for f in (form, torchs)
    )
    check_close(ours, theirs)


def step(fn, tensors):
    with torch.autocast("cpu", torch.bfloat16):
        y = fn(*tensors, "gelu")
    return y, *gradients(y.float(), tensors)


@forms
def test_under_autocast(form):
    tensors = operands()
    check_close(step(form, tensors), step(torchs, tensors), rtol=0.05, atol=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(form, *tensors, "gelu") < kept_bytes(torchs, *tensors, "gelu")


def test_compiled():
    """Dynamo sees no grad_fn: the graph is the one of two layers."""
    tensors = operands()
    compiled = torch.compile(sequence, fullgraph=True, backend="aot_eager")
    check_close(step(compiled, tensors), step(sequence, tensors), rtol=0.05, atol=0.5)
