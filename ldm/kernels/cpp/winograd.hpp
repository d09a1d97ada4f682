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

// Adjoints, for gradients with respect to the weight: of output_1d, ...
template <class T>
static inline void output_1d_adjoint(const T (&y)[TILE], T (&m)[SEEN]) {
  T even_a = y[0] + A2 * y[2], odd_a = PA * y[1] + A3 * y[3];
  T even_b = y[0] + B2 * y[2], odd_b = PB * y[1] + B3 * y[3];
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

// ... and of weight_1d.
template <class T>
static inline void weight_1d_adjoint(const T (&u)[SEEN], T (&w)[3]) {
  constexpr float fa = 1 / (2 * A2 * (A2 - B2)), fb = 1 / (2 * B2 * (B2 - A2));
  T sa = fa * (u[1] + u[2]), da = fa * (u[1] - u[2]), sb = fb * (u[3] + u[4]), db = fb * (u[3] - u[4]);
  w[0] = (1 / (A2 * B2)) * u[0] + sa + sb;
  w[1] = PA * da + PB * db;
  w[2] = A2 * sa + B2 * sb + u[5];
}

template <class T>
struct Weight {
  const T* w;  // [O, C, 3, 3] at the strides of an output, an input, a row, a column
  int64_t O, C, output, input, row, column;
};

constexpr int ROUND = 64;  // channels whose weights are packed at a time

// One tap of the weight for `wide` outputs from `from` on and `deep` inputs: as [deep][NR] numbers.
template <class T>
static inline void read_tap(const Weight<T>& w, const T* from, int64_t wide, int64_t deep, float (*to)[NR]) {
  if (w.input == 1 && wide == NR && deep % VL == 0) {  // inputs lie side by side: squares are turned in registers
    for (int64_t j = 0; j < wide; j += VL)
      for (int64_t c = 0; c < deep; c += VL) {
        vf rows[VL];
        for (int r = 0; r < VL; r++) rows[r] = load(from + (j + r) * w.output + c);
        transpose(rows);
        for (int r = 0; r < VL; r++) store(to[c + r] + j, rows[r]);
      }
  } else if (w.output == 1 && wide == NR) {  // outputs do
    for (int64_t c = 0; c < deep; c++)
      for (int64_t j = 0; j < wide; j += VL) store(to[c] + j, load(from + j + c * w.input));
  } else {
    for (int64_t j = 0; j < wide; j++)  // read as the weight lies, written within the first cache
      for (int64_t c = 0; c < deep; c++) to[c][j] = number(from[j * w.output + c * w.input]);
  }
}

// Panel p of all 36 parts, the channels c0 to before c1, ROUND at most: `to` [c1 - c0][NR], each part `part` numbers
// after the last.
template <class T>
static inline void pack_panel(const Weight<T>& w, int64_t p, int64_t c0, int64_t c1, float* to, size_t part) {
  const int64_t wide = std::min<int64_t>(NR, w.O - p * NR), deep = c1 - c0;
  float taps[3][3][ROUND][NR];
  if (wide < NR) std::memset(taps, 0, sizeof taps);
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 3; k++)
      read_tap(w, w.w + p * NR * w.output + c0 * w.input + i * w.row + k * w.column, wide, deep, taps[i][k]);
  for (int64_t c = 0; c < deep; c++, to += NR)
    for (int v = 0; v < NR; v += VL) {
      vf half[3][SEEN];
      for (int i = 0; i < 3; i++) {
        const vf row[3] = {load(taps[i][0][c] + v), load(taps[i][1][c] + v), load(taps[i][2][c] + v)};
        weight_1d(row, half[i]);
      }
      for (int k = 0; k < SEEN; k++) {
        const vf column[3] = {half[0][k], half[1][k], half[2][k]};
        vf out[SEEN];
        weight_1d(column, out);
        for (int i = 0; i < SEEN; i++) store(to + (i * SEEN + k) * part + v, out[i]);
      }
    }
}

