// Linear attention: tensors in, a chain of matrix products around one attention core out (see tensors.h). The names are those of
// linear_attention_reference in minidamage/ops/linear_attention.py. For each picture X [N, D], values (F, w_v, b_v) as keys (E, w_k, b_k):
//     query         Q = X W_q^T + b_q                         [N, A]
//     projected     X_E = E^T X                               [k, D]
//     keys_values   K = X_E W_k^T + (E^T 1) b_k^T             [k, A]
//     attended      O = softmax(Q K^T / sqrt(d)) V            [N, A]: the core, head by head
//     output        Y = O W_o^T + b_o                         [N, D_o]; O itself without w_o
// Backward from grad = dY; sums are over the pictures, 1 is a column of ones:
//     grad_attended    dO = dY W_o
//     grad_query, grad_keys_values   dQ, dK, dV from dO: the core, whose formulas are in linear_attention.h
//     grad_projected   dX_E = dK W_k
//     dX = dQ W_q + E dX_E + F dX_F,   dE = sum X dX_E^T + 1 (b_k^T sum dK^T)
//     dW_q = sum dQ^T X,   dW_k = sum dK^T X_E,           dW_o = sum dY^T O
//     db_q = sum 1^T dQ,   db_k = (E^T 1)^T sum dK,       db_o = sum 1^T dY
// On a CPU every product is product_cpu(), the core attention_cpu() and attention_backward_cpu(). On a GPU the products are the
// framework's, + (E^T 1) b_k^T is attention_add_bias_cuda(), and the core is that of cuda/fused_attention.cu or, in chunks of rows,
// products of the framework with the kernels of cuda/linear_attention.cu between them.
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

struct Sizes {
  int64_t B, N, D, A, k, H, d;
  double scale() const { return 1 / std::sqrt(static_cast<double>(d)); }  // of the scores
};

// The op's arguments. Of what keys and values have one each, [0] is the keys' and [1] the values'.
struct Layers {
  Tensor x, w_q;            // [B, N, D], [A, D]
  OptionalTensor b_q;       // [A]
  Tensor weight[2];         // w_k, w_v [A, D]
  OptionalTensor bias[2];   // b_k, b_v [A]
  Tensor projection[2];     // E, F [N, k]
  OptionalTensor w_o, b_o;  // [D_o, A], [D_o]
  Sizes size;
};

// What the forward keeps for the backward.
struct Kept {
  Tensor query, projected, keys_values, attended;  // [B, N, A], [2, B, k, D], [2, B, k, A], [B, N, A]
  Tensor log_sum_exp;                              // [B, H, N], float32 or float64
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // output, then Kept
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// The gradients of Backward; those that are not needed stay empty.
enum Gradient { X, W_Q, B_Q, W_K, B_K, W_V, B_V, OF_E, OF_F, W_O, B_O, GRADIENTS };
constexpr Gradient WEIGHT[2] = {W_K, W_V}, BIAS[2] = {B_K, B_V}, PROJECTION[2] = {OF_E, OF_F};  // of keys, of values
using Needed = std::array<bool, GRADIENTS>;
using Gradients = std::array<Tensor, GRADIENTS>;

// ---- the ops, on either machine ------------------------------------------------------------------------------------------

void expect(const char* name, const OptionalTensor& t, at::IntArrayRef sizes, at::ScalarType type, const Tensor& x) {
  TORCH_CHECK_VALUE(!t.has_value() || (t->sizes() == sizes && t->scalar_type() == type && t->device() == x.device()),
                    "linear_attention: ", name, " must be ", sizes, " ", type, " on ", x.device(), ", got ", t->sizes(), " ",
                    t->scalar_type(), " on ", t->device());
}

// Shapes, dtypes and devices of all that a kernel reads.
Layers checked(Layers layers, int64_t num_heads) {
  const auto& [x, w_q, b_q, weight, bias, projection, w_o, b_o, size] = layers;
  const Tensor& E = projection[0];
  TORCH_CHECK_VALUE(x.dim() == 3 && w_q.dim() == 2 && E.dim() == 2, "linear_attention: x must be [B, N, D], w_q [A, D], E [N, k], got ",
                    x.sizes(), ", ", w_q.sizes(), ", ", E.sizes());
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), A = w_q.size(0), k = E.size(1);
  TORCH_CHECK_VALUE(num_heads > 0 && A > 0 && A % num_heads == 0 && k > 0, "linear_attention: ", num_heads, " heads do not divide ", A,
                    " channels, or k = 0");
  TORCH_CHECK_VALUE(!w_o.has_value() || w_o->dim() == 2, "linear_attention: w_o must be [D_o, A]");
  TORCH_CHECK_VALUE(w_o.has_value() || !b_o.has_value(), "linear_attention: b_o without w_o");
  const at::ScalarType type = x.scalar_type();
  for (const Tensor& t : {w_q, weight[0], weight[1]}) expect("w_q, w_k, w_v", t, {A, D}, type, x);
  for (const OptionalTensor& t : {b_q, bias[0], bias[1]}) expect("b_q, b_k, b_v", t, {A}, type, x);
  for (const Tensor& t : projection) expect("E, F", t, {N, k}, type, x);
  if (w_o.has_value()) {
    expect("w_o", w_o, {w_o->size(0), A}, type, x);
    expect("b_o", b_o, {w_o->size(0)}, type, x);
  }
  layers.size = {B, N, D, A, k, num_heads, A / num_heads};
  for (OptionalTensor* t : {&layers.b_q, &layers.bias[0], &layers.bias[1], &layers.b_o}) *t = contiguous(*t);
  return layers;
}

