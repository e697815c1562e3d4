"""No kernel of the CPU library computes with subnormal numbers unless it is given some.

On Intel CPUs an instruction that takes or makes a subnormal number takes a hundred cycles; on AMD's
it hardly shows, so nothing is timed here. The processor keeps count itself: MXCSR has a sticky flag
for a subnormal operand and one for a result that underflowed.
"""

import ctypes
import platform

import pytest
import torch

from fastmp import optim
from fastmp.backends import cpu
from fastmp.backends.cpu.linear import activate, activation_backward
from fastmp.functional import cross_entropy, linear, mix
from fastmp.optim.base import FusedOptimizer

_LIBRARY = cpu.load()[0]
pytestmark = [
    pytest.mark.usefixtures("every_size"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or _LIBRARY is None or _LIBRARY.fastmp_target() == b"base",
        reason="needs the native library with FMA, and MXCSR: an x86-64 processor since 2013",
    ),
]

DENORMAL_OPERAND, UNDERFLOW, ALL_FLAGS = 0x02, 0x10, 0x3F
LEAST_NORMAL = 2.0**-126
# 1e-34 to 1e34: 12 binary orders below are left for a factor of 1e-4, an lr say.
MAGNITUDES = [sign * 1.37 * 2.0**e for e in range(-113, 114, 2) for sign in (1.0, -1.0)]
# Where exponentials end: exp(-87) is the last normal one.
LOGITS = [k / 4 for k in range(-480, 480)]


@pytest.fixture(autouse=True)
def one_thread():
    """MXCSR belongs to a thread: the kernels run in this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subnormal_flags(call):
    """The flags of MXCSR that ``call`` raised, of those for subnormal numbers."""
    libm, environment = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    environment[7] &= ~ALL_FLAGS  # MXCSR is the last word of fenv_t
    libm.fesetenv(environment)
    call()
    libm.fegetenv(environment)
    return environment[7] & (DENORMAL_OPERAND | UNDERFLOW)


def has_subnormal(*tensors):
    sizes = [t.detach().float().abs() for t in tensors]
    return any(bool(((s > 0) & (s < LEAST_NORMAL)).any()) for s in sizes)


def test_the_processor_reports_subnormal_numbers():
    least, tiny = torch.full((16,), LEAST_NORMAL), torch.full((16,), LEAST_NORMAL / 4)
    assert subnormal_flags(lambda: least * 0.3) == UNDERFLOW
    assert subnormal_flags(lambda: tiny + least) == DENORMAL_OPERAND
    assert subnormal_flags(lambda: least + least) == 0


# fp16 is left out: its stores raise the flag for results below 2^-14 at no cost.
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@both
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation, dtype):
    def run():
        results.append(activate(z, activation, False))
        results.extend(activation_backward(grad, z, activation, True, True))
        results.append(linear(z, one, None, activation))

    one = torch.ones(1, 1, dtype=dtype)
    for value in (*MAGNITUDES, *LOGITS):
        z = torch.full((19, 1), value, dtype=dtype)
        grad, results = torch.ones_like(z), []
        flags = subnormal_flags(run)
        assert flags == 0 or has_subnormal(*results), value


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(dtype, smoothing, weighted):
    def run():
        cross_entropy(z, target, weight, label_smoothing=smoothing).backward()

    weight = torch.linspace(0.5, 1.5, 1003) if weighted else None
    target = torch.tensor([0, 1002])
    for value in (*LOGITS[::5], *MAGNITUDES[::5]):
        z = torch.zeros(2, 1003, dtype=dtype)
        z[:, 2:] = value
        z.requires_grad_()
        flags = subnormal_flags(run)
        # no smoothing: a softmax that is subnormal is a result, though bf16 rounds it to 0
        assert flags == 0 or (smoothing == 0.0 and abs(value) > 70.0), value


OPTIMIZERS = {
    "adamw": lambda p, **more: optim.AdamW(p, lr=1e-3, **more),
    "amsgrad": lambda p, **more: optim.Adam(p, lr=1e-3, weight_decay=0.1, amsgrad=True, **more),
    "sgd": lambda p, **more: optim.SGD(p, lr=1e-3, **more),
    "momentum": lambda p, **more: optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, **more),
    "lion": lambda p, **more: optim.Lion(p, lr=1e-3, **more),
}


def stepped(make, dtype, **options) -> FusedOptimizer:
    """An optimizer after a step with gradients of 1."""
    param = torch.nn.Parameter(torch.ones(83, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = make([param], **options)
    optimizer.step()
    return optimizer


@both
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{"skip_nonfinite": False}, {"max_grad_norm": 1.0}])
def test_step(name, dtype, options):
    for value in MAGNITUDES[:132:4]:  # up to 1e6: the square of 1e19 overflows
        optimizer = stepped(OPTIMIZERS[name], dtype, **options)
        (param,) = optimizer.param_groups[0]["params"]
        param.grad.fill_(value)
        flags = subnormal_flags(optimizer.step)
        assert flags == 0 or has_subnormal(*optimizer.masters()), value


@both
@pytest.mark.parametrize("size", [1e-17, 1e-20, 1e-30, 0.0])
def test_norm_of_tiny_gradients(size, dtype):
    optimizer = stepped(OPTIMIZERS["sgd"], dtype)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = (torch.linspace(-1, 1, 83) * size).to(dtype)
    optimizer.step()
    exact = float(param.grad.double().norm())
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)


@both
def test_mix(dtype):
    order = torch.tensor([1, 0])
    lam = torch.tensor([0.25, 0.75])
    for value in MAGNITUDES:
        x = torch.full((2, 1, 5, 5), value)
        assert subnormal_flags(lambda x=x: mix(x, lam, order)) == 0, value
