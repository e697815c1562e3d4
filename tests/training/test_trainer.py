"""The loop: optimization, log, saved state, and the end of a run."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastmp.optim
from fastmp import amp, checkpoint, data
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.report import curves
from fastmp.schedule import OneCycle
from fastmp.training import log
from fastmp.training.trainer import NonFiniteLoss, RunStopped, Trainer


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )
    return amp.convert(model, dtype)


def batches(count, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 3, 4, generator=generator).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def trainer_for(model, *, lr=0.05, criterion=None, momentum=0.9, show=False, **options):
    optimizer = fastmp.optim.SGD(list(model.named_parameters()), lr=lr, momentum=momentum)
    return Trainer(model, optimizer, criterion or CrossEntropyLoss(), progress=show, **options)


class Poison(torch.nn.Module):
    """Multiplies the gradients, or with ``loss`` the logits, by ``value`` in ``steps``."""

    def __init__(self, steps, value=math.inf, loss=False):
        super().__init__()
        self.steps, self.value, self.loss, self.calls = set(steps), value, loss, 0

    def forward(self, x):
        self.calls += self.training
        if not self.training or self.calls not in self.steps:
            return x
        if self.loss:
            return x * self.value
        x = x.clone()
        x.register_hook(lambda gradient: gradient * self.value)
        return x


def newest(folder):
    return checkpoint.load(Checkpoints(folder / "checkpoints").newest())


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# ---- optimization ----


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_weights_are_those_of_a_plain_torch_loop(accumulate, ours, scaled):
    train, epochs = batches(7), 2  # 7 batches: the last group of 2 or 3 is short
    model = small_model()
    steps = math.ceil(7 / accumulate) * epochs
    schedule = OneCycle(0.05, steps)
    scaler = amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    criterion = CrossEntropyLoss(label_smoothing=0.1)
    if not ours:
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    trainer = trainer_for(
        model, criterion=criterion, schedule=schedule, scaler=scaler, accumulate=accumulate
    )
    trainer.fit(train, train, epochs)

    expected = small_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9)
    step = 0
    for _ in range(epochs):
        for start in range(0, 7, accumulate):
            group = train[start : start + accumulate]
            x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
            optimizer.zero_grad()
            F.cross_entropy(expected(x), y, label_smoothing=0.1).backward()
            optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"] = schedule(step)
            optimizer.step()
            step += 1
    assert step == trainer.step == steps
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bits():
    def train():
        model = small_model()
        mixup = Mixup(generator=torch.Generator().manual_seed(3))
        trainer_for(model, mixup=mixup).fit(batches(9), batches(2), 2)
        return weights(model)

    assert torch.equal(train(), train())


def test_evaluation_is_the_mean_over_samples_and_restores_the_mode():
    model = small_model()
    model.insert(1, torch.nn.Dropout(0.9))
    loader = [*batches(2), *batches(1, size=3)]  # a short last batch counts by its samples
    trainer = trainer_for(model)
    evaluation = trainer.evaluate(loader)
    assert model.training
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    logits = model.eval()(x)
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert evaluation.accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("cutmix", [False, True])
def test_maps_of_labels(cutmix, soft):
    """Images that show their labels: a layer of every pixel learns them, ignored ones aside."""
    torch.manual_seed(0)
    y = torch.randint(3, (16, 6, 5))
    x = F.one_hot(y, 3).movedim(-1, 1).float()
    target = x.clone() if soft else torch.where(torch.rand(y.shape) < 0.2, -100, y)
    model = amp.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), torch.float32)
    mixup = Mixup(1.0, float(cutmix), switch_prob=0.5)
    trainer = trainer_for(model, lr=1.0, mixup=mixup)
    trainer.fit([(x, target)] * 10, [(x, target)], 2)
    everything = trainer.evaluate([(x[:5], target[:5]), (x[5:], target[5:])])
    assert everything.accuracy == 1.0
    # soft targets are torch's work, at its precision
    expected = F.cross_entropy(model(x) if soft else model(x).double(), target)
    assert everything.loss == pytest.approx(expected.item(), rel=1e-5)


def test_mixup_normalises_for_training_and_evaluation():
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x):
            seen.append((self.training, x.dtype, float(x.float().mean())))
            return x

    model = torch.nn.Sequential(Watch(), small_model(torch.bfloat16))
    images = torch.full((8, 1, 3, 4), 255, dtype=torch.uint8)
    loader = [(images, torch.zeros(8, dtype=torch.int64))]
    mixup = Mixup(mean=[0.5], std=[0.25], dtype=torch.bfloat16)
    trainer_for(model, mixup=mixup).fit(loader, loader, 1)
    assert seen == [(True, torch.bfloat16, 2.0), (False, torch.bfloat16, 2.0)]


# ---- log and saved state ----


def test_metrics_are_complete_and_match_the_run(tmp_path):
    model = small_model()
    model.append(Poison({3}))
    scaler = amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    schedule = OneCycle(0.1, 10)
    trainer = trainer_for(model, scaler=scaler, schedule=schedule, folder=tmp_path)
    results = trainer.fit(batches(5), batches(2), 2)
    steps = log.read(tmp_path / "metrics.jsonl", "step")
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["epoch"] for row in steps] == [1] * 5 + [2] * 5
    assert [row["skipped"] for row in steps] == [False] * 2 + [True] + [False] * 7
    # the scale halves after the skipped step and doubles after four good ones
    assert [row["scale"] for row in steps] == [256.0] * 3 + [128.0] * 4 + [256.0] * 3
    # the schedule does not move on with the skipped step
    expected = [schedule(applied)[0] for applied in (0, 1, 2, 2, 3, 4, 5, 6, 7, 8)]
    assert [row["lr"] for row in steps] == pytest.approx(expected)
    assert steps[2]["grad_norm"] is None  # JSON has no infinity
    assert all(row["grad_norm"] > 0 for row in steps if not row["skipped"])
    epochs = log.read(tmp_path / "metrics.jsonl", "epoch")
    assert [row["val_accuracy"] for row in epochs] == [r.val_accuracy for r in results]
    mean = sum(row["loss"] for row in steps[:5]) / 5
    assert epochs[0]["train_loss"] == pytest.approx(mean)
    assert results[1].samples_per_second == pytest.approx(40 / results[1].seconds)


def test_a_skipped_step_changes_no_weight():
    model = small_model()
    model.append(Poison({1}, value=math.nan))
    trainer = trainer_for(model, scaler=amp.GradScaler("cpu"))
    before = weights(model)
    trainer.fit(batches(1), batches(1), 1)
    assert torch.equal(weights(model), before)
    assert int(trainer.optimizer.skipped_steps) == 1
    assert trainer.scaler.get_scale() == 32768.0


def test_every_epoch_saves_the_whole_state(tmp_path):
    model = small_model(torch.bfloat16)
    scaler = amp.GradScaler("cpu", init_scale=64.0)
    trainer = trainer_for(model, scaler=scaler, folder=tmp_path)
    trainer.fit(batches(3, dtype=torch.bfloat16), batches(1, dtype=torch.bfloat16), 2)
    state = newest(tmp_path)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (2, 6)
    assert state["scaler"] == scaler.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name], value)
    assert len(state["optimizer"]["state"]) == 4


def test_fitting_again_goes_on_counting(tmp_path):
    trainer = trainer_for(small_model(), folder=tmp_path)
    trainer.fit(batches(2), batches(1), 1)
    assert trainer.fit(batches(2), batches(1), 1)[0].epoch == 2
    steps = log.read(tmp_path / "metrics.jsonl", "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]


def test_an_epoch_is_shown_in_a_line(capsys):
    trainer_for(small_model(), show=True).fit(batches(2), batches(1), 1)
    shown = capsys.readouterr().out
    assert "epoch 1/1  loss" in shown
    assert "samples/s" in shown


# ---- the end of a run ----


def test_a_non_finite_loss_stops_the_run_with_the_state_saved(tmp_path):
    model = small_model()
    model.append(Poison({4}, loss=True))
    trainer = trainer_for(model, folder=tmp_path)
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 4: the loss is (inf|nan)") as error:
        trainer.fit(batches(6), batches(1), 1)
    assert str(tmp_path / "checkpoints") in str(error.value)
    state = newest(tmp_path)
    assert all(value.isfinite().all() for value in state["model"].values())
    steps = log.read(tmp_path / "metrics.jsonl", "step")
    assert steps[-1]["step"] == 4
    assert steps[-1]["loss"] is None
    assert curves.draw(tmp_path, "stopped").stat().st_size > 10_000


def test_a_stop_without_a_folder_says_that_nothing_was_saved():
    model = small_model()
    model.append(Poison({1}, loss=True))
    with pytest.raises(NonFiniteLoss, match="the state was not saved"):
        trainer_for(model).fit(batches(1), batches(1), 1)


def test_more_than_twenty_skips_in_a_row_stop_the_run():
    model = small_model()
    model.append(Poison(set(range(3, 99)) - {10}))
    with pytest.raises(RunStopped, match=r"stopped at step 31: 21 steps in a row .*'1\.weight'"):
        trainer_for(model).fit(batches(40), batches(1), 1)


def test_a_scale_below_one_stops_the_run(tmp_path):
    model = small_model()
    model.append(Poison(set(range(1, 99))))
    scaler = amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(RunStopped, match=r"stopped at step 4: the loss scale fell to 0\.5"):
        trainer_for(model, scaler=scaler, folder=tmp_path).fit(batches(40), batches(1), 1)
    assert newest(tmp_path)["progress"]["step"] == 4


def test_an_interrupt_saves_the_state(tmp_path):
    def interrupted():
        yield from batches(3)
        raise KeyboardInterrupt

    trainer = trainer_for(small_model(), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted at step 3; the state is saved in"):
        trainer.fit(interrupted(), batches(1), 1)
    progress = newest(tmp_path)["progress"]
    assert (progress["epoch"], progress["step"], progress["batch"]) == (0, 3, 3)
    steps = log.read(tmp_path / "metrics.jsonl", "step")
    assert [row["step"] for row in steps] == [1, 2, 3]


@pytest.mark.parametrize("shape", [(8,), (8, 2, 2)], ids=["classes", "maps"])
def test_evaluation_is_that_of_one_batch(shape):
    """Of unequal batches with class weights and ignored labels, one batch with nothing else."""
    criterion = CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]), ignore_index=2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, *shape[1:], generator=generator)
    labels = torch.randint(0, 3, shape, generator=generator)
    labels[7] = 2
    model = torch.nn.Conv2d(1, 1, 1)  # its parameters tell the device
    trainer = trainer_for(
        torch.nn.Sequential(torch.nn.Identity(), Forget(model)), criterion=criterion
    )
    parts = [(logits[s], labels[s]) for s in (slice(5), slice(5, 7), slice(7, 8))]
    found = trainer.evaluate(parts)
    counted = labels != 2
    correct = (logits.argmax(1) == labels)[counted].double().mean()
    assert found.loss == pytest.approx(float(criterion(logits, labels)), rel=1e-6)
    assert found.accuracy == pytest.approx(float(correct))


class Forget(torch.nn.Module):
    """The input; the trainer looks for parameters."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return x


