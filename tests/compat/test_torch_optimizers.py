"""torch's own optimizer cases on ours: inputs, error inputs, schedulers of its own tests.

They come from ``torch.testing._internal.common_optimizers.optim_db``, for CPU and CUDA, in every
dtype that trains. The reference is torch's optimizer on the same parameters and gradients, in fp32
for 16-bit parameters, as ours have fp32 masters.
"""

import copy
import pickle
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastmp

common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch ships it; it needs expecttest"
)

INFOS = {info.name: info for info in common.optim_db if info.name in ("Adam", "AdamW", "SGD")}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Cases of torch, here and in test_torch_operators, that are left out or changed: the reason and
# the test that covers it.
SKIPPED = {
    "foreach, fused": ("torch's choices among its own: taken, no effect", "test_steps_are_torchs"),
    "capturable on a CPU": ("torch refuses it: compared without", "test_steps_are_torchs"),
    "sparse": ("an error", "test_sparse_gradients_are_refused_before_anything_changes"),
    "complex, differentiable": ("an error", "test_errors_of_our_own"),
    "second derivatives of cross_entropy": ("an error", "test_double_backward_says_no"),
    "torch.jit.script of an operator": ("deprecated by torch; it can be traced", "test_jit"),
}


def test_every_skip_is_shown_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [test for _, test in SKIPPED.values() if f"\ndef {test}(" not in tests] == []


def cases():
    """(name, arguments, description): every constructor call of torch's tests, CPU and CUDA."""
    for name, info in INFOS.items():
        seen = []
        for device in ("cpu", "cuda"):
            for given in info.optim_inputs_func(device):
                if given.desc not in seen:
                    seen.append(given.desc)
                    yield pytest.param(name, given.kwargs, id=f"{name}-{given.desc}")


every_case = pytest.mark.parametrize(("name", "options"), list(cases()))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def ours(name, params, options):
    return getattr(fastmp.optim, name)(params, **copy.deepcopy(options))


def torchs(name, params, options):
    # torch refuses capturable on a CPU, and tensor betas without it
    plain = {k: v for k, v in copy.deepcopy(options).items() if k != "capturable"}
    if "betas" in plain:
        plain["betas"] = tuple(float(beta) for beta in plain["betas"])
    return getattr(torch.optim, name)(params, **plain)


