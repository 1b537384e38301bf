// Focal loss on the CPU: the plain form of ../cuda/focal_loss.cu. Read ../focal_loss.h first.
//
// Sigmoid: one pass over inputs and targets; the arithmetic of an element has no branch and no call, so the loop is SIMD.
// Softmax: FOCAL_ROWS rows at a time are turned on their side, so that a SIMD lane owns a row whatever the number of classes is; a
// dozen classes, the usual number of a damage detector, would leave a register along the row half empty.
#include "../focal_loss.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace minidamage {
namespace {

constexpr int64_t BLOCK = 256, LANES = 16;

// run(std::integral_constant<Gamma, ...>()) for the kind of gamma at hand.
template <typename Run>
auto with_gamma(double gamma, const Run& run) {
  switch (gamma_kind(gamma)) {
    case Gamma::zero: return run(std::integral_constant<Gamma, Gamma::zero>());
    case Gamma::two: return run(std::integral_constant<Gamma, Gamma::two>());
    default: return run(std::integral_constant<Gamma, Gamma::any>());
  }
}

}  // namespace

template <typename T>
void sigmoid_focal_loss_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, T* output, int64_t begin, int64_t end) {
  with_gamma(focal.gamma, [&](auto kind) {
    const FocalLoss<T> own = focal;
    T* __restrict out = output;
    for (int64_t i = begin; i < end; ++i) out[i] = sigmoid_focal_value<kind()>(own, inputs[i], targets[i]);
  });
}

template <typename T>
double sigmoid_focal_sum_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, int64_t begin, int64_t end) {
  return with_gamma(focal.gamma, [&](auto kind) {
    const FocalLoss<T> own = focal;
    T values[BLOCK];
    double sum = 0;
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t count = std::min(BLOCK, end - first);
      for (int64_t i = 0; i < count; ++i) values[i] = sigmoid_focal_value<kind()>(own, inputs[first + i], targets[first + i]);
      std::fill(values + count, values + BLOCK, T(0));
      T lanes[LANES] = {};  // a fixed order of summation that is SIMD all the same
      for (int64_t i = 0; i < BLOCK; i += LANES)
        for (int64_t k = 0; k < LANES; ++k) lanes[k] += values[i + k];
      for (const T lane : lanes) sum += lane;
    }
    return sum;
  });
}

template <typename T>
void sigmoid_focal_backward_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, const T* grad_output, T scale,
                                T* grad_inputs, int64_t begin, int64_t end) {
  with_gamma(focal.gamma, [&](auto kind) {
    const FocalLoss<T> own = focal;
    T* __restrict out = grad_inputs;
    if (grad_output) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = grad_output[i] * scale * sigmoid_focal_gradient<kind()>(own, inputs[i], targets[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) out[i] = scale * sigmoid_focal_gradient<kind()>(own, inputs[i], targets[i]);
    }
  });
}

namespace {

// The softmax of FOCAL_ROWS rows, each in a lane. Rows past the end repeat the last one; an ignored row has label 0 and counted 0.
template <typename T>
struct RowBlock {
  std::vector<T> exponentials;  // [C, FOCAL_ROWS]: e^(x - maximum)
  int64_t label[FOCAL_ROWS];
  T counted[FOCAL_ROWS], maximum[FOCAL_ROWS], own[FOCAL_ROWS], rest[FOCAL_ROWS], x_label[FOCAL_ROWS];
  SoftmaxTerms<T> terms[FOCAL_ROWS];

  explicit RowBlock(int64_t C) : exponentials(static_cast<size_t>(C * FOCAL_ROWS)) {}

