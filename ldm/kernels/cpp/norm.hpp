// Group normalisation (Wu and He 2018, equation 1) of x [B, P, C], and SiLU after it.
//
// Sums run over what each channel differs from its own first pixel, a few pixels in fp32 and then in double: so no
// digits are lost where the mean is large beside the deviation, or the map is large.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "pointwise.hpp"

constexpr int64_t TOGETHER = 32;  // pixels that are summed in fp32

// Of `count` pixels: sums and sums of squares [C] of x - first, in double. `part` is scratch [2, C].
template <class T>
static void sums(const T* x, const T* first, int64_t count, int64_t C, double* sum, double* square, float* part) {
  float *s = part, *q = part + C;
  std::fill(sum, sum + C, 0.0);
  std::fill(square, square + C, 0.0);
  for (int64_t start = 0; start < count; start += TOGETHER) {
    std::fill(part, part + 2 * C, 0.0f);
    for (int64_t p = start; p < std::min(count, start + TOGETHER); p++)
      for (int64_t c = 0; c < C; c++) {
        const float d = number(x[p * C + c]) - number(first[c]);
        s[c] += d;
        q[c] += d * d;
      }
    for (int64_t c = 0; c < C; c++) {
      sum[c] += s[c];
      square[c] += q[c];
    }
  }
}

// How one picture's numbers become normal ones: y = (x - middle) * scale + shift, each [C].
struct Line {
  float *middle, *scale, *shift;
};

// From sums over all P pixels. A group's variance is that within its channels and that of their means (Chan et al. 1979).
template <class T>
static void line(const T* first, const double* sum, const double* square, const float* weight, const float* bias, int64_t P,
                 int64_t C, int64_t G, double eps, Line to) {
  const int64_t each = C / G;
  for (int64_t g = 0; g < G; g++) {
    double mean = 0, within = 0, between = 0;
    for (int64_t c = g * each; c < (g + 1) * each; c++) {
      mean += (number(first[c]) + sum[c] / P) / each;
      within += square[c] - sum[c] * sum[c] / P;
    }
    for (int64_t c = g * each; c < (g + 1) * each; c++) {
      const double off = number(first[c]) + sum[c] / P - mean;
      between += off * off;
    }
    const double variance = (within / P + between) / each, inverse = 1 / std::sqrt(std::max(variance, 0.0) + eps);
    for (int64_t c = g * each; c < (g + 1) * each; c++) {
      to.middle[c] = (float)mean;
      to.scale[c] = (float)(weight[c] * inverse);
      to.shift[c] = (float)(bias[c] + (to.middle[c] - mean) * inverse * weight[c]);
    }
  }
}

template <bool SILU, class T>
static void apply(const T* x, T* y, int64_t count, int64_t C, Line by) {
  for (int64_t p = 0; p < count; p++, x += C, y += C)
    for (int64_t c = 0; c < C; c += VL) {
      const vf middle = load_some(by.middle + c, C - c), scale = load_some(by.scale + c, C - c);
      const vf z = (load_some(x + c, C - c) - middle) * scale + load_some(by.shift + c, C - c);
      store_some(y + c, SILU ? silu(z) : z, C - c);
    }
}

struct Normed {
  const float *weight, *bias;
  int64_t B, P, C, G;
  double eps;
  bool silu;
};

// All pictures, by `threads`, in pieces of pixels whose number follows from C alone: so is each sum's order.
template <class T>
static void normalise(const T* x, T* y, const Normed& n, int threads) {
  const int64_t piece = std::max<int64_t>(TOGETHER, 32768 / n.C), pieces = (n.P + piece - 1) / piece, count = n.B * pieces;
  std::unique_ptr<double[]> all(new double[count * 2 * n.C]);
  std::unique_ptr<float[]> lines(new float[n.B * 3 * n.C]);
#pragma omp parallel num_threads(threads) if (count > 1)
  {
    std::unique_ptr<float[]> part(new float[2 * n.C]);
#pragma omp for
    for (int64_t t = 0; t < count; t++) {
      const T* first = x + t / pieces * n.P * n.C;
      const int64_t start = t % pieces * piece;
      double* sum = all.get() + t * 2 * n.C;
      sums(first + start * n.C, first, std::min(piece, n.P - start), n.C, sum, sum + n.C, part.get());
    }
#pragma omp for
    for (int64_t b = 0; b < n.B; b++) {
      double* total = all.get() + b * pieces * 2 * n.C;
      for (int64_t k = 1; k < pieces; k++)
        for (int64_t c = 0; c < 2 * n.C; c++) total[c] += total[k * 2 * n.C + c];
      float* to = lines.get() + b * 3 * n.C;
      line(x + b * n.P * n.C, total, total + n.C, n.weight, n.bias, n.P, n.C, n.G, n.eps, {to, to + n.C, to + 2 * n.C});
    }
#pragma omp for
    for (int64_t t = 0; t < count; t++) {
      float* by = lines.get() + t / pieces * 3 * n.C;
      const int64_t start = t % pieces * piece, at = (t / pieces * n.P + start) * n.C, many = std::min(piece, n.P - start);
      const Line with{by, by + n.C, by + 2 * n.C};
      n.silu ? apply<true>(x + at, y + at, many, n.C, with) : apply<false>(x + at, y + at, many, n.C, with);
    }
  }
}
