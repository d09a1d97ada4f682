// Attention in bf16 by the products of AVX512-BF16, which add two products of a pair of numbers to a sum in fp32.
//
// As Dao et al. 2022 ("FlashAttention") have it: keys come in blocks, and the largest score and the sum of the
// exponentials run along, so scores are never kept. Keys are packed 16 side by side, with pairs of channels together, and
// values with pairs of keys together, once for each head. Each query is computed by itself, whatever stands beside it.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.hpp"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // with AMX torch's own are quicker
#define HAS_ATTENTION
#include <immintrin.h>

constexpr float LOG2E = 1.44269504f;
constexpr int QUERIES = 8;  // that share what is read of keys and values
constexpr int WIDE = 3;     // vectors of keys, or of channels: 8 x 3 sums stay in registers
constexpr int BLOCK = 10 * WIDE * 16;    // keys whose scores are made at a time
constexpr int SCORES = BLOCK + 16;       // a row of them, and a line more: else all rows would share a few cache lines
constexpr int AT_A_TIME = 32 * QUERIES;  // queries of a task

// A tensor [B, M, H, D] at strides: heads of one token lie side by side, or tokens of one head.
struct Tokens {
  bf16* at;
  int64_t batch, token, head;
  bf16* of(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

struct Attended {
  Tokens q, k, v, out;
  int64_t B, H, N, M, D;
  float scale;
  int64_t keys() const { return (M + 15) / 16; }             // vectors of keys
  int64_t pairs() const { return (D + 1) / 2; }              // of channels
  int64_t wide() const { return (D + 15) / 16; }             // vectors of channels
  size_t key_numbers() const { return (size_t)keys() * pairs() * 32; }
  size_t value_numbers() const { return (size_t)keys() * 8 * wide() * 32; }
};

static inline __m512bh pairs_at(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh one_pair(const bf16* p) {
  int both;
  std::memcpy(&both, p, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

// 2^x for x <= 0, within 1e-4 of it: what is made of it has 8 bits.
static inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order NaN stays NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - whole;
  __m512 p = _mm512_set1_ps(0.0551716655f);
  p = p * f + _mm512_set1_ps(0.242611145f);
  p = p * f + _mm512_set1_ps(0.693260986f);
  p = p * f + _mm512_set1_ps(0.999928069f);
  return _mm512_scalef_ps(p, whole);
}

// The keys and values of one head: keys [M / 16][D / 2][16][2], values [D / 16][M / 2][16][2], zeros where there are none.
static inline void pack_head(const Attended& a, int64_t b, int64_t h, bf16* keys, bf16* values) {
  const bf16 *k = a.k.of(b, h), *v = a.v.of(b, h);
  std::memset(keys, 0, a.key_numbers() * sizeof(bf16));
  std::memset(values, 0, a.value_numbers() * sizeof(bf16));
  const int64_t rows = a.keys() * 8;
  for (int64_t m = 0; m < a.M; m++) {
    bf16* key = keys + m / 16 * a.pairs() * 32 + m % 16 * 2;
    for (int64_t d = 0; d < a.D; d++) key[d / 2 * 32 + d % 2] = k[m * a.k.token + d];
    bf16* value = values + m / 2 * 32 + m % 2;
    for (int64_t d = 0; d < a.D; d++) value[(d / 16 * rows * 16 + d % 16) * 2] = v[m * a.v.token + d];
  }
}

// The scores of QUERIES queries, pairs of channels of `q` one after the other, and of W vectors of keys.
template <int W>
static inline void score(const bf16* const (&q)[QUERIES], const bf16* keys, int64_t pairs, float* scores) {
  __m512 s[QUERIES][W];
  for (int i = 0; i < QUERIES; i++)
    for (int j = 0; j < W; j++) s[i][j] = _mm512_setzero_ps();
  for (int64_t d = 0; d < pairs; d++) {
    __m512bh k[W];
    for (int j = 0; j < W; j++) k[j] = pairs_at(keys + (j * pairs + d) * 32);
#pragma GCC unroll 8
    for (int i = 0; i < QUERIES; i++) {
      const __m512bh one = one_pair(q[i] + 2 * d);
      for (int j = 0; j < W; j++) s[i][j] = _mm512_dpbf16_ps(s[i][j], one, k[j]);
    }
  }
  for (int i = 0; i < QUERIES; i++)
    for (int j = 0; j < W; j++) _mm512_storeu_ps(scores + i * SCORES + 16 * j, s[i][j]);
}

// W vectors of channels of QUERIES sums [QUERIES][wide][16], each times `by` first, and plus `count` pairs of weights times values.
template <int W>
static inline void weigh(const bf16* weights, const bf16* values, int64_t apart, int count, const float (&by)[QUERIES],
                         float* sums, int64_t wide) {
  __m512 s[QUERIES][W];
  for (int i = 0; i < QUERIES; i++)
    for (int j = 0; j < W; j++) s[i][j] = _mm512_loadu_ps(sums + (i * wide + j) * 16) * _mm512_set1_ps(by[i]);
  for (int m = 0; m < count; m++) {
    __m512bh v[W];
    for (int j = 0; j < W; j++) v[j] = pairs_at(values + j * apart + m * 32);
#pragma GCC unroll 8
    for (int i = 0; i < QUERIES; i++) {
      const __m512bh one = one_pair(weights + i * SCORES + 2 * m);
      for (int j = 0; j < W; j++) s[i][j] = _mm512_dpbf16_ps(s[i][j], one, v[j]);
    }
  }
  for (int i = 0; i < QUERIES; i++)
    for (int j = 0; j < W; j++) _mm512_storeu_ps(sums + (i * wide + j) * 16, s[i][j]);
}

// The scores of one query with `count` keys, a multiple of 16, become weights: 1 at most, not divided by their sum yet.
// `scale` has them in powers of two. Returns what earlier sums have to be multiplied by, as the largest may have grown.
static inline float soften(const float* scores, bf16* weights, int count, float scale, float& largest, float& sum) {
  __m512 most = _mm512_loadu_ps(scores);
  for (int m = 16; m < count; m += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + m));
  const float before = largest;
  largest = std::max(before, _mm512_reduce_max_ps(most) * scale);
  const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(largest);
  __m512 all = _mm512_setzero_ps();
  for (int m = 0; m < count; m += 16) {
    const __m512 weight = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + m), by, less));
    all = all + weight;
    _mm256_storeu_si256((__m256i*)(weights + m), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  const float kept = before == largest ? 1.0f : std::exp2(before - largest);
  sum = sum * kept + _mm512_reduce_add_ps(all);
  return kept;
}

// The queries from n on, QUERIES of them or those that are left. `room`: `attention_room` numbers.
static inline void some_queries(const Attended& a, int64_t b, int64_t h, int64_t n, const bf16* keys, const bf16* values,
                                float* room) {
  const int64_t wide = a.wide(), pairs = a.pairs(), rows = a.keys() * 8;
  float *scores = room, *sums = scores + QUERIES * SCORES, largest[QUERIES], sum[QUERIES], kept[QUERIES];
  bf16 *weights = (bf16*)(sums + QUERIES * wide * 16), *last = weights + QUERIES * SCORES;
  const bf16* q[QUERIES];
  for (int i = 0; i < QUERIES; i++) {
    largest[i] = -INFINITY, sum[i] = 0;
    q[i] = a.q.of(b, h) + std::min(n + i, a.N - 1) * a.q.token;
    if (a.D % 2) {  // an odd channel is paired with a zero
      std::memcpy(last + i * 2 * pairs, q[i], a.D * sizeof(bf16));
      last[i * 2 * pairs + a.D].bits = 0;
      q[i] = last + i * 2 * pairs;
    }
  }
  std::memset(sums, 0, QUERIES * wide * 16 * sizeof(float));
  for (int64_t m0 = 0; m0 < a.M; m0 += BLOCK) {
    const int count = (int)std::min<int64_t>(BLOCK, a.M - m0), full = (count + 15) / 16 * 16;
    for (int m = 0; m < full; m += 16 * WIDE) {
      const bf16* from = keys + (m0 + m) / 16 * pairs * 32;
      if (full - m >= 16 * WIDE)
        score<WIDE>(q, from, pairs, scores + m);
      else if (full - m >= 16 * 2)
        score<2>(q, from, pairs, scores + m);
      else
        score<1>(q, from, pairs, scores + m);
    }
    for (int i = 0; i < QUERIES; i++) {
      for (int m = count; m < full; m++) scores[i * SCORES + m] = -INFINITY;  // there is no such key
      kept[i] = soften(scores + i * SCORES, weights + i * SCORES, full, a.scale * LOG2E, largest[i], sum[i]);
    }
    for (int64_t j = 0; j < wide;) {
      const bf16* from = values + (j * rows + m0 / 2) * 32;
      const int64_t left = wide - j;
      if (left == 3 || left > 4) {
        weigh<3>(weights, from, rows * 32, full / 2, kept, sums + j * 16, wide), j += 3;
      } else if (left > 1) {  // four are two and two
        weigh<2>(weights, from, rows * 32, full / 2, kept, sums + j * 16, wide), j += 2;
      } else {
        weigh<1>(weights, from, rows * 32, full / 2, kept, sums + j * 16, wide), j += 1;
      }
    }
  }
  for (int i = 0; i < QUERIES && n + i < a.N; i++) {
    bf16* out = a.out.of(b, h) + (n + i) * a.out.token;
    for (int64_t d = 0; d < a.D; d += VL) store_some(out + d, load(sums + i * wide * 16 + d) * (1 / sum[i]), a.D - d);
  }
}

static inline size_t attention_room(const Attended& a) {
  return QUERIES * (SCORES + a.wide() * 16 + SCORES / 2 + a.pairs() + 1);
}
#endif
