"""Gradients in any layout, at any address; none of them is kept."""

import weakref

import pytest
import torch

import fastmp
from fastmp.backends import layouts
from tests.optim.optim_cases import adam_w, give_gradients, parameters

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(params=["one call of C++", "Python"], autouse=True)
def read_by(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(layouts, "native", lambda: None)
    elif layouts.native() is None:
        pytest.skip("there is no native library")


@dtypes
def test_the_same_address_with_other_strides(dtype):
    """A gradient, its transpose, and the gradient again, all in one piece of memory."""
    p = torch.zeros(6, 6, dtype=dtype, requires_grad=True)
    q = p.detach().double().requires_grad_()
    a, b = fastmp.optim.SGD([p], lr=1.0, momentum=0.5), torch.optim.SGD([q], lr=1.0, momentum=0.5)
    grad = torch.arange(36.0).view(6, 6).to(dtype)
    for step in (grad, grad.t(), grad, grad.t().contiguous().t()):
        p.grad, q.grad = step, step.double()
        a.step()
        b.step()
    assert torch.equal(a.masters()[0].double(), q.detach())


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_the_same_address_with_another_dtype(first):
    p = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    p.grad_dtype = None  # any
    memory = torch.zeros(32, dtype=torch.uint8)
    grads = {torch.float32: memory.view(torch.float32)}
    grads[torch.bfloat16] = memory[:16].view(torch.bfloat16)
    optimizer = fastmp.optim.SGD([p], lr=1.0)
    for dtype in (first, *(d for d in grads if d != first)):
        p.grad = grads[dtype].fill_(1.0)
        optimizer.step()
    assert (p == -2.0).all()


def test_the_same_address_with_the_other_sign():
    """A lazy negation, as in the imaginary part of a conjugate."""
    p = torch.zeros(8, requires_grad=True)
    optimizer = fastmp.optim.SGD([p], lr=1.0)
    grad = torch.ones(8)
    for step in (grad, torch._neg_view(grad), grad):
        p.grad = step
        optimizer.step()
    assert (p == -1.0).all()


def test_strides_of_dimensions_of_size_1_do_not_count():
    """A 1x1 convolution under channels_last: its gradient's strides differ, its memory does not."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    twin = torch.nn.Conv2d(3, 4, 1)
    twin.load_state_dict(convolution.state_dict())
    a, b = adam_w(convolution.parameters()), torch.optim.AdamW(twin.parameters())
    assert convolution.weight.stride() != twin.weight.stride()
    for step in range(3):
        give_gradients(list(twin.parameters()), list(convolution.parameters()), seed=step)
        convolution.weight.grad = twin.weight.grad.clone()
        a.step()
        b.step()
    assert a._tables.table.kernel._reordered == []
    torch.testing.assert_close(list(convolution.parameters()), list(twin.parameters()))


def test_a_parameter_at_the_same_address_with_other_strides():
    ours = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    a, b = adam_w([ours]), torch.optim.AdamW([theirs])
    for step in range(4):
        if step == 2:
            for p in (ours, theirs):
                p.data, p.grad = p.data.t(), None
        give_gradients([ours], [theirs], seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


@dtypes
def test_a_parameter_at_the_same_address_with_fewer_elements_is_refused(dtype):
    p = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    optimizer = adam_w([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = p.data[:2]
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).*got \(4, 3\)"):
        optimizer.step()


# ---- memory ----


def trainable(dtype, layout):
    torch.manual_seed(0)
    params = [torch.randn(4, 3, 5, 7).to(dtype), torch.randn(9).to(dtype)]
    if layout == "channels_last":
        params[0] = params[0].to(memory_format=torch.channels_last)
    if layout == "gaps":
        params[0] = params[0][..., ::2]
    return [p.requires_grad_() for p in params]


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_gradients_are_freed_by_zero_grad(dtype, layout, overflow, reduced):
    """Kernel, copies in another order, reference, a reducer's exchange; applied and skipped."""
    params = trainable(dtype, layout)
    optimizer = adam_w(params, max_grad_norm=1.0)
    if reduced:
        optimizer.step_context.reduce_step = lambda local: None
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        if overflow and step == 1:
            params[1].grad[0] = torch.inf
        kept = [weakref.ref(p.grad) for p in params]
        memory = [weakref.ref(p.grad.untyped_storage()) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        assert [ref() for ref in (*kept, *memory)] == [None] * 4
    kernel = optimizer._tables.table.kernel
    assert (kernel is None) == (dtype == torch.float64 or layout == "gaps")
    assert kernel is None or kernel._copies == []


def test_memory_of_freed_gradients_is_used_again():
    """The allocator hands out old addresses in another order: the values decide."""
    ours, theirs = parameters(), parameters()
    a, b = adam_w(ours), torch.optim.AdamW(theirs)
    for step in range(6):
        order = range(len(ours)) if step % 2 else reversed(range(len(ours)))
        generator = torch.Generator().manual_seed(step)
        for i in order:
            ours[i].grad = torch.randn(ours[i].shape, generator=generator)
            theirs[i].grad = ours[i].grad.clone()
        a.step()
        b.step()
        a.zero_grad()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
