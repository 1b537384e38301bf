// The fused core of linear attention on a GPU. Read ../linear_attention.h first, then ../cpu/linear_attention.cpp, the plain form.
//
// In chunks (linear_attention.cu) the scores go to memory and come back between the products, and each product and each kernel between
// them is a launch. Here one launch forward, four backward (the first is attention_mean of linear_attention.cu), on tensor cores (mma.h:
// tiles of 16 x 16, float32 sums), and the scores never leave their multiprocessor. For float16 and bfloat16, d of 16, 32 or 64, k a
// multiple of 16 up to 512; attention_fuses() says where.
//  1. Forward, one warp owns 16 rows of a head. It reads Q, K, V where they lie, rows H d apart (hence d in sixteens: every tile begins on
//     32 bytes), keeps its 16 x k scores in shared memory, at most 33 KB, so the softmax is one over whole rows, without running maxima.
//  2. P takes the place of the scores that it comes from, in half the bytes; O is summed over the keys in registers and rounded once.
//  3. The last tile of a head is moved back to end at row N. Rows that two warps then hold are written by the first alone, and count
//     once in the gradients of K and V.
//  4. Backward from the log-sum-exp: for dQ a warp owns 16 rows and walks over the keys, for dK and dV it owns 16 keys and walks over a
//     segment of the rows. S and dP are computed in both, 14 N k A flops in place of 10: the price of no atomics. Segments come from the
//     shapes alone, and attention_add_segments() adds their float32 sums in order.
// No atomics: every number has one owner, and two runs give equal bytes.
// On an H200 (torch 2.11, 2 pictures, 8 heads, d = 32, bfloat16), in chunks and then fused, forward: N = 784, k = 256 0.41 and 0.20 ms,
// most of it launches; N = 12,544, k = 64 0.50 and 0.21; N = 50,176 1.18 and 0.76, with gradients 5.2 and 2.4. The stock chain of layers
// with its flash attention: 0.17 at N = 784, 0.16 at 12,544 (results/speed.md). The gain of each step alone is not measured.
#include "../linear_attention.h"

#include <type_traits>

#if defined(__CUDACC__)
#include <mma.h>
#endif
// bfloat16 tiles need sm_80. For an older card the fused kernels have no body, and attention_fuses() says no.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MD_TENSOR_CORES 1
#endif

namespace minidamage {
namespace {

constexpr int TILE = 16, TILE_NUMBERS = TILE * TILE;
constexpr int FUSED_WARPS = 4;                // of a block: many registers a thread, and few warps where the map is small
constexpr int64_t MOST_KEYS = 16 * LANES;     // a lane holds 16 numbers of a row in softmax_of_row
constexpr int HALF_STRIDE = TILE + 8;         // rows of a tile in half precision: eight rows of 16 bytes meet no bank twice
constexpr int BACKWARD_BYTES = 2 * TILE_NUMBERS * 4 + 2 * TILE * HALF_STRIDE * 2;  // of a warp: S and dP, then P and dS
// The same for the rows of scores, in float32.
MD_HD constexpr int64_t score_stride(int64_t k) { return k + 4; }

// A head of a picture: head = b H + h, and its first channel of the A = H d.
struct Head {
  int64_t head, b, channel;
  MD_HD Head(int64_t head, int64_t H, int64_t d) : head(head), b(head / H), channel((head - b * H) * d) {}
};
// The 16 rows of a head that a warp holds: 16 tile and on, but moved back to end at row N.
struct RowTile {
  int64_t position, row;  // of the first, in [B, N, A] and in [B, H, N]
  int skip;               // how many of them the tile before owns
  MD_HD RowTile(const Head& at, int64_t N, int64_t A, int64_t tile) {
    const int64_t own = tile * TILE, first = own < N - TILE ? own : N - TILE;
    position = (at.b * N + first) * A + at.channel;
    row = at.head * N + first;
    skip = static_cast<int>(own - first);
  }
};

#if defined(MD_TENSOR_CORES)
// Tiles in registers. Left and right: a factor whose rows lie one after the other in memory; flipped: its transpose does.
namespace wmma = nvcuda::wmma;
template <typename T>
using Left = wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, T, wmma::row_major>;
template <typename T>
using LeftFlipped = wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, T, wmma::col_major>;
template <typename T>
using Right = wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, T, wmma::row_major>;
template <typename T>
using RightFlipped = wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, T, wmma::col_major>;
using Sums = wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float>;

// The D tiles of a [16, d] or, flipped, [d, 16] block whose rows are `stride` apart.
template <int D, typename Fragment, typename T>
MD_DEVICE void load_tiles(Fragment (&tiles)[D], const T* from, int64_t stride) {
#pragma unroll
  for (int c = 0; c < D; ++c) wmma::load_matrix_sync(tiles[c], from + c * TILE, static_cast<unsigned>(stride));
}

#endif

// One row of scores, k <= MOST_KEYS, becomes P in the same place; returns its log-sum-exp. All lanes of a warp, lane j % 32 column j.
template <typename T>
MD_DEVICE float softmax_of_row(float* row, int k, float scale) {
  constexpr int V = MOST_KEYS / LANES;
  float held[V], largest = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int j = threadIdx.x + i * LANES;
    if (i * LANES >= k) break;  // the same for the whole warp
    held[i] = j < k ? row[j] * scale : -INFINITY;
    largest = held[i] > largest ? held[i] : largest;  // passes over NaN: its exponential does not
  }
  largest = largest_of_warp(largest);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int j = threadIdx.x + i * LANES;
    if (i * LANES >= k) break;
    held[i] = j < k ? static_cast<float>(exp(held[i] - largest)) : 0.f;
    sum += held[i];
  }
  sum = sum_of_warp(sum);
  const float part = 1.f / sum;
  T* P = reinterpret_cast<T*>(row);
  __syncwarp();  // P overwrites scores that other lanes have read
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int j = threadIdx.x + i * LANES;
    if (i * LANES >= k) break;
    if (j < k) P[j] = from_accumulate<T>(held[i] * part);
  }
  return largest + static_cast<float>(log(sum));
}

