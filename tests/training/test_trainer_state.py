"""The trainer's state: saved and resumed; EMA, telemetry, accumulation, signals."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastmp.optim
from fastmp import amp, files
from fastmp.checkpoint import CheckpointError
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data import DataError
from fastmp.data.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.optim import SGD
from fastmp.schedule import OneCycle
from fastmp.training import cuda_graph, log, rng, signals
from fastmp.training.trainer import Trainer
from tests.robustness.processes import holder
from tests.training.test_trainer import Poison, batches, newest, small_model, trainer_for, weights

CPU = torch.device("cpu")


def users_loader():
    images = torch.randn(40, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(images, torch.arange(40) % 3), 5, shuffle=True)


class Stop(Exception):
    pass


def run(folder, *, stop_after=None, resume=False):
    """Two epochs with torch's loader, dropout, mixup and a loss scale; interrupted or resumed."""
    rng.seed(7 if not resume else 99)
    model = small_model()
    model.insert(2, torch.nn.Dropout(0.3))
    trainer = trainer_for(
        model,
        schedule=OneCycle(0.05, 16),
        scaler=amp.GradScaler("cpu", init_scale=512.0, growth_interval=3),
        mixup=Mixup(0.4, generator=torch.Generator().manual_seed(3)),
        ema=0.9,
        save_every=3,
        folder=folder,
    )
    if resume:
        assert trainer.resume_newest()
    elif stop_after is not None:
        plain = trainer.train_step

        def step(group):
            if trainer.step == stop_after:
                raise Stop
            plain(group)

        trainer.train_step = step
    try:
        trainer.fit(users_loader(), batches(2), 2 - trainer.epoch)
    except Stop:
        trainer.checkpoints.wait()
    return trainer


@pytest.mark.parametrize("stop_after", [3, 4, 8, 11])
def test_a_run_with_any_loader_goes_on_to_the_bit(tmp_path, stop_after):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_after=stop_after)
    resumed = run(tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    one, two = (t.optimizer.state_dict() for t in (whole, resumed))
    for number, state in one["state"].items():
        assert all(torch.equal(v, two["state"][number][k]) for k, v in state.items())
    assert one["counts"] == two["counts"]
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, resumed.ema.state_dict()[name])
    logs = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")}
            for kind in ("step", "epoch")
            for row in log.read(tmp_path / name / "metrics.jsonl", kind)
        ]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


class Fails(list):
    """Batches, the second of which cannot be read."""

    def __iter__(self):
        yield self[0]
        raise DataError("a.png cannot be read")


def fit(folder, val_loader, resume=False):
    rng.seed(7 if not resume else 99)
    trainer = trainer_for(small_model(), ema=0.9, folder=folder)
    assert trainer.resume_newest() == resume
    trainer.fit(users_loader(), val_loader, 2 - trainer.epoch)
    return trainer


def test_an_error_in_the_validation_loses_no_epoch(tmp_path):
    whole = fit(tmp_path / "whole", batches(2))
    with pytest.raises(DataError) as raised:
        fit(tmp_path / "cut", Fails(batches(2)))
    assert raised.value.__notes__ == [
        f"the state before the validation is saved in {tmp_path / 'cut' / 'checkpoints'}"
    ]
    assert newest(tmp_path / "cut")["progress"]["step"] == 8
    resumed = fit(tmp_path / "cut", batches(2), resume=True)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    one, two = (log.read(tmp_path / name / log.FILE) for name in ("whole", "cut"))
    assert [r for r in one if r["kind"] == "step"] == [r for r in two if r["kind"] == "step"]
    results = [
        [(r["train_loss"], r["val_loss"]) for r in rows if r["kind"] == "epoch"]
        for rows in (one, two)
    ]
    assert results[0] == results[1]