// The same of what the backward is about to read.
Kept checked(const Kept& kept, const Layers& layers, const Tensor& grad) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  const Tensor& x = layers.x;
  const at::ScalarType type = x.scalar_type();
  expect("grad", grad, {B, N, layers.w_o.has_value() ? layers.w_o->size(0) : A}, type, x);
  expect("attended", kept.attended, {B, N, A}, type, x);
  expect("query", kept.query, {B, N, A}, type, x);
  expect("projected", kept.projected, {2, B, k, D}, type, x);
  expect("keys_values", kept.keys_values, {2, B, k, A}, type, x);
  expect("log_sum_exp", kept.log_sum_exp, {B, H, N}, type == at::kDouble ? at::kDouble : at::kFloat, x);
  return {kept.query.contiguous(), kept.projected.contiguous(), kept.keys_values.contiguous(), kept.attended.contiguous(),
          kept.log_sum_exp.contiguous()};
}

// What each machine implements: the output and, if keep, what is kept; the gradients that are needed, never w_o's without w_o.
using RunForward = std::pair<Tensor, Kept>(const Layers& layers, bool keep);
using RunBackward = Gradients(const Layers& layers, const Kept& kept, const Tensor& grad, const Needed& needed);

template <RunForward run>
Forward linear_attention(const Tensor& x, const Tensor& w_q, const OptionalTensor& b_q, const Tensor& w_k, const OptionalTensor& b_k,
                         const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F, int64_t num_heads,
                         const OptionalTensor& w_o, const OptionalTensor& b_o, bool keep) {
  const auto [output, kept] = run(checked({x, w_q, b_q, {w_k, w_v}, {b_k, b_v}, {E, F}, w_o, b_o, {}}, num_heads), keep);
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (!keep) return {output, none(), none(), none(), none(), none()};
  return {output, kept.query, kept.projected, kept.keys_values, w_o.has_value() ? kept.attended : none(), kept.log_sum_exp};
}

template <RunBackward run>
Backward linear_attention_backward(const Tensor& grad, const Tensor& x, const Tensor& w_q, const Tensor& w_k, const OptionalTensor& b_k,
                                   const Tensor& w_v, const OptionalTensor& b_v, const Tensor& E, const Tensor& F, int64_t num_heads,
                                   const OptionalTensor& w_o, const Tensor& attended, const Tensor& query, const Tensor& projected,
                                   const Tensor& keys_values, const Tensor& log_sum_exp, Needed needed) {
  const Layers layers = checked({x, w_q, {}, {w_k, w_v}, {b_k, b_v}, {E, F}, w_o, {}, {}}, num_heads);
  const Kept kept = checked({query, projected, keys_values, attended, log_sum_exp}, layers, grad);
  if (!w_o.has_value()) needed[W_O] = needed[B_O] = false;
  Gradients grads = run(layers, kept, grad, needed);
  for (Tensor& t : grads)
    if (!t.defined()) t = at::empty({0}, x.options());
  return std::tuple_cat(grads);
}