#if defined(MD_TENSOR_CORES)
// sums, by way of `tile` in shared memory, into rows of T that are `out_stride` apart; not the first `skip` rows.
template <typename T>
MD_DEVICE void put_tile(const Sums& sums, float* tile, int64_t stride, T* out, int64_t out_stride, int skip) {
  wmma::store_matrix_sync(tile, sums, static_cast<unsigned>(stride), wmma::mem_row_major);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < TILE_NUMBERS / LANES; ++i) {
    const int e = threadIdx.x + i * LANES, r = e / TILE, c = e % TILE;
    if (r >= skip) out[r * out_stride + c] = from_accumulate<T>(tile[r * stride + c]);
  }
  __syncwarp();
}
#endif

// query, output [B, N, H, d], keys, values [B, k, H, d], log_sum_exp [B, H, N]; d = 16 D. Warp: 16 rows of a head, in shared memory their
// scores [16, k]. The last rows of a head are taken from N - 16 on, and those that another warp owns are not written.
template <typename T, int D>
__global__ void attention_fused(int64_t B, int64_t N, int64_t k, int64_t H, float scale, const T* __restrict__ query,
                                const T* __restrict__ keys, const T* __restrict__ values, T* __restrict__ output,
                                float* __restrict__ log_sum_exp) {
#if defined(MD_TENSOR_CORES)
  MD_DYNAMIC_SHARED(float, shared);
  const int64_t A = H * D * TILE, stride = score_stride(k), tiles = ceil_div(N, TILE);
  float* scores = shared + threadIdx.y * TILE * stride;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; item < B * H * tiles;
       item += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const Head head(item / tiles, H, D * TILE);
    const RowTile at(head, N, A, item - head.head * tiles);
    const int64_t summary = head.b * k * A + head.channel;
    {
      Left<T> rows[D];
      load_tiles(rows, query + at.position, A);
      for (int64_t j = 0; j < k; j += TILE) {
        RightFlipped<T> key[D];
        Sums sums;
        load_tiles(key, keys + summary + j * A, A);
        wmma::fill_fragment(sums, 0.f);
#pragma unroll
        for (int c = 0; c < D; ++c) wmma::mma_sync(sums, rows[c], key[c], sums);
        wmma::store_matrix_sync(scores + j, sums, static_cast<unsigned>(stride), wmma::mem_row_major);
      }
    }
    __syncwarp();
    for (int r = 0; r < TILE; ++r) {
      const float log_sum = softmax_of_row<T>(scores + r * stride, static_cast<int>(k), scale);
      if (log_sum_exp && threadIdx.x == 0 && r >= at.skip) log_sum_exp[at.row + r] = log_sum;
    }
    __syncwarp();
    Sums sums[D];
#pragma unroll
    for (int c = 0; c < D; ++c) wmma::fill_fragment(sums[c], 0.f);
    for (int64_t j = 0; j < k; j += TILE) {
      Left<T> P;
      Right<T> value[D];
      wmma::load_matrix_sync(P, reinterpret_cast<const T*>(scores) + j, static_cast<unsigned>(2 * stride));
      load_tiles(value, values + summary + j * A, A);
#pragma unroll
      for (int c = 0; c < D; ++c) wmma::mma_sync(sums[c], P, value[c], sums[c]);
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < D; ++c) put_tile(sums[c], scores, stride, output + at.position + c * TILE, A, at.skip);
  }
