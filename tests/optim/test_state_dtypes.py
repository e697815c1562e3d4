"""State of an optimizer under another dtype than it was made under: the value it stands for."""

import copy
import itertools

import pytest
import torch

import fastmp
from fastmp.ops.update import split_master
from tests.optim.optim_cases import give_gradients, parameters, same_bits, steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PAIRS = list(itertools.permutations(DTYPES, 2))
SHAPES = [(97, 173), (0,), (5,)]
directions = pytest.mark.parametrize(
    ("old", "new"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
OPTIMIZERS = {
    "AdamW": {"lr": 1e-3, "amsgrad": True},
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "Lion": {"lr": 1e-3},
}


def trained(dtype, name="AdamW"):
    params = parameters(dtype, SHAPES)
    optimizer = getattr(fastmp.optim, name)(params, **OPTIMIZERS[name])
    steps(optimizer, params)
    return optimizer, params


def loaded_into(params, dtype):
    """Weights in ``dtype`` as a model's ``load_state_dict`` leaves them there."""
    return [p.detach().to(dtype, copy=True).requires_grad_() for p in params]


def expected_masters(optimizer, params, dtype):
    """The fp32 value where the old state has one, else the weight; both held by ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = optimizer.masters()
    if params[0].dtype.itemsize > 2:  # the weights are the values: nothing finer is in the state
        exact = [value.to(dtype) for value in exact]
    return [value.to(wide) for value in exact]


def rounded(master, dtype):
    """A split master between two bf16 numbers rounds away from zero."""
    return split_master(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


def check(optimizer, params, exact, moments):
    """Masters, weights and moments are those of the old run, none of them rounded."""
    assert same_bits(exact, optimizer.masters())
    assert same_bits([rounded(m, p.dtype) for m, p in zip(exact, params, strict=True)], params)
    for p, old in zip(params, moments, strict=True):
        for key, value in old.items():
            assert torch.equal(optimizer.state[p][key].double(), value.double())


def moments_of(optimizer, params):
    kept = [copy.deepcopy(optimizer.state[p]) for p in params]
    return [{k: v for k, v in s.items() if k not in ("master", "remainder")} for s in kept]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@directions
def test_a_loaded_state_is_the_value_it_stands_for(old, new, order, name):
    before, weights = trained(old, name)
    exact = expected_masters(before, weights, new)
    if old == torch.float64:
        for p in weights:  # what an fp32 moment can hold
            for value in before.state[p].values():
                value.copy_(value.float())
    moments = moments_of(before, weights)
    params = parameters(new, SHAPES, seed=5)
    optimizer = getattr(fastmp.optim, name)(params, **OPTIMIZERS[name])
    steps(optimizer, params, 1)  # a state of its own, which must go
    loads = [
        lambda: [p.data.copy_(w) for p, w in zip(params, weights, strict=True)],
        lambda: optimizer.load_state_dict(copy.deepcopy(before.state_dict())),
    ]
    for load in loads if order == "model first" else reversed(loads):
        load()
    check(optimizer, params, exact, moments)


@directions
def test_the_first_step_and_the_saved_state_start_from_it(old, new):
    """As a run that was given these masters to begin with."""
    before, weights = trained(old)
    exact = expected_masters(before, weights, new)
    runs = []
    for given in (False, True):
        params = loaded_into(weights, new)
        optimizer = fastmp.optim.AdamW(params, **OPTIMIZERS["AdamW"])
        optimizer.load_state_dict(before.state_dict())
        if given:
            optimizer.load_masters(exact)
        else:
            saved = [sorted(state) for state in optimizer.state_dict()["state"].values()]
            foreign = {"master", "remainder"} - {fastmp.optim.state.MASTER_KEYS.get(new)}
            assert not foreign & set(itertools.chain(*saved))
        give_gradients(params, seed=9)
        optimizer.step()
        runs.append([*params, *optimizer.masters()])
    assert same_bits(*runs)


@directions
def test_a_model_that_is_cast_under_its_optimizer_keeps_the_value(old, new):
    """``model.float()``, ``.half()``, ``.bfloat16()`` after training."""
    optimizer, params = trained(old)
    exact = expected_masters(optimizer, params, new)
    for p in params:
        p.grad = None
        p.data = p.data.to(new)
    reference = loaded_into(params, new)
    given = fastmp.optim.AdamW(reference, **OPTIMIZERS["AdamW"])
    given.load_state_dict(optimizer.state_dict())
    given.load_masters(exact)
    give_gradients(params, reference, seed=9)
    for each in (optimizer, given):
        each.step()
    assert same_bits([*params, *optimizer.masters()], [*reference, *given.masters()])


@directions
def test_a_weight_that_is_not_the_saved_one_counts(old, new):
    """Pruned, replaced and infinite weights between saving and loading; others keep their value."""
    before, weights = trained(old)
    exact = expected_masters(before, weights, new)[0]
    params = loaded_into(weights, new)
    for row, value in enumerate((0.0, 3.1426, torch.inf)):
        params[0].data[row] = value
    optimizer = fastmp.optim.AdamW(params, **OPTIMIZERS["AdamW"])
    optimizer.load_state_dict(before.state_dict())
    present = params[0].detach().clone()
    master = optimizer.masters()[0]
    if old == torch.bfloat16 and new != torch.float16:  # a checksum tells, of the whole tensor
        assert torch.equal(master, present)
    else:
        assert same_bits([exact[3:]], [master[3:]])
    assert torch.equal(master[:3].to(new), present[:3])
    assert not master[0].any()


@pytest.mark.parametrize("old", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_optimizer_in_between_leaves_no_stale_master(old, dtype):
    """It knows neither masters nor remainders: it casts them, and its steps do not keep them."""
    before, weights = trained(old)
    theirs = loaded_into(weights, dtype)
    torchs = torch.optim.AdamW(theirs, **OPTIMIZERS["AdamW"])
    torchs.load_state_dict(copy.deepcopy(before.state_dict()))
    steps(torchs, theirs, 2)
    params = loaded_into(theirs, torch.float32)
    optimizer = fastmp.optim.AdamW(params, **OPTIMIZERS["AdamW"])
    optimizer.load_state_dict(torchs.state_dict())
    assert same_bits([p.detach().float() for p in theirs], optimizer.masters())
