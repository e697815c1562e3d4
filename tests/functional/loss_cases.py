"""Problems for the loss, its definition on torch's functions, and the error it may have."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastmp.functional import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(z, a, b, lam, weight, ignore_index, reduction, smoothing):
    """The definition, on torch's own cross_entropy."""
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    if b is None:
        return F.cross_entropy(z, a, weight, reduction=reduction, **options)
    if lam.dim() == 0:
        ce_a, ce_b = (F.cross_entropy(z, y, weight, reduction=reduction, **options) for y in (a, b))
        return lam * ce_a + (1 - lam) * ce_b
    lam = lam.reshape(-1, *[1] * (a.dim() - 1))
    total = 0
    for y, share in ((a, lam), (b, 1 - lam)):
        rows = share * F.cross_entropy(z, y, weight, reduction="none", **options)
        if reduction == "mean":
            counts = y != ignore_index
            w = z.new_ones(z.shape[1]) if weight is None else weight
            rows = rows.sum() / w[y[counts]].sum()
        total = total + (rows.sum() if reduction == "sum" else rows)
    return total


def value_and_grad(fn, z, seed_grad):
    z = z.detach().requires_grad_()
    loss = fn(z)
    grad_output = torch.full_like(loss, seed_grad)
    return loss.detach(), torch.autograd.grad(loss, z, grad_output)[0]


def assert_close(out, ref, same_dtype, dtype, unit, factor=2.0):
    """Error budget against torch in the same dtype, and a bound for each element."""
    assert out.shape == ref.shape
    assert torch.equal(out.isnan(), ref.isnan())
    finite = ref.isfinite()
    ref_at, out_at = ref[finite].double(), out[finite].double()
    if not ref_at.numel():
        return
    limit = torch.finfo(dtype).max
    representable = ref_at.abs() < limit
    ref_at, out_at = ref_at[representable], out_at[representable]
    error = (out_at - ref_at).abs()
    tiny = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-30
    bound = torch.finfo(dtype).eps * ref_at.abs() + 2e-6 * unit + tiny
    assert (error <= bound).all(), (error - bound).max()
    theirs = (same_dtype[finite].double()[representable] - ref_at).abs()
    if theirs.isfinite().all() and theirs.numel():
        # On a few values torch is exact by luck; a logarithm and a difference in fp32 are rounded.
        rounding = torch.finfo(torch.float32).eps * ref_at.abs().max()
        assert error.max() <= factor * theirs.max() + torch.maximum(bound.max() / 8, rounding)


@st.composite
def problems(draw):
    """Shapes, layouts, targets, options and grad_output, all varied."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.sampled_from([0, 1, 2, 7, 13]))
    classes = draw(st.sampled_from([1, 2, 10, 16, 31, 64, 101, 1000, 2048, 2049, 4099]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed", "offset"]))
    scale = draw(st.sampled_from([1.0, 10.0, 6e4]))

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    z = torch.randn(rows, classes, generator=generator)
    if scale == 6e4:
        z = torch.where(uniform(rows, classes) < 0.3, z.sign() * 6e4, z)
    else:
        z = z * scale
    z = z.to(dtype)
    if layout == "strided":
        z = torch.cat([z, torch.full((rows, 3), float("nan"), dtype=dtype)], 1)[:, :classes]
    elif layout == "transposed":
        z = z.t().contiguous().t()
    elif layout == "offset":
        z = torch.cat([torch.full((1,), float("nan"), dtype=dtype), z.reshape(-1)])[1:]
        z = z.reshape(rows, classes)
    ignore_index = draw(st.sampled_from([-100, 0]))
    targets = [torch.randint(classes, (rows,), generator=generator) for _ in range(2)]
    if draw(st.booleans()):
        targets = [torch.where(uniform(rows) < 0.3, ignore_index, y) for y in targets]
    kind = draw(st.sampled_from(["single", "zero", "one", "number", "rows"]))
    lam = {
        "zero": torch.zeros(()), "one": torch.ones(()), "number": uniform(1)[0],
        "rows": uniform(rows).round(decimals=1),
    }.get(kind)  # fmt: skip
    b = None if kind == "single" else targets[1]
    weight = uniform(classes) + 0.1 if draw(st.booleans()) else None
    weight = None if weight is None else weight.to(dtype)
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    grad_output = draw(st.sampled_from([1.0, 512.0, 0.3125]))
    return z, targets[0], b, lam, weight, ignore_index, reduction, smoothing, grad_output


def check(problem, scales, device="cpu"):
    """cross_entropy against torch in fp64, for each grad_scale."""
    z, a, b, lam, weight, ignore_index, reduction, smoothing, grad_output = problem
    dtype = z.dtype
    z = z.to(device)  # keeps the layout
    a, b, lam, weight = (None if t is None else t.to(device) for t in (a, b, lam, weight))

    def theirs(wide):
        lam_wide = None if lam is None else lam.to(wide)
        weight_wide = None if weight is None else weight.to(wide)
        return value_and_grad(
            lambda z: pair(
                z.to(wide), a, b, lam_wide, weight_wide, ignore_index, reduction, smoothing
            ),
            z, grad_output,
        )  # fmt: skip

    z64 = z.detach().double().requires_grad_()
    lam64, weight64 = (None if t is None else t.double() for t in (lam, weight))
    ref = pair(z64, a, b, lam64, weight64, ignore_index, reduction, smoothing)
    (ref_grad,) = torch.autograd.grad(ref, z64, torch.full_like(ref, grad_output))
    ref = ref.detach()
    # The smoothed sum runs over logits of this size; without it the largest cancels exactly.
    unit = 1.0 + smoothing * (float(z.double().abs().max()) if z.numel() else 0.0)
    same, same_grad = theirs(dtype)
    for scale in scales:
        out, grad = value_and_grad(
            lambda z, scale=scale: cross_entropy(
                z, a, weight, ignore_index, reduction, smoothing,
                target_b=b, lam=lam, grad_scale=scale,
            ),
            z, grad_output,
        )  # fmt: skip
        assert out.dtype == torch.float32
        assert grad.dtype == dtype
        assert_close(out, ref, same, torch.float32, unit)
        assert_close(grad, ref_grad, same_grad, dtype, _largest_pull(problem))


def _largest_pull(problem):
    """What the softmax of a row is multiplied with, at most: the unit of a gradient's error."""
    _z, a, b, _lam, weight, ignore_index, reduction, _smoothing, grad_output = problem
    divisor = 1.0
    if reduction == "mean":
        sums = []
        for y in (a,) if b is None else (a, b):
            counted = y[y != ignore_index]
            w = torch.ones_like(counted, dtype=torch.float64) if weight is None else weight[counted]
            sums.append(float(w.double().sum()))
        divisor = min([s for s in sums if s > 0], default=1.0)
    return grad_output / divisor * (1.0 if weight is None else float(weight.max()))
