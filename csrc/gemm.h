// Matrix products on one core, for kernels whose operands are already in its cache: C [M, N] (+)= A [M, K] B [K, N]; cpu/gemm.cpp. T is
// float or double.
// A is read where it lies, in any strides. B is packed first into panels of NR columns, panel after panel, [K][NR] each, the last one
// filled up with zeros: pack_panels() once, gemm_panels() for as many A as there are. gemm() does both, block by block, for operands of
// any size, and for few rows of A reads B too where it lies. The micro-kernel holds MR x NR sums in registers and for every step of K
// loads two vectors of B and broadcasts MR numbers of A: 2 MR fused multiply-adds for MR + 2 loads. NaN and Inf come through as in a
// plain triple loop; the order of summation depends on the shapes alone. For cpu/*.cpp only: those are compiled for this very processor,
// and MR and NR with them.
// Why not the framework's product: it cannot be called on a tile without a tensor, and the library behind it reaches half the speed
// of its own convolutions on the AVX-512 processor that this was written on. Measured: see cpu/linear_attention.cpp.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace minidamage {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MR = 14;  // 28 sums, 2 of B, 1 of A in 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, MR = 6;   // 12 + 2 + 1 in 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, MR = 12;  // 24 + 2 + 1 in 32
#else
constexpr int VECTOR_BYTES = 16, MR = 6;
#endif
typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES)));
template <typename T>
struct VectorOf {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <typename T>
using vector_t = typename VectorOf<T>::type;
template <typename T>
constexpr int VECTOR_LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));
template <typename T>
constexpr int NR = 2 * VECTOR_LANES<T>;

template <typename T>
inline vector_t<T> load_vector(const T* address) {
  vector_t<T> v;
  std::memcpy(&v, address, sizeof(v));
  return v;
}
template <typename T>
inline void store_vector(T* address, vector_t<T> v) {
  std::memcpy(address, &v, sizeof(v));
}
// The same number in all lanes. x - 0 is x, so that this is one load; 0 + x is not where x is -0, and would be an addition and a shuffle,
// which on Intel's processors take the place of a multiply-add each.
template <typename T>
inline vector_t<T> broadcast(T x) {
  return x - vector_t<T>{};
}
inline FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<FloatVector>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return reinterpret_cast<FloatVector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<FloatVector>(
      vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else  // -ffp-contract=off keeps these two operations
  return a * b + c;
#endif
}
inline DoubleVector multiply_add(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<DoubleVector>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return reinterpret_cast<DoubleVector>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<DoubleVector>(
      vfmaq_f64(reinterpret_cast<float64x2_t>(c), reinterpret_cast<float64x2_t>(a), reinterpret_cast<float64x2_t>(b)));
#else  // -ffp-contract=off keeps these two operations
  return a * b + c;
#endif
}

// The sum over the lanes, always in the same order.
template <typename T>
inline T sum_of_vector(vector_t<T> v) {
  T lanes[VECTOR_LANES<T>];
  store_vector(lanes, v);
  for (int half = VECTOR_LANES<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Element (i, j) is data[i * row + j * column].
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;
  Strided from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  Strided transposed() const { return {data, column, row}; }
};

template <typename T>
int64_t panels_size(int64_t K, int64_t N) {
  return (N + NR<T> - 1) / NR<T> * NR<T> * K;
}

// B [K, N] into panels [K][NR], panels_size(K, N) numbers.
template <typename T>
void pack_panels(Strided<T> B, int64_t K, int64_t N, T* panels);

// C [M, N] (+)= A [M, K] B, B in panels. panel_stride: numbers from a panel to the next, K NR where B was packed whole; panel_row: from
// a row of a panel to the next. bias [N] or null is added once.
template <typename T>
void gemm_panels(int64_t M, int64_t N, int64_t K, Strided<T> A, const T* panels, int64_t panel_stride, T* C, int64_t C_row,
                 bool accumulate, const T* bias = nullptr, int64_t panel_row = NR<T>);

// C [M, N] (+)= A [M, K] B [K, N], operands of any size. scratch is kept between calls.
template <typename T>
void gemm(int64_t M, int64_t N, int64_t K, Strided<T> A, Strided<T> B, T* C, int64_t C_row, bool accumulate, std::vector<T>& scratch,
          const T* bias = nullptr);

}  // namespace minidamage
