// Linear attention: tensors in, a chain of matrix products and one attention core out (see tensors.h). The steps have the names of
// linear_attention_reference in minidamage/ops/linear_attention.py.
#include "linear_attention.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include <array>
#include <cmath>

#include "tensors.h"

namespace minidamage {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// The gradients of Backward; those that are not needed stay empty.
enum Gradient { X, W_Q, B_Q, W_K, B_K, W_V, B_V, OF_E, OF_F, W_O, B_O, GRADIENTS };
constexpr Gradient WEIGHT[2] = {W_K, W_V}, BIAS[2] = {B_K, B_V}, PROJECTION[2] = {OF_E, OF_F};  // of keys, of values
using Needed = std::array<bool, GRADIENTS>;
using Gradients = std::array<Tensor, GRADIENTS>;

Gradients no_gradients(const Tensor& x) {
  Gradients grads;
  for (Tensor& grad : grads) grad = at::empty({0}, x.options());
  return grads;
}

struct Sizes {
  int64_t B, N, D, A, k, H, d;
};

// Shapes, dtypes and devices of all that a kernel reads; w_o, b_* where they are given.
Sizes check(const Tensor& x, const Tensor& w_q, const OptionalTensor& b_q, const Tensor& w_k, const OptionalTensor& b_k, const Tensor& w_v,
            const OptionalTensor& b_v, const Tensor& E, const Tensor& F, int64_t num_heads, const OptionalTensor& w_o,
            const OptionalTensor& b_o) {
  TORCH_CHECK_VALUE(x.dim() == 3 && w_q.dim() == 2 && E.dim() == 2, "linear_attention: x must be [B, N, D], w_q [A, D], E [N, k], got ",
                    x.sizes(), ", ", w_q.sizes(), ", ", E.sizes());
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), A = w_q.size(0), k = E.size(1);
  TORCH_CHECK_VALUE(num_heads > 0 && A > 0 && A % num_heads == 0 && k > 0, "linear_attention: ", num_heads, " heads do not divide ", A,
                    " channels, or k = 0");
  TORCH_CHECK_VALUE(!w_o.has_value() || w_o->dim() == 2, "linear_attention: w_o must be [D_o, A]");
  TORCH_CHECK_VALUE(w_o.has_value() || !b_o.has_value(), "linear_attention: b_o without w_o");
  const auto expect = [&](const char* name, const OptionalTensor& t, std::vector<int64_t> sizes) {
    TORCH_CHECK_VALUE(!t.has_value() || (t->sizes() == at::IntArrayRef(sizes) && t->scalar_type() == x.scalar_type() &&
                                         t->device() == x.device()),
                      "linear_attention: ", name, " must be ", at::IntArrayRef(sizes), " ", x.scalar_type(), " on ", x.device(), ", got ",
                      t.has_value() ? t->sizes() : at::IntArrayRef());
  };
  const OptionalTensor matrices[] = {w_q, w_k, w_v}, biases[] = {b_q, b_k, b_v}, projections[] = {E, F};
  for (const auto& t : matrices) expect("w_q, w_k, w_v", t, {A, D});
  for (const auto& t : biases) expect("b_q, b_k, b_v", t, {A});
  for (const auto& t : projections) expect("E, F", t, {N, k});
  if (w_o.has_value()) {
    expect("w_o", w_o, {w_o->size(0), A});
    expect("b_o", b_o, {w_o->size(0)});
  }
  return {B, N, D, A, k, num_heads, A / num_heads};
}

// What the forward kept, as the backward is about to read it.
void check_kept(const Tensor& grad, const Sizes& size, const Tensor& x, const OptionalTensor& w_o, const Tensor& attended,
                const Tensor& query, const Tensor& projected, const Tensor& keys_values, const Tensor& log_sum_exp) {
  const auto expect = [&](const char* name, const Tensor& t, std::vector<int64_t> sizes, at::ScalarType type) {
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(sizes) && t.scalar_type() == type && t.device() == x.device(), "linear_attention: ",
                      name, " must be ", at::IntArrayRef(sizes), " ", type, " on ", x.device(), ", got ", t.sizes(), " ", t.scalar_type());
  };
  const at::ScalarType type = x.scalar_type();
  expect("grad", grad, {size.B, size.N, w_o.has_value() ? w_o->size(0) : size.A}, type);
  expect("attended", attended, {size.B, size.N, size.A}, type);
  expect("query", query, {size.B, size.N, size.A}, type);
  expect("projected", projected, {2, size.B, size.k, size.D}, type);
  expect("keys_values", keys_values, {2, size.B, size.k, size.A}, type);
  expect("log_sum_exp", log_sum_exp, {size.B, size.H, size.N}, type == at::kDouble ? at::kDouble : at::kFloat);
}