  void fill(const T* logits, const int64_t* labels, int64_t C, int64_t ignore_index, int64_t first, int64_t count) {
    T* __restrict e = exponentials.data();
    for (int64_t k = 0; k < FOCAL_ROWS; ++k) {
      const int64_t r = first + std::min(k, count - 1);
      const T* row = logits + r * C;
      counted[k] = labels[r] == ignore_index ? T(0) : T(1);
      label[k] = labels[r] == ignore_index ? 0 : labels[r];
      x_label[k] = row[label[k]];
      for (int64_t c = 0; c < C; ++c) e[c * FOCAL_ROWS + k] = row[c];
      maximum[k] = row[0], rest[k] = T(0);
    }
    for (int64_t c = 1; c < C; ++c)
      for (int64_t k = 0; k < FOCAL_ROWS; ++k) maximum[k] = e[c * FOCAL_ROWS + k] > maximum[k] ? e[c * FOCAL_ROWS + k] : maximum[k];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t k = 0; k < FOCAL_ROWS; ++k) e[c * FOCAL_ROWS + k] = exp_of(e[c * FOCAL_ROWS + k] - maximum[k]);
    for (int64_t k = 0; k < FOCAL_ROWS; ++k) {
      T& own_of_row = e[label[k] * FOCAL_ROWS + k];
      own[k] = own_of_row, own_of_row = T(0);  // left out of the sum, not subtracted from it
    }
    for (int64_t c = 0; c < C; ++c)
      for (int64_t k = 0; k < FOCAL_ROWS; ++k) rest[k] += e[c * FOCAL_ROWS + k];
    for (int64_t k = 0; k < FOCAL_ROWS; ++k) terms[k] = softmax_terms(maximum[k], x_label[k], own[k], rest[k]);
  }
};

}  // namespace

template <typename T>
double softmax_focal_loss_cpu(const FocalLoss<T>& focal, const T* logits, const int64_t* labels, int64_t C, int64_t ignore_index,
                              T* output, int64_t begin, int64_t end) {
  return with_gamma(focal.gamma, [&](auto kind) {
    RowBlock<T> block(C);
    double sum = 0;
    for (int64_t first = begin; first < end; first += FOCAL_ROWS) {
      const int64_t count = std::min(FOCAL_ROWS, end - first);
      block.fill(logits, labels, C, ignore_index, first, count);
      for (int64_t k = 0; k < count; ++k) {
        const T value = block.counted[k] == T(0) ? T(0) : softmax_focal_value<kind()>(focal, block.terms[k]);
        if (output) output[first + k] = value;
        sum += value;
      }
    }
    return sum;
  });
}

template <typename T>
void softmax_focal_backward_cpu(const FocalLoss<T>& focal, const T* logits, const int64_t* labels, int64_t C, int64_t ignore_index,
                                const T* grad_output, T scale, T* grad_logits, int64_t begin, int64_t end) {
  with_gamma(focal.gamma, [&](auto kind) {
    RowBlock<T> block(C);
    for (int64_t first = begin; first < end; first += FOCAL_ROWS) {
      const int64_t count = std::min(FOCAL_ROWS, end - first);
      block.fill(logits, labels, C, ignore_index, first, count);
      for (int64_t k = 0; k < count; ++k) {
        T* __restrict row = grad_logits + (first + k) * C;
        if (block.counted[k] == T(0)) {
          std::fill(row, row + C, T(0));
          continue;
        }
        const T slope = softmax_focal_slope<kind()>(focal, block.terms[k]) * scale * (grad_output ? grad_output[first + k] : T(1));
        const T factor = slope / (block.own[k] + block.rest[k]);
        const T* e = block.exponentials.data() + k;
        for (int64_t c = 0; c < C; ++c) row[c] = factor * e[c * FOCAL_ROWS];
        row[block.label[k]] = -slope * block.terms[k].miss;
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                                               \
  template void sigmoid_focal_loss_cpu<T>(const FocalLoss<T>&, const T*, const T*, T*, int64_t, int64_t);                            \
  template double sigmoid_focal_sum_cpu<T>(const FocalLoss<T>&, const T*, const T*, int64_t, int64_t);                               \
  template void sigmoid_focal_backward_cpu<T>(const FocalLoss<T>&, const T*, const T*, const T*, T, T*, int64_t, int64_t);           \
  template double softmax_focal_loss_cpu<T>(const FocalLoss<T>&, const T*, const int64_t*, int64_t, int64_t, T*, int64_t, int64_t);  \
  template void softmax_focal_backward_cpu<T>(const FocalLoss<T>&, const T*, const int64_t*, int64_t, int64_t, const T*, T, T*,      \
                                              int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
