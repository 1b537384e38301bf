// Focal loss on a GPU. Read ../focal_loss.h first, then ../cpu/focal_loss.cpp, the plain form.
//
// The plain algorithm, as a chain of framework operations: sigmoid, binary cross-entropy, p_t, power, alpha, products, mean: eight to ten
// kernels forward and as many backward, each of which reads and writes arrays of n numbers: in float32 some 100 bytes an element
// forward and 200 with the backward, for about 60 flops. Softmax: log_softmax, exp, gather, power and the like, much the same over [R, C].
// Bytes that must move: forward 2 reads and 1 write (none at all to write under mean and sum), backward 2 reads and 1 write (and the
// read of grad_output under none): 8 to 12 bytes and 12 to 16 in float32, half of that in 16-bit types. 60 flops to 12 bytes: the bound
// is the memory.
// What is done about it:
//  1. One kernel forward, one backward. The backward recomputes p from x, some 60 flops in place of 4 bytes written and read again, and
//     nothing is kept between the passes but the inputs, which the caller holds anyway.
//  2. Sigmoid: 16 bytes a thread and load. Softmax: a group of lanes as wide as the row (a power of two, at most a warp) owns a row, so
//     that 4 classes do not leave 28 lanes idle; the row is read from memory once and from the first-level cache twice.
//  3. Sums: registers, shuffles, one number a block, then one block over those in order: equal bytes in every run, no atomics.
// On an H200, the sum over 536,000 logits: 0.045 ms, with its gradient 0.34; torchvision 0.28 and 0.88 (results/speed.md). The gain of each
// step alone is not measured.
#include <initializer_list>
#include <type_traits>

#include "../focal_loss.h"