#endif
}

#if defined(MD_TENSOR_CORES)
// From 16 rows of Q and dO and 16 keys and values: P and dS times scale, tiles [16, HALF_STRIDE] of T in shared memory, 0 in the first
// `skip` rows; P may be null. log_sum_exp and mean of the rows. S, dP: tiles of float32 in shared memory. Warp: all of it.
template <typename T, int D>
MD_DEVICE void gradient_tile(const Left<T> (&query)[D], const Left<T> (&grad)[D], const RightFlipped<T> (&key)[D],
                             const RightFlipped<T> (&value)[D], const float* __restrict__ log_sum_exp, const float* __restrict__ mean,
                             float scale, int skip, float* S, float* dP, T* P, T* dS) {
  Sums scores, grad_P;
  wmma::fill_fragment(scores, 0.f);
  wmma::fill_fragment(grad_P, 0.f);
#pragma unroll
  for (int c = 0; c < D; ++c) {
    wmma::mma_sync(scores, query[c], key[c], scores);
    wmma::mma_sync(grad_P, grad[c], value[c], grad_P);
  }
  wmma::store_matrix_sync(S, scores, TILE, wmma::mem_row_major);
  wmma::store_matrix_sync(dP, grad_P, TILE, wmma::mem_row_major);
  __syncwarp();  // also: the products have read the P and dS of the tile before
#pragma unroll
  for (int i = 0; i < TILE_NUMBERS / LANES; ++i) {
    const int e = threadIdx.x + i * LANES, r = e / TILE, at = r * HALF_STRIDE + e % TILE;
    const float p = r < skip ? 0.f : static_cast<float>(exp(S[e] * scale - log_sum_exp[r]));
    if (P) P[at] = from_accumulate<T>(p);
    dS[at] = from_accumulate<T>(r < skip ? 0.f : p * (dP[e] - mean[r]) * scale);
  }
  __syncwarp();
}
#endif

// query, grad_output, grad_query [B, N, H, d], keys, values [B, k, H, d], log_sum_exp, mean [B, H, N]; d = 16 D. Warp: 16 rows of a head.
template <typename T, int D>
__global__ void attention_fused_grad_query(int64_t B, int64_t N, int64_t k, int64_t H, float scale, const T* __restrict__ query,
                                           const T* __restrict__ keys, const T* __restrict__ values,
                                           const float* __restrict__ log_sum_exp, const float* __restrict__ mean,
                                           const T* __restrict__ grad_output, T* __restrict__ grad_query) {
#if defined(MD_TENSOR_CORES)
  MD_DYNAMIC_SHARED(unsigned char, shared);
  float *S = reinterpret_cast<float*>(shared + threadIdx.y * BACKWARD_BYTES), *dP = S + TILE_NUMBERS;
  T* dS = reinterpret_cast<T*>(dP + TILE_NUMBERS);
  const int64_t A = H * D * TILE, tiles = ceil_div(N, TILE);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * FUSED_WARPS + threadIdx.y; item < B * H * tiles;
       item += static_cast<int64_t>(gridDim.x) * FUSED_WARPS) {
    const Head head(item / tiles, H, D * TILE);
    const RowTile at(head, N, A, item - head.head * tiles);
    const int64_t summary = head.b * k * A + head.channel;
    Left<T> rows[D], grads[D];
    Sums sums[D];
    load_tiles(rows, query + at.position, A);
    load_tiles(grads, grad_output + at.position, A);
#pragma unroll
    for (int c = 0; c < D; ++c) wmma::fill_fragment(sums[c], 0.f);
    for (int64_t j = 0; j < k; j += TILE) {
      RightFlipped<T> key[D], value[D];
      load_tiles(key, keys + summary + j * A, A);
      load_tiles(value, values + summary + j * A, A);
      gradient_tile(rows, grads, key, value, log_sum_exp + at.row, mean + at.row, scale, 0, S, dP, static_cast<T*>(nullptr), dS);
      Left<T> grad_scores;
      Right<T> along[D];
      wmma::load_matrix_sync(grad_scores, dS, HALF_STRIDE);
      load_tiles(along, keys + summary + j * A, A);
#pragma unroll
      for (int c = 0; c < D; ++c) wmma::mma_sync(sums[c], grad_scores, along[c], sums[c]);
    }
#pragma unroll
    for (int c = 0; c < D; ++c) put_tile(sums[c], S, TILE, grad_query + at.position + c * TILE, A, at.skip);
  }
