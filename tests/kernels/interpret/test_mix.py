"""The Triton kernel of mix against fp64: in the interpreter, or compiled where there is a GPU."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmp.backends.triton import tiles
from fastmp.backends.triton.kernels.mix import mix
from fastmp.ops.mix import mix_reference
from tests.kernels.interpret.conftest import DEVICE

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = [torch.uint8, *FLOATS]
KINDS = ["plain", "mixup", "mixup rows", "cutmix", "cutmix rows"]
# Vectors of every width, planes in parts and several planes a program; 1 x 1; odd; the third and
# fourth change the width of a vector between a box and none; rows wider than a program.
SHAPES = [
    (1, 1, 1, 1), (5, 3, 7, 11), (4, 2, 28, 28), (3, 4, 6, 4), (2, 3, 32, 32), (9, 1, 3, 3),
    (2, 3, 40, 53), (3, 1, 1, 4104), (2, 2, 72, 72), (1, 4, 5, 16), (7, 3, 2, 1), (3, 2, 1, 1),
]  # fmt: skip


def batch(shape, dtype, generator):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def problem(shape, kind, input, dtype, normalise, seed=0):
    """The arguments of mix, on the device."""
    generator = torch.Generator().manual_seed(seed)
    x = batch(shape, input, generator)
    n, channels, height, width = shape
    lam = box = None
    index = None if kind == "plain" else torch.randint(n, (n,), generator=generator)
    if kind.startswith("mixup"):
        lam = torch.rand(n if "rows" in kind else (), generator=generator)
    if kind.startswith("cutmix"):
        count = n if "rows" in kind else 1
        edges = [torch.randint(s + 1, (count, 2), generator=generator) for s in (height, width)]
        box = torch.cat([e.sort(1).values for e in edges], 1)
        box = box if "rows" in kind else box[0]
    scale = shift = None
    if normalise:
        unit = 255 if input == torch.uint8 else 1
        scale = (1 + torch.rand(channels, generator=generator)) * 3 / unit
        shift = torch.randn(channels, generator=generator)
    tensors = (x, lam, index, box, scale, shift)
    return *(None if t is None else t.to(DEVICE) for t in tensors), dtype


def check(arguments, out):
    """Within twice the reference's own error, as a whole and element by element."""
    *tensors, dtype = arguments
    x, lam, index, box, scale, shift = tensors
    floats = [None if t is None else t.double() for t in (x, lam, scale, shift)]
    exact = mix_reference(*floats[:2], index, box, *floats[2:], torch.float64)
    reference = mix_reference(*arguments)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert out.is_contiguous()
    error = (out.double() - exact).abs()
    budget = 2 * (reference.double() - exact).abs().max() + 1e-6
    assert error.max() <= budget
    # fp32 before the rounding: an ulp or two of the largest term, of which some cancel.
    terms = 2 * exact.abs().max().clamp(min=1) * 2**-23
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + terms).all()


@settings(max_examples=120 if DEVICE == "cpu" else 8)  # a GPU compiles each new shape
@given(
    shape=st.sampled_from(SHAPES) | st.tuples(*[st.integers(1, most) for most in (6, 4, 18, 18)]),
    kind=st.sampled_from(KINDS),
    input=st.sampled_from(INPUTS),
    dtype=st.sampled_from(FLOATS),
    normalise=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example((2, 3, 72, 72), "mixup rows", torch.uint8, torch.float16, True, 0)
@example((2, 3, 72, 72), "cutmix rows", torch.uint8, torch.float16, True, 1)
@example((4, 1, 28, 28), "cutmix", torch.uint8, torch.bfloat16, True, 2)
@example((4, 1, 28, 28), "mixup", torch.float32, torch.float32, False, 3)
def test_matches_the_reference(shape, kind, input, dtype, normalise, seed):
    arguments = problem(shape, kind, input, dtype, normalise, seed)
    before = arguments[0].clone()
    check(arguments, mix(*arguments))
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(kind, input, dtype):
    for normalise in (False, True):
        arguments = problem((3, 2, 8, 24), kind, input, dtype, normalise)
        check(arguments, mix(*arguments))


@pytest.mark.parametrize("width", [8, 16, 12, 5])
def test_every_box(width):
    """Every left and right edge, in vectors of 8, 4 and 1 element; empty ones too."""
    edges = [(left, right) for left in range(width + 1) for right in range(left, width + 1)]
    x = torch.randn(len(edges), 1, 3, width, dtype=torch.float32).half().to(DEVICE)
    index = torch.arange(len(edges), device=DEVICE).roll(1)
    box = torch.tensor([[i % 3, 1 + i % 3, *edge] for i, edge in enumerate(edges)], device=DEVICE)
    arguments = (x, None, index, box, None, None, torch.float16)
    assert torch.equal(mix(*arguments), mix_reference(*arguments))


def test_cutmix_does_not_touch_what_it_does_not_show():
    """Infinities and NaN of the pixels that are covered stay where they are."""
    x = torch.ones(2, 1, 16, 16, device=DEVICE)
    x[0, :, :8] = float("nan")
    x[1, :, 8:] = float("inf")
    box = torch.tensor([[0, 8, 0, 16], [8, 16, 0, 16]], device=DEVICE)
    index = torch.tensor([1, 0], device=DEVICE)
    assert torch.equal(mix(x, None, index, box, None, None, torch.float16), torch.ones_like(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_kept_bitwise_where_nothing_is_mixed(dtype):
    x = torch.randn(3, 2, 5, 8).to(DEVICE, dtype)
    x[0, 0, 0, 0] = -0.0
    index = torch.tensor([1, 2, 0], device=DEVICE)
    own, whole = torch.tensor([[2, 2, 0, 8], [0, 5, 0, 8]], device=DEVICE)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(mix(x, None, None, None, None, None, dtype).view(bits), x.view(bits))
    assert torch.equal(mix(x, None, index, own, None, None, dtype).view(bits), x.view(bits))
    assert torch.equal(mix(x, None, index, whole, None, None, dtype), x[index])
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    assert torch.equal(mix(x, one, index, None, None, None, dtype), x)
    assert torch.equal(mix(x, zero, index, None, None, None, dtype), x[index])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**62)])