namespace minidamage {
namespace {

constexpr int THREADS = 256;

// The sum of `value` over the block, in thread 0. All threads call it; two barriers.
template <typename A>
MD_DEVICE A block_sum(A value) {
  __shared__ A of_warp[THREADS / LANES];
  value = sum_of_warp(value);
  if (threadIdx.x % LANES == 0) of_warp[threadIdx.x / LANES] = value;
  __syncthreads();
  A sum = A(0);
  if (threadIdx.x == 0)
    for (int w = 0; w < THREADS / LANES; ++w) sum += of_warp[w];
  __syncthreads();  // before the array is used again
  return sum;
}

// partials: [lists, FOCAL_PARTIALS], the first `blocks` of each list filled; output: [1]. One block: the sum of list 0, divided by
// `divisor`, or `by_rows` by the sum of list 1 (at least 1).
template <typename T>
__global__ void add_partials(const double* __restrict__ partials, int blocks, bool by_rows, double divisor, T* __restrict__ output) {
  double sum = 0, count = 0;
  for (int b = threadIdx.x; b < blocks; b += THREADS) {
    sum += partials[b];
    if (by_rows) count += partials[FOCAL_PARTIALS + b];
  }
  sum = block_sum(sum);
  count = block_sum(count);
  if (threadIdx.x != 0) return;
  const double by = by_rows ? (count > 1 ? count : 1) : divisor;
  output[0] = from_accumulate<T>(static_cast<accumulate_t<T>>(sum / by));
}

// inputs, targets, output: [count], count a multiple of V. Thread: V neighbouring elements.
template <typename T, int V, Gamma G>
__global__ void sigmoid_forward(const FocalLoss<accumulate_t<T>> focal, const T* __restrict__ inputs, const T* __restrict__ targets,
                                int64_t count, T* __restrict__ output) {
  MD_GRID_STRIDE(index, count / V) {
    const Pack<T, V> x = reinterpret_cast<const Pack<T, V>*>(inputs)[index], t = reinterpret_cast<const Pack<T, V>*>(targets)[index];
    Pack<T, V> loss;
    for (int v = 0; v < V; ++v)
      loss.v[v] = from_accumulate<T>(sigmoid_focal_value<G>(focal, to_accumulate(x.v[v]), to_accumulate(t.v[v])));
    reinterpret_cast<Pack<T, V>*>(output)[index] = loss;
  }
}

// inputs, targets: [count], partials: [blocks]. Thread: V neighbouring elements at a time, and their sum.
template <typename T, int V, Gamma G>
__global__ void sigmoid_sum(const FocalLoss<accumulate_t<T>> focal, const T* __restrict__ inputs, const T* __restrict__ targets,
                            int64_t count, double* __restrict__ partials) {
  accumulate_t<T> sum = 0;
  MD_GRID_STRIDE(index, count / V) {
    const Pack<T, V> x = reinterpret_cast<const Pack<T, V>*>(inputs)[index], t = reinterpret_cast<const Pack<T, V>*>(targets)[index];
    for (int v = 0; v < V; ++v) sum += sigmoid_focal_value<G>(focal, to_accumulate(x.v[v]), to_accumulate(t.v[v]));
  }
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// grad_output: [count], or [1] where `reduced`; grad_inputs: [count]. Thread: V neighbouring elements.
template <typename T, int V, Gamma G>
__global__ void sigmoid_backward(const FocalLoss<accumulate_t<T>> focal, const T* __restrict__ inputs, const T* __restrict__ targets,
                                 int64_t count, bool reduced, accumulate_t<T> scale, const T* __restrict__ grad_output,
                                 T* __restrict__ grad_inputs) {
  using A = accumulate_t<T>;
  const A common = reduced ? to_accumulate(grad_output[0]) * scale : scale;
  MD_GRID_STRIDE(index, count / V) {
    const Pack<T, V> x = reinterpret_cast<const Pack<T, V>*>(inputs)[index], t = reinterpret_cast<const Pack<T, V>*>(targets)[index];
    Pack<T, V> grad;
    if (!reduced) grad = reinterpret_cast<const Pack<T, V>*>(grad_output)[index];
    for (int v = 0; v < V; ++v) {
      const A factor = reduced ? common : to_accumulate(grad.v[v]);
      grad.v[v] = from_accumulate<T>(factor * sigmoid_focal_gradient<G>(focal, to_accumulate(x.v[v]), to_accumulate(t.v[v])));
    }
    reinterpret_cast<Pack<T, V>*>(grad_inputs)[index] = grad;
  }
}

// The softmax of one row by `width` lanes of a warp, which all call it and all get the result.
template <typename T>
struct RowSoftmax {
  using A = accumulate_t<T>;
  A maximum, total;
  SoftmaxTerms<A> terms;

  MD_DEVICE RowSoftmax(const T* row, int64_t label, int64_t C, int lane, int width) {
    maximum = to_accumulate(row[0]);
    for (int64_t c = lane; c < C; c += width) {
      const A x = to_accumulate(row[c]);
      maximum = x > maximum ? x : maximum;
    }
    maximum = largest_of_warp(maximum, width);
    A rest = A(0);
    for (int64_t c = lane; c < C; c += width)
      if (c != label) rest += exp_of(to_accumulate(row[c]) - maximum);
    rest = sum_of_warp(rest, width);
    const A x_label = to_accumulate(row[label]), own = exp_of(x_label - maximum);
    total = own + rest;
    terms = softmax_terms(maximum, x_label, own, rest);
  }
};

// logits: [R, C], labels: [R]; output: [R], or null, then partials: [2, FOCAL_PARTIALS], the sum and the rows counted.
// `width` lanes (a power of two, at most 32): a row at a time. Lanes past the last row walk along with it and write nothing.
template <typename T, Gamma G>
__global__ void softmax_forward(const FocalLoss<accumulate_t<T>> focal, const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                int64_t R, int64_t C, int64_t ignore_index, int width, T* __restrict__ output,
                                double* __restrict__ partials) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % width, groups = THREADS / width;
  double sum = 0, counted = 0;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * groups; start < R; start += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t row = start + threadIdx.x / width, r = row < R ? row : R - 1, label = labels[r];
    const bool exists = label >= 0 && label < C;
    const RowSoftmax<T> softmax(logits + r * C, exists ? label : 0, C, lane, width);
    if (lane != 0 || row >= R) continue;
    const A value = label == ignore_index ? A(0) : exists ? softmax_focal_value<G>(focal, softmax.terms) : A(NAN);
    if (output) output[r] = from_accumulate<T>(value);
    sum += value;
    counted += label != ignore_index;
  }
  if (output) return;
  sum = block_sum(sum);
  counted = block_sum(counted);
  if (threadIdx.x != 0) return;
  partials[blockIdx.x] = sum;
  partials[FOCAL_PARTIALS + blockIdx.x] = counted;
}

// grad_output: [R], or [1] where `reduced`; counted: [1] or null; grad_logits: [R, C]. Lanes and rows as in softmax_forward.
template <typename T, Gamma G>
__global__ void softmax_backward(const FocalLoss<accumulate_t<T>> focal, const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                 int64_t R, int64_t C, int64_t ignore_index, int width, bool reduced, const int64_t* __restrict__ counted,
                                 const T* __restrict__ grad_output, T* __restrict__ grad_logits) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % width, groups = THREADS / width;
  const A scale = counted ? A(1) / A(counted[0] > 1 ? counted[0] : 1) : A(1);
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * groups; start < R; start += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t row = start + threadIdx.x / width, r = row < R ? row : R - 1, label = labels[r];
    const bool exists = label >= 0 && label < C;
    const T* x = logits + r * C;
    const RowSoftmax<T> softmax(x, exists ? label : 0, C, lane, width);
    if (row >= R) continue;
    T* grad = grad_logits + r * C;
    const A slope = softmax_focal_slope<G>(focal, softmax.terms) * scale * to_accumulate(grad_output[reduced ? 0 : r]);
    for (int64_t c = lane; c < C; c += width) {
      const A difference = c == label ? -softmax.terms.miss : exp_of(to_accumulate(x[c]) - softmax.maximum) / softmax.total;
      grad[c] = from_accumulate<T>(label == ignore_index ? A(0) : exists ? slope * difference : A(NAN));
    }
  }
}