// [B, N, C] to [B N, C]
inline Tensor flat(const Tensor& t) { return t.reshape({t.size(0) * t.size(1), t.size(2)}); }

#if !defined(MINIDAMAGE_EMULATED)
// ---- CPU -----------------------------------------------------------------------------------------------------------------

struct Factors {
  Tensor A, B;
};

// Products that do not depend on each other, run together.
template <typename T>
class Products {
 public:
  // C = bias + sum of A B over the terms: [rows, columns] of any strides, but C's rows contiguous; C, if a vector, is one row.
  void add(const Tensor& C, const std::vector<Factors>& terms, const OptionalTensor& bias = std::nullopt) {
    const int64_t columns = C.size(-1);
    Product<T> product{C.dim() == 1 ? 1 : C.size(0), columns, C.mutable_data_ptr<T>(), columns, pointer_or_null<T>(bias), {}};
    for (const Factors& f : terms)
      product.terms.push_back({f.A.size(1), f.A.const_data_ptr<T>(), f.A.stride(0), f.A.stride(1), f.B.const_data_ptr<T>(), f.B.stride(0),
                               f.B.stride(1)});
    products.push_back(product);
    held.insert(held.end(), terms.begin(), terms.end());
  }

  // All blocks of all products, each to the thread that is free first.
  void run() const {
    std::vector<int64_t> first{0};
    for (const auto& p : products) first.push_back(first.back() + product_blocks(p));
    parallel_chunks(first.back(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const size_t i = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
        product_cpu(products[i], block - first[i], block - first[i] + 1);
      }
    });
  }

 private:
  std::vector<Product<T>> products;
  std::vector<Factors> held;  // until the products, which have pointers alone, have run
};

// A B + bias for each row of A [B, N, K] flattened.
template <typename T>
Tensor product(const Tensor& A, const Tensor& B, const OptionalTensor& bias = std::nullopt) {
  const Tensor C = empty_large({A.size(0), A.size(1), B.size(1)}, A.options());
  Products<T> alone;
  alone.add(flat(C), {{flat(A), B}}, bias);
  alone.run();
  return C;
}

template <typename T>
Attention<T> attention_of(const Sizes& size, const Kept& kept) {
  const T* keys = kept.keys_values.const_data_ptr<T>();
  return {size.B, size.N, size.k, size.H, size.d, T(size.scale()), kept.query.const_data_ptr<T>(), keys, keys + size.B * size.k * size.A};
}

// Items enough for many cores, rows enough to pay for the packing of K and V; from the shapes alone.
int64_t segments_of(const Sizes& size, int64_t least_rows, int64_t most_rows) {
  const int64_t wanted = std::max(ceil_div(16, std::max<int64_t>(1, size.B * size.H)), ceil_div(size.N, most_rows));
  return std::max<int64_t>(1, std::min(wanted, size.N / least_rows));
}

template <typename T>
std::pair<Tensor, Kept> forward_cpu(const Layers& layers, bool keep) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  const Tensor x = layers.x.contiguous(), query = empty_large({B, N, A}, x.options());
  const Kept kept = {query, at::empty({2, B, k, D}, x.options()), at::empty({2, B, k, A}, x.options()),
                     keep ? empty_large({B, N, A}, x.options()) : query,  // in place: see the kernel
                     at::empty({keep ? B : 0, H, N}, x.options())};

  Products<T> of_x, of_projected;
  of_x.add(flat(query), {{flat(x), layers.w_q.t()}}, layers.b_q);
  for (int64_t b = 0; b < B; ++b)
    for (int part = 0; part < 2; ++part) of_x.add(kept.projected[part][b], {{layers.projection[part].t(), x[b]}});
  of_x.run();
  for (int part = 0; part < 2; ++part) {
    std::vector<Factors> terms{{flat(kept.projected[part]), layers.weight[part].t()}};
    if (const OptionalTensor& bias = layers.bias[part]; bias.has_value())
      terms.push_back({layers.projection[part].sum(0).repeat({B}).unsqueeze(1), bias->unsqueeze(0)});  // (E^T 1) b_k^T
    of_projected.add(flat(kept.keys_values[part]), terms);
  }
  of_projected.run();

  const Attention<T> attention = attention_of<T>(layers.size, kept);
  const int64_t segments = segments_of(layers.size, 64, 1024);
  parallel_chunks(B * H * segments, 1, [&](int64_t begin, int64_t end) {
    attention_cpu(attention, segments, kept.attended.mutable_data_ptr<T>(), keep ? kept.log_sum_exp.mutable_data_ptr<T>() : nullptr,
                  begin, end);
  });
  return {layers.w_o.has_value() ? product<T>(kept.attended, layers.w_o->t(), layers.b_o) : kept.attended, kept};
}