def test_an_index_out_of_range_is_loud(kind, normalise, wrong):
    """Its sample is NaN, the others are right, and nothing outside is read."""
    x, lam, index, box, scale, shift, dtype = problem(
        (4, 2, 5, 8), kind, torch.float32, torch.float16, normalise
    )
    expected = mix_reference(x, lam, index, box, scale, shift, dtype)
    index[2] = wrong
    out = mix(x, lam, index, box, scale, shift, dtype)
    assert out[2].isnan().all()
    others = [0, 1, 3]
    torch.testing.assert_close(out[others], expected[others])


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_address_and_stride(kind, input):
    """A view one element into its memory; channels_last; strided λ and index; λ of one repeated."""
    arguments = problem((3, 2, 4, 8), kind, input, torch.float16, True)
    x, lam, index, box, scale, shift, dtype = arguments
    memory = torch.cat([x.flatten()[:1], x.flatten()])
    shifted = memory[1:].view_as(x)
    views = [
        shifted,
        x.contiguous(memory_format=torch.channels_last),
        torch.cat([x, x], 3)[..., :8],
    ]
    if lam is not None and lam.dim():
        lam = torch.stack([lam, lam.neg()], 1)[:, 0]
    if index is not None:
        index = torch.stack([index, index + 99], 1)[:, 0]
    for view in views:
        check(arguments, mix(view, lam, index, box, scale, shift, dtype))
    if kind == "mixup":
        check(arguments, mix(x, lam.expand(3), index, box, scale, shift, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_wide_rows(kind, monkeypatch):
    """The kernel for 2^31 ranges, or pixels of a plane."""
    monkeypatch.setattr("fastmp.backends.triton.kernels.mix._INT32_LIMIT", 0)
    for shape in [(3, 2, 24, 72), (5, 3, 7, 11)]:
        arguments = problem(shape, kind, torch.uint8, torch.float16, True)
        check(arguments, mix(*arguments))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 5)])
def test_nothing_to_do(shape):
    out = mix(torch.zeros(shape, device=DEVICE), None, None, None, None, None, torch.float16)
    assert out.shape == shape


def test_most_lanes_have_work():
    for plane in range(1, 20000):
        for vector in (1, 2, 4, 8):
            if plane % vector == 0:
                ranges, block, _ = tiles.mix_tile(plane, 2, vector)
                assert block % vector == 0
                assert ranges * block <= 4096
                assert -(-plane // block) * block < 2 * plane


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter would take an hour")
@pytest.mark.parametrize(
    "shape", [(3, 1, 2**15, 2**15), (2**31 + 3, 1, 1, 1), (1, 1, 1, 2**31 + 3)]
)
@pytest.mark.parametrize("normalise", [False, True])
def test_more_than_2_31_elements(shape, normalise):
    x = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
    x[-1, -1, -1, -3:] = 7
    one = torch.ones(1, device=DEVICE) if normalise else None
    out = mix(x, None, None, None, one, one, torch.float16)
    assert out[-1, -1, -1, -1] == 7 + normalise
    assert out.sum(dtype=torch.float64) == x.sum(dtype=torch.float64) + normalise * x.numel()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_in_a_cuda_graph():
    arguments = problem((4, 3, 32, 32), "mixup rows", torch.uint8, torch.float16, True)
    mix(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mix(*arguments)
    arguments[1].fill_(0.25)
    arguments[2].copy_(arguments[2].flip(0))
    graph.replay()
    check(arguments, out)
