"""bf16 weights changed from outside, and loaded: which remainders still belong to them."""

import copy
import pickle

import pytest
import torch

import fastmp
from fastmp.optim.remainders import checksum
from tests.optim.optim_cases import adam_w, give_gradients, parameters, same_bits, snapshot, steps
from tests.optim.test_edited_weights import (
    OPTIMIZERS,
    assert_masters,
    beside_torch,
    edit_some,
    in_place,
    load,
    optimizers,
)

routes = pytest.mark.parametrize("route", [in_place, load])


def trained(count=3, **options):
    params = parameters(torch.bfloat16)
    optimizer = adam_w(params, **options)
    steps(optimizer, params, count)
    return optimizer, params


def copies(params):
    return [p.detach().clone().requires_grad_() for p in params]


def widened(params):
    return [p.detach().float() for p in params]


@optimizers
@routes
def test_the_first_edit_drops_the_remainders_and_later_ones_go_by_element(name, route):
    """Against torch in fp32, rounded where the first edit rounds."""
    ours = parameters(torch.bfloat16)
    a, theirs, b = beside_torch(name, ours)
    for step in range(9):
        give_gradients(ours, theirs, seed=step)
        if step == 1:
            for p, q in zip(ours, theirs, strict=True):
                in_place(q, p.float())
        if step % 2 == 1:
            edit_some(ours, theirs, route, step)
        assert_masters(a, theirs)
        a.step()
        b.step()


def test_a_mask_applied_every_step_leaves_the_other_weights_their_remainders():
    """1,000 steps of 1e-5 of the weight: without remainders not one of them would show."""
    p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.arange(64) % 2
    optimizer = fastmp.optim.SGD([p], lr=1e-5)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.no_grad():
            p.mul_(mask)
    (master,) = optimizer.masters()
    assert not master[mask == 0].any()
    torch.testing.assert_close(master[mask == 1], torch.full((32,), 0.99), rtol=0, atol=1e-4)


def test_an_edit_while_a_weight_has_no_gradient_is_seen():
    optimizer, params = trained()
    in_place(params[3], 3.0)
    params[3].grad = None
    optimizer.step()
    assert (optimizer.masters()[3] == 3.0).all()
    params[3].grad = torch.zeros_like(params[3])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert (optimizer.masters()[3] == 3.0).all()


