// The products of ../gemm.h: read it first. One file of their own, because they compile slowly: with
// AVX-512 fourteen micro-kernels of two types.
#include "../gemm.h"

#include <algorithm>

namespace minidamage {

constexpr int64_t GEMM_DEPTH = 256;  // rows of B a block: a panel of 32 KiB stays in the first-level cache
constexpr int64_t FEW_ROWS = 5 * MR;  // of A: up to so many, packing B costs more than it gains
// Rows so many bytes apart fall on few sets of the first-level cache, which has fewer ways than a micro-kernel has rows.
constexpr int64_t FAR_BYTES = 2048;

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

namespace {

// C [M, columns] (+)= A [M, K] panel [K][NR], its rows panel_row apart; bias [columns] or null is added once.
template <int M, typename T>
void micro_kernel(Strided<T> A, const T* panel, int64_t panel_row, int64_t K, T* C, int64_t C_row, int64_t columns, bool accumulate,
                  const T* bias) {
  using Vector = vector_t<T>;
  Vector sum[M][2] = {};
  // Rows in threes, each addressed from the first by the distance of a row: fourteen distances are more than there are registers.
  constexpr int THREES = (M + 2) / 3;
  const T* a[THREES];
  for (int g = 0; g < THREES; ++g) a[g] = A.data + 3 * g * A.row;
  for (int64_t p = 0; p < K; ++p, panel += panel_row) {
    const Vector b0 = load_vector(panel), b1 = load_vector(panel + VECTOR_LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T*& first = a[i / 3];
      if (i % 3 == 0) asm("" : "+r"(first));  // or the compiler finds the fourteen again
      const Vector same = broadcast(first[i % 3 * A.row]);
      if (i % 3 == 2 || i == M - 1) first += A.column;
      sum[i][0] = multiply_add(same, b0, sum[i][0]);
      sum[i][1] = multiply_add(same, b1, sum[i][1]);
    }
  }
  if (columns == NR<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      for (int half = 0; half < 2; ++half) {
        T* target = C + i * C_row + half * VECTOR_LANES<T>;
        Vector value = sum[i][half];
        if (bias) value += load_vector(bias + half * VECTOR_LANES<T>);
        if (accumulate) value += load_vector(target);
        store_vector(target, value);
      }
    }
    return;
  }
  T row[NR<T>] = {};  // written in full below, which gcc for aarch64 does not see
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store_vector(row, sum[i][0]);
    store_vector(row + VECTOR_LANES<T>, sum[i][1]);
    for (int64_t j = 0; j < columns; ++j) {
      T* target = C + i * C_row + j;
      *target = row[j] + (bias ? bias[j] : T(0)) + (accumulate ? *target : T(0));
    }
  }
}

template <typename T>
using MicroKernel = void (*)(Strided<T>, const T*, int64_t, int64_t, T*, int64_t, int64_t, bool, const T*);

template <typename T>
MicroKernel<T> micro_kernel_of(int64_t rows) {
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

}  // namespace

template <typename T>
void gemm_panels(int64_t M, int64_t N, int64_t K, Strided<T> A, const T* panels, int64_t panel_stride, T* C, int64_t C_row,
                 bool accumulate, const T* bias, int64_t panel_row) {
  // Even shares: 100 rows are 12 + 13 + ..., not seven times 14 and a lonely 2.
  const int64_t shares = (M + MR - 1) / MR;
  for (int64_t p0 = 0; p0 == 0 || p0 < K; p0 += GEMM_DEPTH) {
    const int64_t depth = std::min(GEMM_DEPTH, K - p0);
    for (int64_t j0 = 0; j0 < N; j0 += NR<T>) {
      const T* panel = panels + j0 / NR<T> * panel_stride + p0 * panel_row;
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t i0 = M * share / shares, rows = M * (share + 1) / shares - i0;
        micro_kernel_of<T>(rows)(A.from(i0, p0), panel, panel_row, depth, C + i0 * C_row + j0, C_row, std::min<int64_t>(NR<T>, N - j0),
                                 accumulate || p0 > 0, bias && p0 == 0 ? bias + j0 : nullptr);
      }
    }
  }
}

// A block of A, [rows, depth] with rows or columns contiguous, in memory where those lie `step` numbers apart.
template <typename T>
static Strided<T> near_copy(Strided<T> block, int64_t rows, int64_t depth, int64_t step, T* memory) {
  const bool by_columns = block.row == 1;
  const int64_t count = by_columns ? depth : rows, size = by_columns ? rows : depth, apart = by_columns ? block.column : block.row;
  for (int64_t i = 0; i < count; ++i) std::memcpy(memory + i * step, block.data + i * apart, size * sizeof(T));
  return by_columns ? Strided<T>{memory, 1, step} : Strided<T>{memory, step, 1};
}

template <typename T>
void gemm(int64_t M, int64_t N, int64_t K, Strided<T> A, Strided<T> B, T* C, int64_t C_row, bool accumulate, std::vector<T>& scratch,
          const T* bias) {
  if (K == 0) A = B = {};
  constexpr int64_t row_block = 448;  // x GEMM_DEPTH numbers of A: half of a second-level cache of 1 MiB
  const int64_t depth_block = std::min(K, GEMM_DEPTH), column_block = std::min<int64_t>(N, 1024);
  const auto far = [](int64_t step) { return step * static_cast<int64_t>(sizeof(T)) >= FAR_BYTES; };
  const bool by_columns = A.row == 1, copy = N >= 2 * NR<T> && (by_columns ? far(A.column) : A.column == 1 && far(A.row));
  const int64_t lines = by_columns ? GEMM_DEPTH : row_block, step = (by_columns ? row_block : GEMM_DEPTH) + VECTOR_LANES<T>;
  const int64_t panels_end = panels_size<T>(depth_block, column_block);
  scratch.resize(std::max<size_t>(scratch.size(), panels_end + (copy ? lines * step : 0)));
  for (int64_t j0 = 0; j0 < N; j0 += column_block) {
    const int64_t columns = std::min(column_block, N - j0);
    const bool in_place = M <= FEW_ROWS && B.column == 1 && !far(B.row) && columns % NR<T> == 0;
    for (int64_t p0 = 0; p0 == 0 || p0 < K; p0 += GEMM_DEPTH) {
      const int64_t depth = std::min(GEMM_DEPTH, K - p0);
      const T* panels = in_place ? B.from(p0, j0).data : scratch.data();
      if (!in_place) pack_panels(B.from(p0, j0), depth, columns, scratch.data());
      for (int64_t i0 = 0; i0 < M; i0 += row_block) {
        const int64_t rows = std::min(row_block, M - i0);
        const Strided<T> block = copy ? near_copy(A.from(i0, p0), rows, depth, step, scratch.data() + panels_end) : A.from(i0, p0);
        gemm_panels(rows, columns, depth, block, panels, in_place ? NR<T> : depth * NR<T>, C + i0 * C_row + j0, C_row,
                    accumulate || p0 > 0, bias && p0 == 0 ? bias + j0 : nullptr, in_place ? B.row : NR<T>);
      }
    }
  }
}

#define INSTANTIATE(T)                                                                                                       \
  template void pack_panels<T>(Strided<T>, int64_t, int64_t, T*);                                                            \
  template void gemm_panels<T>(int64_t, int64_t, int64_t, Strided<T>, const T*, int64_t, T*, int64_t, bool, const T*, int64_t); \
  template void gemm<T>(int64_t, int64_t, int64_t, Strided<T>, Strided<T>, T*, int64_t, bool, std::vector<T>&, const T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
