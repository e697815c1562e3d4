/* The activations of a linear layer and their derivatives, on vectors of fp32.
 *
 *   relu       max(z, 0)
 *   gelu       z Φ(z), Φ the normal distribution (Hendrycks and Gimpel 2016, arXiv:1606.08415)
 *   gelu_tanh  z σ(2 √(2/π) (z + 0.044715 z³)), which is its tanh form
 *   silu       z σ(z)
 *
 * Each takes one exponential, shared between value and derivative. value(z) is the activation,
 * gradient(grad, saved) the output's gradient times the derivative, where saved is z, or the output
 * for relu. NaN stays NaN; derivatives at ±inf are their limits, 0 and 1.
 *
 * kExpensive: worth a table of its values and derivatives (activation_table.h).
 *
 * No intermediate is subnormal unless z, grad or the result is nearly so: on Intel CPUs arithmetic
 * on subnormal numbers takes a hundred cycles, and gelu at inputs of size 8 took 10 times as long
 * as at size 1. Exponentials end at 0 before their products would be subnormal, and squares are
 * taken of |z| >= 2^-60. */
#ifndef FASTMP_ACTIVATION_H
#define FASTMP_ACTIVATION_H

#include "store_bf16.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

struct Identity {
  static constexpr bool kExpensive = false;
  static Vec value(Vec z) { return z; }
  static Vec gradient(Vec grad, Vec) { return grad; }
};

struct Relu {
  static constexpr bool kExpensive = false;
  static Vec value(Vec z) { return z <= 0.0f ? Vec{} : z; }
  static Vec gradient(Vec grad, Vec output) { return output <= 0.0f ? Vec{} : grad; }
};

/* |z|, and 2^-60 where it is less: its square is normal, and nothing beside 1. */
inline Vec squarable(Vec z) {
  return larger(broadcast(8.67361738e-19f), magnitude(z));
}

struct Gelu {
  static constexpr bool kExpensive = true;
  /* Below exp(-83) = 9e-37 the tail, a 32nd of that there, would be subnormal. */
  static constexpr float kMinExponent = -83.0f;
  /* Φ(-|z|) = exp(-z²/2) q(u), u = 1 / (1 + 0.3 |z|), q a polynomial fitted to 1.3e-7 relative. */
  struct Normal {
    Vec density; /* √(2π) times it */
    Vec distribution;
  };
  static Normal normal(Vec z) {
    const Vec size = squarable(z);
    const Vec u = 1.0f / (size * 0.3f + 1.0f);
    Vec q = u * 0.0359315723f - 0.158275366f;
    q = q * u + 0.208205581f;
    q = q * u - 0.0553929657f;
    q = q * u + 0.129468754f;
    q = q * u + 0.0996376202f;
    q = q * u + 0.120798342f;
    q = q * u + 0.119626388f;
    const Vec density = exp_nonpos_fast(size * size * -0.5f, kMinExponent);
    const Vec tail = density * (q * u);
    return {density, z < 0.0f ? tail : 1.0f - tail};
  }
  static Vec value(Vec z) { return z * normal(z).distribution; }
  static Vec gradient(Vec grad, Vec z) {
    z = within(z, 15.0f);
    const Normal n = normal(z);
    return grad * (n.distribution + z * 0.398942280f * n.density);
  }
};

/* σ(x) and its complement, from one exponential of -|x|. */
struct Sigmoid {
  Vec value, complement;
  explicit Sigmoid(Vec x) {
    const Vec e = exp_nonpos_fast((Vec)((UVec)x | 0x80000000u));
    const Vec near_one = 1.0f / (e + 1.0f), near_zero = e * near_one;
    value = x < 0.0f ? near_zero : near_one;
    complement = x < 0.0f ? near_one : near_zero;
  }
};

struct GeluTanh {
  static constexpr bool kExpensive = true;
  static constexpr float kScale = 1.59576912f; /* 2 √(2/π) */
  static constexpr float kCubic = 0.044715f;
  static Vec square(Vec z) { return squarable(z) * squarable(z); }
  static Vec value(Vec z) { return z * Sigmoid(z * kScale * (square(z) * kCubic + 1.0f)).value; }
  static Vec gradient(Vec grad, Vec z) {
    z = within(z, 15.0f);
    const Sigmoid s(z * kScale * (square(z) * kCubic + 1.0f));
    const Vec slope = square(z) * (3.0f * kCubic * kScale) + kScale;
    return grad * (s.value + z * slope * s.value * s.complement);
  }
};

struct Silu {
  static constexpr bool kExpensive = true;
  static Vec value(Vec z) { return z * Sigmoid(z).value; }
  static Vec gradient(Vec grad, Vec z) {
    z = within(z, 110.0f);
    const Sigmoid s(z);
    return grad * (s.value * (z * s.complement + 1.0f));
  }
};

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
