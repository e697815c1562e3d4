"""What of an optimizer's state a file holds."""

import copy
import io
import pickle

import pytest
import torch

from tests.optim.optim_cases import adam_w, give_gradients, parameters


def written(value):
    """Bytes that ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["new", "loaded", "pickled", "copied"])
def test_a_part_of_the_state_is_saved_alone(dtype, how):
    params = parameters(dtype)
    optimizer = adam_w(params, amsgrad=True)
    give_gradients(params)
    optimizer.step()
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif how == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    elif how == "copied":
        optimizer = copy.deepcopy(optimizer)
    saved = optimizer.state_dict()["state"]
    own = {i: sum(t.nbytes for t in state.values()) for i, state in saved.items()}
    overhead = 1000 * 5  # a file's, and that of five tensors: 300 to 900 bytes each
    for i, state in saved.items():
        assert own[i] <= written(state) <= own[i] + overhead
        assert written(list(state.values())[:1]) <= next(iter(state.values())).nbytes + overhead
    assert written(optimizer.state_dict()) <= sum(own.values()) + overhead * len(saved)
