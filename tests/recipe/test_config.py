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