// [B, N, C] to [B N, C]
inline Tensor flat(const Tensor& t) { return t.reshape({t.size(0) * t.size(1), t.size(2)}); }

#if !defined(MINIDAMAGE_EMULATED)
// ---- CPU -----------------------------------------------------------------------------------------------------------------

// C = bias + sum of A B, 2-dimensional tensors of any strides; C is contiguous. Borrows: the tensors must outlive the run.
template <typename T>
Product<T> product(const Tensor& C, std::vector<std::pair<Tensor, Tensor>> factors, const OptionalTensor& bias = std::nullopt) {
  Product<T> result{C.size(0), C.size(1), C.mutable_data_ptr<T>(), C.stride(0), pointer_or_null<T>(bias), {}};
  for (const std::pair<Tensor, Tensor>& factor : factors) {
    const Tensor &A = factor.first, &B = factor.second;
    result.terms.push_back({A.size(1), A.const_data_ptr<T>(), A.stride(0), A.stride(1), B.const_data_ptr<T>(), B.stride(0), B.stride(1)});
  }
  return result;
}

// All blocks of all products, which do not depend on each other.
template <typename T>
void run(const std::vector<Product<T>>& products) {
  std::vector<int64_t> first{0};
  for (const auto& p : products) first.push_back(first.back() + product_blocks(p));
  parallel_chunks(first.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const size_t i = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
      product_cpu(products[i], block - first[i], block - first[i] + 1);
    }
  });
}

template <typename T>
Attention<T> attention_of(const Sizes& size, const Tensor& query, const Tensor& keys_values) {
  const T* keys = keys_values.const_data_ptr<T>();
  return {size.B, size.N, size.k, size.H, size.d, T(1 / std::sqrt(double(size.d))), query.const_data_ptr<T>(), keys,
          keys + size.B * size.k * size.A};
}

// Items enough for many cores, rows enough to pay for the packing of K and V; from the shapes alone.
int64_t segments_of(const Sizes& size, int64_t least_rows, int64_t most_rows) {
  const int64_t wanted = std::max(ceil_div(16, std::max<int64_t>(1, size.B * size.H)), ceil_div(size.N, most_rows));
  return std::max<int64_t>(1, std::min(wanted, size.N / least_rows));
}

template <typename T>
Forward forward_cpu(const Sizes& size, const Tensor& x, const Tensor& w_q, const OptionalTensor& b_q, const Tensor& w_k,
                    const OptionalTensor& b_k, const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F,
                    const OptionalTensor& w_o, const OptionalTensor& b_o, bool keep) {
  const auto [B, N, D, A, k, H, d] = size;
  const at::TensorOptions options = x.options();
  Tensor query = empty_large({B, N, A}, options), attended = keep ? empty_large({B, N, A}, options) : query;  // in place: see the kernel
  Tensor projected = at::empty({2, B, k, D}, options), keys_values = at::empty({2, B, k, A}, options);
  Tensor log_sum_exp = at::empty({keep ? B : 0, H, N}, options);
  std::vector<Product<T>> products{product<T>(flat(query), {{flat(x), w_q.t()}}, b_q)};
  for (int64_t b = 0; b < B; ++b) {
    products.push_back(product<T>(projected[0][b], {{E.t(), x[b]}}));
    products.push_back(product<T>(projected[1][b], {{F.t(), x[b]}}));
  }
  run(products);
  products.clear();
  const Tensor totals[2] = {E.sum(0).repeat({B}), F.sum(0).repeat({B})};  // E^T 1, F^T 1, for every picture
  for (int part = 0; part < 2; ++part) {
    std::vector<std::pair<Tensor, Tensor>> factors{{flat(projected[part]), (part ? w_v : w_k).t()}};
    const OptionalTensor& bias = part ? b_v : b_k;
    if (bias.has_value()) factors.push_back({totals[part].unsqueeze(1), bias->unsqueeze(0)});
    products.push_back(product<T>(flat(keys_values[part]), factors));
  }
  run(products);
  const Attention<T> attention = attention_of<T>(size, query, keys_values);
  const int64_t segments = segments_of(size, 64, 1024);
  parallel_chunks(B * H * segments, 1, [&](int64_t begin, int64_t end) {
    attention_cpu(attention, segments, attended.mutable_data_ptr<T>(), keep ? log_sum_exp.mutable_data_ptr<T>() : nullptr, begin, end);
  });
  Tensor output = attended;
  if (w_o.has_value()) {
    output = empty_large({B, N, w_o->size(0)}, options);
    run<T>({product<T>(flat(output), {{flat(attended), w_o->t()}}, b_o)});
  }
  const Tensor none = at::empty({0}, options);
  if (!keep) return {output, none, none.clone(), none.clone(), none.clone(), none.clone()};
  return {output, query, projected, keys_values, w_o.has_value() ? attended : none, log_sum_exp};
}

