"""The log of the steps: at once, or as on a GPU when the next step is queued."""

from __future__ import annotations

import math

import pytest
import torch

from fastmp import amp
from fastmp.checkpoint.manager import Checkpoints
from fastmp.schedule import OneCycle
from fastmp.training import log, step_log
from fastmp.training.trainer import NonFiniteLoss
from tests.training.test_trainer import Poison, batches, newest, small_model, trainer_for, weights


def test_a_record_keeps_step_and_values():
    record = step_log.Record(3, [torch.tensor(0.5), torch.tensor(2)])
    assert record.step == 3
    assert record.read() == [0.5, 2.0]


def trainer_in(folder, poison, in_flight, **options):
    """With ``in_flight=1`` steps are logged as on a GPU."""
    model = small_model()
    model.append(poison)
    trainer = trainer_for(
        model,
        schedule=OneCycle(0.1, 10),
        scaler=amp.GradScaler("cpu", init_scale=64.0),
        folder=folder,
        **options,
    )
    trainer._steps._in_flight = in_flight
    return trainer


def test_a_late_log_is_the_same_log(tmp_path):
    logs, trainers = [], []
    for in_flight in (0, 1):
        folder = tmp_path / str(in_flight)
        trainer = trainer_in(folder, Poison({3}), in_flight, save_every=4, telemetry=True)
        trainer.fit(batches(5), batches(1), 2)
        rows = log.read(folder / log.FILE)
        logs.append([{k: v for k, v in r.items() if "second" not in k} for r in rows])
        trainers.append(trainer)
    one, two = trainers
    assert logs[0] == logs[1]
    assert len(Checkpoints(tmp_path / "1" / "checkpoints")._all()) == 2
    assert torch.equal(weights(one.model), weights(two.model))
    assert one.optimizer.state_dict()["param_groups"] == two.optimizer.state_dict()["param_groups"]


def test_the_groups_show_the_newest_step_when_all_are_logged(tmp_path):
    trainer = trainer_in(tmp_path, Poison({}), 1)
    (group,) = trainer.optimizer.param_groups
    for batch in batches(4):
        trainer.train_step([batch])
    assert trainer.last_loss() > 0
    assert (group["lr"], group["momentum"]) == OneCycle(0.1, 10)(3)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_diverged_run_saves_all_the_steps_that_were_taken(tmp_path, in_flight):
    poison = Poison({4}, value=math.inf, loss=True)
    trainer = trainer_in(tmp_path, poison, in_flight)
    with pytest.raises(NonFiniteLoss, match="stopped at step 4"):
        trainer.fit(batches(6), batches(1), 1)
    state, taken = newest(tmp_path), 4 + in_flight
    assert state["progress"]["step"] == taken
    assert int(state["optimizer"]["counts"]["applied"]) == taken - 1
    steps = log.read(tmp_path / log.FILE, "step")
    assert [row["step"] for row in steps] == list(range(1, taken + 1))
