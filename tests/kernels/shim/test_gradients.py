"""Gradients in any layout, at any address, on the CUDA kernel."""

from tests.optim.test_gradients import *  # noqa: F403