template <typename T>
Gradients backward_cpu(const Sizes& size, const Needed& needed, const Tensor& grad, const Tensor& x, const Tensor& w_q, const Tensor& w_k,
                       const OptionalTensor& b_k, const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F,
                       const OptionalTensor& w_o, const Tensor& attended, const Tensor& query, const Tensor& projected,
                       const Tensor& keys_values, const Tensor& log_sum_exp) {
  const auto [B, N, D, A, k, H, d] = size;
  const at::TensorOptions options = x.options();
  Tensor grad_attended = grad;
  if (w_o.has_value()) {
    grad_attended = empty_large({B, N, A}, options);
    run<T>({product<T>(flat(grad_attended), {{flat(grad), *w_o}})});
  }
  const int64_t segments = segments_of(size, 512, 1 << 30);
  Tensor grad_query = empty_large({B, N, A}, options), grad_parts = at::empty({2, segments, B, k, A}, options);
  const Attention<T> attention = attention_of<T>(size, query, keys_values);
  parallel_chunks(B * H * segments, 1, [&](int64_t begin, int64_t end) {
    T* grad_keys = grad_parts.mutable_data_ptr<T>();
    attention_backward_cpu(attention, segments, attended.const_data_ptr<T>(), log_sum_exp.const_data_ptr<T>(),
                           grad_attended.const_data_ptr<T>(), grad_query.mutable_data_ptr<T>(), grad_keys,
                           grad_keys + segments * B * k * A, begin, end);
  });
  Tensor grad_keys_values = grad_parts.select(1, 0);  // added up in order, so that the bytes do not depend on the threads
  if (segments > 1) grad_keys_values = grad_keys_values.clone();
  for (int64_t s = 1; s < segments; ++s) grad_keys_values.add_(grad_parts.select(1, s));
  const Tensor sums = grad_keys_values.sum(1), grad_projected = at::empty({2, B, k, D}, options);  // sums [2, k, A]: over the batch
  run<T>({product<T>(flat(grad_projected[0]), {{flat(grad_keys_values[0]), w_k}}),
          product<T>(flat(grad_projected[1]), {{flat(grad_keys_values[1]), w_v}})});

  Gradients grads = no_gradients(x);
  const auto make = [&](int i, at::IntArrayRef sizes) {
    if (needed[i]) grads[i] = empty_large(sizes, options);
    return needed[i];
  };
  const Tensor ones = at::ones({1, 1}, options).expand({1, B * N});
  std::vector<Product<T>> products;
  if (make(W_Q, {A, D})) products.push_back(product<T>(grads[W_Q], {{flat(grad_query).t(), flat(x)}}));
  if (make(B_Q, {A})) products.push_back(product<T>(grads[B_Q].unsqueeze(0), {{ones, flat(grad_query)}}));
  if (make(W_O, {grad.size(2), A})) products.push_back(product<T>(grads[W_O], {{flat(grad).t(), flat(attended)}}));
  if (make(B_O, {grad.size(2)})) products.push_back(product<T>(grads[B_O].unsqueeze(0), {{ones, flat(grad)}}));
  if (make(X, {B, N, D}))
    for (int64_t b = 0; b < B; ++b)
      products.push_back(product<T>(grads[X][b], {{grad_query[b], w_q}, {E, grad_projected[0][b]}, {F, grad_projected[1][b]}}));
  OptionalTensor from_bias[2];
  for (int part = 0; part < 2; ++part) {
    const OptionalTensor& bias = part ? b_v : b_k;
    if (make(BIAS[part], {A})) {
      const Tensor total = (part ? F : E).sum(0);
      run<T>({product<T>(grads[BIAS[part]].unsqueeze(0), {{total.unsqueeze(0), sums[part]}})});
    }
    if (make(WEIGHT[part], {A, D}))
      products.push_back(product<T>(grads[WEIGHT[part]], {{flat(grad_keys_values[part]).t(), flat(projected[part])}}));
    if (!make(PROJECTION[part], {N, k})) continue;
    if (bias.has_value()) {
      from_bias[part] = at::empty({k}, options);
      run<T>({product<T>(from_bias[part]->unsqueeze(0), {{bias->unsqueeze(0), sums[part].t()}})});
    }
    std::vector<std::pair<Tensor, Tensor>> factors;
    for (int64_t b = 0; b < B; ++b) factors.push_back({x[b], grad_projected[part][b].t()});
    products.push_back(product<T>(grads[PROJECTION[part]], factors, from_bias[part]));
  }
  run(products);
  return grads;
}

