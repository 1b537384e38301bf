// Linear attention on a GPU, in chunks: what lies between the matrix products. Read ../linear_attention.h first, then
// ../cpu/linear_attention.cpp, the plain form.
//
// The plain algorithm: S = Q K^T, P = softmax of its rows, O = P V, each a kernel over [B H, N, k]: for 2 x 8 heads of 12,544 positions
// and k = 256 that is 51 million scores, 205 MB in float32, written, read, written as P and read again: 0.6 GB beside the 13 MB of Q and of
// O in bfloat16. Arithmetic: 4 N k A flops forward, 10 N k A backward, all of it in matrix products, which tensor cores do in
// microseconds: what lies between them is a matter of bytes.
// Two answers. Half types of common sizes take the fused core (fused_attention.cu), which keeps the scores where they are made. Here the
// one for everything else; attention_mean and attention_add_bias serve both. The products are the framework's:
//  1. Rows are taken in chunks whose scores fill at most SCORES_BYTES (bindings/linear_attention.cpp), less than the second-level cache:
//     the products and the kernels here hand S and P to each other there, and memory sees Q and O alone. That bounds what is allocated too.
//     A chunk is of one picture where that fills it: the products then read Q, K and V and write O where they lie, no head is copied.
//  2. One warp owns a row and holds it in registers, k up to 512: S is read once, P written once, 6 bytes a score in half precision.
//     Neighbouring lanes have neighbouring scores, so each access of a warp is 128 consecutive bytes. Maximum and sum are shuffles.
//  3. Where a row stands takes a division or two, of 32 bits where the count of rows allows it (common.h), beside as little work as one
//     number a lane (attention_mean at d = 32). In nvcc 13's output for sm_90, bfloat16, attention_mean has 389 instructions in place of
//     551, attention_grad_scores 284 of 401, attention_softmax at k = 256 500 of 622.
// Scores stay in float32 for every dtype but float64: in bfloat16 a score of 10 would be off by 0.02, and its exponential by 2 %. P,
// of size 1, is rounded to the dtype for the tensor cores. Backward keeps the log-sum-exp of a row, 4 bytes, in place of 2 k bytes of P.
// No atomics: every number has one owner, and two runs give equal bytes where the framework's products do.
#include "../linear_attention.h"

namespace minidamage {
namespace {

constexpr int WARPS = 8;

// for (r = the row of this warp; r < rows; r += all warps), in Index: uint32_t where fits_int32(rows).
#define MD_ROWS_OF(Index, r, rows)                                                                   \
  for (Index r = static_cast<Index>(blockIdx.x) * WARPS + threadIdx.y; r < static_cast<Index>(rows); \
       r += static_cast<Index>(gridDim.x) * WARPS)

// scores [rows, k], P [rows, k]. Warp: a row. V: numbers of the row that a lane holds in registers; 0: any k, the row is read three times.
template <typename T, int V, typename Index>
__global__ void attention_softmax(const accumulate_t<T>* scores, ScoreRows at, accumulate_t<T> scale, T* P,  // P may be scores itself
                                  accumulate_t<T>* __restrict__ log_sum_exp) {
  using A = accumulate_t<T>;
  const int lane = threadIdx.x;
  const int64_t k = at.k;
  MD_ROWS_OF(Index, r, at.heads * at.rows) {
    const A* row = scores + r * k;
    A held[V > 0 ? V : 1];
    A largest = -A(INFINITY);
    const auto look = [&](A score) { largest = score > largest ? score : largest; };  // passes over NaN: its exponential does not
    if constexpr (V > 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t j = lane + i * LANES;
        held[i] = j < k ? row[j] * scale : -A(INFINITY);
        look(held[i]);
      }
    } else {
      for (int64_t j = lane; j < k; j += LANES) look(row[j] * scale);
    }
    largest = largest_of_warp(largest);
    A sum = A(0);
    if constexpr (V > 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (lane + i * LANES >= k) continue;
        held[i] = A(exp(held[i] - largest));
        sum += held[i];
      }
    } else {
      for (int64_t j = lane; j < k; j += LANES) sum += A(exp(row[j] * scale - largest));
    }
    sum = sum_of_warp(sum);
    const A part = A(1) / sum;
    if constexpr (V > 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t j = lane + i * LANES;
        if (j < k) P[r * k + j] = from_accumulate<T>(held[i] * part);
      }
    } else {
      for (int64_t j = lane; j < k; j += LANES) P[r * k + j] = from_accumulate<T>(A(exp(row[j] * scale - largest)) * part);
    }
    if (log_sum_exp && lane == 0) log_sum_exp[at.position(r)] = largest + A(log(sum));
  }
}

