// Matrix products of a tile that stays in the cache, for CPU kernels that make one operand on the fly (deform_conv2d).
//
// Why not the framework's: a call of at::mm wants its operands in memory, whole, and on AMD processors the library behind it (MKL)
// keeps to 256-bit instructions: 107 GFLOP/s a core where oneDNN's convolution reached 260 (EPYC with AVX-512). Here one operand is a
// tile of rows, the other comes in panels of PANEL columns, and a block of ROWS x PANEL sums stays in registers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace minidamage {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, PANEL_VECTORS = 4;  // 6 x 4 sums, 4 numbers of B and one of A: 29 of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, PANEL_VECTORS = 2;  // 6 x 2, 2 and 1: 15 of 16
#else
constexpr int VECTOR_BYTES = 16, PANEL_VECTORS = 2;
#endif
constexpr int PANEL_ROWS = 6;
constexpr int64_t PANEL_DEPTH = 128;  // terms of a sum at a time: 32 KiB of B in the first-level cache

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int64_t LANES = VECTOR_BYTES / sizeof(T);
template <typename T>
constexpr int64_t PANEL = PANEL_VECTORS * LANES<T>;  // columns of a panel

template <typename T>
inline Vector<T> load_vector(const T* address) {
  Vector<T> v;
  std::memcpy(&v, address, sizeof(v));
  return v;
}
template <typename T>
inline void store_vector(T* address, Vector<T> v) {
  std::memcpy(address, &v, sizeof(v));
}

// a b + c, rounded once where the processor can.
#if defined(__AVX512F__)
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <typename V>
inline V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

// The sum over the lanes, always in the same order.
template <typename T>
inline T sum_lanes(Vector<T> v) {
  T lanes[LANES<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t half = LANES<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// c [M, PANEL] (+)= a [M, depth] b [depth, PANEL]. Element (m, k) of a is at a[m a_row + k a_step], row k of b at b + k b_step.
template <int M, typename T>
inline void block_product(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t depth, T* c, int64_t c_row,
                          bool add) {
  Vector<T> sum[M][PANEL_VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < PANEL_VECTORS; ++v) sum[m][v] = add ? load_vector(c + m * c_row + v * LANES<T>) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector<T> row[PANEL_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < PANEL_VECTORS; ++v) row[v] = load_vector(b + v * LANES<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<T> factor = a[m * a_row] - Vector<T>{};  // in all lanes
#pragma GCC unroll 8
      for (int v = 0; v < PANEL_VECTORS; ++v) sum[m][v] = multiply_add(factor, row[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < PANEL_VECTORS; ++v) store_vector(c + m * c_row + v * LANES<T>, sum[m][v]);
}

// c [rows, PANEL] (+)= a [rows, depth] b [depth, PANEL], rows and depth of any size, b one panel. Each sum runs over k in order.
template <typename T>
inline void panel_product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, T* c,
                          int64_t c_row, bool add) {
  for (int64_t k = 0; k == 0 || k < depth; k += PANEL_DEPTH) {
    const int64_t terms = std::min(PANEL_DEPTH, depth - k);
    const T* part = b + k * b_step;
    for (int64_t r = 0; r < rows; r += PANEL_ROWS) {
      const T* block = a + r * a_row + k * a_step;
      T* sums = c + r * c_row;
      switch (std::min<int64_t>(PANEL_ROWS, rows - r)) {
        case 1: block_product<1>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0); break;
        case 2: block_product<2>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0); break;
        case 3: block_product<3>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0); break;
        case 4: block_product<4>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0); break;
        case 5: block_product<5>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0); break;
        default: block_product<6>(block, a_row, a_step, part, b_step, terms, sums, c_row, add || k > 0);
      }
    }
  }
}

}  // namespace minidamage
