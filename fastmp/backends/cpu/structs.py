"""``csrc/fastmp.h`` for ctypes: structs, entry points and status codes.

``tests/backends/test_abi.py`` compares the two field by field.
"""

from __future__ import annotations

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from enum import IntEnum

from fastmp.backends.abi import Request

ABI_VERSION = 9


class Status(IntEnum):
    """``fastmp_status``: what an entry point returns."""

    OK = 0
    BAD_ARGUMENT = 1
    NO_MEMORY = 2
    BAD_TARGET = 3


class UpdateArgs(Structure):
    """``fastmp_update_args``."""

    _fields_ = (
        ("size", c_int64),
        ("rows", c_void_p),
        ("row_count", c_int64),
        ("groups", c_void_p),
        ("group_count", c_int64),
        ("request", Request),
    )


class LossArgs(Structure):
    """``fastmp_loss_args``."""

    _fields_ = (
        ("size", c_int64),
        ("logits", c_void_p),
        ("dtype", c_int32),
        ("reduction", c_int32),
        ("rows", c_int64),
        ("classes", c_int64),
        ("row_stride", c_int64),
        ("target_a", c_void_p),
        ("target_b", c_void_p),
        ("lam", c_void_p),
        ("lam_stride", c_int64),
        ("weight", c_void_p),
        ("ignore_index", c_int64),
        ("smoothing", c_double),
        ("grad_output", c_void_p),
        ("grad_output_stride", c_int64),
        ("loss", c_void_p),
        ("stats", c_void_p),
        ("grad", c_void_p),
        ("bad_row", c_int64),
        ("bad_target", c_int64),
    )


class MixArgs(Structure):
    """``fastmp_mix_args``."""

    _fields_ = (
        ("size", c_int64),
        ("input", c_void_p),
        ("output", c_void_p),
        ("input_dtype", c_int32),
        ("output_dtype", c_int32),
        ("batch", c_int64),
        ("channels", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("index", c_void_p),
        ("lam", c_void_p),
        ("lam_stride", c_int64),
        ("box", c_void_p),
        ("box_stride", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
    )


class GemmArgs(Structure):
    """``fastmp_gemm_args``."""

    _fields_ = (
        ("size", c_int64),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("a_k_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("b_k_stride", c_int64),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("dtype", c_int32),
        ("activation", c_int32),
        ("bias", c_void_p),
        ("preactivation", c_void_p),
        ("out", c_void_p),
        ("threads", c_int64),
    )


class BatchedGemmArgs(Structure):
    """``fastmp_batched_gemm_args``."""

    _fields_ = (
        ("size", c_int64),
        ("a", c_void_p),
        ("a_batch", c_int64),
        ("a_stride", c_int64),
        ("a_k_stride", c_int64),
        ("b", c_void_p),
        ("b_batch", c_int64),
        ("b_stride", c_int64),
        ("b_k_stride", c_int64),
        ("c", c_void_p),
        ("out", c_void_p),
        ("batch", c_int64),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("alpha", c_double),
        ("beta", c_double),
        ("symmetric", c_int64),
        ("threads", c_int64),
    )


class ActivationArgs(Structure):
    """``fastmp_activation_args``."""

    _fields_ = (
        ("size", c_int64),
        ("saved", c_void_p),
        ("grad_output", c_void_p),
        ("out", c_void_p),
        ("grad_bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
        ("activation", c_int32),
    )


class TensorsArgs(Structure):
    """``fastmp_tensors_args``."""

    _fields_ = (
        ("size", c_int64),
        ("lists", c_void_p),
        ("list_count", c_int64),
        ("handle_offset", c_int64),
        ("keys_offset", c_int64),
        ("autograd_offset", c_int64),
        ("grad_offset", c_int64),
        ("no_grad", c_int64),
        ("list_size", c_void_p),
        ("list_item", c_void_p),
        ("get_data_ptr", c_void_p),
        ("get_dtype", c_void_p),
        ("get_device_index", c_void_p),
        ("get_dim", c_void_p),
        ("get_sizes", c_void_p),
        ("get_strides", c_void_p),
        ("get_version", c_void_p),
        ("raise_version", c_void_p),
        ("layout", c_void_p),
        ("words", c_int64),
        ("addresses", c_void_p),
        ("address_stride", c_int64),
        ("handles", c_void_p),
        ("with_grad", c_int64),
        ("version_sum", c_int64),
        ("write", c_int32),
        ("same", c_int32),
    )


#: The functions of the library, each of which takes a pointer to one struct.
ENTRY_POINTS: dict[str, type[Structure]] = {
    "fastmp_update": UpdateArgs,
    "fastmp_loss_forward": LossArgs,
    "fastmp_loss_backward": LossArgs,
    "fastmp_mix": MixArgs,
    "fastmp_gemm": GemmArgs,
    "fastmp_batched_gemm": BatchedGemmArgs,
    "fastmp_activation": ActivationArgs,
    "fastmp_activation_backward": ActivationArgs,
    "fastmp_tensors": TensorsArgs,
    "fastmp_raise_versions": TensorsArgs,
}
