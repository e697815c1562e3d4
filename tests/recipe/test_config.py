"""The ranges of the settings stand at their fields and are enforced."""

import dataclasses
import math
import re
from typing import get_args, get_type_hints

import pytest

from fastmp.recipe import ConfigError, TrainConfig, config

HINTS = get_type_hints(TrainConfig)
NUMBERS = [name for name, kind in HINTS.items() if {int, float} & {kind, *get_args(kind)}]


def test_every_number_has_a_range_and_a_default_in_it():
    assert sorted(config._ranges()) == sorted(NUMBERS)
    for name, allowed in config._ranges().items():
        default = getattr(TrainConfig(), name)
        assert default is None or allowed.low <= default <= allowed.high


@pytest.mark.parametrize("name", NUMBERS)
def test_values_outside_the_range_are_refused(name):
    allowed = config._ranges()[name]
    for end in (allowed.low, allowed.high):
        value = int(end) if HINTS[name] in (int, int | None) else end
        assert getattr(dataclasses.replace(TrainConfig(), **{name: value}), name) == value
    for value in (allowed.low - 1, allowed.high * 2 if allowed.high < math.inf else -1.0, math.nan):
        with pytest.raises(
            ConfigError, match=rf"^{name}: expected {re.escape(allowed.expected)}, got "
        ):
            dataclasses.replace(TrainConfig(), **{name: value})


def test_bad_settings_are_refused_by_the_dataclass():
    with pytest.raises(ConfigError, match="seed: expected a whole number from 0"):
        TrainConfig(seed=-1)


def test_defaults_that_depend_on_other_settings():
    digits = TrainConfig().resolved()
    assert (digits.epochs, digits.batch_size, digits.lr) == (15, 64, pytest.approx(2e-3))
    large = TrainConfig(data="fashion-mnist", accumulate=4).resolved()
    assert (large.epochs, large.batch_size, large.lr) == (8, 256, pytest.approx(8e-3))
    kept = TrainConfig(epochs=1, batch_size=7, lr=0.0).resolved()
    assert (kept.epochs, kept.batch_size, kept.lr) == (1, 7, 0.0)


def test_a_rate_is_scaled_to_the_global_batch():
    adam = TrainConfig(base_lr=1e-3, batch_size=256, accumulate=2)
    assert adam.resolved(8).lr == pytest.approx(1e-3 * 4)  # the square root of 16
    sgd = TrainConfig(optimizer="sgd", batch_size=256)
    assert sgd.resolved(8).lr == pytest.approx(0.8)
    assert TrainConfig(lr=0.5, batch_size=999).resolved(8).lr == 0.5
    # no step has more samples than there are: 1,433 in 22 whole batches of 64
    for settings, batch in (
        ({"batch_size": 100_000}, 1433),
        ({"batch_size": 64, "accumulate": 100}, 22 * 64),
        ({"batch_size": 1000, "accumulate": 5}, 1000),
        ({"batch_size": 64}, 64),
    ):
        config = TrainConfig(optimizer="sgd", base_lr=0.256, **settings)
        assert config.resolved(samples=1433).lr == pytest.approx(batch / 1000)
        assert config.resolved(samples=1433).global_batch(samples=1433) == batch
    assert TrainConfig(lr=0.5, batch_size=999).resolved(8, samples=9).lr == 0.5
    with pytest.raises(ConfigError, match=r"lr, base_lr: expected one of them, got 0.1 and"):
        TrainConfig(lr=0.1, base_lr=0.2).resolved()


@pytest.mark.parametrize("name", ["data", "model", "init_from", "out"])
def test_names_that_the_config_file_could_not_hold_are_refused(name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected a name in UTF-8, got 'a:\\udcff'"):
        TrainConfig(**{name: "a:\udcff"})
    TrainConfig(**{name: "ü:日本"})


@pytest.mark.parametrize(
    ("samples", "devices", "batch"),
    [(1, 1, 8), (200, 1, 8), (400, 1, 16), (1433, 1, 64), (5119, 1, 128), (5120, 1, 256),
     (60_000, 1, 256), (60_000, 100, 16)],
)  # fmt: skip
def test_small_data_sets_have_small_batches(samples, devices, batch):
    """So that an epoch has 20 steps; the lr follows the batch."""
    config = TrainConfig(data="fashion-mnist").resolved(devices, samples)
    assert config.batch_size == batch
    assert config.lr == pytest.approx(4e-3 * (min(batch * devices, samples) / 256) ** 0.5)
    given = TrainConfig(data="fashion-mnist", batch_size=99).resolved(devices, samples)
    assert given.batch_size == 99
