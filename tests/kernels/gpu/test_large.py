"""More than 2^31 elements, up to 40 GB a test: in one file, so in one process of pytest-xdist."""

import gc

import pytest
import torch
import torch.nn.functional as F

import fastmp
from fastmp.functional import cross_entropy, linear, mix
from tests.kernels.gpu.test_addresses import assert_mixed
from tests.kernels.gpu.test_operations import DEVICE, MEAN, OBSTACLE, STD

pytestmark = [
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "there is a GPU"),
    pytest.mark.usefixtures("every_size"),
]


@pytest.fixture
def free_40_gb():
    """40 GB of free memory, which the cache gives back after the test."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < 40:
        pytest.skip(f"needs 40 GB of free GPU memory, got {free:.0f}")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("free_40_gb")
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("n", "classes"), [(8200, 262144), (42800, 50257)])
def test_loss_of_more_than_2_31_logits(n, classes, reduction):
    """With none the gradient is computed in the backward, with sum in the forward.

    Rows of 262,144 are read twice, those of 50,257 stay in shared memory.
    """
    z = torch.randn(n, classes, device=DEVICE, dtype=torch.float16).requires_grad_()
    y = torch.randint(classes, (n,), device=DEVICE)
    loss = cross_entropy(z, y, reduction=reduction, grad_scale=1024.0)
    (grad,) = torch.autograd.grad(loss, z, torch.full_like(loss, 1024.0))
    rows = [0, 8191, 8192, n - 2, n - 1]
    some = z.detach()[rows].double().requires_grad_()
    ref = F.cross_entropy(some, y[rows], reduction="none")
    (ref_grad,) = torch.autograd.grad(ref, some, torch.full_like(ref, 1024.0))
    if reduction == "none":
        torch.testing.assert_close(loss[rows].double(), ref, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[rows].double(), ref_grad, rtol=2**-10, atol=1e-7)


@pytest.mark.usefixtures("free_40_gb")
def test_linear_of_more_than_2_31_results():
    x = torch.randn(524296, 64, device=DEVICE).half()
    w = (torch.randn(4104, 64, device=DEVICE) / 8).half()
    b = torch.randn(4104, device=DEVICE).half()
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = linear(x, w, b, "gelu")
    # A power of two, and so small that no sum of 524,296 of them leaves fp16.
    dx, dw, db = torch.autograd.grad(y, leaves, torch.full_like(y, 2.0**-6))
    x64, w64, b64 = (t.detach().double() for t in leaves)

    def wide(some_x, some_w, some_b):
        z = F.linear(some_x, some_w, some_b).requires_grad_()
        value = F.gelu(z)
        (dz,) = torch.autograd.grad(value, z, torch.full_like(value, 2.0**-6))
        return value.detach(), dz

    value, dz = wide(x64[-200:], w64, b64)
    torch.testing.assert_close(y[-200:].double(), value, rtol=2**-10, atol=1e-5)
    _, dz_columns = wide(x64, w64[-8:], b64[-8:])
    exactly = dz @ w64, dz_columns.t() @ x64, dz_columns.sum(0)
    for ours, exact in zip((dx[-200:], dw[-8:], db[-8:]), exactly, strict=True):
        assert (ours.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.usefixtures("free_40_gb")
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mix_of_more_than_2_31_bytes(kind):
    x = torch.randint(256, (10930, 3, 256, 256), device=DEVICE, dtype=torch.uint8)
    index = torch.arange(len(x), device=DEVICE).flip(0)
    lam, box = torch.tensor(0.25, device=DEVICE), torch.tensor([10, 200, 33, 250], device=DEVICE)
    chosen = {"lam": lam} if kind == "mixup" else {"lam": None, "box": box}
    out = mix(x, index=index, **chosen, mean=MEAN, std=STD, dtype=torch.float16)
    pair = torch.tensor([0, len(x) - 1], device=DEVICE)  # each other's partners
    assert_mixed(out[pair], x[pair], pair.new_tensor([1, 0]), **chosen)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of free GPU memory")
    count = 2**31 + 4099
    p = torch.zeros(count, dtype=torch.float16, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = fastmp.optim.SGD([p], lr=1.0)
    optimizer.step()
    assert bool((p == -1).all())
    torch.testing.assert_close(float(optimizer.grad_norm), count**0.5, rtol=1e-6, atol=0)
    p.grad[-1] = torch.nan
    optimizer.step()
    assert bool((p == -1).all())
    assert optimizer.skipped_steps == 1