// run(std::integral_constant<Gamma, ...>()) for the kind of gamma at hand.
template <typename Run>
void with_gamma(double gamma, const Run& run) {
  switch (gamma_kind(gamma)) {
    case Gamma::zero: return run(std::integral_constant<Gamma, Gamma::zero>());
    case Gamma::two: return run(std::integral_constant<Gamma, Gamma::two>());
    default: return run(std::integral_constant<Gamma, Gamma::any>());
  }
}

unsigned reduction_blocks(int64_t count) {
  const int64_t blocks = blocks_for(count, THREADS);
  return static_cast<unsigned>(blocks < FOCAL_PARTIALS ? blocks : FOCAL_PARTIALS);
}

// 16 bytes a thread where the count and the addresses allow it: run(std::integral_constant<int, V>()).
template <typename T, typename Run>
void with_width(int64_t count, std::initializer_list<const void*> arrays, const Run& run) {
  constexpr int V = 16 / sizeof(T);
  bool wide = count % V == 0;
  for (const void* array : arrays) wide = wide && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  wide ? run(std::integral_constant<int, V>()) : run(std::integral_constant<int, 1>());
}

// Lanes for a row of C logits: the power of two that holds it, at most a warp.
int lanes_for(int64_t C) {
  int width = 1;
  while (width < LANES && width < C) width *= 2;
  return width;
}

}  // namespace

template <typename A>
void sigmoid_focal_loss_cuda(const FocalLoss<A>& focal, DType dtype, const void* inputs, const void* targets, int64_t count,
                             Reduction reduction, double* partials, void* output, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(inputs), *t = static_cast<const T*>(targets);
    const bool none = reduction == Reduction::none;
    with_width<T>(count, {inputs, targets, none ? output : inputs}, [&](auto width) {
      with_gamma(focal.gamma, [&](auto kind) {
        if (none) {
          const auto kernel = &sigmoid_forward<T, width(), kind()>;
          MD_LAUNCH(kernel, blocks_for(count / width(), THREADS), THREADS, 0, stream, focal, x, t, count, static_cast<T*>(output));
        } else {
          const unsigned blocks = reduction_blocks(count / width());
          const auto kernel = &sigmoid_sum<T, width(), kind()>;
          MD_LAUNCH(kernel, blocks, THREADS, 0, stream, focal, x, t, count, partials);
          const double divisor = reduction == Reduction::mean ? static_cast<double>(count) : 1;
          const auto add = &add_partials<T>;
          MD_LAUNCH(add, 1, THREADS, 0, stream, partials, static_cast<int>(blocks), false, divisor, static_cast<T*>(output));
        }
      });
    });
  });
}

