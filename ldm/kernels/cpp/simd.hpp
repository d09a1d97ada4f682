// Vectors of the widest kind that the processor has, by GCC's and clang's vector extensions; numbers of 16 bits become
// those of 32 where they are read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

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

typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

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

static inline vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
static inline void store(bf16* p, vf x) {  // to the nearest, to the even one of two
  const vu bits = (vu)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vh half = __builtin_convertvector(x == x ? rounded : (vu){} + 0x7fc0, vh);
  std::memcpy(p, &half, sizeof half);
}

// The first n numbers of a vector, VL at most: the others are 0.
template <class T>
static inline vf load_some(const T* p, int64_t n) {
  if (n >= VL) return load(p);
  T some[VL] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}
template <class T>
static inline void store_some(T* p, vf x, int64_t n) {
  if (n >= VL) return store(p, x);
  T some[VL];
  store(some, x);
  std::memcpy(p, some, n * sizeof(T));
}

// Two rows of a matrix exchange every other S numbers: what lies beside the diagonal goes to the other side.
template <int S, size_t... I>
static inline void exchange(vf& a, vf& b, std::index_sequence<I...>) {
  const vf first = __builtin_shufflevector(a, b, (I & S ? VL + I - S : I)...);
  const vf second = __builtin_shufflevector(a, b, (I & S ? VL + I : I + S)...);
  a = first, b = second;
}

// VL x VL numbers, rows to columns.
template <int S = VL / 2>
static inline void transpose(vf (&rows)[VL]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<VL>());
    transpose<S / 2>(rows);
  }
}
