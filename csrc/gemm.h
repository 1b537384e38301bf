// Matrix products on one core, for kernels whose operands are already in its cache: C [M, N] (+)= A [M, K] B [K, N].
// A is read where it lies, in any strides. B is packed first into panels of NR columns, panel after panel, [K][NR] each, the last one
// filled up with zeros: pack_panels() once, gemm_panels() for as many A as there are. gemm() does both, block by block, for operands of
// any size. The micro-kernel holds MR x NR sums in registers and for every step of K loads two vectors of B and broadcasts MR numbers
// of A: 2 MR fused multiply-adds for MR + 2 loads. NaN and Inf come through as in a plain triple loop; the order of summation depends on
// the shapes alone. For cpu/*.cpp only: those are compiled for this very processor, and MR and NR with them.
// Why not the framework's product: it cannot be called on a tile without a tensor, and the library behind it reaches half the speed
// of its own convolutions on the AVX-512 processor that this was written on. Measured: see cpu/linear_attention.cpp.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
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
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));
template <typename T>
constexpr int NR = 2 * LANES<T>;
constexpr int64_t GEMM_DEPTH = 256;  // rows of B a block: a panel of 32 KiB stays in the first-level cache

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
inline FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<FloatVector>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return reinterpret_cast<FloatVector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
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
#else
  return a * b + c;
#endif
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
void pack_panels(Strided<T> B, int64_t K, int64_t N, T* panels) {
  if (K == 0) return;
  for (int64_t j0 = 0; j0 < N; j0 += NR<T>, panels += K * NR<T>) {
    const int64_t columns = std::min<int64_t>(NR<T>, N - j0);
    if (columns < NR<T>) std::memset(panels, 0, K * NR<T> * sizeof(T));
    if (B.column == 1) {
      for (int64_t p = 0; p < K; ++p) std::memcpy(panels + p * NR<T>, B.data + p * B.row + j0, columns * sizeof(T));
      continue;
    }
    constexpr int64_t strip = 16;  // a cache line of each column: read once, written while it is near
    for (int64_t p0 = 0; p0 < K; p0 += strip) {
      const int64_t end = std::min(K, p0 + strip);
      for (int64_t j = 0; j < columns; ++j) {
        const T* source = B.data + (j0 + j) * B.column;
        for (int64_t p = p0; p < end; ++p) panels[p * NR<T> + j] = source[p * B.row];
      }
    }
  }
}

// C [M, columns] (+)= A [M, K] panel [K][NR]; bias [columns] or null is added once.
template <int M, typename T>
inline void micro_kernel(Strided<T> A, const T* panel, int64_t K, T* C, int64_t C_row, int64_t columns, bool accumulate, const T* bias) {
  using Vector = vector_t<T>;
  Vector sum[M][2] = {};
  const T* a = A.data;
  for (int64_t p = 0; p < K; ++p, a += A.column, panel += NR<T>) {
    const Vector b0 = load_vector(panel), b1 = load_vector(panel + LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vector broadcast = Vector{} + a[i * A.row];
      sum[i][0] = multiply_add(broadcast, b0, sum[i][0]);
      sum[i][1] = multiply_add(broadcast, b1, sum[i][1]);
    }
  }
  if (columns == NR<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      for (int half = 0; half < 2; ++half) {
        T* target = C + i * C_row + half * LANES<T>;
        Vector value = sum[i][half];
        if (bias) value += load_vector(bias + half * LANES<T>);
        if (accumulate) value += load_vector(target);
        store_vector(target, value);
      }
    }
    return;
  }
  T row[NR<T>];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store_vector(row, sum[i][0]);
    store_vector(row + LANES<T>, sum[i][1]);
    for (int64_t j = 0; j < columns; ++j) {
      T* target = C + i * C_row + j;
      *target = row[j] + (bias ? bias[j] : T(0)) + (accumulate ? *target : T(0));
    }
  }
}

template <typename T>
using MicroKernel = void (*)(Strided<T>, const T*, int64_t, T*, int64_t, int64_t, bool, const T*);

