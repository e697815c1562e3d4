"""The operations on an NVIDIA GPU: compiled, captured, never waiting."""

from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from fastmp import backends
from fastmp.backends import triton
from fastmp.backends.cuda import loss as ring_loss
from fastmp.data.mixup import Mixup
from fastmp.functional import MixedTarget, cross_entropy, linear, linear_cross_entropy, mix
from fastmp.nn import CrossEntropyLoss, Linear
from tests.functional.confident_cases import GRAD_OUTPUT, check_confident_rows, gradient_on


def _obstacle():
    """Why nothing here can run; empty if it can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if torch.cuda.get_device_capability() < triton.MINIMUM_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    version, reason = triton.load()
    return "" if version else reason


OBSTACLE = _obstacle()
pytestmark = [
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE),
    pytest.mark.usefixtures("every_size"),
]

DEVICE = "cuda"
HALVES = [torch.float16, torch.bfloat16]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


# ---- what every operation is put through ----


class Case(NamedTuple):
    """A call of an operation: ``forward`` of all tensors but the last."""

    forward: Any
    leaves: int  # so many tensors come first and get a gradient
    tensors: list[torch.Tensor]  # the last one: grad_output
    slack: float = 1e-6  # of the largest value: by so much may two runs differ


def results(case, forward=None):
    """The value, and the gradients of the leaves."""
    *inputs, grad_output = case.tensors
    leaves = [t.detach().requires_grad_() for t in inputs[: case.leaves]]
    out = (forward or case.forward)(*leaves, *inputs[case.leaves :])
    if not leaves:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output)]


def assert_same(ours, theirs, slack):
    for one, other in zip(ours, theirs, strict=True):
        rtol, atol = 2 * torch.finfo(other.dtype).eps, slack * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def loss_case(kind, dtype, seed):
    """Rows in registers for fp16, in shared memory or in blocks for bf16, of two multiprocessors
    for "long"; grad_scale is right if seed is 0.
    """
    torch.manual_seed(seed)
    rows, classes = (130, 1001) if dtype == torch.float16 else (70, 33003)
    if kind == "long":
        rows, classes = 140, 120001
    z = (3 * torch.randn(rows, classes)).to(dtype)
    a, b = torch.randint(classes, (2, rows))
    a[1] = -100
    lam, scale = torch.rand(rows), torch.tensor(1024.0 * (1 + seed))
    grad_output = torch.rand(rows) if kind == "each row" else scale / (1 + seed % 2)

    def forward(z, a, b, lam, scale):
        given = {"number": 1024.0, "tensor": scale, "long": scale}.get(kind)
        reduction = "none" if kind == "each row" else "mean"
        options = {"reduction": reduction, "label_smoothing": 0.1, "grad_scale": given}
        return cross_entropy(z, MixedTarget(a, b, lam), **options)

    return Case(forward, 1, [t.to(DEVICE) for t in (z, a, b, lam, scale, grad_output)])


def linear_loss_case(chunk, dtype, seed):
    """Chunks of 128 and a last one of 44 rows, or all at once."""
    torch.manual_seed(seed)
    x, w = torch.randn(300, 264), torch.randn(1001, 264) / 16
    a, b = torch.randint(1001, (2, 300))
    a[1] = -100

    def forward(x, w, a, b, lam):
        return linear_cross_entropy(x, w, MixedTarget(a, b, lam), label_smoothing=0.1, chunk=chunk)

    tensors = [x.to(dtype), w.to(dtype), a, b, torch.rand(300), torch.tensor(1024.0)]
    return Case(forward, 2, [t.to(DEVICE) for t in tensors], 4 * torch.finfo(dtype).eps)


def linear_case(activation, dtype, seed):
    """The products of the gradients are cuBLAS's, which may add up in another order."""
    torch.manual_seed(seed)
    shapes = (300, 264), (520, 264), (520,), (300, 520)
    x, w, b, grad = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    slack = 4 * torch.finfo(dtype).eps

    def forward(x, w, b):
        return linear(x, w, b, activation)

    return Case(forward, 3, [x, w / 16, b, grad], slack)


def mix_case(kind, seed):
    torch.manual_seed(seed)
    x = torch.randint(256, (9, 3, 40, 48), dtype=torch.uint8)
    index, lam = torch.randperm(9), torch.rand(9)
    edges = [torch.randint(size + 1, (9, 2)).sort(1).values for size in (40, 48)]
    box = torch.cat(edges, 1)

    def forward(x, index, lam, box):
        chosen = {"lam": lam} if kind == "mixup" else {"lam": None, "box": box}
        return mix(x, index=index, **chosen, mean=MEAN, std=STD, dtype=torch.float16)

    tensors = [t.to(DEVICE) for t in (x, index, lam, box)]
    return Case(forward, 0, [*tensors, torch.zeros((), device=DEVICE)])


CASES = {f"loss {a} {d}": partial(loss_case, a, d) for d in HALVES
         for a in ("nothing", "number", "tensor", "each row")}  # fmt: skip
CASES["loss long"] = partial(loss_case, "long", torch.bfloat16)
CASES |= {f"{a} {d}": partial(linear_case, a, d) for d in HALVES for a in ("gelu", "relu")}
CASES |= {
    f"linear loss {n} {d}": partial(linear_loss_case, n, d) for d in HALVES for n in (128, 300)
}
CASES |= {kind: partial(mix_case, kind) for kind in ("mixup", "cutmix")}
every_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("op", ["loss", "linear", "mix"])
def test_triton_serves(op):
    served = {(s.op, s.device): s for s in backends.report()}[op, "cuda"]
    assert served.backend == "triton", served.reason


