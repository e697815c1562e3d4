"""What the CPU engine is put through, on the CUDA kernel: the same tests, unchanged."""

from tests.amp.test_grad_scaler import *  # noqa: F403
from tests.optim.test_optimizers import *  # noqa: F403
from tests.optim.test_state import *  # noqa: F403
