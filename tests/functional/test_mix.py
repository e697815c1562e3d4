"""fastmp.functional.mix against its formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmp import backends
from fastmp.backends import cpu
from fastmp.functional import mix
from fastmp.ops.mix import mix_reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = [*FLOATS, torch.float64, torch.uint8]


def formula(x, lam, index, box, mean, std):
    """In fp64, sample by sample."""
    norm = x.double() / (255 if x.dtype == torch.uint8 else 1)
    if mean is not None:
        norm = norm - torch.tensor(mean, dtype=torch.float64)[:, None, None]
    if std is not None:
        norm = norm / torch.tensor(std, dtype=torch.float64)[:, None, None]
    if index is None:
        return norm
    out = norm.clone()
    for i in range(x.shape[0]):
        partner = norm[index[i]]
        if box is not None:
            top, bottom, left, right = (box if box.dim() == 1 else box[i]).tolist()
            out[i, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
        else:
            share = (lam if lam.dim() == 0 else lam[i]).double()
            out[i] = share * norm[i] + (1 - share) * partner
    return out


def batch(shape, dtype, generator):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(
        st.sampled_from(
            [
                (0, 3, 4, 4),
                (1, 1, 1, 1),
                (2, 3, 0, 5),
                (5, 3, 7, 11),
                (4, 2, 16, 16),
                (3, 1, 40, 53),
            ]
        )
    )
    x = batch(shape, draw(st.sampled_from(INPUTS)), generator)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.cat([x, x], 3)[..., ::2]
    n, channels, height, width = x.shape
    kind = draw(st.sampled_from(["plain", "zero", "one", "number", "rows", "box", "boxes"]))
    index = None if kind == "plain" else torch.randint(max(n, 1), (n,), generator=generator)
    lam = {
        "zero": torch.zeros(()), "one": torch.ones(()), "number": torch.tensor(0.3),
        "rows": torch.rand(n, generator=generator),
    }.get(kind)  # fmt: skip
    box = None
    if kind in ("box", "boxes"):
        edges = [
            torch.randint(size + 1, (n if kind == "boxes" else 1, 2), generator=generator)
            for size in (height, width)
        ]
        box = torch.cat([e.sort(1).values for e in edges], 1)
        box = box if kind == "boxes" else box[0]
    mean = [0.1 * c for c in range(channels)] if draw(st.booleans()) else None
    std = [0.2 + 0.1 * c for c in range(channels)] if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([None, *FLOATS, torch.float64]))
    return x, lam, index, box, mean, std, dtype


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_matches_the_formula(problem):
    x, lam, index, box, mean, std, dtype = problem
    before = x.clone()
    out = mix(x, lam, index, box=box, mean=mean, std=std, dtype=dtype)
    ref = formula(x, lam, index, box, mean, std)
    expected = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    assert out.dtype == expected
    assert out.shape == x.shape
    assert out.is_contiguous()
    tolerance = max(torch.finfo(expected).eps / 2, 1e-6)  # one rounding; fp32 a few
    torch.testing.assert_close(out.double(), ref, rtol=tolerance, atol=4e-6)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr() or not x.numel()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_kept_bitwise_where_nothing_is_mixed(dtype):
    x = torch.randn(3, 2, 5, 7).to(dtype)
    index = torch.tensor([1, 2, 0])
    assert torch.equal(mix(x, None, None), x)
    assert torch.equal(mix(x, torch.tensor(1.0), index), x)
    assert torch.equal(mix(x, 0, index), x[index])
    assert torch.equal(mix(x, None, index, box=torch.tensor([0, 5, 0, 7])), x[index])
    assert torch.equal(mix(x, None, index, box=torch.tensor([2, 2, 0, 7])), x)


@pytest.mark.parametrize("shape", [(4,), (4, 9), (4, 3, 5), (4, 2, 3, 4, 5)])
def test_any_shape(shape):
    x, index = torch.randn(shape), torch.tensor([3, 2, 1, 0])
    torch.testing.assert_close(mix(x, 0.25, index), 0.25 * x + 0.75 * x[index])
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    torch.testing.assert_close(mix(x, None, None), x / 255)


def test_bytes_cover_0_to_1_exactly():
    x = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert mix(x, None, None).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("lam", [0.3, torch.rand(4)])
def test_gradient(lam):
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    index = torch.tensor([3, 3, 1, 0])
    mix(x, lam, index, mean=[0.0, 1.0], std=[2.0, 4.0]).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    share = torch.as_tensor(lam).reshape(-1, 1, 1, 1)
    norm = (y - torch.tensor([0.0, 1.0])[:, None, None]) / torch.tensor([2.0, 4.0])[:, None, None]
    (share * norm + (1 - share) * norm[index]).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_same_bits_for_any_number_of_threads():
    x = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    index, lam = torch.randperm(64), torch.rand(64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mix(x, lam, index, mean=[0.5] * 3, std=[0.2] * 3, dtype=torch.float16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("cut", [False, True])
def test_opcheck_and_reference(opcheck, dtype, cut):
    x = batch((3, 2, 5, 4), dtype, torch.Generator().manual_seed(0))
    index, lam = torch.tensor([2, 2, 0]), torch.tensor([0.0, 0.5, 1.0])
    box = torch.tensor([[0, 5, 1, 3], [1, 2, 0, 4], [0, 0, 0, 0]]) if cut else None
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 0.25])
    for arguments in (
        (x, lam, index, box, scale, shift, torch.float32),
        (x, None, None, None, None, None, torch.bfloat16),
        (x, lam, index, box, None, None, torch.float64),
    ):
        opcheck(torch.ops.fastmp.mix, arguments)
        torch.testing.assert_close(torch.ops.fastmp.mix(*arguments), mix_reference(*arguments))


def test_compiles_into_one_graph():
    x, index = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8), torch.tensor([1, 0, 3, 2])

    def fn(x, lam):
        return mix(x, lam, index, mean=[0.5] * 3, std=[0.2] * 3, dtype=torch.float16) * 2

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    lam = torch.tensor(0.3)
    assert torch.equal(compiled(x, lam), fn(x, lam))


def test_who_serves_is_on_record():
    native, _ = cpu.load()
    served = {(s.op, s.device): s for s in backends.report()}["mix", "cpu"]
    assert served.backend == ("reference" if native is None else "cpu")


X, I, BOX = torch.zeros(2, 3, 4, 5), torch.tensor([1, 0]), torch.tensor([0, 4, 0, 5])  # noqa: E741
BAD = {
    "scalar": (ValueError, "batch", (torch.zeros(()), None, None), {}),
    "integer": (TypeError, "uint8", (X.int(), 0.5, I), {}),
    "dtype": (TypeError, "floating", (X, 0.5, I), {"dtype": torch.int32}),
    "lam above": (ValueError, r"\[0, 1\]", (X, 1.5, I), {}),
    "lam nan": (ValueError, r"\[0, 1\]", (X, torch.tensor(float("nan")), I), {}),
    "lam row": (ValueError, r"\[0, 1\]", (X, torch.tensor([0.5, -1.0]), I), {}),
    "lam shape": (ValueError, "shape", (X, torch.ones(3), I), {}),
    "lam missing": (ValueError, "lam is missing", (X, None, I), {}),
    "lam alone": (ValueError, "give index", (X, 0.5, None), {}),
    "index above": (IndexError, r"\[0, 2\).*0 to 2", (X, 0.5, torch.tensor([0, 2])), {}),
    "index below": (IndexError, r"-1 to 0", (X, 0.5, torch.tensor([0, -1])), {}),
    "index int32": (ValueError, "int64", (X, 0.5, I.int()), {}),
    "index shape": (ValueError, "index", (X, 0.5, torch.tensor([0])), {}),
    "index device": (RuntimeError, "device", (X, 0.5, I.to("meta")), {}),
    "box shape": (ValueError, "box", (X, None, I), {"box": BOX[:3]}),
    "box dtype": (ValueError, "int64", (X, None, I), {"box": BOX.int()}),
    "box outside": (ValueError, "4 x 5", (X, None, I), {"box": BOX + 1}),
    "box reversed": (ValueError, "4 x 5", (X, None, I), {"box": torch.tensor([3, 1, 0, 5])}),
    "box flat": (ValueError, "N, C, H, W", (X.flatten(1), None, I), {"box": BOX}),
    "mean flat": (ValueError, "N, C, H, W", (X.flatten(1), 0.5, I), {"mean": [0.0]}),
    "mean size": (ValueError, "3 channels", (X, 0.5, I), {"mean": [0.0]}),
    "index and lam swapped": (TypeError, "index must be an int64 tensor, got 0.5", (X, I, 0.5), {}),
    "std zero": (ValueError, "not be 0", (X, 0.5, I), {"std": [1.0, 0.0, 1.0]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    error, text, arguments, options = BAD[name]
    with pytest.raises(error, match=text):
        mix(*arguments, **options)