@pytest.mark.skipif(
    not OBSTACLE and torch.cuda.get_device_capability() < (9, 0),
    reason="no bulk copies before compute capability 9.0",
)
@pytest.mark.parametrize("classes", [4097, 8192, 16384, 33003, 50257, 128256, 200000])
def test_long_rows_go_through_the_ring(classes, monkeypatch):
    """Once the gradient is known in the forward."""
    calls = []
    run = ring_loss.run
    monkeypatch.setattr(ring_loss, "run", lambda *args: (calls.append(args[-1]), run(*args))[1])
    z = torch.randn(300, classes, device=DEVICE).bfloat16().requires_grad_()
    y = torch.randint(classes, (300,), device=DEVICE)
    cross_entropy(z, y).backward()
    fits_one = 2 * classes <= ring_loss.sm_shared(z.device) - 16384
    assert [ring.size.cluster for ring in calls] == [1 if fits_one else 2]


@every_case
def test_compiled_is_eager(build):
    case = build(0)
    torch.compiler.reset()
    compiled = torch.compile(case.forward, fullgraph=True)
    assert_same(results(case, compiled), results(case), case.slack)


@every_case
def test_a_cuda_graph_replays_what_eager_computes(build):
    case = build(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case)
    for seed in (1, 2):  # grad_scale wrong, then right
        fresh = build(seed)
        for static, new in zip(case.tensors, fresh.tensors, strict=True):
            static.copy_(new)
        graph.replay()
        assert_same(captured, results(fresh), case.slack)


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(0)


@every_case
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits(build):
    case = build(0)
    expected = results(case)
    with waiting_is_an_error():
        again = results(case)
    assert_same(again, expected, case.slack)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_never_waits_in_a_training_step():
    x, y = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,))
    x, y, scale = x.to(DEVICE), y.to(DEVICE), torch.full((), 1024.0, device=DEVICE)
    options = {"device": DEVICE, "dtype": torch.float16}
    layers = Linear(3072, 256, **options, activation="gelu"), Linear(256, 10, **options)
    model, criterion = torch.nn.Sequential(*layers), CrossEntropyLoss(label_smoothing=0.1)
    mixup = Mixup(cutmix_alpha=1.0, mean=MEAN, std=STD, dtype=torch.float16)

    def steps(count):
        for _ in range(count):
            mixed, target = mixup(x, y)
            (criterion(model(mixed.flatten(1)), target, scale) * scale).backward()

    steps(20)  # some of which cut
    with waiting_is_an_error():
        steps(10)
        with pytest.raises(RuntimeError, match="synchroniz"):
            scale.item()  # the watchman is awake
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_case
def test_three_runs_give_the_same_bits(build):
    case = build(1)
    first, *others = (results(case) for _ in range(3))
    for again in others:
        assert all(map(torch.equal, again, first))


@every_case
def test_on_two_streams(build):
    """Each stream's inputs come late: a launch on another stream would miss them."""
    cases = build(1), build(2)
    expected = [results(case) for case in cases]
    late = [[torch.zeros_like(t) for t in case.tensors] for case in cases]
    torch.cuda.synchronize()
    outputs = []
    for case, empty in zip(cases, late, strict=True):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)  # 10 ms
            for static, new in zip(empty, case.tensors, strict=True):
                static.copy_(new)
            outputs.append(results(case._replace(tensors=empty)))
    torch.cuda.synchronize()
    for case, ours, theirs in zip(cases, outputs, expected, strict=True):
        assert_same(ours, theirs, case.slack)


@every_case
def test_on_a_device_that_is_not_the_current_one(build):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    case = build(1)
    elsewhere = results(case._replace(tensors=[t.to("cuda:1") for t in case.tensors]))
    assert all(t.device == torch.device("cuda:1") for t in elsewhere)
    assert_same([t.to(DEVICE) for t in elsewhere], results(case), case.slack)


# ---- what cannot be refused without waiting ----


@pytest.mark.parametrize("value", [-1, 130001, 2**40, -(2**62)])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("classes", [1001, 33003, 130001])
def test_a_target_out_of_range_is_loud(classes, value, which):
    z = torch.randn(5, classes, device=DEVICE).half().requires_grad_()
    targets = torch.randint(classes, (2, 5), device=DEVICE)
    targets[which, 2] = value
    for reduction, scale in (("none", None), ("mean", None), ("sum", 1.0)):
        target = MixedTarget(*targets, 0.25)
        loss = cross_entropy(z, target, reduction=reduction, grad_scale=scale)
        (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
        bad = torch.arange(5, device=DEVICE) == 2
        assert torch.equal(loss.isnan(), bad if reduction == "none" else bad.any())
        assert torch.equal(grad.isnan().any(1), bad)
    torch.cuda.synchronize()


@pytest.mark.parametrize("value", [-1, 9, 2**40, -(2**62)])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_index_out_of_range_is_loud(kind, value):
    case = mix_case(kind, 0)
    (good,) = results(case)
    case.tensors[1][2] = value
    (out,) = results(case)
    others = [i for i in range(9) if i != 2]
    assert out[2].isnan().all()
    assert torch.equal(out[others], good[others])
    torch.cuda.synchronize()


# ---- confident rows ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [10, 1001, 16384, 50257])
def test_the_true_class_of_a_confident_row(classes, dtype):
    for scale in (None, GRAD_OUTPUT, 3.0):
        check_confident_rows(classes, dtype, gradient_on(DEVICE, scale))
