"""The tests of the CPU engine, unchanged, on the CUDA kernel."""

from tests.amp.test_grad_scaler import *  # noqa: F403
from tests.optim.test_edited_weights import *  # noqa: F403
from tests.optim.test_optimizers import *  # noqa: F403
from tests.optim.test_state import *  # noqa: F403
