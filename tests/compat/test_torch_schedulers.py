"""All of torch's schedulers on our optimizers and on torch's, with states exchanged midway."""

import copy
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as torchs
from torch.optim.swa_utils import SWALR

import fastmp

STEPS = 24

SCHEDULERS = {
    "LambdaLR": partial(torchs.LambdaLR, lr_lambda=lambda s: 0.9**s),
    "MultiplicativeLR": partial(torchs.MultiplicativeLR, lr_lambda=lambda s: 0.95),
    "StepLR": partial(torchs.StepLR, step_size=5, gamma=0.5),
    "MultiStepLR": partial(torchs.MultiStepLR, milestones=[4, 9, 20], gamma=0.3),
    "ConstantLR": partial(torchs.ConstantLR, factor=0.3, total_iters=6),
    "LinearLR": partial(torchs.LinearLR, start_factor=0.1, total_iters=8),
    "ExponentialLR": partial(torchs.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(torchs.PolynomialLR, total_iters=20, power=2.0),
    "CosineAnnealingLR": partial(torchs.CosineAnnealingLR, T_max=STEPS, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": partial(torchs.CosineAnnealingWarmRestarts, T_0=5, T_mult=2),
    "CyclicLR": partial(torchs.CyclicLR, base_lr=1e-3, max_lr=0.1, step_size_up=5),
    "OneCycleLR": partial(torchs.OneCycleLR, max_lr=0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": partial(torchs.ReduceLROnPlateau, patience=1, factor=0.5),
    "SequentialLR": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=5), torchs.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler(
        [torchs.LinearLR(o, 0.1, total_iters=5), torchs.StepLR(o, 7)], o
    ),
    "SWALR": partial(SWALR, swa_lr=0.002, anneal_epochs=6),
}

OPTIMIZERS = [
    pytest.param("AdamW", {"lr": 0.01}, id="AdamW"),
    pytest.param("AdamW", {"lr": torch.tensor(0.01)}, id="AdamW-tensor-lr"),
    pytest.param("Adam", {"lr": 0.01, "amsgrad": True}, id="Adam-amsgrad"),
    pytest.param("SGD", {"lr": 0.01, "momentum": 0.9}, id="SGD"),
]


def test_no_scheduler_is_missing():
    """Fails on a torch with a new scheduler."""
    assert {*SCHEDULERS} == {*torchs.__all__, "SWALR"} - {"LRScheduler"}


class Run:
    """Two groups at different rates, the scheduler under test, gradients by the step's number."""

    def __init__(self, module, name, options, scheduler):
        # A fresh tensor for each: schedulers write into it.
        options = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
        self.params = [torch.linspace(-1, 1, n, requires_grad=True) for n in (33, 7, 1)]
        slow = {"params": self.params[1:], "lr": options["lr"] / 10}
        groups = [{"params": self.params[:1]}, slow]
        self.optimizer = getattr(module, name)(groups, **options)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def train(self, steps):
        """The lr and momenta of each group, a row per step."""
        rows = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in self.params:
                p.grad = torch.randn(p.shape, generator=generator)
            groups = self.optimizer.param_groups
            rows.append([(float(g["lr"]), g.get("momentum", g.get("betas"))) for g in groups])
            self.optimizer.step()
            plateau = isinstance(self.scheduler, torchs.ReduceLROnPlateau)
            self.scheduler.step(1.0) if plateau else self.scheduler.step()
        return rows

    def load(self, other):
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)
        # Copies: a loaded optimizer of torch's shares its tensors with the state it was given.
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.scheduler.load_state_dict(copy.deepcopy(other.scheduler.state_dict()))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter")
def test_rates_equal_torchs_bitwise_across_exchanged_states(name, options, scheduler):
    ours, theirs = (Run(m, name, options, scheduler) for m in (fastmp.optim, torch.optim))
    half = range(STEPS // 2)
    rates = theirs.train(half)
    assert ours.train(half) == rates
    assert len({row[0] for row in rates}) > 1  # the schedule changes the rate
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-5, atol=1e-6)
    ours_loaded, torch_loaded = (
        Run(m, name, options, scheduler) for m in (fastmp.optim, torch.optim)
    )
    ours_loaded.load(theirs)
    torch_loaded.load(ours)
    rest = range(STEPS // 2, STEPS)
    rates = theirs.train(rest)
    assert ours.train(rest) == ours_loaded.train(rest) == torch_loaded.train(rest) == rates
    for run in (ours, ours_loaded, torch_loaded):
        torch.testing.assert_close(run.params, theirs.params, rtol=1e-5, atol=1e-6)
