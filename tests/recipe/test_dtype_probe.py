"""The probe chooses the dtype that is clearly fastest, on a clock of its own."""

import functools
import random

import pytest

from fastmp.recipe import dtype_probe


class Race:
    """Steps of given durations, on a clock of their own."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def run(self, name, samples):
        self.calls.append((name, samples))
        seconds = self.seconds[name]
        if seconds is None:
            raise RuntimeError("not implemented for 'Half'")
        first = (name, samples) not in self.calls[:-1]
        self.now += seconds + 0.05 * first  # libraries set themselves up

    def fastest(self):
        steps = {name: functools.partial(self.run, name) for name in self.seconds}
        return dtype_probe.fastest(steps, 64, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"fp32": 0.010, "bf16": 0.0081, "fp16": 0.012}, "fp32"),  # below 1.25 times the speed
        ({"fp32": 0.010, "bf16": 0.0079, "fp16": 0.012}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.3, "fp16": 0.29}, "fp16"),
    ],
)
def test_the_probe_chooses_a_type_that_is_clearly_faster(seconds, chosen):
    race = Race(**seconds)
    found = race.fastest()
    assert found.chosen == chosen
    assert found.milliseconds == pytest.approx({n: s * 1e3 for n, s in seconds.items()})
    assert race.now < 3 * sum(seconds.values()) + 8 * max(seconds.values()) + 5


@pytest.mark.parametrize(("ratio", "chosen"), [(0.9, "fp32"), (1.1, "fp32"), (1.4, "bf16")])
def test_the_choice_does_not_depend_on_the_noise_of_the_clock(ratio, chosen):
    """Every step takes up to twice its time, one in 20 0.5 s more, as beside other work."""
    for seed in range(50):
        race, noise = Race(fp32=0.010, bf16=0.010 / ratio), random.Random(seed)
        plain = race.run

        def noisy(name, samples, race=race, noise=noise, plain=plain):
            plain(name, samples)
            race.now += race.seconds[name] * noise.random() + 0.5 * (noise.random() < 0.05)

        race.run = noisy
        assert race.fastest().chosen == chosen


def test_the_probe_drops_slow_and_broken_types():
    race = Race(fp32=0.001, bf16=3.0, fp16=None)
    found = race.fastest()
    assert found.chosen == "fp32"
    assert [call for call in race.calls if call[0] != "fp32"] == [("bf16", 2)] * 2 + [("fp16", 2)]
    assert str(found).startswith("a training step: fp32 1.0 ms, bf16 dropped, fp16 dropped")