// output, grad_output [B, N, H, d]; mean [B, H, N]. Warp: one (b, h, n), its lanes neighbouring channels.
template <typename T, typename Index>
__global__ void attention_mean(int64_t B, int64_t N, int64_t H, int64_t d, const T* __restrict__ output, const T* __restrict__ grad_output,
                               accumulate_t<T>* __restrict__ mean) {
  using A = accumulate_t<T>;
  MD_ROWS_OF(Index, r, B * N * H) {  // r = (b N + n) H + h, the order in memory
    A sum = A(0);
    for (int64_t c = threadIdx.x; c < d; c += LANES) sum += to_accumulate(output[r * d + c]) * to_accumulate(grad_output[r * d + c]);
    sum = sum_of_warp(sum);
    const Index position = r / static_cast<Index>(H), b = position / static_cast<Index>(N);
    const int64_t h = r - position * H, n = position - b * N;
    if (threadIdx.x == 0) mean[(b * H + h) * N + n] = sum;
  }
}

// scores, grad_P, P, grad_scores [rows, k]; log_sum_exp, mean [B, H, N]. Warp: a row.
template <typename T, typename Index>
__global__ void attention_grad_scores(const accumulate_t<T>* __restrict__ scores, const accumulate_t<T>* __restrict__ grad_P,
                                      const accumulate_t<T>* __restrict__ log_sum_exp, const accumulate_t<T>* __restrict__ mean,
                                      ScoreRows at, accumulate_t<T> scale, T* __restrict__ P, T* __restrict__ grad_scores) {
  using A = accumulate_t<T>;
  MD_ROWS_OF(Index, r, at.heads * at.rows) {
    const int64_t position = at.position(r);
    const A shift = log_sum_exp[position], centre = mean[position];
    for (int64_t j = threadIdx.x; j < at.k; j += LANES) {
      const int64_t e = r * at.k + j;
      const A p = A(exp(scores[e] * scale - shift));
      P[e] = from_accumulate<T>(p);
      grad_scores[e] = from_accumulate<T>(p * (grad_P[e] - centre) * scale);
    }
  }
}

// ---- the biases of keys and values ------------------------------------------------------------------------------------------------

constexpr int BIAS_COLUMNS = 16, BIAS_ROWS = 64;

// keys_values [2, B, k, A] += (E^T 1) b_k^T and (F^T 1) b_v^T; E, F [N, k], b_k, b_v [A] or null. Block: 16 columns of E or of F, whose
// sums its threads share, the rows of thread (c, r): r, r + 64, ...
template <typename T>
__global__ void attention_add_bias(int64_t B, int64_t N, int64_t k, int64_t A, const T* __restrict__ E, const T* __restrict__ F,
                                   const T* __restrict__ b_k, const T* __restrict__ b_v, T* __restrict__ keys_values) {
  const T *projection = blockIdx.y ? F : E, *bias = blockIdx.y ? b_v : b_k;
  if (!bias) return;
  __shared__ accumulate_t<T> sums[BIAS_ROWS][BIAS_COLUMNS];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * BIAS_COLUMNS, column = first + threadIdx.x;
  accumulate_t<T> sum = 0;
#pragma unroll 8
  for (int64_t n = threadIdx.y; n < N; n += BIAS_ROWS)
    if (column < k) sum += to_accumulate(projection[n * k + column]);
  sums[threadIdx.y][threadIdx.x] = sum;
  for (unsigned half = BIAS_ROWS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
  }
  __syncthreads();
  const int thread = threadIdx.y * BIAS_COLUMNS + threadIdx.x, lane = thread % LANES;
  const int64_t columns = k - first < BIAS_COLUMNS ? k - first : BIAS_COLUMNS;
  for (int64_t r = thread / LANES; r < B * columns; r += BIAS_ROWS * BIAS_COLUMNS / LANES) {  // a warp a row of [B, columns, A]
    const int64_t b = r / columns, c = r - b * columns;
    T* row = keys_values + ((blockIdx.y * B + b) * k + first + c) * A;
    for (int64_t a = lane; a < A; a += LANES) row[a] = from_accumulate<T>(to_accumulate(row[a]) + sums[0][c] * to_accumulate(bias[a]));
  }
}