#endif
}

// As above, and parts [2, segments, B, k, H, d]: of grad_keys and grad_values. Warp: 16 keys of a head and a segment of its rows, 16 rows
// at a time.
template <typename T, int D>
__global__ void attention_fused_grad_keys(int64_t B, int64_t N, int64_t k, int64_t H, float scale, int64_t segments,
                                          const T* __restrict__ query, const T* __restrict__ keys, const T* __restrict__ values,
                                          const float* __restrict__ log_sum_exp, const float* __restrict__ mean,
                                          const T* __restrict__ grad_output, float* __restrict__ parts) {
#if defined(MD_TENSOR_CORES)
  MD_DYNAMIC_SHARED(unsigned char, shared);
  float *S = reinterpret_cast<float*>(shared + threadIdx.y * BACKWARD_BYTES), *dP = S + TILE_NUMBERS;
  T *P = reinterpret_cast<T*>(dP + TILE_NUMBERS), *dS = P + TILE * HALF_STRIDE;
  const int64_t A = H * D * TILE, tiles = ceil_div(N, TILE), blocks = k / TILE, per_segment = ceil_div(tiles, segments);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * FUSED_WARPS + threadIdx.y; item < segments * B * H * blocks;
       item += static_cast<int64_t>(gridDim.x) * FUSED_WARPS) {  // ((segment B + b) H + h) blocks + block: neighbours share their rows
    const int64_t group = item / blocks, j = (item - group * blocks) * TILE, segment = group / (B * H);
    const Head head(group - segment * (B * H), H, D * TILE);
    const int64_t summary = (head.b * k + j) * A + head.channel;
    const int64_t end = (segment + 1) * per_segment < tiles ? (segment + 1) * per_segment : tiles;
    RightFlipped<T> key[D], value[D];
    Sums grad_keys[D], grad_values[D];
    load_tiles(key, keys + summary, A);
    load_tiles(value, values + summary, A);
#pragma unroll
    for (int c = 0; c < D; ++c) {
      wmma::fill_fragment(grad_keys[c], 0.f);
      wmma::fill_fragment(grad_values[c], 0.f);
    }
    for (int64_t tile = segment * per_segment; tile < end; ++tile) {
      const RowTile at(head, N, A, tile);
      Left<T> rows[D], grads[D];
      load_tiles(rows, query + at.position, A);
      load_tiles(grads, grad_output + at.position, A);
      gradient_tile(rows, grads, key, value, log_sum_exp + at.row, mean + at.row, scale, at.skip, S, dP, P, dS);
      LeftFlipped<T> from_P, from_scores;
      wmma::load_matrix_sync(from_P, P, HALF_STRIDE);
      wmma::load_matrix_sync(from_scores, dS, HALF_STRIDE);
#pragma unroll
      for (int c = 0; c < D; ++c) {
        Right<T> row, grad;
        wmma::load_matrix_sync(row, query + at.position + c * TILE, static_cast<unsigned>(A));
        wmma::load_matrix_sync(grad, grad_output + at.position + c * TILE, static_cast<unsigned>(A));
        wmma::mma_sync(grad_keys[c], from_scores, row, grad_keys[c]);
        wmma::mma_sync(grad_values[c], from_P, grad, grad_values[c]);
      }
    }
    float* part = parts + segment * B * k * A + summary;
#pragma unroll
    for (int c = 0; c < D; ++c) {
      wmma::store_matrix_sync(part + c * TILE, grad_keys[c], static_cast<unsigned>(A), wmma::mem_row_major);
      wmma::store_matrix_sync(part + segments * B * k * A + c * TILE, grad_values[c], static_cast<unsigned>(A), wmma::mem_row_major);
    }
  }
#endif
}

// parts [2, segments, count], sums [2, count]: in order, rounded once. Thread: a number.
template <typename T>
__global__ void attention_add_segments(int64_t segments, int64_t count, const float* __restrict__ parts, T* __restrict__ sums) {
  MD_GRID_STRIDE(i, 2 * count) {
    const float* part = parts + i / count * (segments - 1) * count + i;
    float sum = 0.f;
    for (int64_t s = 0; s < segments; ++s) sum += part[s * count];
    sums[i] = from_accumulate<T>(sum);
  }
}

