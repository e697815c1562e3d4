"""The linear layer and its loss without logits, against both of torch's, in fp64 and per dtype."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastmp.functional import cross_entropy, linear_cross_entropy
from fastmp.nn import LinearCrossEntropyLoss
from fastmp.ops import linear_loss
from fastmp.ops.loss import MixedTarget
from tests.functional.linear_loss_cases import C, H, N, problem


@pytest.fixture(params=[False, True], ids=["logits once", "logits twice"])
def _sweeps(request, monkeypatch):
    """Chunks as on a CPU, and as on a GPU in 16 bits."""
    module = sys.modules["fastmp.functional.linear_cross_entropy"]
    monkeypatch.setattr(module, "computes_logits_twice", lambda weight: request.param)


def reference(x, w, b, a, other=None, lam=None, **options):
    logits = F.linear(x, w, b)
    loss = F.cross_entropy(logits, a, **options)
    return (
        loss
        if other is None
        else lam * loss + (1 - lam) * F.cross_entropy(logits, other, **options)
    )


def value_and_grads(loss, tensors, grad_output=3.0):
    grads = torch.autograd.grad(loss, tensors, torch.full_like(loss, grad_output))
    return (loss.detach(), *grads)


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("reduction", "lam"),  # torch has no λ per row for a mean: see the next test
    [(reduction, lam) for reduction in ("mean", "sum", "none") for lam in (None, 0.3)]
    + [("sum", "rows"), ("none", "rows")],
)
@pytest.mark.parametrize("chunk", [1, 32, 77, 1000])
def test_values_and_gradients_are_torchs(chunk, reduction, lam, ignored, weighted):
    x, w, b, a, other, weight = problem(ignored=ignored, weighted=weighted)
    lam = torch.linspace(0, 1, N, dtype=torch.float64) if lam == "rows" else lam
    if isinstance(lam, torch.Tensor) and reduction == "sum":
        rows = reference(x, w, b, a, other, lam, weight=weight, reduction="none")
        expected = value_and_grads(rows.sum(), (x, w, b))
    else:
        second = None if lam is None else other
        loss = reference(
            x, w, b, a, second, lam, weight=weight, reduction=reduction, label_smoothing=0.1
        )
        expected = value_and_grads(loss, (x, w, b))
    smoothing = 0.0 if isinstance(lam, torch.Tensor) and reduction == "sum" else 0.1
    pair = {} if lam is None else {"target_b": other, "lam": lam}
    loss = linear_cross_entropy(
        x, w, a, linear_bias=b, weight=weight, reduction=reduction, label_smoothing=smoothing,
        chunk=chunk, **pair,
    )  # fmt: skip
    for ours, theirs in zip(value_and_grads(loss, (x, w, b)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_sweeps")
def test_a_mean_of_pairs_with_lam_per_row_is_cross_entropys():
    x, w, b, a, other, weight = problem(ignored=True, weighted=True)
    lam = torch.linspace(0, 1, N, dtype=torch.float64)
    loss = cross_entropy(F.linear(x, w, b), MixedTarget(a, other, lam), weight)
    expected = value_and_grads(loss, (x, w, b))
    loss = linear_cross_entropy(
        x, w, MixedTarget(a, other, lam), linear_bias=b, weight=weight, chunk=16
    )
    for ours, theirs in zip(value_and_grads(loss, (x, w, b)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_output", [1.0, 1024.0, 300.0])
@pytest.mark.parametrize("chunk", [64, 300])
def test_error_is_within_twice_torchs(dtype, grad_output, chunk):
    """3 times for the weight's gradient, a sum over the batch; a loss scale is not known ahead."""
    x, w, b, a, _, _ = problem(dtype, rows=300)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = value_and_grads(reference(*exact, a), exact, grad_output)
    theirs = value_and_grads(reference(x, w, b, a), (x, w, b), grad_output)
    loss = linear_cross_entropy(x, w, a, linear_bias=b, chunk=chunk)
    ours = value_and_grads(loss, (x, w, b), grad_output)
    assert ours[0].dtype == torch.float32
    for i, (own, torchs, exact_value) in enumerate(zip(ours, theirs, expected, strict=True)):
        error, allowed = ((t.double() - exact_value).abs().max() for t in (own, torchs))
        ulp = torch.finfo(dtype).eps * exact_value.abs().max()
        assert error <= (3 if i >= 2 else 2) * allowed + ulp / 16, (i, error, allowed)


