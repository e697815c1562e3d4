"""When a step is recorded, replayed and recorded again; a recorder without a device."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch.utils._pytree import tree_unflatten

import fastmp
from fastmp import amp
from fastmp.schedule import OneCycle
from fastmp.training.cuda_graph import MAX_CHANGES, Graphed, Unsupported
from fastmp.training.graph_constants import GraphConstants

OPTIMIZERS = ("SGD", "Adam", "AdamW", "Lion")


class Recorder:
    """Writes down what each call was; a replay runs the step, and fails if a constant has changed.

    ``read`` gives what a recorded launch would hold. A pool whose graphs are all gone is refused,
    as torch does.
    """

    def __init__(self, read, refusal=""):
        self.read, self.refusal, self.log = read, refusal, []
        self.after_replay = lambda: None

    def new_pool(self):
        self.graphs = []

    def run(self, step, inputs):
        self.log.append("run")
        return step(inputs)

    def watch(self, step, inputs):
        self.log.append("watch")
        return step(inputs), self.refusal

    def capture(self, step, leaves, spec):
        self.log.append("capture")
        held = self.read()
        assert not self.graphs or any(graph() for graph in self.graphs), "a pool without a graph"

        def replay(leaves):
            self.log.append("replay")
            assert self.read() == held, "a replay with other constants than were recorded"
            outputs = step(tree_unflatten(leaves, spec))
            self.after_replay()
            return outputs

        self.graphs.append(weakref.ref(replay))
        return replay


class Loop:
    """A training step of one's own: model, optimizer, scaler; graphed, and a twin that is not."""

    def __init__(self, name="AdamW", dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = amp.convert(torch.nn.Sequential(torch.nn.Linear(4, 3)), dtype)
        self.late = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.dtype = dtype
        kind = getattr(fastmp.optim, name)
        self.optimizer = kind(self.model.parameters(), lr=0.1, weight_decay=0.1, **options)
        enabled = dtype == torch.float16
        self.scaler = amp.GradScaler("cpu", init_scale=4.0, growth_interval=3, enabled=enabled)
        self.recorder = Recorder(self.read)
        self.constants = GraphConstants([self.optimizer], [self.model], [self.scaler])
        self.graphed = Graphed(self.step, self.recorder, self.constants)
        self.recorder.after_replay = self.leave_the_host_alone

    def leave_the_host_alone(self):
        """As a replay on a device does: versions of weights stay."""
        self.graphed._held = self.graphed._now()

    def read(self):
        """The constants of a launch, read independently of ``GraphConstants``."""
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors = [t for p in params for t in (p, *self.optimizer.state[p].values())]
        return (
            copy.deepcopy(groups),
            [t.data_ptr() for t in tensors],
            [p.requires_grad for p in params],
            self.optimizer.max_grad_norm,
            self.model.training,
            self.scaler.get_growth_factor() if self.scaler.is_enabled() else 0,
        )

    def step(self, x):
        out = self.model(x) + self.late
        loss = out.float().square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.late.grad = None if self.late not in self.optimizer.state else self.late.grad
        return loss.detach()


def inputs(rows=2, dtype=torch.float32):
    return torch.linspace(-1, 1, rows * 4).reshape(rows, 4).to(dtype)


def set_group(key, value):
    def change(loop):
        loop.optimizer.param_groups[0][key] = value

    return change


def load_state(loop):
    loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))


def write_weight(loop):
    with torch.no_grad():
        loop.model[0].weight.mul_(0.5)


def replace_weight(loop):
    loop.model[0].weight.data = loop.model[0].weight.data.clone()


CHANGES = {
    "lr": set_group("lr", 0.01),
    "weight_decay": set_group("weight_decay", 0.5),
    "group": lambda loop: loop.optimizer.add_param_group({"params": [loop.late]}),
    "clip": lambda loop: setattr(loop.optimizer, "max_grad_norm", 0.01),
    "freeze": lambda loop: loop.model[0].bias.requires_grad_(False),
    "state": load_state,
    "weight": write_weight,
    "data": replace_weight,
    "eval": lambda loop: loop.model.eval(),
    "schedule": lambda loop: OneCycle(0.1, 50).bind(loop.optimizer),
}
OWN = {
    "SGD": {"momentum": set_group("momentum", 0.5), "dampening": set_group("dampening", 0.2)},
    "AdamW": {"betas": set_group("betas", (0.5, 0.6)), "eps": set_group("eps", 0.1)},
    "Adam": {"amsgrad": set_group("amsgrad", True)},
    "Lion": {"betas": set_group("betas", (0.5, 0.6))},
}
CASES = [(name, key) for name in OPTIMIZERS for key in (*CHANGES, *OWN[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_change_from_outside_is_obeyed_and_recorded_again(name, key, dtype):
    options = {"momentum": 0.9} if name == "SGD" else {}
    graphed, eager = (Loop(name, dtype, **options) for _ in range(2))
    change = CHANGES.get(key) or OWN[name][key]
    for step in range(12):
        if step == 6:
            for loop in (graphed, eager):
                change(loop)
        x = inputs(dtype=dtype)
        assert torch.equal(graphed.graphed(x), eager.step(x))
    for ours, theirs in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    log = graphed.recorder.log
    assert log[:8] == ["run", "run", "watch", "capture", "replay", "replay", "replay", "run"]
    assert log.count("capture") == 2
    assert log[-1] == "replay"


def test_a_schedule_on_the_device_is_followed_by_the_graph():
    """Its groups show the newest lr and momentum, which no launch reads."""
    loop = Loop("SGD", momentum=0.9)
    loop.recorder.read = list
    OneCycle(0.1, 50, base_momentum=0.8, max_momentum=0.9).bind(loop.optimizer)
    for step in range(10):
        loop.graphed(inputs())
        loop.optimizer.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.9 - step / 100)
    assert loop.recorder.log.count("capture") == 1
    assert loop.recorder.log[-1] == "replay"


def test_every_shape_runs_as_kernels_twice_before_it_is_recorded():
    loop = Loop()
    for rows in (2, 2, 2, 2, 3, 2, 3, 3, 2, 3):
        loop.graphed(inputs(rows))
    log = loop.recorder.log
    assert log[:5] == ["run", "run", "watch", "capture", "replay"]
    assert log[5:] == ["run", "replay", "watch", "capture", "replay", "replay", "replay"]


def test_a_step_that_changes_between_all_calls_is_not_recorded():
    loop = Loop()
    for step in range(MAX_CHANGES + 1):
        loop.graphed(inputs())
        loop.optimizer.param_groups[0]["lr"] = 0.1 / (step + 2)
    with pytest.raises(Unsupported, match="change between all steps"):
        loop.graphed(inputs())
    assert set(loop.recorder.log) <= {"run", "watch"}
    assert len(loop.recorder.log) == MAX_CHANGES + 1  # the refused call has not run


def test_a_step_that_waits_is_refused_before_the_next():
    loop = Loop()
    loop.recorder.refusal = "the step waits for the device"
    for _ in range(3):
        loop.graphed(inputs())
    with pytest.raises(Unsupported, match="waits for the device"):
        loop.graphed(inputs())
    assert loop.recorder.log == ["run", "run", "watch"]


@pytest.mark.parametrize("value", [object(), {1}, math.inf])
def test_inputs_are_tensors_and_plain_values(value):
    loop = Loop()
    graphed = Graphed(lambda batch: loop.step(batch[0]), loop.recorder, loop.constants)
    if isinstance(value, float):
        graphed((inputs(), value))
    else:
        with pytest.raises(Unsupported, match="expected tensors and plain values"):
            graphed((inputs(), value))
