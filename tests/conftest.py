"""One seed, one hypothesis profile: every run of the suite on a machine tries the same cases."""

import os
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch

from fastmp.backends import cpu
from fastmp.ops import linear

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Another build of the CPU library, for ``make sanitize``; importing fastmp has loaded its own.
if another := os.environ.get("FASTMP_TEST_LIBRARY"):
    cpu._library_path = lambda: Path(another)
    cpu.load.cache_clear()
    assert cpu.load()[0]._name == another

# On a GPU each new shape is a compilation of a second.
EXAMPLES = 8 if torch.cuda.is_available() else 60
hypothesis.settings.register_profile(
    "fastmp", derandomize=True, deadline=None, max_examples=EXAMPLES
)
hypothesis.settings.load_profile("fastmp")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def every_size():
    """The fused linear layer, however small the problem."""

    def always(input, weight, activation):
        return True

    with mock.patch.object(linear, "worthwhile", always):
        yield


@pytest.fixture
def commands():
    """fastmp's command line can be started: its flags are tyro's."""
    pytest.importorskip("tyro", reason="tyro is not installed: no command line")


@pytest.fixture
def opcheck():
    """``torch.library.opcheck``, where the test tools that it imports can be imported."""
    pytest.importorskip("expecttest", reason="expecttest is not installed: opcheck needs it")
    return torch.library.opcheck