template <class T>
struct Convolution {
  const T* x;         // [B, H, W, C]
  const float* u;     // [36][O / NR][C][NR]
  const float* bias;  // [O], or null
  T* y;               // [B, H', W', O]
  int B, H, W, C, O, pad;
  int height() const { return H + 2 * pad - 2; }
  int width() const { return W + 2 * pad - 2; }
  int down() const { return (height() + TILE - 1) / TILE; }  // tiles
  int across() const { return (width() + TILE - 1) / TILE; }
  int tiles() const { return B * down() * across(); }
};

// What tile t sees, B^T d B, as row `at` of v [36][T][C].
template <class N>
static inline void input_tile(const Convolution<N>& c, int t, float* v, int T, int at) {
  const int across = c.across(), down = c.down();
  const int b = t / (across * down), top = t / across % down * TILE - c.pad, left = t % across * TILE - c.pad;
  const size_t C = c.C;
  const N* picture = c.x + (size_t)b * c.H * c.W * C;
  for (size_t ch = 0; ch < C; ch += VL) {
    const int64_t n = C - ch;
    vf half[SEEN][SEEN];
    for (int j = 0; j < SEEN; j++) {
      vf column[SEEN], out[SEEN];
      for (int i = 0; i < SEEN; i++) {
        const int h = top + i, w = left + j;
        const bool outside = h < 0 || h >= c.H || w < 0 || w >= c.W;
        column[i] = outside ? vf{} : load_some(picture + ((size_t)h * c.W + w) * C + ch, n);
      }
      input_1d(column, out);
      for (int i = 0; i < SEEN; i++) half[i][j] = out[i];
    }
    for (int i = 0; i < SEEN; i++) {
      vf out[SEEN];
      input_1d(half[i], out);
      for (int j = 0; j < SEEN; j++) store_some(v + ((size_t)(i * SEEN + j) * T + at) * C + ch, out[j], n);
    }
  }
}

// The pixels of tile t, A^T m A and the bias, in the channels o0 to before o1: from row `at` of m [36][T][wide].
template <class N>
static inline void output_tile(const Convolution<N>& c, int t, const float* m, int T, int at, size_t wide, int o0, int o1) {
  const int across = c.across(), down = c.down(), height = c.height(), width = c.width();
  const int b = t / (across * down), top = t / across % down * TILE, left = t % across * TILE;
  for (int o = o0; o < o1; o += VL) {
    const int n = std::min(VL, o1 - o);
    vf plus{};
    for (int k = 0; k < n; k++) plus[k] = c.bias ? c.bias[o + k] : 0;
    vf half[TILE][SEEN];
    for (int j = 0; j < SEEN; j++) {
      vf column[SEEN], out[TILE];
      for (int i = 0; i < SEEN; i++) column[i] = load(m + ((size_t)(i * SEEN + j) * T + at) * wide + (o - o0));
      output_1d(column, out);
      for (int i = 0; i < TILE; i++) half[i][j] = out[i];
    }
    for (int i = 0; i < TILE && top + i < height; i++) {
      vf out[TILE];
      output_1d(half[i], out);
      for (int j = 0; j < TILE && left + j < width; j++) {
        store_some(c.y + (((size_t)b * height + top + i) * width + left + j) * c.O + o, out[j] + plus, n);
      }
    }
  }
}