// The core's: dQ [B, N, A], and dK and dV [2, B, k, A], from dO.
template <typename T>
std::pair<Tensor, Tensor> attention_backward_on_cpu(const Sizes& size, const Kept& kept, const Tensor& grad_attended) {
  const auto [B, N, D, A, k, H, d] = size;
  const int64_t segments = segments_of(size, 512, 1 << 30);
  const Tensor grad_query = empty_large({B, N, A}, grad_attended.options());
  const Tensor parts = at::empty({2, segments, B, k, A}, grad_attended.options());
  const Attention<T> attention = attention_of<T>(size, kept);
  parallel_chunks(B * H * segments, 1, [&](int64_t begin, int64_t end) {
    T *grad_keys = parts.mutable_data_ptr<T>(), *grad_values = grad_keys + parts.numel() / 2;
    attention_backward_cpu(attention, segments, kept.attended.const_data_ptr<T>(), kept.log_sum_exp.const_data_ptr<T>(),
                           grad_attended.const_data_ptr<T>(), grad_query.mutable_data_ptr<T>(), grad_keys, grad_values, begin, end);
  });
  const Tensor grad_keys_values = parts.select(1, 0);
  for (int64_t s = 1; s < segments; ++s) grad_keys_values.add_(parts.select(1, s));  // in order: the bytes do not depend on the threads
  return {grad_query, grad_keys_values};
}

template <typename T>
Gradients backward_cpu(const Layers& layers, const Kept& kept, const Tensor& grad, const Needed& needed) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  const Tensor x = layers.x.contiguous(), grad_attended = layers.w_o.has_value() ? product<T>(grad, *layers.w_o) : grad;
  const auto [grad_query, grad_keys_values] = attention_backward_on_cpu<T>(layers.size, kept, grad_attended);

  const Tensor sums = grad_keys_values.sum(1), grad_projected = at::empty({2, B, k, D}, x.options());  // sums [2, k, A]: over the pictures
  OptionalTensor bias_row[2];                                                                          // [k]: b_k^T sum dK^T
  Products<T> of_keys, of_all;
  for (int part = 0; part < 2; ++part) {
    of_keys.add(flat(grad_projected[part]), {{flat(grad_keys_values[part]), layers.weight[part]}});  // dX_E = dK W_k
    if (const OptionalTensor& bias = layers.bias[part]; bias.has_value())
      of_keys.add(*(bias_row[part] = at::empty({k}, x.options())), {{bias->unsqueeze(0), sums[part].t()}});
  }
  of_keys.run();

  Gradients grads;
  const auto add = [&](Gradient i, at::IntArrayRef sizes, const std::vector<Factors>& terms, const OptionalTensor& bias = std::nullopt) {
    if (needed[i]) of_all.add(grads[i] = empty_large(sizes, x.options()), terms, bias);
  };
  const Tensor ones = at::ones({1, 1}, x.options()).expand({1, B * N});
  add(W_Q, {A, D}, {{flat(grad_query).t(), flat(x)}});  // sum dQ^T X
  add(B_Q, {A}, {{ones, flat(grad_query)}});
  add(W_O, {grad.size(2), A}, {{flat(grad).t(), flat(kept.attended)}});  // sum dY^T O
  add(B_O, {grad.size(2)}, {{ones, flat(grad)}});
  for (int part = 0; part < 2; ++part) {
    add(WEIGHT[part], {A, D}, {{flat(grad_keys_values[part]).t(), flat(kept.projected[part])}});  // sum dK^T X_E
    if (needed[BIAS[part]]) add(BIAS[part], {A}, {{layers.projection[part].sum(0).unsqueeze(0), sums[part]}});  // (E^T 1)^T sum dK
    std::vector<Factors> pictures;
    for (int64_t b = 0; b < B; ++b) pictures.push_back({x[b], grad_projected[part][b].t()});
    add(PROJECTION[part], {N, k}, pictures, bias_row[part]);  // sum X dX_E^T, and bias_row in every row
  }
  if (needed[X]) grads[X] = empty_large({B, N, D}, x.options());
  for (int64_t b = 0; b < B && needed[X]; ++b) {  // dQ W_q + E dX_E + F dX_F
    const Tensor &E = layers.projection[0], &F = layers.projection[1];
    of_all.add(grads[X][b], {{grad_query[b], layers.w_q}, {E, grad_projected[0][b]}, {F, grad_projected[1][b]}});
  }
  of_all.run();
  return grads;
}