def test_masters_and_saved_state_are_those_of_the_weights_between_steps():
    optimizer, params = trained()
    in_place(params[3], params[3] * 2)
    expected = params[3].detach().float()
    assert torch.equal(optimizer.masters()[3], expected)
    other = adam_w(copies(params))
    saved = optimizer.state_dict()
    assert saved["remainders"]["edited"].tolist() == [i == 3 for i in range(len(params))]
    other.load_state_dict(saved)
    assert torch.equal(other.masters()[3], expected)
    assert same_bits(other.masters(), optimizer.masters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_moved_to_a_parameter_that_replaces_its_own(name):
    """As code does that prunes or grows a model: state and group get the new parameter."""
    (old,) = parameters(torch.bfloat16, [(97, 3)])
    optimizer = getattr(fastmp.optim, name)([old], lr=1e-2, **OPTIMIZERS[name])
    steps(optimizer, [old], 3)
    (new,) = parameters(torch.bfloat16, [(97, 3)], seed=5)
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"][0] = new
    assert same_bits(optimizer.masters(), widened([new]))
    optimizer.param_groups[0]["lr"] = 0.0
    steps(optimizer, [new], 1, first=3)
    assert same_bits(optimizer.masters(), widened([new]))
    optimizer.param_groups[0]["lr"] = 1e-2
    steps(optimizer, [new], 1, first=4)
    assert not same_bits(optimizer.masters(), widened([new]))


def test_load_masters_is_no_edit():
    optimizer, params = trained()
    fine = [m * 1.0001 for m in optimizer.masters()]
    optimizer.load_masters(fine)
    assert same_bits(optimizer.masters(), fine)
    in_place(params[3], params[3] * 2)
    assert torch.equal(optimizer.masters()[3], params[3].detach().float())
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert same_bits(optimizer.masters()[4:], fine[4:])


@pytest.mark.parametrize("first", [torch.inf, 1.0], ids=["skipped", "applied"])
def test_a_reference_step_is_no_edit(first):
    """Weights with gaps have no kernel. A step that is skipped raises versions by fewer."""
    whole = torch.ones(6, 8, dtype=torch.bfloat16)
    p = whole[:, ::2].requires_grad_()
    optimizer = fastmp.optim.SGD([p], lr=1e-5)
    p.grad = torch.full_like(p, first)
    optimizer.step()
    for _ in range(100 - int(optimizer.applied_steps)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer._tables.table.fallback is not None
    (master,) = optimizer.masters()
    torch.testing.assert_close(master, torch.full((6, 4), 0.999), rtol=0, atol=3e-6)


# ---- saving and loading ----


def resumed(optimizer, params, how):
    """The optimizer and its weights in another process; ``how``: the order of loading."""
    saved = copy.deepcopy(optimizer.state_dict())
    own = parameters(torch.bfloat16, seed=9)
    again = adam_w(own)
    if how == "optimizer first":
        again.load_state_dict(saved)
    for p, value in zip(own, params, strict=True):
        load(p, value.detach())
    if how != "optimizer first":
        again.load_state_dict(saved)
    if how == "broadcast":
        for p in own:
            in_place(p, p.detach().clone())
    return again, own


@pytest.mark.parametrize("how", ["weights first", "optimizer first", "broadcast"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loaded_run_goes_on_to_the_bit(how, masked):
    """Whatever is loaded first, DDP's broadcast between, and a mask applied every step."""

    def run(optimizer, params, first, last):
        for step in range(first, last):
            steps(optimizer, params, 1, first=step)
            for p in params if masked else ():
                in_place(p, p.detach() * (torch.arange(p.numel()).view(p.shape) % 2))

    optimizer, params = trained(0)
    run(optimizer, params, 0, 4)
    again, own = resumed(optimizer, params, how)
    assert same_bits(again.masters(), optimizer.masters())
    run(optimizer, params, 4, 8)
    run(again, own, 4, 8)
    assert same_bits(snapshot(optimizer, params), snapshot(again, own))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copied_optimizer_sees_edits_before_its_first_step(how):
    optimizer, _ = trained()
    again = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
    own = again.param_groups[0]["params"]
    assert same_bits(again.masters(), optimizer.masters())
    in_place(own[3], own[3] * 2)
    assert torch.equal(again.masters()[3], own[3].detach().float())


@pytest.mark.parametrize("how", ["weights first", "optimizer first"])
def test_other_weights_than_the_states_have_no_remainders(how):
    optimizer, params = trained()
    others = [torch.randn(p.shape).bfloat16() for p in params]
    again, own = resumed(optimizer, others, how)
    assert same_bits(again.masters(), widened(others))
    saved = again.state_dict()  # of weights that may still come: it keeps what it has
    assert same_bits(
        [s["remainder"] for s in saved["state"].values()],
        [s["remainder"] for s in optimizer.state_dict()["state"].values()],
    )
    for p in own:
        p.grad = torch.zeros_like(p)
    again.param_groups[0].update(lr=0.0)
    again.step()
    assert same_bits(again.masters(), widened(others))


def test_state_without_checksums_is_loaded_with_its_remainders():
    optimizer, params = trained()
    saved = optimizer.state_dict()
    del saved["remainders"]
    again = adam_w(copies(params))
    again.load_state_dict(saved)
    assert same_bits(again.masters(), optimizer.masters())


def test_a_checksum_depends_on_every_bit_and_its_place_and_not_on_strides():
    weight = torch.randn(7, 3, 5, 5).bfloat16()
    expected = checksum(weight)
    assert expected.dtype == torch.int64
    assert checksum(weight.to(memory_format=torch.channels_last)) == expected
    assert checksum(weight[1:]) == checksum(weight[1:].clone())
    seen = {int(expected)}
    for i in range(weight.numel()):
        for bit in (0, 15):
            flipped = weight.clone()
            flipped.view(torch.int16).view(-1)[i] ^= 1 << bit if bit < 15 else -(2**15)
            seen.add(int(checksum(flipped)))
    seen.add(int(checksum(weight.flip(0))))
    assert len(seen) == 2 * weight.numel() + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pruned_layer_stays_pruned_through_the_trainer(dtype, tmp_path):
    """Half of a layer masked after every step; a run that was saved and loaded ends in its bits."""

    def made():
        torch.manual_seed(0)
        model = fastmp.convert(
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)), dtype
        )
        optimizer = adam_w(model.parameters(), lr=1e-3)
        masked = model[0].weight
        optimizer.register_step_post_hook(lambda *_: in_place(masked, masked * kept))
        scaler = fastmp.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        criterion = fastmp.nn.CrossEntropyLoss()
        return fastmp.Trainer(model, optimizer, criterion, scaler=scaler, progress=False)

    kept = torch.arange(32).view(8, 4) % 2
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(8, 4, generator=generator).to(dtype),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(4)
    ]
    whole, first, second = made(), made(), made()
    for group in batches:
        whole.train_step([group])
    for group in batches[:2]:
        first.train_step([group])
    first.save(tmp_path / "saved")
    second.resume(tmp_path / "saved")
    for group in batches[2:]:
        second.train_step([group])
    assert same_bits(whole.optimizer.masters(), second.optimizer.masters())
    assert not second.optimizer.masters()[0][kept == 0].any()
