// Products of matrices, C[M, N] = A[M, K] B[K, N], one thread's share.
//
// B is packed in panels of NR columns, [N / NR][K][NR], so that a block of MR rows and NR columns keeps its sums in
// registers while it reads both in order (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
// multiplication"). A is read where it lies. Each sum runs over K in one order, whatever M and N are.
#pragma once
#include <algorithm>

#include "simd.hpp"

constexpr int KC = 320;  // a panel's rows in a round: KC x NR numbers stay in the first cache

static inline size_t panels(size_t n) { return (n + NR - 1) / NR; }

// acc += A[MR rows, K] B[K, NR]
template <int R>
static inline void block(const float* a, size_t lda, const float* b, int K, vf (&acc)[R][NV]) {
  for (int k = 0; k < K; k++, b += NR) {
    vf b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      vf x = all(a[i * lda + k]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
}

// One block of R rows: if not the `first` round, what `c` holds is added; the `last` gives them to `out(i, v)`.
template <int R, class Out>
static inline void rows(const float* a, size_t lda, const float* b, int K, float* c, size_t ldc, bool first, bool last,
                        Out out) {
  vf acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  block<R>(a, lda, b, K, acc);
  if (!first)  // whole rounds are added, not numbers one by one to a long sum: that rounds less
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
      for (int j = 0; j < NV; j++) acc[i][j] += load(c + i * ldc + j * VL);
  if (last) {
    for (int i = 0; i < R; i++) out(i, acc[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
      for (int j = 0; j < NV; j++) store(c + i * ldc + j * VL, acc[i][j]);
  }
}

template <int R, class Out>
static inline void some_rows(int r, const float* a, size_t lda, const float* b, int K, float* c, size_t ldc, bool first,
                             bool last, Out out) {
  if constexpr (R > 0) {
    if (r == R)
      rows<R>(a, lda, b, K, c, ldc, first, last, out);
    else
      some_rows<R - 1>(r, a, lda, b, K, c, ldc, first, last, out);
  }
}

// All of M rows times the panels p0 ... p1 of B; sums that take several rounds wait in `c` [M, (p1 - p0) NR].
// `out(m, p, v)` takes row m of panel p.
template <class Out>
static inline void gemm(const float* a, size_t lda, int M, const float* b, int K, int p0, int p1, float* c, Out out) {
  const size_t ldc = (size_t)(p1 - p0) * NR;
  for (int k = 0; k < K; k += KC) {
    const int depth = std::min(KC, K - k);
    const bool first = k == 0, last = k + KC >= K;
    for (int p = p0; p < p1; p++) {
      const float* panel = b + ((size_t)p * K + k) * NR;
      for (int m = 0; m < M; m += MR) {
        auto mine = [&](int i, vf(&v)[NV]) { out(m + i, p, v); };
        some_rows<MR>(std::min(MR, M - m), a + m * lda + k, lda, panel, depth, c + m * ldc + (size_t)(p - p0) * NR, ldc,
                      first, last, mine);
      }
    }
  }
}