// run(T(), std::integral_constant<int, D>()), d = 16 D
template <typename Run>
void with_tiles(const FusedAttention& problem, const Run& run) {
  const auto of = [&](auto zero) {
    if (problem.d == TILE) run(zero, std::integral_constant<int, 1>());
    else if (problem.d == 2 * TILE) run(zero, std::integral_constant<int, 2>());
    else run(zero, std::integral_constant<int, 4>());
  };
  if (problem.dtype == DType::float16) of(__half());
  else of(__nv_bfloat16());
}

// Whether the code that this device runs was compiled for tensor cores; a card newer than that runs what was compiled for an older one.
inline bool has_tensor_cores() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, attention_fused<__half, 2>) == cudaSuccess) return attributes.ptxVersion >= 80;
  cudaGetLastError();
  return false;
#else
  return true;
#endif
}

}  // namespace

bool attention_fuses(const FusedAttention& problem) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 32 == 0; };
  return (problem.dtype == DType::float16 || problem.dtype == DType::bfloat16) && problem.N >= TILE && problem.k % TILE == 0 &&
         problem.k <= MOST_KEYS && (problem.d == TILE || problem.d == 2 * TILE || problem.d == 4 * TILE) && problem.B > 0 &&
         problem.H * problem.d <= std::numeric_limits<int32_t>::max() && aligned(problem.query) && aligned(problem.keys) &&
         aligned(problem.values) && has_tensor_cores();
}

void attention_fused_cuda(const FusedAttention& problem, void* output, float* log_sum_exp, void* stream) {
  const int64_t bytes = TILE * score_stride(problem.k) * static_cast<int64_t>(sizeof(float));  // a warp's; a block has 48 KiB at most
  const int64_t fit = (48 << 10) / bytes, warps = fit < FUSED_WARPS ? fit : FUSED_WARPS;
  with_tiles(problem, [&](auto zero, auto D) {
    using T = decltype(zero);
    const auto kernel = &attention_fused<T, decltype(D)::value>;
    MD_LAUNCH(kernel, dim3(blocks_for(problem.B * problem.H * ceil_div(problem.N, TILE), warps)), dim3(LANES, static_cast<unsigned>(warps)),
              static_cast<size_t>(warps * bytes), stream, problem.B, problem.N, problem.k, problem.H, problem.scale(),
              static_cast<const T*>(problem.query), static_cast<const T*>(problem.keys), static_cast<const T*>(problem.values),
              static_cast<T*>(output), log_sum_exp);
  });
}

int64_t attention_fused_segments(const FusedAttention& problem) {
  // Warps enough to fill a GPU, which bounds the parts too; four tiles of rows each at least.
  const int64_t warps = 2048, most = problem.N / (4 * TILE), wanted = ceil_div(warps, problem.B * problem.H * (problem.k / TILE));
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

void attention_fused_backward_cuda(const FusedAttention& problem, const float* log_sum_exp, const float* mean, const void* grad_output,
                                   void* grad_query, float* parts, void* grad_keys_values, void* stream) {
  const int64_t B = problem.B, N = problem.N, k = problem.k, H = problem.H, count = B * k * H * problem.d;
  const int64_t segments = attention_fused_segments(problem);
  const dim3 block(LANES, FUSED_WARPS);
  with_tiles(problem, [&](auto zero, auto D) {
    using T = decltype(zero);
    const T *query = static_cast<const T*>(problem.query), *keys = static_cast<const T*>(problem.keys);
    const T *values = static_cast<const T*>(problem.values), *grad = static_cast<const T*>(grad_output);
    const auto of_query = &attention_fused_grad_query<T, decltype(D)::value>;
    MD_LAUNCH(of_query, blocks_for(B * H * ceil_div(N, TILE), FUSED_WARPS), block, FUSED_WARPS * BACKWARD_BYTES, stream, B, N, k, H,
              problem.scale(), query, keys, values, log_sum_exp, mean, grad, static_cast<T*>(grad_query));
    const auto of_keys = &attention_fused_grad_keys<T, decltype(D)::value>;
    MD_LAUNCH(of_keys, blocks_for(segments * B * H * (k / TILE), FUSED_WARPS), block, FUSED_WARPS * BACKWARD_BYTES, stream, B, N, k, H,
              problem.scale(), segments, query, keys, values, log_sum_exp, mean, grad, parts);
    MD_LAUNCH(attention_add_segments<T>, blocks_for(2 * count, 256), 256, 0, stream, segments, count, parts,
              static_cast<T*>(grad_keys_values));
  });
}

}  // namespace minidamage
