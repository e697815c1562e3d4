"""The optimizer step on an NVIDIA GPU: its bits, in a CUDA graph, without a sync, at any size."""

import pytest
import torch

import fastmp
from fastmp import backends
from tests.kernels.gpu.test_operations import OBSTACLE
from tests.optim.optim_cases import give_gradients, masters, parameters, same_bits, snapshot

pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "there is a GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RULES = ["AdamW", "SGD", "Lion"]


def on_gpu(params):
    return [p.detach().cuda().requires_grad_() for p in params]


def test_cuda_serves_update():
    (row,) = [r for r in backends.report() if (r.op, r.device) == ("update", "cuda")]
    assert row.backend == "cuda", row.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_as_on_the_cpu(name, dtype):
    """Without a norm in it; the powers of the betas are rounded to fp32 on both."""
    runs = []
    for place in (on_gpu, list):
        params = place(parameters(dtype))
        optimizer = getattr(fastmp.optim, name)(params, lr=0.1)
        for step in range(5):
            give_gradients(params, seed=step)
            optimizer.step()
        assert optimizer._tables.table.fallback is None
        runs.append([t.cpu() for t in snapshot(optimizer, params)])
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"ema": 0.9}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit", "ema": 0.9},
     {"master": "split", "state_dtype": "8bit"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", RULES)
def test_averages_and_narrow_states_have_the_bits_of_the_cpu(name, options, dtype):
    """Their random bits too; a step over an overflow leaves every byte."""
    if "master" in options and dtype != torch.float16:
        pytest.skip("split masters are an option of fp16 weights")
    options = options | ({"momentum": 0.9} if name == "SGD" else {})
    runs = []
    for place in (on_gpu, list):
        params = place(parameters(dtype))
        optimizer = getattr(fastmp.optim, name)(params, lr=0.1, **options)
        for step in range(5):
            give_gradients(params, seed=step)
            if step == 2:
                params[3].grad[7] = torch.inf
            optimizer.step()
        assert optimizer._tables.table.fallback is None
        assert (optimizer.applied_steps, optimizer.skipped_steps) == (4, 1)
        averages = optimizer.averages() if "ema" in options else []
        runs.append([t.cpu() for t in (*snapshot(optimizer, params), *averages)])
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_changed_between_steps_are_taken_as_on_the_cpu(dtype):
    """Clamped in place, zeroed past autograd; the checksums of the weights are the same too."""
    runs = []
    for place in (on_gpu, list):
        params = place(parameters(dtype))
        optimizer = fastmp.optim.SGD(params, lr=0.1, momentum=0.9)
        for step in range(6):
            give_gradients(params, seed=step)
            optimizer.step()
            for p in params:
                p.detach().clamp_(-0.5, 0.5)
            params[3].data[::3] = 0.0
        saved = optimizer.state_dict().get("remainders", {})
        runs.append([t.cpu() for t in (*optimizer.masters(), *saved.values())])
        assert not optimizer.masters()[3][::3].any()
    assert same_bits(*runs)


def test_bf16_weights_changed_just_before_a_capture_are_refused():
    (p,) = on_gpu(parameters(torch.bfloat16, shapes=[(100,)]))
    optimizer = fastmp.optim.SGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.detach().mul_(2)
    with (
        pytest.raises(RuntimeError, match="expected one step before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()
    assert optimizer.applied_steps == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_steps_equal_torchs(dtype):
    ours = on_gpu(parameters(dtype))
    theirs = [p.detach().float().requires_grad_() for p in ours]
    a = fastmp.optim.AdamW(ours, max_grad_norm=0.7)
    b = torch.optim.AdamW(theirs, fused=True)
    for step in range(10):
        give_gradients(ours, theirs, seed=step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        a.step()
        b.step()
    expected = [p.detach() for p in theirs]
    torch.testing.assert_close(masters(a, ours), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replayed_graph_steps_over_an_overflow(dtype):
    """lr from a table, a scaler in the graph: as the same calls without a graph."""
    runs = []
    for graphed in (True, False):
        params = on_gpu(parameters(dtype))
        grads = [torch.empty_like(p) for p in params]
        optimizer = fastmp.optim.AdamW(params, max_grad_norm=1.0)
        optimizer.set_schedule([0.1, 0.2, 0.05])
        scaler = fastmp.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=3)
        scaler.scale(torch.ones((), device="cuda"))

        def step(params=params, grads=grads, scaler=scaler, optimizer=optimizer):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            scaler.step(optimizer)
            scaler.update()

        def give(seed, params=params, grads=grads):
            give_gradients(params, seed=seed)
            for p, grad in zip(params, grads, strict=True):
                grad.copy_(p.grad)
            if seed % 4 == 2:
                grads[3][7] = torch.inf

        give(0)
        step()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for seed in range(1, 9):
            give(seed)
            if graphed:
                graph.replay()
            else:
                step()
        assert (optimizer.applied_steps, optimizer.skipped_steps) == (7, 2)
        state = [scaler._scale, scaler._growth_tracker, optimizer.grad_norm]
        runs.append([*snapshot(optimizer, params), *(t.clone() for t in state)])
    assert same_bits(*runs)


def test_a_captured_step_reads_its_lr_from_the_device():
    (p,) = on_gpu(parameters(shapes=[(100,)]))
    lr = torch.tensor(0.5, device="cuda")
    optimizer = fastmp.optim.SGD([p], lr=lr)
    p.grad = torch.ones_like(p)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = p.detach().clone()
    lr.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(p.detach(), before - 0.25)


def test_a_step_never_waits_for_the_gpu():
    params = on_gpu(parameters(torch.float16))
    optimizer = fastmp.optim.AdamW(params, max_grad_norm=1.0)
    scaler = fastmp.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    give_gradients(params)
    scaler.step(optimizer)
    scaler.update()
    give_gradients(params, seed=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
        scaler.update()
        optimizer.param_groups[0]["lr"] = 0.5
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.applied_steps == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replayed_step_of_muon_steps_over_an_overflow(dtype):
    """Both passes and the iteration between them, without a sync; then as the CPU, to rounding."""
    shapes = [(64, 48), (48, 64), (32, 160), (16, 4, 3, 3), (9,)]
    runs = []
    for mode in ("graph", "loop", "cpu"):
        params = parameters(dtype, shapes) if mode == "cpu" else on_gpu(parameters(dtype, shapes))
        grads = [torch.empty_like(p) for p in params]
        groups = [{"params": params[:4]}, {"params": params[4:], "rule": "adamw"}]
        optimizer = fastmp.optim.Muon(groups, lr=0.02, max_grad_norm=1.0)
        optimizer.set_schedule([0.1, 0.2, 0.05])

        def step(params=params, grads=grads, optimizer=optimizer):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()

        def give(seed, params=params, grads=grads):
            give_gradients(params, seed=seed)
            for p, grad in zip(params, grads, strict=True):
                grad.copy_(p.grad)
            if seed == 2:
                grads[1][3, 3] = torch.inf

        give(0)
        step()
        graph = torch.cuda.CUDAGraph() if mode == "graph" else None
        if graph is not None:
            with torch.cuda.graph(graph):
                step()
        torch.cuda.set_sync_debug_mode("error" if mode == "loop" else "default")
        for seed in range(1, 5):
            torch.cuda.set_sync_debug_mode("default")
            give(seed)
            torch.cuda.set_sync_debug_mode("error" if mode == "loop" else "default")
            graph.replay() if graph is not None else step()
        torch.cuda.set_sync_debug_mode("default")
        assert (optimizer.applied_steps, optimizer.skipped_steps) == (4, 1)
        runs.append([*snapshot(optimizer, params), *optimizer.masters()])
    assert same_bits(runs[0], runs[1])
    for a, b in zip(runs[1][-5:], runs[2][-5:], strict=True):
        assert (a.cpu() - b).norm() <= 0.02 * b.norm()
