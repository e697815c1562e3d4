"""The operations fastmp::linear and fastmp::linear_backward, and the native entry points below."""

import ctypes
import itertools
import mmap
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastmp import backends
from fastmp.backends import cpu
from fastmp.backends.abi import DTYPE_CODES, Activation
from fastmp.backends.cpu import gemm_choice
from fastmp.backends.cpu.structs import ActivationArgs, GemmArgs
from fastmp.ops.linear import ACTIVATIONS, backward_reference, linear_reference, saves_preactivation
from tests.native import NATIVE, needs_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def own_product(own=True):
    """The library's matrix product or torch's, on any CPU."""
    return mock.patch.object(gemm_choice, "prefers_own", return_value=own)


def operands(rows, k, n, dtype):
    return [torch.randn(shape).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))]


def forward_and_backward(x, w, b, grad, activation):
    y, z = torch.ops.fastmp.linear(x, w, b, activation, True)
    saved = y if activation == "relu" else z
    grads = torch.ops.fastmp.linear_backward(grad, saved, x, w, activation, [True] * 3)
    return y, z, *grads


# ---- the same bits ----


def on_threads(fn):
    """fn() on 1, 2 and 3 threads, and on 1 again."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            yield fn()
    finally:
        torch.set_num_threads(before)


def assert_same_bits(results):
    first, *others = results
    for other in others:
        assert all(map(torch.equal, first, other))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(257, 100, 129), (30, 64, 1500), (2100, 33, 20), (300, 1100, 10)]
)
def test_the_same_bits_for_any_number_of_threads(sizes, dtype):
    arguments = operands(*sizes, dtype)
    with own_product():
        assert_same_bits(on_threads(lambda: forward_and_backward(*arguments, "gelu")))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_passes_give_the_same_bits_for_any_number_of_threads(activation, dtype):
    """After torch's product, here one by 1, which is exact."""
    x, w, one = torch.randn(100_003, 1).to(dtype), torch.ones(1, 1).to(dtype), [False, False, True]
    grad, saved = torch.randn(3001, 100).to(dtype), torch.randn(3001, 100).to(dtype)
    weight = torch.empty(100, 0).to(dtype)

    def passes():
        y, _ = torch.ops.fastmp.linear(x, w, None, activation, False)
        _, _, db = torch.ops.fastmp.linear_backward(
            grad, saved, weight[0].expand(3001, 0), weight, activation, one
        )
        return y, db

    with own_product(False):
        assert_same_bits(on_threads(passes))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(31, 19, 35), (1040, 5, 3), (16, 2060, 33)])
def test_an_element_depends_on_its_row_and_column_alone(sizes, dtype):
    """Neither on its position in a tile, nor on the strides of its row and column."""
    x, w, b, _ = operands(*sizes, dtype)

    def product(x, w, b):
        return torch.ops.fastmp.linear(x, w, b, "silu", False)[0]

    with own_product():
        whole = product(x, w, b)
        for rows in (slice(1), slice(3, 17), slice(15, None), slice(None, None, 2)):
            assert torch.equal(product(x[rows], w, b), whole[rows])
        for columns in (slice(1), slice(1, None), slice(2, 19), slice(None, None, 2)):
            assert torch.equal(product(x, w[columns], b[columns]), whole[:, columns])
        for layout in (lambda t: t.t().contiguous().t(), lambda t: t.repeat(1, 2)[:, : t.shape[1]]):
            assert torch.equal(product(layout(x), layout(w), b), whole)