def test_small_gradients_survive_in_fp16():
    """Of a mean over 65,536 rows: logit gradients of 3e-7, five units of fp16 in torch."""
    x, w, _, a, _, _ = problem(torch.float16, rows=65536)
    x = (x / 64).detach().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    (expected,) = torch.autograd.grad(reference(*exact, None, a), exact[1])
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, w, a), w)
    (theirs,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w), a), w)
    error, torchs = ((t.double() - expected).norm() / expected.norm() for t in (ours, theirs))
    assert error < 2e-3
    assert torchs > 5 * error


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("chunk", [32, N])
def test_every_target_ignored(chunk):
    """The mean is NaN and the gradients are 0, as in torch; rows may hold anything."""
    x, w, b, a, _, _ = problem()
    ignored = torch.full_like(a, -100)
    loss = linear_cross_entropy(x, w, ignored, linear_bias=b, chunk=chunk)
    value, *grads = value_and_grads(loss, (x, w, b))
    assert value.isnan()
    assert all((grad == 0).all() for grad in grads)


def test_rows_of_other_shapes():
    x, w, b, a, _, _ = problem()
    one = linear_cross_entropy(x[3], w, a[3], linear_bias=b)
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[3], w, b), a[3]))
    assert linear_cross_entropy(x[3], w, a[3], reduction="none").shape == ()
    empty = linear_cross_entropy(x[:0], w, a[:0], reduction="sum")
    assert empty == 0
    assert linear_cross_entropy(x[:0], w, a[:0]).isnan()


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("chunk", [32, N])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen, chunk):
    x, w, b, a, _, _ = problem()
    tensors = [x, w, b]
    tensors[frozen] = tensors[frozen].detach()
    loss = linear_cross_entropy(tensors[0], tensors[1], a, linear_bias=tensors[2], chunk=chunk)
    loss.backward()
    assert [t.grad is not None for t in tensors] == [i != frozen for i in range(3)]


def test_tied_weights():
    """The embedding is the last layer: its gradient is the sum of both."""
    table = torch.randn(C, H, dtype=torch.float64, requires_grad=True)
    a = torch.arange(N) % C
    hidden = F.embedding(a, table).tanh()
    (expected,) = torch.autograd.grad(reference(hidden, table, None, a.flip(0)), table,
                                      retain_graph=True)  # fmt: skip
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, table, a.flip(0)), table)
    torch.testing.assert_close(ours, expected)


