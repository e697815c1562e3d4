"""One seed, one hypothesis profile: every run of the suite tries the same cases."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fastmp", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("fastmp")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