def test_bad_arguments():
    model = small_model()
    with pytest.raises(TypeError, match=r"expected an optimizer from fastmp.optim.* got Adam$"):
        Trainer(model, torch.optim.Adam(model.parameters()), CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"which fastmp.nn.CrossEntropyLoss takes, got MSELoss"):
        trainer_for(model, criterion=torch.nn.MSELoss(), mixup=Mixup())
    with pytest.raises(
        ValueError, match=r"criterion: expected one loss for the batch, got shape \(8,\)"
    ):
        trainer_for(model, criterion=CrossEntropyLoss(reduction="none")).fit(batches(1), None, 1)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        trainer_for(model, accumulate=0)
    with pytest.raises(ValueError, match="train_loader gave no batches"):
        trainer_for(model).fit([], batches(1), 1)
    with pytest.raises(ValueError, match="the loader gave no batches with labels that count"):
        trainer_for(model).evaluate([])


def test_digits_are_learned():
    digits = data.load("digits")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    train = data.loader(digits.train, 64, shuffle=True)
    test = data.loader(digits.test, 1000, shuffle=False)
    mixup = Mixup(mean=digits.mean, std=digits.std)
    results = trainer_for(model, mixup=mixup).fit(train, test, 5)
    assert results[-1].val_accuracy > 0.9
    assert results[-1].train_loss < results[0].train_loss
