// Functions of one number, for a vector of them at a time.
#pragma once
#include <algorithm>

#include "simd.hpp"

// e^x = 2^n e^r with |r| <= log(2) / 2, e^r by its series: within 3e-7 of it (the clamp keeps it finite).
static inline vf exponential(vf x) {
  const vf high = all(88.0f), low = all(-87.0f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const vf moved = x * 1.44269504f + rounder, n = moved - rounder;
  const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf y = all(1.9841270e-4f);
  y = y * r + 1.3888889e-3f;
  y = y * r + 8.3333333e-3f;
  y = y * r + 4.1666667e-2f;
  y = y * r + 1.6666667e-1f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  return y * (vf)(((vu)moved << 23) + 0x3f800000u);  // all of the rounder's bits fall out
}

static inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// x Phi(x), Phi the normal distribution's function, within 2e-7 |x|: Abramowitz and Stegun 1964, 7.1.26.
static inline vf gelu(vf x) {
  const vf zero{}, z = 0.70710678f * (x < zero ? -x : x), t = 1.0f / (1.0f + 0.3275911f * z);
  vf y = all(1.061405429f);
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  const vf tail = 0.5f * y * t * exponential(-z * z);  // Phi(-|x|)
  return x * (x < zero ? tail : 1.0f - tail);
}

// y [N, D] = value * gelu(gate), of [value, gate] = x [N, 2 D]
template <class T>
static void geglu(const T* x, T* y, int64_t N, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > 16384)
  for (int64_t n = 0; n < N; n++) {
    const T *value = x + n * 2 * D, *gate = value + D;
    for (int64_t d = 0; d < D; d += VL)
      store_some(y + n * D + d, load_some(value + d, D - d) * gelu(load_some(gate + d, D - d)), D - d);
  }
}
