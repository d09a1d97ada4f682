// 3 x 3 convolutions by a quarter of the products: F(4 x 4, 3 x 3) of Winograd's minimal filtering (Lavin and Gray
// 2015, "Fast Algorithms for Convolutional Neural Networks", section 4).
//
// Y = A^T [ (G w G^T) * (B^T d B) ] A for each tile d of 6 x 6 pixels, which gives 4 x 4. Products of the 36 numbers are
// summed over channels: 36 products of matrices. The points of interpolation are 0, +-3/4, +-3/2 and infinity: their
// rounding is half of that with the usual 0, +-1, +-2.
#pragma once
#include "gemm.hpp"

constexpr int TILE = 4, SEEN = 6, PARTS = SEEN * SEEN;
constexpr float PA = 0.75f, PB = 1.5f;
constexpr float A2 = PA * PA, B2 = PB * PB, A3 = A2 * PA, B3 = B2 * PB;

template <class T>
static inline void input_1d(const T (&d)[SEEN], T (&v)[SEEN]) {
  T even_a = d[4] - B2 * d[2], odd_a = PA * (d[3] - B2 * d[1]);
  T even_b = d[4] - A2 * d[2], odd_b = PB * (d[3] - A2 * d[1]);
  v[0] = A2 * B2 * d[0] - (A2 + B2) * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = A2 * B2 * d[1] - (A2 + B2) * d[3] + d[5];
}

template <class T>
static inline void output_1d(const T (&m)[SEEN], T (&y)[TILE]) {
  T sa = m[1] + m[2], da = m[1] - m[2], sb = m[3] + m[4], db = m[3] - m[4];
  y[0] = m[0] + sa + sb;
  y[1] = PA * da + PB * db;
  y[2] = A2 * sa + B2 * sb;
  y[3] = A3 * da + B3 * db + m[5];
}

template <class T>
static inline void weight_1d(const T (&w)[3], T (&u)[SEEN]) {
  constexpr float fa = 1 / (2 * A2 * (A2 - B2)), fb = 1 / (2 * B2 * (B2 - A2));
  T even_a = fa * (w[0] + A2 * w[2]), even_b = fb * (w[0] + B2 * w[2]);
  u[0] = (1 / (A2 * B2)) * w[0];
  u[1] = even_a + (fa * PA) * w[1];
  u[2] = even_a - (fa * PA) * w[1];
  u[3] = even_b + (fb * PB) * w[1];
  u[4] = even_b - (fb * PB) * w[1];
  u[5] = w[2];
}

struct Weight {
  const float* w;  // [O, C, 3, 3] at the strides of an output, an input, a row, a column
  int64_t O, C, output, input, row, column;
};

// Panel p of all 36 parts, the channels c0 ... c0 + VL: [36][O / NR][C][NR].
static inline void pack_panel(const Weight& w, int64_t p, int64_t c0, float* packed) {
  const int64_t wide = panels(w.O) * NR, n = std::min<int64_t>(VL, w.C - c0);
  vf u[PARTS][NR];
  for (int j = 0; j < NR; j++) {
    const int64_t o = p * NR + j;
    vf taps[3][3], half[3][SEEN];
    for (int i = 0; i < 3; i++) {
      for (int k = 0; k < 3; k++) {
        taps[i][k] = vf{};
        if (o >= w.O) continue;
        const float* from = w.w + o * w.output + c0 * w.input + i * w.row + k * w.column;
        for (int64_t c = 0; c < n; c++) taps[i][k][c] = from[c * w.input];
      }
      weight_1d(taps[i], half[i]);
    }
    for (int k = 0; k < SEEN; k++) {
      const vf column[3] = {half[0][k], half[1][k], half[2][k]};
      vf out[SEEN];
      weight_1d(column, out);
      for (int i = 0; i < SEEN; i++) u[i * SEEN + k][j] = out[i];
    }
  }
  for (int f = 0; f < PARTS; f++)
    for (int64_t c = 0; c < n; c++) {
      float* to = packed + f * wide * w.C + (p * w.C + c0 + c) * NR;
      for (int j = 0; j < NR; j++) to[j] = u[f][j][c];
    }
}

