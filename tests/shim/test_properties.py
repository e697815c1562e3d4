"""What the CPU engine is put through, on the CUDA kernel: the same tests, unchanged."""

from test_amp import *  # noqa: F403
from test_optim import *  # noqa: F403
from test_optim_state import *  # noqa: F403
