"""The CUDA kernel's grid, table and launches."""

import gc
import weakref

import pytest
import torch

import fastmp
from fastmp.backends import registry
from fastmp.backends.cuda import update as backend
from fastmp.ops.update.rules import RULES
from tests.optim.optim_cases import adam_w, give_gradients, masters, parameters, same_bits, snapshot

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def steps(optimizer, params, count=4):
    for step in range(count):
        give_gradients(params, seed=step)
        optimizer.step()
    return [*snapshot(optimizer, params), optimizer.grad_norm.clone()]


def test_rules_have_the_numbers_of_the_header(library):
    assert [n for n in range(100) if library.shim_has_rule(n)] == sorted(RULES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [adam_w, fastmp.optim.SGD, fastmp.optim.Lion])
def test_the_same_bits_as_the_cpu_engine(cpu_engine, monkeypatch, dtype, make):
    """Without a norm in it, the order of the operations is the same."""
    ours = steps(make(p := parameters(dtype), lr=0.1), p)
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    theirs = steps(make(p := parameters(dtype), lr=0.1), p)
    assert same_bits(ours[:-1], theirs[:-1])
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ema", [0.9, [0.5, 0.8, 0.2]], ids=str)
def test_averages_have_the_same_bits(cpu_engine, monkeypatch, dtype, ema):
    ours = steps(adam_w(p := parameters(dtype), ema=ema), p)
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    theirs = steps(adam_w(p := parameters(dtype), ema=ema), p)
    assert same_bits(ours[:-1], theirs[:-1])


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit", "ema": 0.9}], ids=str)
def test_split_fp16_masters_have_the_same_bits(cpu_engine, monkeypatch, options):
    def run():
        params = parameters(torch.float16, [(4097,), (5000,)])
        params[0].data.mul_(2.0**-16)  # subnormal ones
        return steps(adam_w(params, lr=1e-6, master="split", **options), params)[:-1]

    ours = run()
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    assert same_bits(ours, run())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_share_a_long_row_do_each_element_once(cpu_engine, monkeypatch, dtype, offset):
    """40 chunks of one row, of 2 blocks: 8 each are enough."""

    def run():
        (given,) = parameters(dtype, [(40003 + offset,)])
        params = [given.detach()[offset:].requires_grad_()]
        return steps(adam_w(params, lr=0.1), params, 2)[:-1]

    ours = run()
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    assert same_bits(ours, run())


@pytest.mark.parametrize(
    ("make", "options"),
    [(adam_w, {}), (adam_w, {"ema": 0.9}), (adam_w, {"eps": 0.0}), (fastmp.optim.Lion, {})],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_states_of_any_value_have_the_same_bits(
    cpu_engine, monkeypatch, dtype, make, options
):
    """Values in the range of the fast path beside those that it leaves to the general one."""
    small = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    small[:200] *= 1e-36  # ratios whose residual is subnormal
    small[200:400] *= 1e-16  # roots
    small[400:] = 3e-22  # its square is 0: a warp of nothing else

    def run():
        (p,) = params = parameters(dtype, [(20001,)])
        p.data[5::97], p.data[6::97] = 0.0, -0.0
        p.data[4000:4004] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-40])
        p.data[4100:4200] *= 1e-38 if dtype == torch.bfloat16 else 1e-5
        p.data[7008:8008] = 0.0
        optimizer = make(params, lr=1e-2, state_dtype="8bit", skip_nonfinite=False, **options)
        for step in range(3):
            give_gradients(params, seed=step, scale=1e-3)
            p.grad[1024:2048] = 0.0
            p.grad[step::7] *= 1e-20
            p.grad[3000:3100] = -1e-25
            p.grad[5000:5032] = 1e30
            p.grad[7008:8008] = small
            p.grad[6000], p.grad[6064] = torch.inf, torch.nan
            if step == 2:  # beside remainders of other weights
                p.data[8000:8100], p.data[8100:8110] = 0.0, torch.inf
            optimizer.step()
        return [
            t.nan_to_num(nan=1.5) if t.is_floating_point() else t
            for t in snapshot(optimizer, params)
        ]

    ours = run()
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    assert same_bits(ours, run())