def parameters(dtype, wide=None):
    """As in torch's tests: a matrix, a vector and a number; gradients come with ``grads``."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(s, generator=generator) for s in ((5, 7), (11,), ())]
    return [v.to(dtype).to(wide or dtype).requires_grad_() for v in values]


def grads(params, step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)


def run(optimizer, params, steps, dtype):
    for step in steps:
        grads(params, step, dtype)
        optimizer.step()


def values(optimizer, params):
    """The fp32 values of the weights: masters of 16-bit ones."""
    found = []
    for p in params:
        state = optimizer.state[p]
        value = p.detach()
        if "remainder" in state:
            value = fastmp.ops.update.join_master(value, state["remainder"])
        found.append(state.get("master", value).clone())
    return found


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def pair(name, options, dtype):
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    mine, theirs = parameters(dtype), parameters(dtype, wide)
    return mine, ours(name, mine, options), theirs, torchs(name, theirs, options)


@every_dtype
@every_case
def test_steps_are_torchs(name, options, dtype):
    mine, a, theirs, b = pair(name, options, dtype)
    run(a, mine, range(6), dtype)
    run(b, theirs, range(6), dtype)
    agree(values(a, mine), [p.detach() for p in theirs])
    for p, w in zip(mine, values(a, mine), strict=True):
        assert torch.equal(p.detach(), w.to(dtype)) or dtype == torch.bfloat16


@every_case
def test_state_goes_to_torch_and_back(name, options):
    """Three steps of ours, three of torch's, three of ours equal nine of torch's."""
    mine, a, theirs, b = pair(name, options, torch.float32)
    run(b, theirs, range(9), torch.float32)
    run(a, mine, range(3), torch.float32)
    guest = torchs(name, mine, options)
    guest.load_state_dict(a.state_dict())
    for group in guest.param_groups:
        group["capturable"] = False  # torch's own is refused on a CPU
    run(guest, mine, range(3, 6), torch.float32)
    again = ours(name, mine, options)
    again.load_state_dict(guest.state_dict())
    run(again, mine, range(6, 9), torch.float32)
    agree(values(again, mine), [p.detach() for p in theirs])


@every_dtype
@every_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_to_the_bit(name, options, dtype, how):
    params = parameters(dtype)
    optimizer = ours(name, params, options)
    run(optimizer, params, range(3), dtype)
    if how == "state_dict":
        twins = [p.detach().clone().requires_grad_() for p in params]
        twin = ours(name, twins, options)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        made = copy.deepcopy if how == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        twin = made(optimizer)
        twins = [p for group in twin.param_groups for p in group["params"]]
    run(optimizer, params, range(3, 6), dtype)
    run(twin, twins, range(3, 6), dtype)
    for a, b in zip(params, twins, strict=True):
        assert a is not b
        assert torch.equal(a, b)


@every_case
def test_param_groups_and_names(name, options):
    """Two groups with an lr each, of (name, tensor) pairs; one more group comes in mid-run."""

    def groups(params):
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        lr = 0.01 if not isinstance(options.get("lr"), torch.Tensor) else torch.tensor(0.01)
        return [{"params": named[:1], "lr": lr}, {"params": named[1:2]}], {"params": named[2:]}

    mine, theirs = parameters(torch.float32), parameters(torch.float32)
    found = []
    for make, params in ((ours, mine), (torchs, theirs)):
        first, later = groups(params)
        optimizer = make(name, first, options)
        run(optimizer, params, range(3), torch.float32)
        optimizer.add_param_group(later)
        run(optimizer, params, range(3, 6), torch.float32)
        found.append(optimizer)
    agree([p.detach() for p in mine], [p.detach() for p in theirs])
    a, b = (optimizer.state_dict()["param_groups"] for optimizer in found)
    for one, other in zip(a, b, strict=True):
        assert one["param_names"] == other["param_names"]
        assert set(other) <= set(one)


@pytest.mark.parametrize("name", INFOS)
def test_schedulers_of_torchs_cases(name):
    """Each of torch's own lists of schedulers, chained as torch chains them."""
    for makers in INFOS[name].scheduler_inputs:
        mine, theirs = parameters(torch.float32), parameters(torch.float32)
        rates = []
        for make, params in ((ours, mine), (torchs, theirs)):
            optimizer = make(name, params, {"lr": 0.01})
            schedulers = [maker(optimizer) for maker in makers]
            seen = []
            for step in range(12):
                run(optimizer, params, [step], torch.float32)
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(1.0) if plateau else scheduler.step()
                seen.append(optimizer.param_groups[0]["lr"])
            rates.append(seen)
        assert rates[0] == rates[1]
        agree([p.detach() for p in mine], [p.detach() for p in theirs])


ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors_are_torchs(name, error):
    given = error.optimizer_error_input
    params = parameters(torch.float32) if given.params is None else given.params
    make = partial(getattr(fastmp.optim, name), params, **given.kwargs)
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            make()
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            make()


@pytest.mark.parametrize("name", INFOS)
def test_every_hook_runs(name):
    """Of step, state_dict and load_state_dict, on one optimizer and on all, before and after."""
    params = parameters(torch.float32)
    optimizer = ours(name, params, {"lr": 0.01})
    called = []

    def hook(label):
        def run(*_):
            called.append(label)

        return run

    handles = [
        optimizer.register_step_pre_hook(hook("step pre")),
        optimizer.register_step_post_hook(hook("step post")),
        optimizer.register_state_dict_pre_hook(hook("state pre")),
        optimizer.register_state_dict_post_hook(hook("state post")),
        optimizer.register_load_state_dict_pre_hook(hook("load pre")),
        optimizer.register_load_state_dict_post_hook(hook("load post")),
        register_optimizer_step_pre_hook(hook("all pre")),
        register_optimizer_step_post_hook(hook("all post")),
    ]
    try:
        run(optimizer, params, range(1), torch.float32)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    assert called == [
        "all pre", "step pre", "step post", "all post",
        "state pre", "state post", "load pre", "load post",
    ]  # fmt: skip
    run(optimizer, params, range(1), torch.float32)
    assert len(called) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_a_compiled_step_is_the_step(name, dtype):
    mine, theirs = parameters(dtype), parameters(dtype)
    eager, compiled = (ours(name, p, {"lr": 0.01}) for p in (mine, theirs))
    step = torch.compile(compiled.step)
    for number in range(3):
        run(eager, mine, [number], dtype)
        grads(theirs, number, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.compile's own
            step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