inline dim3 blocks_of_rows(int64_t rows) { return dim3(blocks_for(rows, WARPS)); }
inline dim3 threads() { return dim3(LANES, WARPS); }

template <typename T, int V>
void launch_softmax(const accumulate_t<T>* scores, const ScoreRows& at, accumulate_t<T> scale, void* P, accumulate_t<T>* log_sum_exp,
                    void* stream) {
  const auto kernel = fits_int32(at.heads * at.rows) ? &attention_softmax<T, V, uint32_t> : &attention_softmax<T, V, int64_t>;
  MD_LAUNCH(kernel, blocks_of_rows(at.heads * at.rows), threads(), 0, stream, scores, at, scale, static_cast<T*>(P), log_sum_exp);
}

}  // namespace

template <typename A>
void attention_softmax_cuda(const A* scores, const ScoreRows& at, A scale, DType dtype, void* P, A* log_sum_exp, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (at.k <= 2 * LANES) launch_softmax<T, 2>(scores, at, scale, P, log_sum_exp, stream);
    else if (at.k <= 8 * LANES) launch_softmax<T, 8>(scores, at, scale, P, log_sum_exp, stream);
    else if (at.k <= 16 * LANES) launch_softmax<T, 16>(scores, at, scale, P, log_sum_exp, stream);
    else launch_softmax<T, 0>(scores, at, scale, P, log_sum_exp, stream);
  });
}

template <typename A>
void attention_mean_cuda(int64_t B, int64_t N, int64_t H, int64_t d, DType dtype, const void* output, const void* grad_output, A* mean,
                         void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = fits_int32(B * N * H) ? &attention_mean<T, uint32_t> : &attention_mean<T, int64_t>;
    MD_LAUNCH(kernel, blocks_of_rows(B * N * H), threads(), 0, stream, B, N, H, d, static_cast<const T*>(output),
              static_cast<const T*>(grad_output), mean);
  });
}

template <typename A>
void attention_grad_scores_cuda(const A* scores, const A* grad_P, const A* log_sum_exp, const A* mean, const ScoreRows& at, A scale,
                                DType dtype, void* P, void* grad_scores, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = fits_int32(at.heads * at.rows) ? &attention_grad_scores<T, uint32_t> : &attention_grad_scores<T, int64_t>;
    MD_LAUNCH(kernel, blocks_of_rows(at.heads * at.rows), threads(), 0, stream, scores, grad_P, log_sum_exp, mean, at, scale,
              static_cast<T*>(P), static_cast<T*>(grad_scores));
  });
}

void attention_add_bias_cuda(int64_t B, int64_t N, int64_t k, int64_t A, DType dtype, const void* E, const void* F, const void* b_k,
                             const void* b_v, void* keys_values, void* stream) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    MD_LAUNCH(attention_add_bias<T>, dim3(static_cast<unsigned>(ceil_div(k, BIAS_COLUMNS)), 2), dim3(BIAS_COLUMNS, BIAS_ROWS), 0, stream,
              B, N, k, A, static_cast<const T*>(E), static_cast<const T*>(F), static_cast<const T*>(b_k), static_cast<const T*>(b_v),
              static_cast<T*>(keys_values));
  };
  if (dtype == DType::float64) with_storage<double>(dtype, run);
  else with_storage<float>(dtype, run);
}

#define INSTANTIATE(A)                                                                                                            \
  template void attention_softmax_cuda<A>(const A*, const ScoreRows&, A, DType, void*, A*, void*);                                \
  template void attention_mean_cuda<A>(int64_t, int64_t, int64_t, int64_t, DType, const void*, const void*, A*, void*);           \
  template void attention_grad_scores_cuda<A>(const A*, const A*, const A*, const A*, const ScoreRows&, A, DType, void*, void*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