@pytest.mark.parametrize("kind", [torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_narrow_states_have_the_same_bits(cpu_engine, monkeypatch, dtype, kind, offset):
    """At aligned addresses, and off them element by element."""

    def run():
        params = [torch.zeros(n + offset, dtype=dtype)[offset:] for n in (4096, 5003, 16385, 7)]
        for given, p in zip(parameters(dtype, [p.shape for p in params]), params, strict=True):
            p.copy_(given.detach())
        params = [p.requires_grad_() for p in params]
        makes = (fastmp.optim.AdamW, fastmp.optim.Lion)
        return [t for m in makes for t in steps(m(params, state_dtype=kind), params, 3)[:-1]]

    ours = run()
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    assert same_bits(ours, run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ema", [None, [0.5, 0.8, 0.2]], ids=str)
def test_muon_has_the_bits_of_the_cpu_engine(cpu_engine, kernel, monkeypatch, dtype, ema):
    """Two launches a step, and an overflow that skips both."""

    def run():
        params = parameters(dtype, [(24, 80), (16, 16), (4, 2, 3, 3), (9,)])
        groups = [{"params": params[:3]}, {"params": params[3:], "rule": "adamw"}]
        optimizer = fastmp.optim.Muon(groups, lr=0.1, ema=ema)
        optimizer.set_schedule([0.1, 0.2, 0.05, 0.3], [0.9, 0.8, 0.7, 0.6])
        state = steps(optimizer, params)
        params[1].grad[0, 0] = torch.inf
        optimizer.step()
        assert (optimizer.applied_steps, optimizer.skipped_steps) == (4, 1)
        return state[:-1] + snapshot(optimizer, params)

    ours = run()
    assert kernel.launches == 4 * 2 + 1
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    assert same_bits(ours, run())


def test_the_norm_does_not_depend_on_the_grid(kernel, monkeypatch):
    monkeypatch.setattr(backend, "MAX_PARTIALS", 17)

    def run(blocks):
        kernel.max_blocks = blocks
        return steps(adam_w(p := parameters(torch.float16), max_grad_norm=0.1), p)

    first = run(1)
    assert same_bits(first, run(2))
    assert same_bits(first, run(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_at_any_address(dtype):
    """Off the 4 elements of an access: a slower path, the same values."""

    def run(offset):
        whole = [torch.zeros(p.numel() + offset, dtype=dtype) for p in parameters(dtype)]
        params = [w[offset:].view(p.shape) for w, p in zip(whole, parameters(dtype), strict=True)]
        for mine, p in zip(params, parameters(dtype), strict=True):
            mine.copy_(p.detach())
            mine.requires_grad_()
        return steps(adam_w(params), params)

    aligned = run(0)
    for offset in (1, 2, 3):
        assert same_bits(aligned[:-1], run(offset)[:-1])


def test_groups_rules_and_dtypes_in_one_launch(kernel):
    ours = [*parameters(torch.float16), *parameters(torch.bfloat16), *parameters(torch.float32)]
    theirs = [p.detach().float().requires_grad_() for p in ours]

    def groups(p):
        return [{"params": p[:10]}, {"params": p[10:], "amsgrad": True, "lr": 0.1}]

    a, b = adam_w(groups(ours)), torch.optim.AdamW(groups(theirs))
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    expected = [p.detach() for p in theirs]
    torch.testing.assert_close(masters(a, ours), expected, rtol=1e-5, atol=1e-6)
    assert kernel.launches == 3


def many_groups():
    """Their addresses fit into the argument of the launch, their hyperparameters do not."""
    params = parameters(shapes=[(3,)] * 12)
    return params, adam_w([{"params": [p], "lr": 1e-3 * i} for i, p in enumerate(params)])


def many_tensors():
    """Their addresses do not fit into the argument of the launch."""
    params = parameters(shapes=[(2,)] * 101)
    return params, adam_w(params)


def test_a_step_of_few_tensors_uploads_nothing(kernel):
    params = parameters()
    optimizer = adam_w(params)
    steps(optimizer, params, 3)
    assert kernel.uploads == 0


@pytest.mark.parametrize("make", [many_groups, many_tensors])
def test_more_words_are_uploaded_only_when_they_changed(kernel, make):
    params, optimizer = make()
    steps(optimizer, params, 1)
    before = kernel.uploads
    for _ in range(3):
        optimizer.step()
    assert kernel.uploads == before  # the same gradients, the same lr
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert kernel.uploads == before + 1
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert kernel.uploads == before + 2


@pytest.mark.parametrize("make", [many_groups, many_tensors])
def test_uploaded_words_give_the_same_bits(cpu_engine, monkeypatch, make):
    params, optimizer = make()
    ours = steps(optimizer, params)
    monkeypatch.setitem(registry._kernels, ("update", "cpu"), cpu_engine)
    params, optimizer = make()
    assert same_bits(ours[:-1], steps(optimizer, params)[:-1])


def test_a_capture_uploads_into_memory_of_its_own(kernel):
    params, optimizer = many_tensors()
    steps(optimizer, params, 1)
    optimizer.step()
    before, captured = kernel.uploads, len(backend._captured)
    kernel.capturing = True
    optimizer.step()
    kernel.capturing = False
    assert kernel.uploads == before  # page-locked memory cannot be asked for then
    host, device, *_ = backend._captured[captured]
    assert torch.equal(host, device)
    assert device.data_ptr() != optimizer._tables.table.kernel._image.data_ptr()


@pytest.mark.parametrize("make", [many_tensors, lambda: (p := parameters(), adam_w(p))])
def test_the_memory_of_a_captured_step_outlives_its_optimizer(kernel, make):
    params, optimizer = make()
    steps(optimizer, params, 1)
    captured = len(backend._captured)
    kernel.capturing = True
    optimizer.step()
    args = optimizer._tables.table.kernel._args
    kept = {t.data_ptr() for held in backend._captured[captured:] for t in held if t is not None}
    words = {args.step_words} - {None}
    assert {args.rows, args.partial_sums, args.partial_nonfinite_rows, *words} <= kept


def test_a_capture_keeps_neither_weights_nor_gradients(kernel):
    params = parameters()
    optimizer = adam_w(params)
    steps(optimizer, params, 1)
    kernel.capturing = True
    optimizer.step()
    kept = [weakref.ref(tensor) for p in params for tensor in (p, p.grad)]
    del optimizer, params
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_step_with_a_scale_and_a_clip_is_one_launch(kernel):
    params = parameters(torch.float16)
    optimizer = adam_w(params, max_grad_norm=1.0)
    scaler = fastmp.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(torch.ones(()))
    for step in range(3):
        give_gradients(params, scale=100.0, seed=step)
        if step == 1:
            params[3].grad[7] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert kernel.launches == 3
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (2, 1)


@pytest.mark.parametrize("seed", range(5))
def test_400_tensors_of_any_size(seed, monkeypatch):
    monkeypatch.setattr(backend, "MAX_PARTIALS", 23)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 9, (400,), generator=generator).pow(4).tolist()
    ours, theirs = (
        parameters(shapes=[(n,) for n in sizes]),
        parameters(shapes=[(n,) for n in sizes]),
    )
    a, b = adam_w(ours, max_grad_norm=0.5), torch.optim.AdamW(theirs)
    for step in range(2):
        give_gradients(ours, theirs, seed=step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
