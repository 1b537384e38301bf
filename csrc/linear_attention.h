// Linear attention (Linformer: Wang et al., 2020): every one of N queries attends to the same k projected keys. What both machines share.
// Read minidamage/ops/linear_attention.py first, for the formula; then cpu/linear_attention.cpp, the plain form, then
// cuda/linear_attention.cu and cuda/fused_attention.cu. The whole op is a chain of matrix products around one core:
//     S = Q K^T / sqrt(d) [N, k],   P = softmax of the rows of S,   O = P V;      of every picture and head
// and backward, with P recomputed from S and the row's log-sum-exp L = log sum_j exp(S_j):
//     P = exp(S - L),   dP = dO V^T,   dS = P (dP - mean),   mean = sum_j P_j dP_j = sum_c O_c dO_c,
//     dQ = dS K / sqrt(d),   dK = dS^T Q / sqrt(d),   dV = P^T dO.
// S and P of all N rows never exist at once: a GPU holds those of a tile or of a chunk of rows.
//
// Layout: queries, outputs and their gradients [B, N, H, d], keys and values [B, k, H, d], log-sum-exp [B, H, N].
#pragma once

#include <vector>

#include "common.h"

namespace minidamage {

// ---- CPU, cpu/linear_attention.cpp; T is float or double --------------------------------------------------------------------

// C [M, N] = bias + sum of A B over the terms; A [M, K], B [K, N]. Element (i, j) of an operand is at i * row + j * column.
template <typename T>
struct ProductTerm {
  int64_t K;
  const T* A;
  int64_t A_row, A_column;
  const T* B;
  int64_t B_row, B_column;
};
template <typename T>
struct Product {
  int64_t M, N;
  T* C;  // [M, N], rows C_row apart
  int64_t C_row;
  const T* bias;  // [N], or null
  std::vector<ProductTerm<T>> terms;
};
// A product is computed in blocks, any of them at any time on any thread: each owns its part of C.
template <typename T>
int64_t product_blocks(const Product<T>& product);
template <typename T>
void product_cpu(const Product<T>& product, int64_t begin, int64_t end);

template <typename T>
struct Attention {
  int64_t B, N, k, H, d;
  T scale;          // 1 / sqrt(d)
  const T* query;   // [B, N, H, d]
  const T* keys;    // [B, k, H, d]
  const T* values;  // [B, k, H, d]
};

// One work item is a head of a picture and a segment of its rows: item (b H + h) segments + s.
// Writes output [B, N, H, d], which may be the query's own memory, and, unless null, log_sum_exp [B, H, N].
template <typename T>
void attention_cpu(const Attention<T>& problem, int64_t segments, T* output, T* log_sum_exp, int64_t begin, int64_t end);
// Overwrites grad_query [B, N, H, d]; grad_keys, grad_values: [segments, B, k, H, d], to be added up over the segments. How many
// segments there are must depend on the shapes alone, never on the threads: the sums would change with it.
template <typename T>
void attention_backward_cpu(const Attention<T>& problem, int64_t segments, const T* output, const T* log_sum_exp, const T* grad_output,
                            T* grad_query, T* grad_keys, T* grad_values, int64_t begin, int64_t end);

// ---- CUDA, cuda/linear_attention.cu; dtype is that of P, dS, output and grad_output; A is float, or double for double -----------
//
// Between the products of the chunked form; attention_mean_cuda and attention_add_bias_cuda serve the fused one too. A chunk of scores,
// [heads, rows, k]: rows first ... first + rows - 1 of the N of every head of every picture.
struct ScoreRows {
  int64_t heads, rows, k, N, first;
  // Where row r of the chunk stands in [heads, N]. Index: the type of the division, which holds heads * rows.
  template <typename Index>
  MD_HD int64_t position(Index r) const {
    const Index head = r / static_cast<Index>(rows);
    return head * N + first + (r - head * static_cast<Index>(rows));
  }
};
// scores of A become P of dtype, [heads, rows, k]: the softmax of scores times scale. log_sum_exp [heads, N] of A, or null.
template <typename A>
void attention_softmax_cuda(const A* scores, const ScoreRows& at, A scale, DType dtype, void* P, A* log_sum_exp, void* stream);
// mean [B, H, N] of A: the sum over channels of output * grad_output, both [B, N, H, d] of dtype.
template <typename A>
void attention_mean_cuda(int64_t B, int64_t N, int64_t H, int64_t d, DType dtype, const void* output, const void* grad_output, A* mean,
                         void* stream);
// From scores and grad_P [heads, rows, k] of A, log_sum_exp and mean [heads, N]: P, and dS times scale, [heads, rows, k] of dtype.
template <typename A>
void attention_grad_scores_cuda(const A* scores, const A* grad_P, const A* log_sum_exp, const A* mean, const ScoreRows& at, A scale,
                                DType dtype, void* P, void* grad_scores, void* stream);

// keys_values [2, B, k, A] += (E^T 1) b_k^T and (F^T 1) b_v^T, all of dtype: E, F [N, k], b_k, b_v [A] or null. One launch where the
// framework takes four.
void attention_add_bias_cuda(int64_t B, int64_t N, int64_t k, int64_t A, DType dtype, const void* E, const void* F, const void* b_k,
                             const void* b_v, void* keys_values, void* stream);

// ---- CUDA, cuda/fused_attention.cu: the whole core in one launch, on tensor cores, float16 and bfloat16. Arrays of dtype ---------------
struct FusedAttention {
  int64_t B, N, k, H, d;
  DType dtype;
  const void *query, *keys, *values;
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(d))); }
};
// Whether these shapes and pointers, on the current device, have a fused form; gradients are of the query's alignment.
bool attention_fuses(const FusedAttention& problem);
// Writes output [B, N, H, d] and, unless null, log_sum_exp [B, H, N].
void attention_fused_cuda(const FusedAttention& problem, void* output, float* log_sum_exp, void* stream);
// Into how many segments the backward splits the rows, from the shapes alone: the sums depend on it.
int64_t attention_fused_segments(const FusedAttention& problem);
// log_sum_exp, mean [B, H, N]; writes grad_query [B, N, H, d] and grad_keys_values [2, B, k, H, d]. parts [2, segments, B, k, H, d]:
// overwritten. grad_output is aligned to 32 bytes.
void attention_fused_backward_cuda(const FusedAttention& problem, const float* log_sum_exp, const float* mean, const void* grad_output,
                                   void* grad_query, float* parts, void* grad_keys_values, void* stream);

}  // namespace minidamage