std::pair<Tensor, Kept> forward_on_cpu(const Layers& layers, bool keep) {
  return layers.x.scalar_type() == at::kDouble ? forward_cpu<double>(layers, keep) : forward_cpu<float>(layers, keep);
}
Gradients backward_on_cpu(const Layers& layers, const Kept& kept, const Tensor& grad, const Needed& needed) {
  const auto run = layers.x.scalar_type() == at::kDouble ? backward_cpu<double> : backward_cpu<float>;
  return run(layers, kept, grad.contiguous(), needed);
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("linear_attention", &linear_attention<forward_on_cpu>);
  m.impl("linear_attention_backward", &linear_attention_backward<backward_on_cpu>);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
// ---- CUDA, the core in chunks --------------------------------------------------------------------------------------------

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

// O into kept.attended, and kept.log_sum_exp where it is defined.
void attention_in_chunks(const Sizes& size, const Kept& kept, void* stream) {
  for_chunks(size, [&](const Chunk& at) {
    const Tensor K = keys_of(kept.keys_values[0], size, at), V = keys_of(kept.keys_values[1], size, at);
    const Tensor scores = batched(heads_of(kept.query, size, at), K.transpose(1, 2), sum_type(K));
    const Tensor P = K.scalar_type() == scores.scalar_type() ? scores : at::empty(scores.sizes(), K.options());
    in_compute_type(K, [&](auto zero) {
      using A = decltype(zero);
      attention_softmax_cuda<A>(scores.const_data_ptr<A>(), scores_of(size, at), A(size.scale()), dtype_of(K), P.mutable_data_ptr(),
                                kept.log_sum_exp.defined() ? kept.log_sum_exp[at.b].mutable_data_ptr<A>() : nullptr, stream);
    });
    MD_LAUNCH_CHECK();
    put_product(kept.attended, size, at, P, V);
  });
}

// dQ [B, N, A], and dK and dV [2, B, k, A], from dO and the rows' means of dP [B, H, N].
std::pair<Tensor, Tensor> attention_backward_in_chunks(const Sizes& size, const Kept& kept, const Tensor& grad_attended,
                                                       const Tensor& mean, void* stream) {
  const at::ScalarType type = sum_type(kept.query);
  const Tensor grad_query = at::empty_like(kept.query), grad_keys_values = at::empty_like(kept.keys_values);
  const Tensor sums = at::zeros({2, size.B * size.H, size.k, size.d}, mean.options());
  for_chunks(size, [&](const Chunk& at) {
    const Tensor K = keys_of(kept.keys_values[0], size, at), V = keys_of(kept.keys_values[1], size, at);
    const Tensor queries = heads_of(kept.query, size, at), grads = heads_of(grad_attended, size, at);
    const Tensor scores = batched(queries, K.transpose(1, 2), type), grad_P = batched(grads, V.transpose(1, 2), type);
    const Tensor P = at::empty(scores.sizes(), K.options()), grad_scores = at::empty_like(P);
    in_compute_type(K, [&](auto zero) {
      using A = decltype(zero);
      attention_grad_scores_cuda<A>(scores.const_data_ptr<A>(), grad_P.const_data_ptr<A>(), kept.log_sum_exp[at.b].const_data_ptr<A>(),
                                    mean[at.b].const_data_ptr<A>(), scores_of(size, at), A(size.scale()), dtype_of(K),
                                    P.mutable_data_ptr(), grad_scores.mutable_data_ptr(), stream);
    });
    MD_LAUNCH_CHECK();
    put_product(grad_query, size, at, grad_scores, K);
    const int64_t head = at.b * size.H, heads = at.pictures * size.H;
    add_product(sums[0].narrow(0, head, heads), grad_scores.transpose(1, 2), queries);
    add_product(sums[1].narrow(0, head, heads), P.transpose(1, 2), grads);
  });
  grad_keys_values.view({2, size.B, size.k, size.H, size.d}).transpose(2, 3).copy_(sums.view({2, size.B, size.H, size.k, size.d}));
  return {grad_query, grad_keys_values};
}

// ---- CUDA, the core: fused where attention_fuses(), else in chunks; the arguments and results are those of the chunks -----------

FusedAttention fused(const Sizes& size, const Kept& kept) {
  const char* keys = static_cast<const char*>(kept.keys_values.const_data_ptr());
  return {size.B, size.N, size.k, size.H, size.d, dtype_of(kept.query), kept.query.const_data_ptr(), keys,
          keys + kept.keys_values.nbytes() / 2};
}

void attention_on_cuda(const Sizes& size, const Kept& kept, void* stream) {
  const FusedAttention whole = fused(size, kept);
  if (!attention_fuses(whole)) return attention_in_chunks(size, kept, stream);
  attention_fused_cuda(whole, kept.attended.mutable_data_ptr(),
                       kept.log_sum_exp.defined() ? kept.log_sum_exp.mutable_data_ptr<float>() : nullptr, stream);
  MD_LAUNCH_CHECK();
}

std::pair<Tensor, Tensor> attention_backward_on_cuda(const Sizes& size, const Kept& kept, const Tensor& grad_attended, void* stream) {
  const Tensor mean = at::empty({size.B, size.H, size.N}, kept.query.options().dtype(sum_type(kept.query)));
  in_compute_type(mean, [&](auto zero) {
    using A = decltype(zero);
    attention_mean_cuda<A>(size.B, size.N, size.H, size.d, dtype_of(kept.query), kept.attended.const_data_ptr(),
                           grad_attended.const_data_ptr(), mean.mutable_data_ptr<A>(), stream);
  });
  MD_LAUNCH_CHECK();
  const FusedAttention whole = fused(size, kept);
  const bool aligned = reinterpret_cast<uintptr_t>(grad_attended.const_data_ptr()) % 32 == 0;
  if (!attention_fuses(whole) || !aligned) return attention_backward_in_chunks(size, kept, grad_attended, mean, stream);
  const Tensor grad_query = at::empty_like(kept.query), grad_keys_values = at::empty_like(kept.keys_values);
  const Tensor parts = at::empty({2, attention_fused_segments(whole), size.B, size.k, size.A}, mean.options());
  attention_fused_backward_cuda(whole, kept.log_sum_exp.const_data_ptr<float>(), mean.const_data_ptr<float>(),
                                grad_attended.const_data_ptr(), grad_query.mutable_data_ptr(), parts.mutable_data_ptr<float>(),
                                grad_keys_values.mutable_data_ptr(), stream);
  MD_LAUNCH_CHECK();
  return {grad_query, grad_keys_values};
}

// ---- CUDA, the whole -----------------------------------------------------------------------------------------------------

// X_E and X_F into kept.projected, K and V into kept.keys_values.
void keys_values_on_cuda(const Layers& layers, const Kept& kept, void* stream) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  for (int part = 0; part < 2; ++part) {
    Tensor projected = kept.projected[part], rows = flat(kept.keys_values[part]);  // products go straight into their place
    at::bmm_out(projected, layers.projection[part].t().expand({B, k, N}), layers.x);
    at::mm_out(rows, flat(projected), layers.weight[part].t());
  }
  const OptionalTensor &b_k = layers.bias[0], &b_v = layers.bias[1];
  if ((!b_k.has_value() && !b_v.has_value()) || B == 0) return;
  const Tensor E = layers.projection[0].contiguous(), F = layers.projection[1].contiguous();
  const auto pointer = [](const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; };
  attention_add_bias_cuda(B, N, k, A, dtype_of(E), E.const_data_ptr(), F.const_data_ptr(), pointer(b_k), pointer(b_v),
                          kept.keys_values.mutable_data_ptr(), stream);
  MD_LAUNCH_CHECK();
}