Forward linear_attention_on_cpu(const Tensor& x, const Tensor& w_q, const OptionalTensor& b_q, const Tensor& w_k, const OptionalTensor& b_k,
                                const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F, int64_t num_heads,
                                const OptionalTensor& w_o, const OptionalTensor& b_o, bool keep) {
  const Sizes size = check(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o);
  Forward result;
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    result = forward_cpu<T>(size, x.contiguous(), w_q, contiguous(b_q), w_k, contiguous(b_k), w_v, contiguous(b_v), E, F, w_o,
                            contiguous(b_o), keep);
  });
  return result;
}

Backward linear_attention_backward_on_cpu(const Tensor& grad, const Tensor& x, const Tensor& w_q, const Tensor& w_k,
                                          const OptionalTensor& b_k, const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E,
                                          const Tensor& F, int64_t num_heads, const OptionalTensor& w_o, const Tensor& attended,
                                          const Tensor& query, const Tensor& projected, const Tensor& keys_values,
                                          const Tensor& log_sum_exp, Needed needed) {
  const Sizes size = check(x, w_q, std::nullopt, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, std::nullopt);
  check_kept(grad, size, x, w_o, attended, query, projected, keys_values, log_sum_exp);
  if (!w_o.has_value()) needed[W_O] = needed[B_O] = false;
  Gradients grads;
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    grads = backward_cpu<T>(size, needed, grad.contiguous(), x.contiguous(), w_q, w_k, contiguous(b_k), w_v, contiguous(b_v), E, F, w_o,
                            attended.contiguous(), query.contiguous(), projected.contiguous(), keys_values.contiguous(),
                            log_sum_exp.contiguous());
  });
  return std::tuple_cat(grads);
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("linear_attention", linear_attention_on_cpu);
  m.impl("linear_attention_backward", linear_attention_backward_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
// ---- CUDA: the core in one launch where attention_fuses(), else in chunks of batched products by the framework -------------------

// Scores in flight, float32: with P beside them they stay in a second-level cache of 40 to 50 MB.
constexpr int64_t SCORES_BYTES = 16 << 20;

// [M, K] x [K, N] of every batch element, in `type`: float32 sums of half-precision factors are not rounded.
Tensor batched(const Tensor& A, const Tensor& B, at::ScalarType type) {
  if (A.scalar_type() == type) return at::bmm(A, B);
#if defined(MINIDAMAGE_EMULATED)
  return at::bmm(A.to(type), B.to(type));
#else
  return at::bmm(A, B, type);
#endif
}

// Rows first ... first + rows - 1 of the pictures b ... b + pictures - 1.
struct Chunk {
  int64_t b, pictures, first, rows;
};

// visit(Chunk) for all of [B, N]: rows of one picture, or whole pictures where several fit. Two pictures go one by one: without the
// copies of heads and of the result that a chunk of several needs, they are fewer launches than one chunk.
template <typename Visit>
void for_chunks(const Sizes& size, const Visit& visit) {
  const int64_t most = SCORES_BYTES / static_cast<int64_t>(sizeof(float)) / (size.H * size.k);  // rows
  const int64_t rows = std::max<int64_t>(128, most), fit = std::min(size.B, most / std::max<int64_t>(1, size.N));
  const int64_t pictures = fit > 2 ? fit : 1;
  for (int64_t b = 0; b < size.B; b += pictures)
    for (int64_t first = 0; first < size.N; first += rows)
      visit(Chunk{b, std::min(pictures, size.B - b), first, std::min(rows, size.N - first)});
}

ScoreRows scores_of(const Sizes& size, const Chunk& at) { return {at.pictures * size.H, at.rows, size.k, size.N, at.first}; }

// The chunk's part of [B, N, A] as [pictures, H, rows, d], a view.
Tensor split(const Tensor& t, const Sizes& size, const Chunk& at) {
  return t.narrow(0, at.b, at.pictures).narrow(1, at.first, at.rows).view({at.pictures, at.rows, size.H, size.d}).transpose(1, 2);
}
// As [pictures H, rows, d]: the heads of one picture are a view too, of several a copy. The products below take views as they are.
Tensor heads_of(const Tensor& t, const Sizes& size, const Chunk& at) {
  return split(t, size, at).reshape({at.pictures * size.H, at.rows, size.d});
}
// The keys (or values) [B, k, A] of the chunk's pictures.
Tensor keys_of(const Tensor& keys, const Sizes& size, const Chunk& at) { return heads_of(keys, size, {at.b, at.pictures, 0, size.k}); }

// A B, [pictures H, rows, d], into the chunk's part of t [B, N, A].
void put_product(const Tensor& t, const Sizes& size, const Chunk& at, const Tensor& A, const Tensor& B) {
  const Tensor part = split(t, size, at);
  if (at.pictures == 1) {
    Tensor target = part[0];
    at::bmm_out(target, A, B);
  } else {
    part.copy_(at::bmm(A, B).view(part.sizes()));
  }
}

// sums [heads, k, d] += A B of every head
void add_product(const Tensor& sums, const Tensor& A, const Tensor& B) {
  if (A.scalar_type() == sums.scalar_type()) sums.baddbmm_(A, B);
  else sums.add_(batched(A, B, sums.scalar_type()));
}

at::ScalarType sum_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

FusedAttention fused(const Sizes& size, const Tensor& query, const Tensor& keys_values) {
  const char* keys = static_cast<const char*>(keys_values.const_data_ptr());
  return {size.B, size.N, size.k, size.H, size.d, dtype_of(query), query.const_data_ptr(), keys, keys + keys_values.nbytes() / 2};
}

Tensor attention_on_cuda(const Sizes& size, const Tensor& query, const Tensor& keys_values, Tensor& log_sum_exp) {
  const OnDevice device(query);
  const Tensor attended = at::empty_like(query);
  const FusedAttention whole = fused(size, query, keys_values);
  if (attention_fuses(whole)) {
    attention_fused_cuda(whole, attended.mutable_data_ptr(), log_sum_exp.defined() ? log_sum_exp.mutable_data_ptr<float>() : nullptr,
                         device.stream());
    MD_LAUNCH_CHECK();
    return attended;
  }
  for_chunks(size, [&](const Chunk& at) {
    const Tensor K = keys_of(keys_values[0], size, at), V = keys_of(keys_values[1], size, at);
    const Tensor scores = batched(heads_of(query, size, at), K.transpose(1, 2), sum_type(query));
    const Tensor P = query.scalar_type() == scores.scalar_type() ? scores : at::empty(scores.sizes(), query.options());
    in_compute_type(query, [&](auto zero) {
      using A = decltype(zero);
      attention_softmax_cuda<A>(scores.const_data_ptr<A>(), scores_of(size, at), A(1 / std::sqrt(double(size.d))), dtype_of(query),
                                P.mutable_data_ptr(), log_sum_exp.defined() ? log_sum_exp[at.b].mutable_data_ptr<A>() : nullptr,
                                device.stream());
    });
    MD_LAUNCH_CHECK();
    put_product(attended, size, at, P, V);
  });
  return attended;
}

// The gradients of query [B, N, A], and of keys and values [2, B, k, A].
std::tuple<Tensor, Tensor> attention_backward_on_cuda(const Sizes& size, const Tensor& grad, const Tensor& attended,
                                                      const Tensor& query, const Tensor& keys_values, const Tensor& log_sum_exp) {
  const OnDevice device(query);
  const at::ScalarType type = sum_type(query);
  const at::TensorOptions sums = query.options().dtype(type);
  const Tensor grad_query = at::empty_like(query), mean = at::empty({size.B, size.H, size.N}, sums);
  in_compute_type(query, [&](auto zero) {
    using A = decltype(zero);
    attention_mean_cuda<A>(size.B, size.N, size.H, size.d, dtype_of(query), attended.const_data_ptr(), grad.const_data_ptr(),
                           mean.mutable_data_ptr<A>(), device.stream());
  });
  MD_LAUNCH_CHECK();
  const FusedAttention whole = fused(size, query, keys_values);
  if (attention_fuses(whole) && reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 32 == 0) {
    const Tensor grad_keys_values = at::empty_like(keys_values);
    const Tensor parts = at::empty({2, attention_fused_segments(whole), size.B, size.k, size.A}, sums);
    attention_fused_backward_cuda(whole, log_sum_exp.const_data_ptr<float>(), mean.const_data_ptr<float>(), grad.const_data_ptr(),
                                  grad_query.mutable_data_ptr(), parts.mutable_data_ptr<float>(), grad_keys_values.mutable_data_ptr(),
                                  device.stream());
    MD_LAUNCH_CHECK();
    return {grad_query, grad_keys_values};
  }
  const Tensor grad_keys_values = at::zeros({2, size.B * size.H, size.k, size.d}, sums);
  for_chunks(size, [&](const Chunk& at) {
    const Tensor K = keys_of(keys_values[0], size, at), V = keys_of(keys_values[1], size, at);
    const Tensor queries = heads_of(query, size, at), grads = heads_of(grad, size, at);
    const Tensor scores = batched(queries, K.transpose(1, 2), type), grad_P = batched(grads, V.transpose(1, 2), type);
    const Tensor P = at::empty(scores.sizes(), query.options()), grad_scores = at::empty_like(P);
    in_compute_type(query, [&](auto zero) {
      using A = decltype(zero);
      attention_grad_scores_cuda<A>(scores.const_data_ptr<A>(), grad_P.const_data_ptr<A>(), log_sum_exp[at.b].const_data_ptr<A>(),
                                    mean[at.b].const_data_ptr<A>(), scores_of(size, at), A(1 / std::sqrt(double(size.d))),
                                    dtype_of(query), P.mutable_data_ptr(), grad_scores.mutable_data_ptr(), device.stream());
    });
    MD_LAUNCH_CHECK();
    put_product(grad_query, size, at, grad_scores, K);
    const int64_t head = at.b * size.H, heads = at.pictures * size.H;
    add_product(grad_keys_values[0].narrow(0, head, heads), grad_scores.transpose(1, 2), queries);
    add_product(grad_keys_values[1].narrow(0, head, heads), P.transpose(1, 2), grads);
  });
  const Tensor joined = at::empty({2, size.B, size.k, size.A}, query.options());
  joined.view({2, size.B, size.k, size.H, size.d}).transpose(2, 3).copy_(grad_keys_values.view({2, size.B, size.H, size.k, size.d}));
  return {grad_query, joined};
}

Forward linear_attention_on_cuda(const Tensor& x, const Tensor& w_q, const OptionalTensor& b_q, const Tensor& w_k,
                                 const OptionalTensor& b_k, const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F,
                                 int64_t num_heads, const OptionalTensor& w_o, const OptionalTensor& b_o, bool keep) {
  const Sizes size = check(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o);
  const OnDevice device(x);
  const Tensor query = at::linear(x, w_q, b_q).contiguous();
  const Tensor projected = at::empty({2, size.B, size.k, size.D}, x.options());
  const Tensor keys_values = at::empty({2, size.B, size.k, size.A}, x.options());
  for (int part = 0; part < 2; ++part) {
    const Tensor& projection = part ? F : E;
    Tensor summary = projected[part], rows = flat(keys_values[part]);  // products go straight into their place
    at::bmm_out(summary, projection.t().expand({size.B, size.k, size.N}), x);
    at::mm_out(rows, flat(summary), (part ? w_v : w_k).t());
  }
  if ((b_k.has_value() || b_v.has_value()) && size.B > 0) {
    const Tensor of_keys = E.contiguous(), of_values = F.contiguous();
    const OptionalTensor biases[2] = {contiguous(b_k), contiguous(b_v)};
    const auto pointer = [](const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; };
    attention_add_bias_cuda(size.B, size.N, size.k, size.A, dtype_of(x), of_keys.const_data_ptr(), of_values.const_data_ptr(),
                            pointer(biases[0]), pointer(biases[1]), keys_values.mutable_data_ptr(), device.stream());
    MD_LAUNCH_CHECK();
  }
  Tensor log_sum_exp = keep ? at::empty({size.B, size.H, size.N}, x.options().dtype(sum_type(x))) : Tensor();
  const Tensor attended = attention_on_cuda(size, query, keys_values, log_sum_exp);
  Tensor output = attended;
  if (w_o.has_value()) {
    output = at::empty({size.B, size.N, w_o->size(0)}, x.options());
    Tensor rows = flat(output);
    at::linear_out(rows, flat(attended), *w_o, b_o);  // not at::linear, whose result is a view where there is a bias: see from_rows()
  }
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (!keep) return {output, none(), none(), none(), none(), none()};
  return {output, query, projected, keys_values, w_o.has_value() ? attended : none(), log_sum_exp};
}

Backward linear_attention_backward_on_cuda(const Tensor& grad, const Tensor& x, const Tensor& w_q, const Tensor& w_k,
                                           const OptionalTensor& b_k, const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E,
                                           const Tensor& F, int64_t num_heads, const OptionalTensor& w_o, const Tensor& attended,
                                           const Tensor& query, const Tensor& projected, const Tensor& keys_values,
                                           const Tensor& log_sum_exp, Needed needed) {
  const Sizes size = check(x, w_q, std::nullopt, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, std::nullopt);
  check_kept(grad, size, x, w_o, attended, query, projected, keys_values, log_sum_exp);
  const auto [B, N, D, A, k, H, d] = size;
  const OnDevice device(x);
  const Tensor grad_attended = w_o.has_value() ? at::matmul(grad, *w_o) : grad;
  const auto [grad_query, grad_keys_values] = attention_backward_on_cuda(size, grad_attended.contiguous(), attended.contiguous(),
                                                                         query.contiguous(), keys_values.contiguous(),
                                                                         log_sum_exp.contiguous());
  const Tensor sums = grad_keys_values.sum(1);  // [2, k, A]: over the batch
  Gradients grads = no_gradients(x);
  if (needed[X]) grads[X] = at::matmul(grad_query, w_q);
  if (needed[W_Q]) grads[W_Q] = at::matmul(flat(grad_query).t(), flat(x));
  if (needed[B_Q]) grads[B_Q] = grad_query.sum(at::IntArrayRef{0, 1});
  if (needed[W_O] && w_o.has_value()) grads[W_O] = at::matmul(flat(grad).t(), flat(attended));
  if (needed[B_O] && w_o.has_value()) grads[B_O] = grad.sum(at::IntArrayRef{0, 1});
  Tensor positions;  // one product over pictures and channels for dE, one for dF
  if (needed[OF_E] || needed[OF_F]) positions = x.transpose(0, 1).reshape({N, B * D});
  for (int part = 0; part < 2; ++part) {
    const Tensor grad_part = grad_keys_values[part], sum = sums[part], &projection = part ? F : E;
    const OptionalTensor& bias = part ? b_v : b_k;
    if (needed[WEIGHT[part]]) grads[WEIGHT[part]] = at::matmul(flat(grad_part).t(), flat(projected[part]));
    if (needed[BIAS[part]]) grads[BIAS[part]] = at::matmul(projection.sum(0), sum);
    if (!needed[X] && !needed[PROJECTION[part]]) continue;
    const Tensor grad_projected = at::matmul(grad_part, part ? w_v : w_k);  // [B, k, D]
    if (needed[X]) grads[X].baddbmm_(projection.expand({B, N, k}), grad_projected);
    if (!needed[PROJECTION[part]]) continue;
    const Tensor summaries = grad_projected.transpose(0, 1).reshape({k, B * D}).t();
    grads[PROJECTION[part]] = bias.has_value() ? at::addmm(at::matmul(sum, *bias), positions, summaries) : at::matmul(positions, summaries);
  }
  return std::tuple_cat(grads);
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("linear_attention", linear_attention_on_cuda);
  m.impl("linear_attention_backward", linear_attention_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
