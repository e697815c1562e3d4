"""The coefficients of gelu in ``backends/triton/kernels/activation.py``, and their errors.

    python -m benchmarks.tools.fit_activation

Φ(z) = 1 / (1 + 2^(z p(z²))) and gelu'(z) = Φ + z Φ (1 - Φ) r(z²), p and r polynomials: minimax fits
by Lawson's algorithm (least squares, weights multiplied by the error again and again). The errors
are relative to the tail: |Δ gelu| / (gelu(-|z|) + floor) and |Δ gelu'| / (Φ + |z| φ + floor). r is
fitted to the Φ that p gives, and so takes back what p is off there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)


class Fit(NamedTuple):
    """Coefficients from the constant upwards, and the largest error that they leave."""

    p: list[float]
    p_error: float
    r: list[float]
    r_error: float


class Aim(NamedTuple):
    """A dtype's degree, the largest |z| that counts, and what is too small to count beside."""

    degree: int
    limit: float
    floor: float


#: bf16: beyond -5.5 torch's own gelu, z (1 + erf) / 2 in fp32, is 0 or off by more than itself.
#: fp16: its least number, 2^-24, is 64 times the error at the floor; gelu(-5.6) rounds to 0.
AIMS = {torch.bfloat16: Aim(3, 5.5, 0.0), torch.float16: Aim(6, 5.6, 2.0**-14)}


def polynomial(coefficients: list[float] | Tensor, q: Tensor) -> Tensor:
    """Σ c_i q^i by Horner's rule."""
    value = torch.zeros_like(q)
    for c in reversed(list(coefficients)):
        value = value * q + c
    return value


def minimax(q: Tensor, target: Tensor, weight: Tensor, degree: int) -> tuple[list[float], float]:
    """The polynomial in q with the least max |error · weight|, and that."""
    powers = (q[:, None] / q.max()) ** torch.arange(degree + 1)
    best: tuple[list[float], float] = ([], math.inf)
    share = torch.full_like(q, 1 / len(q))
    for _ in range(400):
        w = share.sqrt() * weight
        c = torch.linalg.lstsq(powers * w[:, None], (target * w)[:, None]).solution[:, 0]
        error = ((powers @ c - target) * weight).abs()
        if error.max().item() < best[1]:
            best = (c / q.max() ** torch.arange(degree + 1)).tolist(), error.max().item()
        share = share * (error / error.max() + 1e-6)
        share /= share.sum()
    return best


def fit(aim: Aim) -> Fit:
    """p and r of one dtype."""
    z = aim.limit * torch.sin(torch.linspace(1e-4, math.pi / 2, 4000, dtype=torch.float64))
    q, upper, tail = z * z, torch.special.ndtr(z), torch.special.ndtr(-z)
    density = torch.exp(-q / 2) / math.sqrt(2 * math.pi)
    logit = (torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)) / LN2
    p, p_error = minimax(
        q, -logit / z, LN2 * z * upper * z * tail / (z * tail + aim.floor), aim.degree
    )
    near = 1 / (1 + torch.exp2(-z * polynomial(p, q)))  # Φ(-z) as p gives it
    bell = z * near * (1 - near)
    slope = tail - z * density  # gelu'(-z)
    r, r_error = minimax(
        q, (near - slope) / bell, bell / (tail + z * density + aim.floor), aim.degree
    )
    return Fit(p, p_error, r, r_error)


def main() -> None:
    for dtype, aim in AIMS.items():
        found: Any = fit(aim)._asdict()
        print(dtype, aim)
        for name, value in found.items():
            values = value if isinstance(value, list) else [value]
            print(f"  {name:8}", ", ".join(f"{v:.9g}" for v in values))


if __name__ == "__main__":
    main()