template <typename A>
void sigmoid_focal_backward_cuda(const FocalLoss<A>& focal, DType dtype, const void* inputs, const void* targets, int64_t count,
                                 Reduction reduction, const void* grad_output, void* grad_inputs, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool reduced = reduction != Reduction::none;
    const A scale = reduction == Reduction::mean ? A(1) / A(count) : A(1);
    with_width<T>(count, {inputs, targets, grad_inputs, reduced ? inputs : grad_output}, [&](auto width) {
      with_gamma(focal.gamma, [&](auto kind) {
        const auto kernel = &sigmoid_backward<T, width(), kind()>;
        MD_LAUNCH(kernel, blocks_for(count / width(), THREADS), THREADS, 0, stream, focal, static_cast<const T*>(inputs),
                  static_cast<const T*>(targets), count, reduced, scale, static_cast<const T*>(grad_output),
                  static_cast<T*>(grad_inputs));
      });
    });
  });
}

template <typename A>
void softmax_focal_loss_cuda(const FocalLoss<A>& focal, DType dtype, const void* logits, const int64_t* labels, int64_t R, int64_t C,
                             int64_t ignore_index, Reduction reduction, double* partials, void* output, void* stream) {
  const int width = lanes_for(C);
  const bool none = reduction == Reduction::none;
  const unsigned blocks = reduction_blocks(R * width);
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_gamma(focal.gamma, [&](auto kind) {
      const auto kernel = &softmax_forward<T, kind()>;
      MD_LAUNCH(kernel, blocks, THREADS, 0, stream, focal, static_cast<const T*>(logits), labels, R, C, ignore_index, width,
                none ? static_cast<T*>(output) : nullptr, partials);
      if (none) return;
      const bool by_rows = reduction == Reduction::mean;
      const auto add = &add_partials<T>;
      MD_LAUNCH(add, 1, THREADS, 0, stream, partials, static_cast<int>(blocks), by_rows, 1.0, static_cast<T*>(output));
    });
  });
}

template <typename A>
void softmax_focal_backward_cuda(const FocalLoss<A>& focal, DType dtype, const void* logits, const int64_t* labels, int64_t R, int64_t C,
                                 int64_t ignore_index, Reduction reduction, const int64_t* counted, const void* grad_output,
                                 void* grad_logits, void* stream) {
  const int width = lanes_for(C);
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_gamma(focal.gamma, [&](auto kind) {
      const auto kernel = &softmax_backward<T, kind()>;
      MD_LAUNCH(kernel, blocks_for(R * width, THREADS), THREADS, 0, stream, focal, static_cast<const T*>(logits), labels, R, C,
                ignore_index, width, reduction != Reduction::none, reduction == Reduction::mean ? counted : nullptr,
                static_cast<const T*>(grad_output), static_cast<T*>(grad_logits));
    });
  });
}

#define INSTANTIATE(A)                                                                                                                 \
  template void sigmoid_focal_loss_cuda<A>(const FocalLoss<A>&, DType, const void*, const void*, int64_t, Reduction, double*, void*,   \
                                           void*);                                                                                    \
  template void sigmoid_focal_backward_cuda<A>(const FocalLoss<A>&, DType, const void*, const void*, int64_t, Reduction, const void*,  \
                                               void*, void*);                                                                         \
  template void softmax_focal_loss_cuda<A>(const FocalLoss<A>&, DType, const void*, const int64_t*, int64_t, int64_t, int64_t,         \
                                           Reduction, double*, void*, void*);                                                         \
  template void softmax_focal_backward_cuda<A>(const FocalLoss<A>&, DType, const void*, const int64_t*, int64_t, int64_t, int64_t,     \
                                               Reduction, const int64_t*, const void*, void*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
