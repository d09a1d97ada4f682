// Vectors of the widest kind that the processor has, by GCC's and clang's vector extensions.
#pragma once
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

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf all(float x) { return x - vf{}; }