# ---- the operations ----


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_forward_saves_what_it_is_asked_to(activation, dtype, own):
    x, w, b, _ = operands(6, 5, 3, dtype)
    with own_product(own):
        for shape, save in itertools.product([(6, 5), (2, 3, 5), (5,)], [True, False]):
            part = x.flatten()[: torch.Size(shape).numel()].view(shape)
            y, z = torch.ops.fastmp.linear(part, w, b, activation, save)
            ref_y, ref_z = linear_reference(part, w, b, activation, save)
            assert y.is_contiguous()
            assert (z.numel() > 0) == (save and saves_preactivation(activation))
            tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
            tolerance = {name: max(value, 2e-6) for name, value in tolerance.items()}
            torch.testing.assert_close((y, z), (ref_y, ref_z), **tolerance)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_backward_computes_what_it_is_asked_to(activation, dtype, own):
    """Tensors that a gradient does not need are not read: here they are NaN."""
    x, w, b, grad = operands(6, 5, 3, dtype)
    y, z = linear_reference(x, w, b, activation, True)
    saved = {"none": torch.full_like(y, NAN), "relu": y}.get(activation, z)
    full = backward_reference(grad, saved, x, w, activation, [True] * 3)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    tolerance = {name: max(value, 4e-6) for name, value in tolerance.items()}
    for needs in itertools.product([True, False], repeat=3):
        of_dw = x if needs[1] else x.new_full((), NAN).expand(x.shape)
        of_dx = w if needs[0] else w.new_full((), NAN).expand(w.shape)
        with own_product(own):
            grads = torch.ops.fastmp.linear_backward(
                grad, saved.t().contiguous().t(), of_dw, of_dx, activation, list(needs)
            )
        for ours, theirs, need in zip(grads, full, needs, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs if need else theirs.new_empty(0), **tolerance)


@pytest.mark.parametrize("own", [True, False])
def test_arguments_are_not_written_to(own):
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        arguments = operands(15, 33, 17, dtype)
        before = [t.clone() for t in arguments]
        with own_product(own):
            results = forward_and_backward(*arguments, activation)
        assert all(map(torch.equal, arguments, before))
        places = [t.data_ptr() for t in (*arguments, *results) if t.numel()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_opcheck(opcheck, activation, dtype):
    x, w, b, grad = operands(6, 5, 3, dtype)
    for shape, bias, save in (((6, 5), b, True), ((2, 3, 5), None, True), ((6, 5), b, False)):
        arguments = (x.view(shape), w, bias, activation, save)
        opcheck(torch.ops.fastmp.linear.default, arguments)
    for shape, needs in (((6,), (1, 1, 1)), ((2, 3), (1, 0, 1)), ((6,), (0, 0, 1))):
        x, grad, needs = x.view(*shape, 5), grad.view(*shape, 3), [bool(need) for need in needs]
        arguments = (grad, torch.randn_like(grad), x, w, activation, needs)
        opcheck(torch.ops.fastmp.linear_backward.default, arguments)
        if activation != "none":
            arguments = (grad, torch.randn_like(grad), activation, needs[2], needs[0])
            opcheck(torch.ops.fastmp.activation_backward.default, arguments)


def test_the_report_names_the_backend():
    _, reason = cpu.load()
    served = {(s.op, s.device): s for s in backends.report()}["linear", "cpu"]
    assert served.backend == ("cpu" if NATIVE else "reference")
    assert served.reason.startswith(reason)


# ---- the native entry points ----


def gemm_args(a, b, out, /, **more):
    fields = {
        "a": a.data_ptr(), "a_stride": a.stride(0), "a_k_stride": a.stride(1),
        "b": b.data_ptr(), "b_stride": b.stride(1), "b_k_stride": b.stride(0),
        "m": a.shape[0], "n": b.shape[1], "k": a.shape[1],
        "dtype": DTYPE_CODES[a.dtype], "out": out.data_ptr(), "threads": 1,
    }  # fmt: skip
    return GemmArgs(**(fields | more))


BAD = {
    "m": -1, "n": -1, "k": -1, "threads": 0, "dtype": 3, "activation": 5,
    "a_k_stride": 2, "b_k_stride": 2, "a": None, "b": None, "out": None,
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("field", BAD)
def test_gemm_refuses(field):
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.full((3, 5), 7.0)
    strides = {"b_stride": 5} if field == "b_k_stride" else {}
    with pytest.raises(RuntimeError, match="fastmp_gemm refused"):
        cpu.call("fastmp_gemm", gemm_args(a, b, out, **strides, **{field: BAD[field]}))
    assert (out == 7.0).all()
    cpu.call("fastmp_gemm", gemm_args(a, b, out))
    torch.testing.assert_close(out, a @ b)


@needs_native
@pytest.mark.parametrize("entry", ["fastmp_activation", "fastmp_activation_backward"])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("rows", -1),
        ("columns", -1),
        ("dtype", 3),
        ("activation", 5),
        ("saved", None),
        ("out", None),
    ],
)
def test_activation_refuses(field, bad, entry):
    z, out = torch.randn(3, 4), torch.full((3, 4), 7.0)
    fields = {
        "saved": z.data_ptr(), "grad_output": z.data_ptr(), "out": out.data_ptr(),
        "rows": 3, "columns": 4, "activation": Activation.RELU,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"{entry} refused"):
        cpu.call(entry, ActivationArgs(**(fields | {field: bad})))
    assert (out == 7.0).all()
    cpu.call(entry, ActivationArgs(**fields))
    assert not (out == 7.0).any()