def test_under_autocast():
    x, w, b, a, _, _ = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, a, linear_bias=b)
        expected = F.cross_entropy(F.linear(x, w, b), a)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpoint(use_reentrant):
    x, w, b, a, _, _ = problem()
    options = {"linear_bias": b, "chunk": 32}
    expected = value_and_grads(linear_cross_entropy(x, w, a, **options), (x, w, b), 1.0)
    loss = checkpoint(
        lambda x: linear_cross_entropy(x, w, a, **options), x, use_reentrant=use_reentrant
    )
    loss.backward()
    for t, grad in zip((x, w, b), expected[1:], strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.slow
@pytest.mark.parametrize("chunk", [32, N])
def test_compiled_it_is_one_operation(chunk):
    x, w, b, a, _, _ = problem(torch.float32)

    def loss_of(x, w, b):
        return linear_cross_entropy(x * 2, w, a, linear_bias=b, chunk=chunk)

    expected = value_and_grads(loss_of(x, w, b), (x, w, b))
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(value_and_grads(compiled(x, w, b), (x, w, b)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("chunk", [32, N])
def test_many_grad_outputs_at_once(chunk, reduction):
    x, w, b, a, other, _ = problem()
    lam = torch.linspace(0, 1, N, dtype=torch.float64)
    loss = linear_cross_entropy(
        x, w, a, linear_bias=b, target_b=other, lam=lam, reduction=reduction, chunk=chunk
    )
    expected = reference(x, w, b, a, other, lam, reduction="none")
    if reduction != "none":
        expected = expected.sum() / (N if reduction == "mean" else 1)
    grad_output = torch.randn(3, *loss.shape, dtype=loss.dtype)
    found, exact = (
        torch.autograd.grad(f, (x, w, b), grad_output, is_grads_batched=True)
        for f in (loss, expected)
    )
    torch.testing.assert_close(found, exact)


def test_in_torch_func_and_twice_differentiated():
    x, w, b, a, _, _ = problem()
    grad = torch.func.grad(lambda w: linear_cross_entropy(x, w, a, linear_bias=b))(w)
    (expected,) = torch.autograd.grad(reference(x, w, b, a), w)
    torch.testing.assert_close(grad, expected)
    loss = linear_cross_entropy(x, w, a, linear_bias=b)
    (first,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()


@pytest.mark.usefixtures("_sweeps")
@pytest.mark.parametrize("chunk", [32, N])
def test_a_graph_kept_gives_the_same_twice(chunk):
    x, w, b, a, _, _ = problem()
    loss = linear_cross_entropy(x, w, a, linear_bias=b, chunk=chunk)
    one, two = (torch.autograd.grad(loss, (x, w, b), retain_graph=True) for _ in range(2))
    assert all(torch.equal(i, j) for i, j in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_power_of_two_as_grad_output_changes_no_digit(dtype):
    x, w, b, a, _, _ = problem(dtype, rows=64)
    loss = linear_cross_entropy(x, w, a, linear_bias=b)
    one, many = (
        torch.autograd.grad(loss, (x, w, b), torch.tensor(g), retain_graph=True) for g in (1, 1024)
    )
    for small, large in zip(one, many, strict=True):
        normal = small.abs() >= torch.finfo(dtype).smallest_normal
        assert torch.equal((small * 1024)[normal], large[normal])


def test_the_weights_gradient_in_parts(monkeypatch):
    """fp16, 5 classes at a time."""
    x, w, b, a, _, _ = problem(torch.float16)
    whole, parts = [], []
    for grads, rows in ((whole, C), (parts, 5)):
        monkeypatch.setattr(linear_loss, "PART_BYTES", 4 * H * rows)
        loss = linear_cross_entropy(x, w, a, linear_bias=b)
        grads += torch.autograd.grad(loss, (x, w, b), torch.tensor(512.0))
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_heavy_classes_overflow_no_fp16(reduction):
    """Class weights of 3e4 would make logit gradients of 3e4 a row; ignored rows leave one row."""
    x, w, b, a, _, _ = problem(torch.float16)
    a[1:] = -100
    weight = torch.full((C,), 3e4)
    loss = linear_cross_entropy(x, w, a, linear_bias=b, weight=weight, reduction=reduction)
    ours = torch.autograd.grad(loss, (x, w, b), torch.tensor(0.5))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = F.cross_entropy(F.linear(*wide), a, weight=weight.double(), reduction=reduction)
    theirs = torch.autograd.grad(expected, wide, torch.tensor(0.5, dtype=torch.float64))
    for own, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            own.double(), exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max())
        )


@given(
    rows=st.integers(1, 70), chunk=st.integers(1, 80), seed=st.integers(0, 2**16),
    smoothing=st.floats(0, 1), lam=st.floats(0, 1),
)  # fmt: skip
def test_chunks_change_nothing(rows, chunk, seed, smoothing, lam):
    x, w, b, a, other, _ = problem(rows=rows, seed=seed)
    options = {"label_smoothing": smoothing, "target_b": other, "lam": lam, "linear_bias": b}
    whole = value_and_grads(linear_cross_entropy(x, w, a, **options), (x, w, b))
    parts = value_and_grads(linear_cross_entropy(x, w, a, chunk=chunk, **options), (x, w, b))
    for one, two in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_peak_memory_is_that_of_a_chunk():
    """Counted by torch's allocator: the logits would be 32 MB, with softmax and gradient 96."""
    rows, classes = 2048, 4096
    x = torch.randn(rows, 8, requires_grad=True)
    w = torch.randn(classes, 8, requires_grad=True)
    a = torch.randint(classes, (rows,))

    def peak(call):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            call()
        used, most = 0, 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            used += event.nbytes()
            most = max(most, used)
        return most

    whole = peak(lambda: F.cross_entropy(F.linear(x, w), a).backward())
    chunked, at_once = (
        peak(lambda n=n: linear_cross_entropy(x, w, a, chunk=n).backward()) for n in (128, rows)
    )
    assert chunked < 0.05 * whole
    assert at_once < 0.4 * whole


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"linear_weight": torch.zeros(C, H + 1)}, RuntimeError, r"input must have the shape"),
        ({"linear_weight": torch.zeros(C, H, 2)}, RuntimeError, r"\(C, in_features\), got"),
        ({"linear_weight": torch.zeros(C, H).half()}, RuntimeError, "weight must have the dtype"),
        ({"linear_weight": torch.zeros(C, H, device="meta")}, RuntimeError, "on the device"),
        ({"linear_bias": torch.zeros(C + 1)}, RuntimeError, "bias must have the shape"),
        ({"input": torch.zeros(2, N, H)}, RuntimeError, "flatten input and target"),
        ({"target": torch.full((N,), C)}, IndexError, f"{C}"),
        ({"target": torch.zeros(N + 1, dtype=torch.long)}, ValueError, "batch_size"),
        ({"lam": 2.0, "target_b": torch.zeros(N, dtype=torch.long)}, ValueError, "lam"),
        ({"lam": 0.5}, ValueError, "belong together"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"weight": torch.ones(C + 1)}, RuntimeError, "weight tensor"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = {
        "input": torch.zeros(N, H),
        "linear_weight": torch.zeros(C, H),
        "target": torch.zeros(N, dtype=torch.long),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_the_module():
    layer = LinearCrossEntropyLoss(H, C, bias=True, label_smoothing=0.1, chunk=16)
    x, _, _, a, _, _ = problem(torch.float32)
    expected = reference(x, layer.linear.weight, layer.linear.bias, a, label_smoothing=0.1)
    torch.testing.assert_close(layer(x, a), expected)
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias"}
