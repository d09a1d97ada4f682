// What Python calls (ldm/kernels/native.py): plain C functions of pointers, shapes and strides in numbers; fp32, or bf16
// where a flag `half` says so.
// They use the threads that torch's own kernels use, `threads` of them.
#include <sys/mman.h>

#include "attention.hpp"
#include "norm.hpp"
#include "winograd.hpp"

namespace {

// Memory for `numbers`, the same at each call of one thread for one `purpose`: it is kept, as pages that come and go would
// have to be cleared again. Mapped: what stays in the heap among blocks that come and go keeps all below it from the system.
template <int purpose>
float* scratch(size_t numbers) {
  struct Kept {
    float* at = nullptr;
    size_t size = 0;
    void leave() {
      if (at != nullptr) munmap(at, size * sizeof(float));
    }
    ~Kept() { leave(); }
  };
  thread_local Kept kept;
  if (kept.size < numbers) {
    kept.leave();
    kept.size = (numbers + 1023) / 1024 * 1024;
    kept.at = static_cast<float*>(
        mmap(nullptr, kept.size * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  return kept.at;
}

// Whether all tiles are convolved together, by threads that share them: else some would have none.
bool shares_tiles(int64_t count, int64_t at_once, int threads) { return threads > 1 && count < threads * at_once; }

// Tiles that a thread takes at a time, `most` of them, so that all threads have as many to do.
int64_t balanced(int64_t count, int64_t most, int threads) {
  const int64_t rounds = (count + most * threads - 1) / (most * threads);
  return (count + rounds * threads - 1) / (rounds * threads);
}

// A convolution of which only the sizes matter.
Convolution<float> sized(int64_t B, int64_t H, int64_t W, int64_t C, int64_t pad) {
  return {nullptr, nullptr, nullptr, nullptr, (int)B, (int)H, (int)W, (int)C, 0, (int)pad};
}

template <class N>
void by_packed(const Convolution<N>& given, int64_t at_once, int threads) {
  const int64_t C = given.C, O = given.O;
  const int64_t count = given.tiles(), wide = panels(O) * NR;
  if (shares_tiles(count, at_once, threads)) {
    float *v = scratch<0>(PARTS * count * C), *m = scratch<1>(PARTS * count * wide);
#pragma omp parallel num_threads(threads)
    {
      float* sums = scratch<2>(count * NR);
#pragma omp for
      for (int64_t t = 0; t < count; t++) input_tile(given, (int)t, v, (int)count, (int)t);
#pragma omp for
      for (int64_t task = 0; task < PARTS * (int64_t)panels(O); task++) {
        const int f = (int)(task / panels(O)), p = (int)(task % panels(O));
        multiply(given, f, p, p + 1, (int)count, v, m, sums);
      }
#pragma omp for
      for (int64_t t = 0; t < count; t++) output_tile(given, (int)t, m, (int)count, (int)t, wide, 0, (int)O);
    }
    return;
  }
  at_once = balanced(count, at_once, threads);
#pragma omp parallel num_threads(threads)
  {
    float *v = scratch<0>(PARTS * at_once * C), *m = scratch<1>(PARTS * at_once * wide), *sums = scratch<2>(at_once * wide);
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < count; t += at_once)
      tiles(given, (int)t, (int)std::min(count, t + at_once), v, m, sums);
  }
}

template <class N>
void by_unpacked(const Convolution<N>& given, const Weight<N>& by, int threads) {
  const int64_t C = given.C;
  const int all = given.tiles(), count = (int)panels(given.O), most = std::min(all, AT_ONCE);
  float* v = scratch<0>((size_t)PARTS * most * C);
#pragma omp parallel num_threads(threads)
  {
    float *u = scratch<1>(PARTS * APART), *m = scratch<2>((size_t)PARTS * most * NR);
    for (int t0 = 0; t0 < all; t0 += AT_ONCE) {
      const int T = std::min(AT_ONCE, all - t0);
#pragma omp for
      for (int t = 0; t < T; t++) input_tile(given, t0 + t, v, T, t);
#pragma omp for schedule(dynamic)
      for (int p = 0; p < count; p++) one_panel(given, by, p, t0, T, v, u, m);
    }
  }
}

}  // namespace

extern "C" {

int64_t winograd_numbers(int64_t O, int64_t C) { return (int64_t)PARTS * panels(O) * NR * C; }

// weight [O, C, 3, 3] at strides -> [36][O / NR][C][NR]
void pack_winograd(const float* weight, float* packed, int64_t O, int64_t C, int64_t output, int64_t input, int64_t row,
                   int64_t column, int threads) {
  const Weight<float> given{weight, O, C, output, input, row, column};
  const int64_t rounds = (C + ROUND - 1) / ROUND, count = (int64_t)panels(O) * rounds;
  const size_t part = panels(O) * NR * C;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < count; task++) {
    const int64_t p = task / rounds, c = task % rounds * ROUND;
    pack_panel(given, p, c, std::min(C, c + ROUND), packed + (p * C + c) * NR, part);
  }
}

// y [B, H', W', O] = x [B, H, W, C] * weight + bias [O], x padded by `pad` zeros on all sides: H' = H + 2 pad - 2;
// x and y in bf16 where `half`
void convolve(const void* x, const float* packed, const float* bias, void* y, int64_t B, int64_t H, int64_t W, int64_t C,
              int64_t O, int64_t pad, int64_t at_once, int half, int threads) {
  const int b = (int)B, h = (int)H, w = (int)W, c = (int)C, o = (int)O, p = (int)pad;
  if (half)
    by_packed<bf16>({(const bf16*)x, packed, bias, (bf16*)y, b, h, w, c, o, p}, at_once, threads);
  else
    by_packed<float>({(const float*)x, packed, bias, (float*)y, b, h, w, c, o, p}, at_once, threads);
}

// Numbers that `convolve` takes for itself.
int64_t convolve_scratch(int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t pad, int64_t at_once, int threads) {
  const int64_t count = sized(B, H, W, C, pad).tiles(), wide = panels(O) * NR;
  if (shares_tiles(count, at_once, threads)) return count * (PARTS * (C + wide) + threads * NR);
  return threads * balanced(count, at_once, threads) * (PARTS * C + (PARTS + 1) * wide);
}

// The same with the weight [O, C, 3, 3] at strides, of which nothing is kept; it is in bf16 too where `half`.
void convolve_unpacked(const void* x, const void* weight, const float* bias, void* y, int64_t B, int64_t H, int64_t W,
                       int64_t C, int64_t O, int64_t pad, int64_t output, int64_t input, int64_t row, int64_t column,
                       int half, int threads) {
  const int b = (int)B, h = (int)H, w = (int)W, c = (int)C, o = (int)O, p = (int)pad;
  if (half)
    by_unpacked<bf16>({(const bf16*)x, nullptr, bias, (bf16*)y, b, h, w, c, o, p},
                      {(const bf16*)weight, O, C, output, input, row, column}, threads);
  else
    by_unpacked<float>({(const float*)x, nullptr, bias, (float*)y, b, h, w, c, o, p},
                       {(const float*)weight, O, C, output, input, row, column}, threads);
}

// Numbers that `convolve_unpacked` takes for itself.
int64_t convolve_unpacked_scratch(int64_t B, int64_t H, int64_t W, int64_t C, int64_t pad, int threads) {
  const int64_t most = std::min<int64_t>(sized(B, H, W, C, pad).tiles(), AT_ONCE);
  return PARTS * (most * C + threads * ((int64_t)APART + most * NR));
}

// For the gradient of a weight: of the tiles t0 to before t0 + T, v [36][T][C] as the convolution makes them of x
// [B, H, W, C], and m [36][T][O] of the gradient dy [B, H', W', O] of what it gives. The gradient is the adjoint of
// `weight_1d`, both ways, of the sums over all tiles of v^T m.
void winograd_tiles(const float* x, const float* dy, float* v, float* m, int64_t B, int64_t H, int64_t W, int64_t C, int64_t O,
                    int64_t pad, int64_t t0, int64_t T, int threads) {
  const Convolution<float> seen{x, nullptr, nullptr, nullptr, (int)B, (int)H, (int)W, (int)C, (int)O, (int)pad};
  const Convolution<float> given{dy, nullptr, nullptr, nullptr, (int)B, (int)H, (int)W, (int)C, (int)O, (int)pad};
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < T; t++) {
    input_tile(seen, (int)(t0 + t), v, (int)T, (int)t);
    output_tile_adjoint(given, (int)(t0 + t), m, (int)T, (int)t);
  }
}

// dw [3][3][N] of those sums [36][N], N = C O
void winograd_weight(const float* sums, float* dw, int64_t N, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t at = 0; at < N; at += VL) {
    const int n = (int)std::min<int64_t>(VL, N - at);
    vf half[3][SEEN];
    for (int k = 0; k < SEEN; k++) {
      vf column[SEEN], out[3];
      for (int i = 0; i < SEEN; i++) {
        column[i] = vf{};
        std::memcpy(&column[i], sums + (i * SEEN + k) * N + at, n * sizeof(float));
      }
      weight_1d_adjoint(column, out);
      for (int i = 0; i < 3; i++) half[i][k] = out[i];
    }
    for (int i = 0; i < 3; i++) {
      vf out[3];
      weight_1d_adjoint(half[i], out);
      for (int k = 0; k < 3; k++) std::memcpy(dw + (i * 3 + k) * N + at, &out[k], n * sizeof(float));
    }
  }
}

