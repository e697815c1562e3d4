"""One start of two gloo ranks, which stand for two GPUs; the results of every case of ranks.py."""

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.launcher import torchrun


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The results of rank 0, those of rank 1, and the folder of their run."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(ranks.__file__, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [*both, folder]
