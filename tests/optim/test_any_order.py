"""Operations in any order: what must not change a run does not, to the bit.

Two optimizers of equal weights get the same gradients, edits and settings. One of them is also
saved, copied, looked at and skipped between.
"""

import copy
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import fastmp
from tests.optim.optim_cases import give_gradients, same_bits

SHAPES = [(5, 3), (4100,), (2, 33, 8, 9), (7,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KINDS = [torch.float32, torch.bfloat16, "8bit"]
DECAYS = [None, 0.9, (0.5, 0.9, 0.99)]
NAMES = ["AdamW", "Adam", "SGD", "Lion", "Muon"]
index = st.integers(0, len(SHAPES) - 1)


class Run:
    """Parameters and an optimizer of them."""

    def __init__(self, name, dtypes, options):
        generator = torch.Generator().manual_seed(0)
        shapes = zip(SHAPES, dtypes, strict=True)
        self.params = [torch.randn(s, generator=generator).to(d) for s, d in shapes]
        self.params[2] = self.params[2].to(memory_format=torch.channels_last)
        for p in self.params:
            p.requires_grad_()
        self.name, self.options = name, options
        self.optimizer = self.make(self.params)

    def make(self, params):
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.03}]
        if self.name == "Muon":
            groups[1]["rule"] = "adamw"
        options = {"momentum": 0.9} if self.name == "SGD" else {}
        return getattr(fastmp.optim, self.name)(groups, lr=1e-2, **options, **self.options)

    def load_into_another(self, state):
        old, copies = self.optimizer, [p.detach().clone() for p in self.params]
        self.params = [p.requires_grad_() for p in copies]
        self.optimizer = self.make(self.params)
        self.optimizer.ema, self.optimizer.state_dtype = old.ema, old.state_dtype
        self.optimizer.max_grad_norm = old.max_grad_norm
        self.optimizer.load_state_dict(state)

    def values(self):
        own = self.optimizer
        states = own.fp32_state_dict()["state"].values()
        moments = [v for s in states for k, v in sorted(s.items()) if k.startswith(("exp", "mom"))]
        averages = [] if own.ema is None else own.averages()
        masters, params = own.masters(), [p.detach() for p in self.params]
        return [*params, *masters, *averages, own.applied_steps, *filter(torch.any, moments)]


# ---- what must not change a run ----


def load_a_file_into_another(run):
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    run.load_into_another(torch.load(file, weights_only=True))


def load_its_own_state(run):
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def replace_by_a_copy(run):
    run.params, run.optimizer = copy.deepcopy((run.params, run.optimizer))


def replace_by_a_pickle(run):
    run.params, run.optimizer = pickle.loads(pickle.dumps((run.params, run.optimizer)))


def go_by_fp32(run):
    own = run.optimizer
    own.state_dtype, kind = torch.float32, own.state_dtype
    own.state_dtype = kind


def swap_averages_in(run):
    if run.optimizer.ema is not None:
        with run.optimizer.averaged():
            pass


def load_its_own_averages(run):
    if run.optimizer.ema is not None:
        run.optimizer.load_averages(run.optimizer.averages())


def read(run):
    run.values()
    dict(run.optimizer.state)


def load_its_own_masters(run):
    run.optimizer.load_masters(run.optimizer.masters())


def skip_a_step(run):
    for p in run.params:
        p.grad = torch.full_like(p, torch.nan)
    run.optimizer.step()


def step_without_gradients(run):
    for p in run.params:
        p.grad = None
    run.optimizer.step()


#: Edits and new settings count from the next step on, skipped or not, or from what is loaded.
WHEN_SETTLED = [load_its_own_masters, load_its_own_averages, skip_a_step, step_without_gradients]
LOADS = [load_a_file_into_another, load_its_own_state, replace_by_a_copy, replace_by_a_pickle]
DISTURBANCES = [go_by_fp32, swap_averages_in, read, *LOADS, *WHEN_SETTLED]


class AnyOrder(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(NAMES),
        dtypes=st.lists(st.sampled_from(DTYPES), min_size=len(SHAPES), max_size=len(SHAPES)),
        kind=st.sampled_from(KINDS),
        ema=st.sampled_from(DECAYS),
        master=st.sampled_from([None, "split"]),
    )
    def begin(self, name, dtypes, kind, ema, master):
        options = {"state_dtype": kind, "ema": ema, "master": master}
        self.plain, self.disturbed = (Run(name, dtypes, options) for _ in range(2))
        self.runs = [self.plain, self.disturbed]
        self.settled = False  # every parameter was stepped since the last edit or new setting
        self.loaded = False  # and not stepped since then
        self.seed = 0

    # ---- a run ----

    @rule(
        scale=st.sampled_from([1e-3, 1.0, 30.0]),
        without=st.sets(index, max_size=2),
        bad=st.sampled_from([False, False, False, True]),
        at=index,
        loss_scale=st.sampled_from([None, 128.0]),
    )
    def step(self, scale, without, bad, at, loss_scale):
        self.seed += 1
        for run in self.runs:
            give_gradients(run.params, scale=scale, seed=self.seed)
            for i in without:
                run.params[i].grad = None
            if bad and at not in without:
                run.params[at].grad.fill_(torch.inf)
            run.optimizer.step_context.grad_scale = loss_scale and torch.tensor(loss_scale)
            run.optimizer.step()
            run.optimizer.step_context.grad_scale = None
        if not (without or bad):
            self.settled, self.loaded = True, False

    @rule(i=index, first=st.booleans())
    def edit(self, i, first):
        """The first one drops all remainders of a weight, and one between a load and a step."""
        if self.loaded:
            return
        for run in self.runs:
            with torch.no_grad():
                run.params[i][:1].fill_(0.25) if first else run.params[i].mul_(0.5)
        self.settled = False

    @rule(dtype=st.sampled_from(DTYPES[:3]))
    def cast(self, dtype):
        """Of an edited 16-bit weight another one has fewer bits than a file of it: fp32 then."""
        for p in self.plain.params + self.disturbed.params:
            if p.dtype != torch.float64 and (self.settled or torch.float32 in (p.dtype, dtype)):
                p.grad, p.data = None, p.data.to(dtype)
        self.settled = False

    @rule(
        kind=st.sampled_from(KINDS), ema=st.sampled_from(DECAYS), norm=st.sampled_from([None, 1.0])
    )
    def set_options(self, kind, ema, norm):
        for run in self.runs:
            run.optimizer.state_dtype, run.optimizer.ema = kind, ema
            run.optimizer.max_grad_norm = norm
        self.settled = False

    @rule(lr=st.sampled_from([1e-2, 1e-3]), decay=st.sampled_from([0.0, 0.1]))
    def set_rates(self, lr, decay):
        for run in self.runs:
            for group in run.optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay

    # ---- what must not change it ----

    @rule(disturb=st.sampled_from(DISTURBANCES))
    def disturb(self, disturb):
        if self.settled or disturb not in WHEN_SETTLED:
            disturb(self.disturbed)
            self.loaded = self.loaded or disturb in LOADS

    @invariant()
    def equal_bits(self):
        if hasattr(self, "runs"):
            assert same_bits(self.plain.values(), self.disturbed.values())


AnyOrder.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
