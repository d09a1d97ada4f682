// What Python calls (ldm/kernels/native.py): plain C functions of pointers, shapes and strides in numbers, fp32.
// They use the threads that torch's own kernels use, `threads` of them.
#include <cstdlib>
#include <memory>

#include "winograd.hpp"

namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(size_t numbers) {
  const size_t bytes = (numbers * sizeof(float) + 63) / 64 * 64 + 64;
  return Buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

}  // namespace

extern "C" {

int64_t winograd_numbers(int64_t O, int64_t C) { return (int64_t)PARTS * panels(O) * NR * C; }

// weight [O, C, 3, 3] at strides -> [36][O / NR][C][NR]
void pack_winograd(const float* weight, float* packed, int64_t O, int64_t C, int64_t output, int64_t input, int64_t row,
                   int64_t column, int threads) {
  const Weight given{weight, O, C, output, input, row, column};
  const int64_t deep = (C + VL - 1) / VL, count = (int64_t)panels(O) * deep;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < count; task++) pack_panel(given, task / deep, task % deep * VL, packed);
}

// y [B, H', W', O] = x [B, H, W, C] * weight + bias [O], x padded by `pad` zeros on all sides: H' = H + 2 pad - 2
void convolve(const float* x, const float* packed, const float* bias, float* y, int64_t B, int64_t H, int64_t W, int64_t C,
              int64_t O, int64_t pad, int64_t at_once, int threads) {
  const Convolution given{x, packed, bias, y, (int)B, (int)H, (int)W, (int)C, (int)O, (int)pad};
  const int64_t count = B * given.down() * given.across(), wide = panels(O) * NR;
#pragma omp parallel num_threads(threads)
  {
    Buffer v = buffer(PARTS * at_once * C), m = buffer(PARTS * at_once * wide), sums = buffer(at_once * wide);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < count; t += at_once)
      tiles(given, (int)t, (int)std::min(count, t + at_once), v.get(), m.get(), sums.get());
  }
}

}  // extern "C"
