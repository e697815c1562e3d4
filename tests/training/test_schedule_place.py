"""The schedule of a run that goes on with other batches: the rest of it, to its end."""

import pytest
import torch

from fastmp.schedule import Cosine, Cyclic, OneCycle, Warmup
from fastmp.training import log
from fastmp.training.schedule_place import SchedulePlace
from tests.training.test_trainer import batches, small_model, trainer_for, weights

EPOCHS = 4
MAKERS = {
    "one-cycle": lambda steps: OneCycle(0.1, steps, base_momentum=None, max_momentum=None),
    "warm cosine": lambda steps: Warmup(Cosine(0.1, steps - 2), 2),
    "cyclic": lambda steps: Cyclic(0.01, 0.1, max(1, steps // 4)),
    "function": lambda steps: lambda k: (0.1 * (1 - k / steps), None),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def data(count):
    return batches(24)[:count]


def run(folder, loader, schedule, epochs, **options):
    trainer = trainer_for(small_model(), schedule=schedule, folder=folder, **options)
    trainer.resume_newest()
    trainer.fit(loader, batches(1), epochs)
    return trainer


def rates(folder):
    return [row["lr"] for row in log.read(folder / "metrics.jsonl", "step")]


@makers
@pytest.mark.parametrize(("before", "after", "accumulate"), [(4, 8, 1), (8, 4, 1), (8, 8, 2)])
def test_a_schedule_made_for_the_new_batches_goes_on_at_the_share_done(
    tmp_path, make, before, after, accumulate
):
    old, new = before * EPOCHS, after // accumulate * EPOCHS
    run(tmp_path, data(before), make(old), 2)
    resumed = run(tmp_path, data(after), make(new), 2, accumulate=accumulate)
    expected = [make(old)(k)[0] for k in range(old // 2)]
    expected += [make(new)(k)[0] for k in range(new // 2, new)]
    assert rates(tmp_path) == pytest.approx(expected)
    # a second time, with the settings of the first resumption, and then with those of the start
    again = make(2 * new)
    run(tmp_path, data(after), again, 1, accumulate=accumulate)
    assert rates(tmp_path)[len(expected) :] == pytest.approx(
        [again(k)[0] for k in range(new, new + after // accumulate)]
    )
    assert resumed.optimizer.applied_steps == old // 2 + new // 2


@pytest.mark.parametrize("name", ["one-cycle", "warm cosine"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_a_schedule_of_the_old_steps_is_gone_through_to_its_end(tmp_path, name, before, after):
    made = MAKERS[name](before * EPOCHS)
    run(tmp_path, data(before), made, 2)
    run(tmp_path, data(after), made, 1)
    run(tmp_path, data(after), made, 1)  # resumed once more
    seen = rates(tmp_path)[2 * before :]
    assert seen[-1] == made(before * EPOCHS - 1)[0]
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 2 * after
    assert seen[0] == pytest.approx(made(2 * before)[0], rel=0.2)


class InterruptedOnce(list):
    """Ctrl-C in the middle of the second pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(super().__iter__()):
            if self.passes == 2 and number == len(self) // 2:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_an_interrupted_epoch_goes_on_at_its_share(tmp_path, before, after):
    trainer = trainer_for(small_model(), schedule=MAKERS["one-cycle"](2 * before), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(InterruptedOnce(data(before)), batches(1), 2)
    made = MAKERS["one-cycle"](2 * after)
    run(tmp_path, data(after), made, 1)
    expected = [made(k)[0] for k in range(after + after // 2, 2 * after)]
    assert rates(tmp_path)[before + before // 2 :] == pytest.approx(expected)


@makers
def test_the_same_batches_change_nothing(tmp_path, make):
    whole = run(tmp_path / "whole", data(4), make(16), 4)
    for _ in range(4):
        parts = run(tmp_path / "parts", data(4), make(16), 1)
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")
    assert torch.equal(weights(whole.model), weights(parts.model))


def test_a_schedule_that_is_bound_to_the_optimizer_is_the_one_shown(tmp_path):
    made = OneCycle(0.1, 8, base_momentum=None, max_momentum=None)
    trainer = trainer_for(small_model(), folder=tmp_path)
    made.bind(trainer.optimizer)
    trainer.fit(data(4), batches(1), 2)
    assert rates(tmp_path) == [made(k)[0] for k in range(8)]


def test_more_epochs_go_on_at_the_same_step(tmp_path):
    run(tmp_path, data(4), OneCycle(0.1, 8), 2)
    longer = OneCycle(0.1, 16)
    run(tmp_path, data(4), longer, 2)
    assert rates(tmp_path)[8:] == [longer(k)[0] for k in range(8, 16)]


def test_other_loaders_within_one_run_leave_the_schedule_alone(tmp_path):
    made = OneCycle(0.1, 12)
    trainer = trainer_for(small_model(), schedule=made, folder=tmp_path)
    trainer.fit(data(4), batches(1), 1)
    trainer.fit(data(8), batches(1), 1)
    assert rates(tmp_path) == [made(k)[0] for k in range(12)]


@pytest.mark.parametrize("batch", [0, 2])
def test_half_as_many_ranks_have_twice_the_batches(batch):
    one, two = (trainer_for(small_model(), schedule=OneCycle(0.1, n)) for n in (8, 16))
    one.fit(data(4), batches(1), 1)
    saved = one.state_dict()
    saved["ranks"] *= 2
    saved["progress"]["batch"] = batch
    two.load_state_dict(saved)
    two.fit(data(8), batches(1), 1)
    assert two.step == 4 + 8 - 2 * batch
    assert two._step_fn.followed(4) == OneCycle(0.1, 16)(8)


def test_the_checkpoint_of_an_older_version_says_it_by_its_steps():
    one, two = (trainer_for(small_model(), schedule=OneCycle(0.1, n)) for n in (8, 16))
    one.fit(data(4), batches(1), 1)
    saved = one.state_dict()
    del saved["schedule"], saved["batches_an_epoch"]
    two.load_state_dict(saved)
    two.fit(data(8), batches(1), 1)
    assert two._step_fn.followed(4) == OneCycle(0.1, 16)(8)


def test_skipped_steps_shift_nothing():
    place = SchedulePlace(steps_per_epoch=10, length=40)
    place.move(5, 20, applied=18)  # two of 20 were skipped
    followed = place.follow(OneCycle(0.1, 20))
    assert followed(18) == OneCycle(0.1, 20)(9)
    assert followed.length == 18 + 11
