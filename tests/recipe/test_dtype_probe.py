"""The probe chooses the fastest dtype, on a clock of its own."""

import functools

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
        ({"fp32": 0.010, "bf16": 0.0109, "fp16": 0.012}, "bf16"),  # within 10%: half the memory
        ({"fp32": 0.010, "bf16": 0.0111, "fp16": 0.012}, "fp32"),
        ({"fp32": 0.010, "bf16": 0.0109, "fp16": 0.008}, "fp16"),
        ({"fp32": 1.0, "bf16": 0.3, "fp16": 0.29}, "fp16"),
    ],
)
def test_the_probe_prefers_a_16_bit_type_that_is_nearly_as_fast(seconds, chosen):
    race = Race(**seconds)
    found = race.fastest()
    assert found.chosen == chosen
    assert found.milliseconds == pytest.approx({n: s * 1e3 for n, s in seconds.items()})
    assert race.now < 3 * sum(seconds.values()) + 8 * max(seconds.values()) + 5


def test_the_probe_drops_slow_and_broken_types():
    race = Race(fp32=0.001, bf16=3.0, fp16=None)
    found = race.fastest()
    assert found.chosen == "fp32"
    assert [call for call in race.calls if call[0] != "fp32"] == [("bf16", 2), ("fp16", 2)]
    assert str(found) == "fp32 (a training step: fp32 1.0 ms, bf16 dropped, fp16 dropped)"