def test_a_batch_that_cannot_be_read_loses_no_step(tmp_path):
    def trained(name, loader, resume=False):
        rng.seed(7 if not resume else 99)
        trainer = trainer_for(small_model(), ema=0.9, folder=tmp_path / name)
        assert trainer.resume_newest() == resume
        trainer.fit(loader, batches(1), 2 - trainer.epoch)
        return trainer

    whole = trained("whole", batches(3))
    with pytest.raises(DataError) as raised:
        trained("cut", Fails(batches(3)))
    (note,) = raised.value.__notes__
    assert note == f"the state is saved in {tmp_path / 'cut' / 'checkpoints'}"
    assert newest(tmp_path / "cut")["progress"]["step"] == 1
    resumed = trained("cut", batches(3), resume=True)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    one, two = (log.read(tmp_path / name / log.FILE, "step") for name in ("whole", "cut"))
    assert [row["loss"] for row in one] == [row["loss"] for row in two]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_a_folder_that_another_process_trains_in(tmp_path):
    with holder(tmp_path) as other:
        trainer = trainer_for(small_model(), folder=tmp_path)
        with pytest.raises(files.FolderInUse, match=f"in use by process {other.pid} on"):
            trainer.fit(batches(3), batches(1), 1)
        assert trainer.step == 0
        assert [path.name for path in tmp_path.iterdir()] == [files.LOCK]
        other.communicate("")
    trainer.fit(batches(3), batches(1), 1)
    assert trainer.step == 3
    assert not (tmp_path / files.LOCK).exists()


def test_there_is_nothing_to_resume_in_a_new_folder(tmp_path):
    trainer = trainer_for(small_model(), folder=tmp_path / "new")
    assert not trainer.resume_newest()
    assert not trainer_for(small_model()).resume_newest()
    with pytest.raises(CheckpointError):
        trainer.resume(tmp_path)


def test_save_and_resume_by_path(tmp_path):
    one = trainer_for(small_model())
    one.fit(batches(3), batches(1), 1)
    one.save(tmp_path / "mine")
    two = trainer_for(small_model())
    two.resume(tmp_path / "mine")
    assert (two.epoch, two.step) == (1, 3)
    for trainer in (one, two):
        trainer.fit(batches(3), batches(1), 1)
    assert torch.equal(weights(one.model), weights(two.model))


def test_a_run_without_an_average_begins_one_at_its_weights():
    one = trainer_for(small_model())
    one.fit(batches(3), batches(1), 1)
    two = trainer_for(small_model(), ema=0.9)
    two.load_state_dict(one.state_dict())
    for name, average in two.ema.state_dict().items():
        assert torch.equal(average, one.model.state_dict()[name])


def test_averages_that_only_the_optimizer_was_asked_for_are_saved():
    def trainer():
        model = small_model()
        return Trainer(model, SGD(model.parameters(), lr=0.1, ema=0.5), CrossEntropyLoss())

    one, two = trainer(), trainer()
    one.fit(batches(3), epochs=1)
    two.load_state_dict(one.state_dict())
    assert not torch.equal(one.optimizer.averages()[0], one.optimizer.masters()[0])
    assert all(map(torch.equal, one.optimizer.averages(), two.optimizer.averages()))


def test_the_state_of_another_model_or_optimizer_is_refused_and_nothing_has_changed():
    saved = trainer_for(small_model()).state_dict()
    wider = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    model = small_model()
    other = Trainer(model, fastmp.optim.AdamW(model.parameters()), CrossEntropyLoss())
    for trainer in (trainer_for(wider), other):
        before = weights(trainer.model).clone()
        with pytest.raises(
            CheckpointError, match=r"the checkpoint is of another (model|optimizer)"
        ):
            trainer.load_state_dict(saved)
        assert torch.equal(weights(trainer.model), before)


