"""The linear kernels' machine code: matrix instructions, TMA, 128-bit accesses."""

import pytest
import torch

from tests.kernels.compile.harness import SM_WARPS

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastmp.backends.triton.kernels.activation import activation_backward
from fastmp.backends.triton.kernels.linear import linear
from fastmp.backends.triton.tiles import linear_tile

pytestmark = pytest.mark.slow

# Of each architecture's matrix instructions, and its copies from global to shared memory.
MATRIX = {80: r"HMMA\..*", 90: r"HGMMA\..*", 100: r"UTCHMMA.*", 120: r"HMMA\..*"}
COPY = {80: r"LDGSTS\..*\.128", 90: r"UTMALDG\..*", 100: r"UTMALDG\..*", 120: r"LDGSTS\..*\.128"}
STORE = {80: r"STG\..*\.128", 90: r"UTMASTG\..*", 100: r"UTMASTG\..*", 120: r"STG\..*\.128"}

# Every tile in both dtypes, every activation, with and without bias and z.
CASES = {
    "small M, fp16 gelu + z": (64, 1024, torch.float16, "gelu", True, True),
    "small M, bf16 silu": (64, 1024, torch.bfloat16, "silu", False, False),
    "short K, fp16 gelu_tanh + z": (1024, 1024, torch.float16, "gelu_tanh", True, True),
    "short K, bf16 relu": (1024, 1024, torch.bfloat16, "relu", True, False),
    "long K, fp16 silu + z": (1024, 4096, torch.float16, "silu", False, True),
    "long K, bf16 gelu": (1024, 4096, torch.bfloat16, "gelu", True, False),
}


# Instructions of arithmetic for each exponential, so for each element: multiply-adds, products,
# sums, comparisons. The bias is one more. Before, gelu took 19, gelu_tanh 13, silu 9.
ARITHMETIC = {
    (torch.bfloat16, "gelu"): 7,
    (torch.float16, "gelu"): 10,
    (torch.float16, "gelu_tanh"): 5,
    (torch.float16, "silu"): 3,
    (torch.bfloat16, "silu"): 3,
}


def arithmetic(kernel):
    """Sums of the instructions on fp32; those on pairs (sm_100) count twice."""
    single = kernel.count(r"(FFMA|FMUL|FADD|FSETP|FSEL|FMNMX)(\..*)?")
    return single + 2 * kernel.count(r"(FFMA2|FMUL2|FADD2)(\..*)?")


def _matrix(rows, columns, dtype):
    return torch.zeros(1, dtype=dtype).expand(rows, columns).contiguous()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_product(compiled, case):
    m, k, dtype, activation, bias, save = case
    x, w = _matrix(m, k, dtype), _matrix(512, k, dtype)
    b = torch.zeros(512, dtype=dtype) if bias else None
    for kernel in compiled(linear, x, w, b, activation, save):
        arch = kernel.arch
        assert kernel.count(MATRIX[arch]) >= 4
        assert kernel.count(COPY[arch]) >= 2
        assert kernel.count(STORE[arch]) >= (4 if save else 2)
        copied_alone = r"LDG\..*\.(U16|S16|U8)" if arch in (90, 100) else r"LDS\.U16.*"
        assert kernel.count(copied_alone) == 0
        if activation in ("gelu", "gelu_tanh", "silu"):
            elements = kernel.count(r"MUFU\.EX2")
            assert elements > 0
            assert kernel.count(r"MUFU\.(?!EX2).*") <= elements + 30  # integer divisions
            expected = (ARITHMETIC[dtype, activation] + bias) * elements
            assert expected * 0.6 <= arithmetic(kernel) <= expected + elements / 8
        # As many programs on a multiprocessor as the tile's epilogue counts on.
        tile = linear_tile(m, k, arch)
        assert kernel.occupancy() * SM_WARPS[arch] >= tile.programs_per_sm * tile.warps


BACKWARDS = {  # dtype, activation, db, y
    "fp16 gelu + bias": (torch.float16, "gelu", True, False),
    "bf16 gelu + bias + y": (torch.bfloat16, "gelu", True, True),
    "fp16 gelu_tanh + bias + y": (torch.float16, "gelu_tanh", True, True),
    "bf16 gelu_tanh + bias": (torch.bfloat16, "gelu_tanh", True, False),
    "fp32 silu + bias": (torch.float32, "silu", True, False),
    "bf16 silu + y": (torch.bfloat16, "silu", False, True),
    "fp16 relu": (torch.float16, "relu", False, False),
    "bf16 bias": (torch.bfloat16, "none", True, False),
}


@pytest.mark.parametrize("case", BACKWARDS.values(), ids=BACKWARDS)
def test_activation_backward(compiled, case):
    dtype, activation, needs_bias, needs_output = case
    grad = _matrix(1024, 1024, dtype)
    y = _matrix(1024, 1024, dtype) if needs_output else None
    for kernel in compiled(activation_backward, grad, grad, activation, needs_bias, y):
        assert kernel.count(r"LDG\..*\.128") >= 1
        assert kernel.count(r"LDG.*") == kernel.count(r"LDG\..*\.128")
        if kernel.name == "_activation_backward_kernel":
            # 64 bytes of each operand and thread on their way at a time.
            assert kernel.count(r"LDG\..*") == (4 if activation == "none" else 8)
            written = (activation != "none") + needs_output
            assert kernel.count(r"STG\..*\.128") == 4 * written
            # 4 programs: 64 KB on their way; 3 with y: 48 KB, of 29 that are needed.
            assert kernel.occupancy() >= (0.18 if needs_output else 0.25)


def test_activation_backward_of_odd_rows(compiled):
    """Rows of 1,021 elements: one at a time, and still no spills."""
    grad = _matrix(1024, 1021, torch.float16)
    compiled(activation_backward, grad, grad, "relu", True)
