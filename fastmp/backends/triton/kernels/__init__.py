"""The Triton kernels and their launchers; only these files import Triton."""
