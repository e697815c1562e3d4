"""One seed, one hypothesis profile, the threads of a worker process and the order of the tests."""

import hashlib
import os
import tempfile
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

# Inductor keeps what it compiled between runs, and does not see an operation's outputs change.
OPERATIONS = sorted(Path(linear.__file__).parent.rglob("*.py"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in OPERATIONS)).hexdigest()[:16]
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"fastmp-inductor-{DIGEST}"))
)

# pytest-xdist starts one worker per core: each has its share of the threads, as do its children.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, torch.get_num_threads() // WORKERS)
if WORKERS > 1:
    torch.set_num_threads(THREADS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)

# On a GPU each new shape is a compilation of a second.
EXAMPLES = 8 if torch.cuda.is_available() else 60
hypothesis.settings.register_profile(
    "fastmp", derandomize=True, deadline=None, max_examples=EXAMPLES
)
hypothesis.settings.load_profile("fastmp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers slow tests come first, so that none is left when the rest has ended."""
    if WORKERS > 1:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
def recomputing():
    """act(z) is computed again where z is kept, as on a GPU; on a CPU that takes 1 to 3% longer."""
    with mock.patch.object(linear, "recomputes_input", return_value=True):
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
