// Functions of one number, without branches, so that compilers turn loops over them into vectors; and numbers of 16 bits.
#pragma once
#include <cstdint>
#include <cstring>

// The upper half of a float.
struct bf16 {
  uint16_t bits;
};
static inline float number(float x) { return x; }
static inline float number(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // to the nearest, to the even one of two
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p->bits = (uint16_t)(x != x ? 0x7fc0 : rounded);
}

// e^x = 2^n e^r with |r| <= log(2) / 2, e^r by its series: within 3e-7 of it (the clamp keeps it finite).
static inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const float moved = x * 1.44269504f + rounder, n = moved - rounder;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9841270e-4f;
  y = y * r + 1.3888889e-3f;
  y = y * r + 8.3333333e-3f;
  y = y * r + 4.1666667e-2f;
  y = y * r + 1.6666667e-1f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &moved, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

static inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// x Phi(x), Phi the normal distribution's function, within 2e-7 |x|: Abramowitz and Stegun 1964, 7.1.26.
static inline float gelu(float x) {
  const float z = 0.70710678f * (x < 0 ? -x : x), t = 1.0f / (1.0f + 0.3275911f * z);
  float y = 1.061405429f;
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  const float tail = 0.5f * y * t * exponential(-z * z);  // Phi(-|x|)
  return x * (x < 0 ? tail : 1.0f - tail);
}

// y [N, D] = value * gelu(gate), of [value, gate] = x [N, 2 D]
template <class T>
static void geglu(const T* x, T* y, int64_t N, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > 16384)
  for (int64_t n = 0; n < N; n++) {
    const T *value = x + n * 2 * D, *gate = value + D;
    T* to = y + n * D;
#pragma GCC ivdep
    for (int64_t d = 0; d < D; d++) put(to + d, number(value[d]) * gelu(number(gate[d])));
  }
}