template <typename T>
inline MicroKernel<T> micro_kernel_of(int64_t rows) {
  static constexpr MicroKernel<T> kernels[] = {
      micro_kernel<1, T>, micro_kernel<2, T>, micro_kernel<3, T>, micro_kernel<4, T>, micro_kernel<5, T>, micro_kernel<6, T>,
#if defined(__AVX512F__) || defined(__aarch64__)
      micro_kernel<7, T>, micro_kernel<8, T>, micro_kernel<9, T>, micro_kernel<10, T>, micro_kernel<11, T>, micro_kernel<12, T>,
#endif
#if defined(__AVX512F__)
      micro_kernel<13, T>, micro_kernel<14, T>,
#endif
  };
  return kernels[rows - 1];
}

// C [M, N] (+)= A [M, K] B, B in panels. panel_stride: numbers from a panel to the next, K NR where B was packed whole.
template <typename T>
void gemm_panels(int64_t M, int64_t N, int64_t K, Strided<T> A, const T* panels, int64_t panel_stride, T* C, int64_t C_row,
                 bool accumulate, const T* bias = nullptr) {
  // Even shares: 100 rows are 12 + 13 + ..., not seven times 14 and a lonely 2.
  const int64_t shares = (M + MR - 1) / MR;
  for (int64_t p0 = 0; p0 == 0 || p0 < K; p0 += GEMM_DEPTH) {
    const int64_t depth = std::min(GEMM_DEPTH, K - p0);
    for (int64_t j0 = 0; j0 < N; j0 += NR<T>) {
      const T* panel = panels + j0 / NR<T> * panel_stride + p0 * NR<T>;
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t i0 = M * share / shares, rows = M * (share + 1) / shares - i0;
        micro_kernel_of<T>(rows)(A.from(i0, p0), panel, depth, C + i0 * C_row + j0, C_row, std::min<int64_t>(NR<T>, N - j0),
                                 accumulate || p0 > 0, bias && p0 == 0 ? bias + j0 : nullptr);
      }
    }
  }
}

// C [M, N] (+)= A [M, K] B [K, N], operands of any size. scratch is kept between calls.
template <typename T>
void gemm(int64_t M, int64_t N, int64_t K, Strided<T> A, Strided<T> B, T* C, int64_t C_row, bool accumulate, std::vector<T>& scratch,
          const T* bias = nullptr) {
  if (K == 0) A = B = {};
  constexpr int64_t row_block = 448;  // x GEMM_DEPTH numbers of A: half of a second-level cache of 1 MiB
  const int64_t depth_block = std::min(K, GEMM_DEPTH), column_block = std::min<int64_t>(N, 1024);
  // Rows some KiB apart fall on few sets of the first-level cache, which has fewer ways than a micro-kernel has rows: bring them nearer.
  const bool many_columns = N >= 2 * NR<T>, far = (A.row == 1 ? A.column : A.row) * static_cast<int64_t>(sizeof(T)) >= 2048;
  const bool copy = many_columns && far && (A.row == 1 || A.column == 1);
  const int64_t panels_end = panels_size<T>(depth_block, column_block), copy_row = (A.row == 1 ? row_block : GEMM_DEPTH) + LANES<T>;
  scratch.resize(std::max<size_t>(scratch.size(), panels_end + (copy ? (A.row == 1 ? GEMM_DEPTH : row_block) * copy_row : 0)));
  for (int64_t j0 = 0; j0 < N; j0 += column_block) {
    const int64_t columns = std::min(column_block, N - j0);
    for (int64_t p0 = 0; p0 == 0 || p0 < K; p0 += GEMM_DEPTH) {
      const int64_t depth = std::min(GEMM_DEPTH, K - p0);
      pack_panels(B.from(p0, j0), depth, columns, scratch.data());
      for (int64_t i0 = 0; i0 < M; i0 += row_block) {
        const int64_t rows = std::min(row_block, M - i0);
        Strided<T> block = A.from(i0, p0);
        if (copy) {
          T* near = scratch.data() + panels_end;
          const int64_t count = A.row == 1 ? depth : rows, size = A.row == 1 ? rows : depth, step = A.row == 1 ? A.column : A.row;
          for (int64_t i = 0; i < count; ++i) std::memcpy(near + i * copy_row, block.data + i * step, size * sizeof(T));
          block = A.row == 1 ? Strided<T>{near, 1, copy_row} : Strided<T>{near, copy_row, 1};
        }
        gemm_panels(rows, columns, depth, block, scratch.data(), depth * NR<T>, C + i0 * C_row + j0, C_row, accumulate || p0 > 0,
                    bias && p0 == 0 ? bias + j0 : nullptr);
      }
    }
  }
}

}  // namespace minidamage