// What the sums over channels of tile t would have to change by, A dy A^T, as row `at` of m [36][T][O]: of y's gradient
// dy [B, H', W', O], in c.x.
static inline void output_tile_adjoint(const Convolution<float>& c, int t, float* m, int T, int at) {
  const int across = c.across(), down = c.down(), height = c.height(), width = c.width();
  const int b = t / (across * down), top = t / across % down * TILE, left = t % across * TILE;
  const float* picture = c.x + (size_t)b * height * width * c.O;
  for (int o = 0; o < c.O; o += VL) {
    const int n = std::min(VL, c.O - o);
    vf half[SEEN][TILE];
    for (int j = 0; j < TILE; j++) {
      vf column[TILE], out[SEEN];
      for (int i = 0; i < TILE; i++) {
        const bool outside = top + i >= height || left + j >= width;
        column[i] = outside ? vf{} : load_some(picture + ((size_t)(top + i) * width + left + j) * c.O + o, n);
      }
      output_1d_adjoint(column, out);
      for (int i = 0; i < SEEN; i++) half[i][j] = out[i];
    }
    for (int i = 0; i < SEEN; i++) {
      vf out[SEEN];
      output_1d_adjoint(half[i], out);
      for (int j = 0; j < SEEN; j++) store_some(m + ((size_t)(i * SEEN + j) * T + at) * c.O + o, out[j], n);
    }
  }
}

// The panels p0 to before p1 of part f of T tiles, by packed weights. v: [36][T][C], m: [36][T][O], sums: [T][those panels].
template <class N>
static inline void multiply(const Convolution<N>& c, int f, int p0, int p1, int T, const float* v, float* m, float* sums) {
  const size_t wide = panels(c.O) * NR, C = c.C;
  float* mine = m + (size_t)f * T * wide;
  gemm(v + (size_t)f * T * C, C, T, c.u + (size_t)f * wide * C, c.C, p0, p1, sums, [&](int row, int p, vf(&acc)[NV]) {
    for (int j = 0; j < NV; j++) store(mine + row * wide + p * NR + j * VL, acc[j]);
  });
}

// The tiles t0 to before t1 of all, by packed weights. v: [36][T][C], m: [36][T][O], sums: [T][O], with T = t1 - t0 and
// O rounded up to NR.
template <class N>
static inline void tiles(const Convolution<N>& c, int t0, int t1, float* v, float* m, float* sums) {
  const int T = t1 - t0;
  const int all = (int)panels(c.O);
  for (int t = t0; t < t1; t++) input_tile(c, t, v, T, t - t0);
  for (int f = 0; f < PARTS; f++) multiply(c, f, 0, all, T, v, m, sums);
  for (int t = t0; t < t1; t++) output_tile(c, t, m, T, t - t0, (size_t)all * NR, 0, c.O);
}

// A part of a panel of KC channels, and a line more: parts 4 KB apart would all fall into the same few cache lines.
constexpr size_t APART = (size_t)KC * NR + NR;

constexpr int AT_ONCE = 128;  // tiles for which a weight is packed

// One panel of the T tiles from t0 on, whose input lies in v [36][T][C]: its weights are packed KC channels at a time and
// used at once. u: [36][APART], m: [36][T][NR].
template <class N>
static inline void one_panel(const Convolution<N>& c, const Weight<N>& w, int p, int t0, int T, const float* v, float* u, float* m) {
  for (int k = 0; k < c.C; k += KC) {
    const int depth = std::min(KC, c.C - k);
    for (int s = 0; s < depth; s += ROUND)
      pack_panel(w, p, k + s, k + std::min(depth, s + ROUND), u + (size_t)s * NR, APART);
    for (int f = 0; f < PARTS; f++)
      for (int s = 0; s < depth; s += KC / 2)  // shorter sums round less
        for (int row = 0; row < T; row += MR)
          some_rows<MR>(std::min(MR, T - row), v + ((size_t)f * T + row) * c.C + k + s, c.C, u + f * APART + (size_t)s * NR,
                        std::min(KC / 2, depth - s), m + ((size_t)f * T + row) * NR, NR, k + s == 0, false,
                        [](int, vf(&)[NV]) {});
  }
  const int o = p * NR;
  for (int t = 0; t < T; t++) output_tile(c, t0 + t, m, T, t, NR, o, std::min(c.O, o + NR));
}