// y [B, P, C] = silu(GroupNorm(x)) with `silu`, of G groups; x and y in bf16 where `half`, all else fp32
void group_norm(const void* x, const float* weight, const float* bias, void* y, int64_t B, int64_t P, int64_t C, int64_t G,
                double eps, int silu, int half, int threads) {
  const Normed given{weight, bias, B, P, C, G, eps, silu != 0};
  if (half)
    normalise((const bf16*)x, (bf16*)y, given, threads);
  else
    normalise((const float*)x, (float*)y, given, threads);
}

// y [N, D] = value * gelu(gate), of [value, gate] = x [N, 2 D]; x and y in bf16 where `half`
void geglu_rows(const void* x, void* y, int64_t N, int64_t D, int half, int threads) {
  if (half)
    geglu((const bf16*)x, (bf16*)y, N, D, threads);
  else
    geglu((const float*)x, (float*)y, N, D, threads);
}

// Whether there is an `attention` for this processor.
int has_attention() {
#ifdef HAS_ATTENTION
  return 1;
#else
  return 0;
#endif
}

#ifdef HAS_ATTENTION
// out = softmax(q k^T scale) v of each head, in bf16: q, out [B, N, H, D] and k, v [B, M, H, D], each with its strides of a
// picture, a token and a head.
void attention(bf16* q, bf16* k, bf16* v, bf16* out, const int64_t* strides, int64_t B, int64_t H, int64_t N, int64_t M,
               int64_t D, double scale, int threads) {
  const auto tokens = [&](bf16* at, int i) { return Tokens{at, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
  const Attended given{tokens(q, 0), tokens(k, 1), tokens(v, 2), tokens(out, 3), B, H, N, M, D, (float)scale};
  const size_t of_keys = given.key_numbers(), of_values = given.value_numbers();
  const int64_t heads = B * H, tasks = (N + AT_A_TIME - 1) / AT_A_TIME;
  bf16 *keys = (bf16*)scratch<0>((heads * of_keys + 1) / 2), *values = (bf16*)scratch<1>((heads * of_values + 1) / 2);
#pragma omp parallel num_threads(threads)
  {
    float* room = scratch<2>(attention_room(given));
#pragma omp for
    for (int64_t i = 0; i < heads; i++) pack_head(given, i / H, i % H, keys + i * of_keys, values + i * of_values);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * tasks; task++) {
      const int64_t i = task / tasks, from = task % tasks * AT_A_TIME, to = std::min(N, from + AT_A_TIME);
      for (int64_t n = from; n < to; n += QUERIES)
        some_queries(given, i / H, i % H, n, keys + i * of_keys, values + i * of_values, room);
    }
  }
}

// Numbers in fp32 that `attention` takes for itself.
int64_t attention_scratch(int64_t B, int64_t H, int64_t M, int64_t D, int threads) {
  const Attended given{{}, {}, {}, {}, B, H, 0, M, D, 0};
  return (B * H * (given.key_numbers() + given.value_numbers())) / 2 + threads * attention_room(given);
}
#endif

}  // extern "C"