def test_numbers_of_numpy_are_saved(tmp_path):
    def schedule(step):
        return np.float32(0.5**step), None

    model = small_model()
    optimizer = SGD(model.parameters(), lr=np.float64(0.1), weight_decay=np.float32(0.01))
    trainer = Trainer(
        model,
        optimizer,
        CrossEntropyLoss(label_smoothing=np.float64(0.1)),
        schedule=schedule,
        scaler=amp.GradScaler("cpu", init_scale=np.float64(8), growth_interval=np.int64(3)),
        mixup=Mixup(np.float64(0.4)),
        ema=np.float64(0.5),
        folder=tmp_path,
    )
    trainer.fit(batches(3), batches(1), 1)
    trainer.save(tmp_path / "mine")
    assert newest(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == np.float32(0.01)
    rows = log.read(tmp_path / "metrics.jsonl", "step")
    assert [row["lr"] for row in rows] == [1.0, 0.5, 0.25]


def test_the_best_and_the_newest_are_kept(tmp_path):
    trainer = trainer_for(small_model(), folder=tmp_path, keep=1)
    results = trainer.fit(batches(4), batches(3), 5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    best = max(range(5), key=lambda i: (results[i].val_accuracy, i))
    assert checkpoints.best().name == f"step-{4 * (best + 1):09d}"
    assert newest(tmp_path)["progress"]["epoch"] == 5
    saved = log.read(tmp_path / "metrics.jsonl", "saved")
    # before the validation and after it, with its score
    assert [row["step"] for row in saved] == [4, 4, 8, 8, 12, 12, 16, 16, 20, 20]


def test_the_average_is_what_is_evaluated():
    trainer = trainer_for(small_model(), ema=0.5)
    trainer.fit(batches(4), batches(1), 1)
    own = weights(trainer.model)
    with trainer.ema.swapped_in():
        averaged = trainer_for(trainer.model).evaluate(batches(2))
    assert trainer.evaluate(batches(2)) == averaged
    assert torch.equal(weights(trainer.model), own)
    assert trainer_for(trainer.model).evaluate(batches(2)) != averaged


def test_overflows_and_telemetry_are_logged(tmp_path):
    model = small_model(torch.float16)
    model.append(Poison({2}))
    scaler = amp.GradScaler("cpu", init_scale=64.0)
    trainer = trainer_for(model, scaler=scaler, telemetry=True, folder=tmp_path)
    trainer.fit(batches(4, dtype=torch.float16), batches(1, dtype=torch.float16), 1)
    lines = tmp_path / "metrics.jsonl"
    (overflow,) = log.read(lines, "overflow")
    assert (overflow["step"], overflow["parameter"]) == (2, "1.weight")
    rows = log.read(lines, "telemetry")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {row["gradients"] for row in rows} == {sum(p.numel() for p in model.parameters())}
    assert rows[1]["updates_lost"] == rows[1]["updates_saved"] == 0


def test_without_a_gpu_the_graph_is_left_out_with_the_reason(capsys):
    one, two = trainer_for(small_model()), trainer_for(small_model(), cuda_graph=True)
    for trainer in (one, two):
        trainer.fit(batches(3), batches(1), 1)
    assert "no CUDA graph: CUDA graphs need a CUDA device, the model is on cpu" in (
        capsys.readouterr().out
    )
    assert torch.equal(weights(one.model), weights(two.model))
    with pytest.raises(cuda_graph.Unsupported):
        cuda_graph.CudaRecorder(CPU)


def test_gradients_of_many_passes_are_summed_in_fp32_and_rounded_once():
    data = batches(8, size=4, dtype=torch.bfloat16)
    trainer = trainer_for(small_model(torch.bfloat16), accumulate=8)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in trainer.model.parameters())
    )
    trainer.train_step(data)

    model, criterion = small_model(torch.bfloat16), CrossEntropyLoss()
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for images, labels in data:
        share = torch.tensor(1 / 8)
        (criterion(model(images), labels, grad_scale=share) * share).backward()
        for total, p in zip(sums, model.parameters(), strict=True):
            total += p.grad.float()
            p.grad = None
    assert all(torch.equal(g, t.to(g.dtype)) for g, t in zip(seen, sums, strict=True))
    with pytest.raises(ValueError, match="expected 1 to 8 batches, got 9"):
        trainer.train_step([*data, data[0]])


def test_sigterm_in_python(tmp_path):
    def loader():
        for number, batch in enumerate(batches(6)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    trainer = trainer_for(small_model(), folder=tmp_path)
    with pytest.raises(signals.Terminated, match="terminated at step 3; the state is saved"):
        trainer.fit(loader(), batches(1), 1)
    assert newest(tmp_path)["progress"]["step"] == 3


def test_bad_arguments():
    model = small_model()
    with pytest.raises(ValueError, match="save_every must be at least 0, got -1"):
        trainer_for(model, save_every=-1)
    with pytest.raises(ValueError, match=r"average must lie in \[0, 1\), got 1"):
        trainer_for(model, ema=1.0)