std::pair<Tensor, Kept> forward_on_cuda(const Layers& layers, bool keep) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  const at::TensorOptions options = layers.x.options();
  const OnDevice device(layers.x);
  const Tensor query = at::linear(layers.x, layers.w_q, layers.b_q).contiguous();
  const Kept kept = {query, at::empty({2, B, k, D}, options), at::empty({2, B, k, A}, options), at::empty_like(query),
                     keep ? at::empty({B, H, N}, options.dtype(sum_type(query))) : Tensor()};
  keys_values_on_cuda(layers, kept, device.stream());
  attention_on_cuda(layers.size, kept, device.stream());
  if (!layers.w_o.has_value()) return {kept.attended, kept};
  const Tensor output = at::empty({B, N, layers.w_o->size(0)}, options);
  Tensor rows = flat(output);
  at::linear_out(rows, flat(kept.attended), *layers.w_o, layers.b_o);  // at::linear's is a view where there is a bias: see from_rows()
  return {output, kept};
}

Gradients backward_on_cuda(const Layers& layers, const Kept& kept, const Tensor& grad, const Needed& needed) {
  const auto [B, N, D, A, k, H, d] = layers.size;
  const Tensor& x = layers.x;
  const OnDevice device(x);
  const Tensor grad_attended = layers.w_o.has_value() ? at::matmul(grad, *layers.w_o) : grad;
  const auto [grad_query, grad_keys_values] = attention_backward_on_cuda(layers.size, kept, grad_attended.contiguous(), device.stream());

  Gradients grads;
  if (needed[X]) grads[X] = at::matmul(grad_query, layers.w_q);
  if (needed[W_Q]) grads[W_Q] = at::matmul(flat(grad_query).t(), flat(x));
  if (needed[B_Q]) grads[B_Q] = grad_query.sum(at::IntArrayRef{0, 1});
  if (needed[W_O]) grads[W_O] = at::matmul(flat(grad).t(), flat(kept.attended));
  if (needed[B_O]) grads[B_O] = grad.sum(at::IntArrayRef{0, 1});
  const Tensor sums = grad_keys_values.sum(1);  // [2, k, A]: over the pictures
  Tensor positions;                             // one product over pictures and channels for dE, one for dF
  if (needed[OF_E] || needed[OF_F]) positions = x.transpose(0, 1).reshape({N, B * D});
  for (int part = 0; part < 2; ++part) {
    const Gradient of_weight = WEIGHT[part], of_bias = BIAS[part], of_projection = PROJECTION[part];
    const Tensor &projection = layers.projection[part], grad_part = grad_keys_values[part];
    const OptionalTensor& bias = layers.bias[part];
    if (needed[of_weight]) grads[of_weight] = at::matmul(flat(grad_part).t(), flat(kept.projected[part]));
    if (needed[of_bias]) grads[of_bias] = at::matmul(projection.sum(0), sums[part]);
    if (!needed[X] && !needed[of_projection]) continue;
    const Tensor grad_projected = at::matmul(grad_part, layers.weight[part]);  // [B, k, D]
    if (needed[X]) grads[X].baddbmm_(projection.expand({B, N, k}), grad_projected);
    if (!needed[of_projection]) continue;
    const Tensor summaries = grad_projected.transpose(0, 1).reshape({k, B * D}).t();
    grads[of_projection] = bias.has_value() ? at::addmm(at::matmul(sums[part], *bias), positions, summaries)
                                            : at::matmul(positions, summaries);
  }
  return grads;
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("linear_attention", &linear_attention<forward_on_cuda>);
  m.impl("linear_attention_backward", &linear_attention_backward<backward_on_cuda>);
}
#endif

}  // namespace
}  // namespace minidamage