struct Convolution {
  const float* x;     // [B, H, W, C]
  const float* u;     // [36][O / NR][C][NR]
  const float* bias;  // [O], or null
  float* y;           // [B, H', W', O]
  int B, H, W, C, O, pad;
  int height() const { return H + 2 * pad - 2; }
  int width() const { return W + 2 * pad - 2; }
  int down() const { return (height() + TILE - 1) / TILE; }  // tiles
  int across() const { return (width() + TILE - 1) / TILE; }
};

// The tiles t0 ... t1 of all. v: [36][T][C], m: [36][T][O] with T = t1 - t0 and O rounded up to NR.
static inline void tiles(const Convolution& c, int t0, int t1, float* v, float* m, float* c_sums) {
  const int across = c.across(), down = c.down(), T = t1 - t0, height = c.height(), width = c.width();
  const size_t wide = panels(c.O) * NR, C = c.C;
  for (int t = t0; t < t1; t++) {
    const int b = t / (across * down), top = t / across % down * TILE - c.pad, left = t % across * TILE - c.pad;
    const float* picture = c.x + (size_t)b * c.H * c.W * C;
    for (size_t ch = 0; ch < C; ch += VL) {
      const int n = (int)std::min<size_t>(VL, C - ch);
      vf half[SEEN][SEEN];
      for (int j = 0; j < SEEN; j++) {
        vf column[SEEN], out[SEEN];
        for (int i = 0; i < SEEN; i++) {
          const int h = top + i, w = left + j;
          column[i] = vf{};
          if (h < 0 || h >= c.H || w < 0 || w >= c.W) continue;
          const float* p = picture + ((size_t)h * c.W + w) * C + ch;
          if (n == VL)
            column[i] = load(p);
          else
            std::memcpy(&column[i], p, n * sizeof(float));
        }
        input_1d(column, out);
        for (int i = 0; i < SEEN; i++) half[i][j] = out[i];
      }
      for (int i = 0; i < SEEN; i++) {
        vf out[SEEN];
        input_1d(half[i], out);
        for (int j = 0; j < SEEN; j++) {
          float* p = v + ((size_t)(i * SEEN + j) * T + (t - t0)) * C + ch;
          if (n == VL)
            store(p, out[j]);
          else
            std::memcpy(p, &out[j], n * sizeof(float));
        }
      }
    }
  }
  for (int f = 0; f < PARTS; f++) {
    float* mine = m + (size_t)f * T * wide;
    gemm(v + (size_t)f * T * C, C, T, c.u + (size_t)f * wide * C, c.C, 0, (int)panels(c.O), c_sums,
         [&](int row, int p, vf(&acc)[NV]) {
           for (int j = 0; j < NV; j++) store(mine + row * wide + p * NR + j * VL, acc[j]);
         });
  }
  for (int t = t0; t < t1; t++) {
    const int b = t / (across * down), top = t / across % down * TILE, left = t % across * TILE;
    for (int o = 0; o < c.O; o += VL) {
      const int n = std::min(VL, c.O - o);
      vf plus{};
      for (int k = 0; k < n; k++) plus[k] = c.bias ? c.bias[o + k] : 0;
      vf half[TILE][SEEN];
      for (int j = 0; j < SEEN; j++) {
        vf column[SEEN], out[TILE];
        for (int i = 0; i < SEEN; i++) column[i] = load(m + ((size_t)(i * SEEN + j) * T + (t - t0)) * wide + o);
        output_1d(column, out);
        for (int i = 0; i < TILE; i++) half[i][j] = out[i];
      }
      for (int i = 0; i < TILE && top + i < height; i++) {
        vf out[TILE];
        output_1d(half[i], out);
        for (int j = 0; j < TILE && left + j < width; j++) {
          const size_t at = (((size_t)b * height + top + i) * width + left + j) * c.O + o;
          vf y = out[j] + plus;
          if (n == VL) {
            store(c.y + at, y);
          } else {
            for (int k = 0; k < n; k++) c.y[at + k] = y[k];
          }
        }
      }
    }
  }
}
