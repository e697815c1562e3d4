"""The operations in worker processes of torch's DataLoader."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastmp


class Mixed(Dataset):
    """Calls mix, the linear layer and the loss on one sample in the worker."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).add(index).to(torch.uint8)
        mixed = fastmp.functional.mix(images, 0.3, torch.tensor([1, 0]), dtype=torch.float16)
        weight = torch.ones(5, 768, dtype=torch.float16) / 768
        logits = fastmp.functional.linear(mixed.flatten(1), weight)
        return logits, fastmp.functional.cross_entropy(logits, torch.tensor([0, index % 5]))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_operations_in_worker_processes(method):
    """Started after the parent has used its thread pool, whose threads a fork does not inherit."""
    x = torch.randn(512, 512, dtype=torch.float16)
    fastmp.functional.linear(x, x)
    expected = list(DataLoader(Mixed(), batch_size=4))
    found = list(
        DataLoader(
            Mixed(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=120
        )
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
