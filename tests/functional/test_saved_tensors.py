"""What the operations keep for their backward is theirs to drop or to move that run the model.

``torch.utils.checkpoint`` drops it and computes it again, ``saved_tensors_hooks`` move it.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastmp.functional import cross_entropy, linear
from tests.functional.loss_cases import DTYPES

ROWS, WIDTH = 256, 256  # large enough for the kernel of the linear layer


class Created(TorchDispatchMode):
    """Bytes that operations made and that are still held; not those of the operands."""

    def __init__(self, *operands):
        super().__init__()
        self.seen, self.given = [], {t.untyped_storage().data_ptr() for t in operands}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.seen += [weakref.ref(t) for t in outputs if isinstance(t, torch.Tensor)]
        return result

    def held(self):
        gc.collect()
        alive = [t for t in (ref() for ref in self.seen) if t is not None]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        return sum(count for address, count in held.items() if address not in self.given)


def loss(x, w, y, grad_scale=None):
    return cross_entropy(linear(x, w, None, "gelu"), y, label_smoothing=0.1, grad_scale=grad_scale)


def torchs(x, w, y):
    return F.cross_entropy(F.gelu(F.linear(x, w)), y, label_smoothing=0.1)


def operands(dtype=torch.float32):
    torch.manual_seed(0)
    x, w = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    y = torch.randint(WIDTH, (ROWS,))
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_chunked_loss_holds_nothing(reentrant, dtype):
    x, w, y = operands(dtype)
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
    created = Created(x, w, y)
    with created:
        chunks = [checkpoint(loss, h, w, t, use_reentrant=reentrant) for h, t in parts]
        total = torch.stack(chunks).mean()
    assert created.held() <= 100  # losses; one gradient of a chunk has 32 kB
    expected = torch.autograd.grad(loss(x, w, y), (x, w))
    total.backward()
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-4}  # four sums in 16 bits
    torch.testing.assert_close((x.grad, w.grad), expected, **close)


@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_saved_tensors_can_be_moved(grad_scale):
    x, w, y = operands()
    created, elsewhere = Created(x, w, y), []

    def pack(t):
        elsewhere.append(t.detach().numpy().copy())
        return len(elsewhere) - 1

    with created, saved_tensors_hooks(pack, lambda i: torch.from_numpy(elsewhere[i])):
        value = loss(x, w, y, grad_scale)
    assert created.held() <= 100
    ours = torch.autograd.grad(8 * value, (x, w))
    torch.testing.assert_close(ours, torch.autograd.grad(8 * torchs(x, w, y), (x, w)))


def test_a_second_derivative_under_a_checkpoint_is_refused():
    z, y = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    value = checkpoint(lambda z: cross_entropy(z * 1, y), z, use_reentrant=False)
    (grad,) = torch.autograd.grad(value, z, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(z, y), z)[0])
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.square().sum().backward()
