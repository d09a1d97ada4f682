// Vectors of the widest kind that the processor has, by GCC's and clang's vector extensions.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;  // numbers in a vector; rows of a block whose sums stay in registers
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 8;
#endif
constexpr int NV = 2, NR = NV * VL;  // vectors and columns of a panel

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf all(float x) { return x - vf{}; }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
}
static inline float largest(vf v) {
  float m = v[0];
  for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// exp(x) to 1e-7 of it for x <= 88; below -87 it is that of -87, which is 0 beside any sum.
static inline vf exp_(vf x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  x = larger(x, all(-87.f));
  vf t = x * 1.44269504f + magic;
  vf n = t - magic;
  vf f = x - n * 0.693359375f;  // ln 2 in two parts, of which the first has few digits
  f = f - n * -2.12194440e-4f;
  vf p = all(1.f / 720);
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  vi bits;
  std::memcpy(&bits, &t, sizeof t);
  bits = (bits + (127 - 0x4B400000)) << 23;  // 0x4B400000: the bits of magic
  vf power;
  std::memcpy(&power, &bits, sizeof t);
  return p * power;
}
