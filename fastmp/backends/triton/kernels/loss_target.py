"""The targets of the loss: their terms and the coefficients of the gradient. Formulas: ``loss.py``.

All functions take the scalars of one row, or tensors of rows (``loss_short.py``). Offsets are o_,
masks m_.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.numerics import exp


class Target(NamedTuple):
    """One target of a row, or of each row."""

    y: Any
    w: Any  # class weight; NaN for an index out of range: loud, and no crash
    m: Any  # False: ignored
    mix_weight: Any
    z: Any  # the target's logit


@triton.jit
def load_index(target, o_n, m_n, ignore_index):
    """The target of row o_n; ignore_index where m_n, if given, is False."""
    if m_n is None:
        return tl.load(target + o_n)
    else:
        return tl.load(target + o_n, mask=m_n, other=ignore_index)


@triton.jit
def load_number(x, stride, o_n, m_n):
    """x of row o_n: in memory or, without a stride, the number itself; 1 without x."""
    if x is None:
        return 1.0
    elif stride is None:
        return x
    elif m_n is None:
        return tl.load(x + o_n * stride).to(tl.float32)
    else:
        return tl.load(x + o_n * stride, mask=m_n, other=0.0).to(tl.float32)


@triton.jit
def load_target(y, weight, p_row, mix_weight, C, ignore_index):
    """The target of index y."""
    m = y != ignore_index
    m_valid = m & (y >= 0) & (y < C)
    y = tl.where(m_valid, y, 0).to(tl.int32)
    w = tl.where(m, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + y, mask=m_valid, other=0.0).to(tl.float32)
    w = tl.where(m & ~m_valid, float("nan"), w)
    z = tl.load(p_row + y, mask=m, other=0.0).to(tl.float32)
    return Target(y, w, m, mix_weight, z)


@triton.jit
def larger_first(a, b):
    """The target with the larger logit and the other one.

    Where both are one class, the larger has the weight of both and the other is none.
    """
    both = a.m & b.m & (a.y == b.y) & (a.w == b.w)  # not NaN, which is out of range
    mix_a = a.mix_weight + tl.where(both, b.mix_weight, 0.0)
    mix_b = tl.where(both, 0.0, b.mix_weight)
    m_b = b.m & ~both
    swap = m_b & (~a.m | (b.z > a.z))
    return (
        Target(tl.where(swap, b.y, a.y), tl.where(swap, b.w, a.w), a.m | m_b,
               tl.where(swap, mix_b, mix_a), tl.where(swap, b.z, a.z)),
        Target(tl.where(swap, a.y, b.y), tl.where(swap, a.w, b.w), a.m & m_b,
               tl.where(swap, mix_a, mix_b), tl.where(swap, a.z, b.z)),
    )  # fmt: skip


@triton.jit
def log_sum_exp(t, row_max, others):
    """log Σ exp(z - row_max), to rounding where it is close to 0: t is the largest, and e_t = 1.

    x log(u) / (u - 1) is log(1 + x), whatever rounding makes of u = 1 + x (W. Kahan).
    """
    u = others + exp(t.z - row_max)
    lse = tl.log(u)
    small = (t.z == row_max) & (u < 2.0)
    return tl.where(small, others * tl.where(u == 1.0, 1.0, lse / (u - 1.0)), lse)


@triton.jit
def target_loss(t, row_max, lse, smooth_loss, target_prob):
    """One target's loss, but for mix_weight; smooth_loss is the second line of the formula."""
    target_nll = target_prob * t.w * (lse - (t.z - row_max))
    return tl.where(t.m, target_nll + smooth_loss, 0.0)


@triton.jit
def pair_losses(a, b, t, lam_n, s, weight_total, target_prob, smooth_prob, PAIR: tl.constexpr,
                SMOOTH: tl.constexpr):  # fmt: skip
    """The terms of targets a and b, but for the divisors."""
    lse = log_sum_exp(t, s.row_max, s.others)
    smooth_loss = smooth_prob * (weight_total * lse + s.smooth_sum) if SMOOTH else 0.0
    loss_a = target_loss(a, s.row_max, lse, smooth_loss, target_prob)
    if PAIR:
        loss_b = target_loss(b, s.row_max, lse, smooth_loss, target_prob)
        return lam_n * loss_a, (1.0 - lam_n) * loss_b
    else:
        return loss_a, tl.zeros_like(loss_a)


@triton.jit
def counted(target, WEIGHTED: tl.constexpr):
    """What a divisor is made of: Σw or, without class weights, how many rows are ignored."""
    return target.w if WEIGHTED else tl.where(target.m, 0.0, 1.0)


class Coefficients(NamedTuple):
    """What the gradient of a row is computed with."""

    softmax: Any
    smooth: Any
    grad_t: Any  # the gradient at the larger target
    grad_o: Any  # at the other one


@triton.jit
def coefficients(t, other, grad_output, row_max, others, weight_total, target_prob, smooth_prob):
    """Of a row, for the gradient formula; 0 where it is ignored."""
    mix_t = tl.where(t.m, grad_output * t.mix_weight, 0.0)
    mix_o = tl.where(other.m, grad_output * other.mix_weight, 0.0)
    target_coef = mix_t * target_prob * t.w
    other_coef = mix_o * target_prob * other.w
    smooth_coef = (mix_t + mix_o) * smooth_prob
    e_t = exp(t.z - row_max)
    per_sum = 1.0 / (others + e_t)
    softmax_coef = (target_coef + other_coef + smooth_coef * weight_total) * per_sum
    away = other_coef + smooth_coef * (weight_total - t.w)
    towards = target_coef + smooth_coef * t.w
    grad_t = (away * e_t - towards * others) * per_sum
    grad_o = exp(other.z - row_max) * softmax_coef - smooth_coef * other.w - other_coef
    return Coefficients(softmax_coef, smooth_coef, grad_t, grad_o)