def guarded(values, at_end):
    """The same values and strides right before or after a page that must not be touched."""
    count = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    count *= values.element_size()
    page = mmap.PAGESIZE
    body = -(-count // page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, body + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for guard in (start, start + page + body):
        assert libc.mprotect(guard, page, 0) == 0
    address = start + page + (body - count if at_end else 0)
    memory = torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=values.dtype)
    memory.fill_(NAN)
    return memory.as_strided(values.shape, values.stride()).copy_(values)


def stay_within_their_arguments():
    """Run in a process of its own: a read or write outside ends it."""
    sizes = itertools.product([1, 2, 14, 17, 29], [1, 2, 7, 16, 17, 33], [1, 9, 16, 17, 32, 47])
    for i, (rows, k, n) in enumerate([*sizes, (15, 1025, 33), (15, 2049, 1), (1030, 3, 2)]):
        dtype, activation = DTYPES[i % 3], Activation(i % 5)
        values = [torch.randn(shape).to(dtype) for shape in ((rows, k), (k, n), (n,), (rows, n))]
        for at_end, layout in itertools.product([False, True], range(4)):
            a, b, bias, grad = values
            a = a.t().contiguous().t() if layout % 2 else torch.cat([a, a], 1)[:, :k]
            b = b.t().contiguous().t() if layout // 2 else torch.cat([b, b], 1)[:, :n]
            a, b, bias, grad = (guarded(t, at_end) for t in (a, b, bias, grad))
            z, y, dz, db = (guarded(torch.zeros_like(t), at_end) for t in (grad, grad, grad, bias))
            cpu.call("fastmp_gemm", gemm_args(
                a, b, y, bias=bias.data_ptr(), preactivation=z.data_ptr(), activation=activation
            ))  # fmt: skip
            backward = ActivationArgs(
                saved=z.data_ptr(), grad_output=grad.data_ptr(), out=dz.data_ptr(),
                grad_bias=db.data_ptr(), rows=rows, columns=n, dtype=DTYPE_CODES[dtype],
                activation=activation,
            )  # fmt: skip
            cpu.call("fastmp_activation_backward", backward)
            cpu.call("fastmp_activation", backward)
            expected = torch.addmm(values[2].double(), values[0].double(), values[1].double())
            tolerance = {"rtol": 0.01, "atol": 0.01 * k**0.5}
            torch.testing.assert_close(z.double(), expected, **tolerance)
            assert all(t.isfinite().all() for t in (y, dz, db))
    print("within")


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages by Linux's mmap")
def test_nothing_outside_the_arguments_is_touched():
    code = "from tests.backends import test_cpu_gemm as t; t.stay_within_their_arguments()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "within\n", (result.returncode, result.stderr[-2000:])
