// Focal loss (Lin et al., ICCV 2017, equation 5), sigmoid and softmax: the arithmetic, written once for both machines.
// Read this, then cpu/focal_loss.cpp, then cuda/focal_loss.cu.
//
// A cross-entropy that is weighted by miss^gamma, miss = 1 - p_t the probability given to everything but the truth. Nothing here takes a
// difference of two nearly equal probabilities: p and q = 1 - p come from the same e^-|x|, each with its own full precision, so value
// and gradient hold for |x| up to 1e4 and beyond. NaN in a logit or a target gives NaN.
#pragma once

#include "exp_log.h"

namespace minidamage {

// miss^gamma without a power function where gamma allows it.
enum class Gamma { zero, two, any };
inline Gamma gamma_kind(double gamma) { return gamma == 0 ? Gamma::zero : gamma == 2 ? Gamma::two : Gamma::any; }

enum class Reduction : int64_t { none, mean, sum };

template <typename A>
struct FocalLoss {
  A alpha, gamma;  // alpha < 0: no alpha
};

// miss^gamma, and miss^(gamma - 1), which is 0 at miss = 0: its factor is 0 there too, and faster.
template <Gamma G, typename A>
MD_HD void miss_powers(A miss, A gamma, A& power, A& power_below) {
  if (G == Gamma::zero) {
    power = A(1), power_below = A(0);
  } else if (G == Gamma::two) {
    power = miss * miss, power_below = miss;
  } else {
    power = exp_of(gamma * log_of(miss));
    power_below = miss > A(0) ? power / miss : miss;
  }
}

// ---- sigmoid: logit x, target t in 0..1 (1: the object is there; between: a soft target) ------------------------------------------
//
//   loss = alpha_t miss^gamma entropy,  entropy = -t log p - (1 - t) log q,  miss = p (1 - t) + q t,
//   alpha_t = alpha t + (1 - alpha) (1 - t)
//   d loss / dx = alpha_t (miss^gamma (p - t) + gamma miss^(gamma - 1) (1 - 2 t) p q entropy)
template <typename A>
struct SigmoidTerms {
  A p, q, entropy, miss, alpha_t;
};

template <typename A>
MD_HD SigmoidTerms<A> sigmoid_terms(const FocalLoss<A>& focal, A x, A t) {
  SigmoidTerms<A> terms;
  const A size = x < A(0) ? -x : x, e = exp_of(-size), larger = A(1) / (A(1) + e), smaller = e * larger;
  terms.p = x < A(0) ? smaller : larger;
  terms.q = x < A(0) ? larger : smaller;
  terms.entropy = size * (x < A(0) ? t : A(1) - t) + log1p_of(e);
  terms.miss = terms.p * (A(1) - t) + terms.q * t;
  terms.alpha_t = focal.alpha < A(0) ? A(1) : focal.alpha * t + (A(1) - focal.alpha) * (A(1) - t);
  return terms;
}

template <Gamma G, typename A>
MD_HD A sigmoid_focal_value(const FocalLoss<A>& focal, A x, A t) {
  const SigmoidTerms<A> terms = sigmoid_terms(focal, x, t);
  A power, power_below;
  miss_powers<G>(terms.miss, focal.gamma, power, power_below);
  return terms.alpha_t * (power * terms.entropy);
}

template <Gamma G, typename A>
MD_HD A sigmoid_focal_gradient(const FocalLoss<A>& focal, A x, A t) {
  const SigmoidTerms<A> terms = sigmoid_terms(focal, x, t);
  A power, power_below;
  miss_powers<G>(terms.miss, focal.gamma, power, power_below);
  const A difference = terms.p * (A(1) - t) - terms.q * t;  // p - t
  const A slope = focal.gamma * power_below * (A(1) - (t + t)) * (terms.p * terms.q) * terms.entropy;
  return terms.alpha_t * (power * difference + slope);
}

// ---- softmax: logits x [C] of a row, its label -----------------------------------------------------------------------------------
//
//   loss = alpha miss^gamma entropy,  entropy = -log p_label,  miss = sum of p_j over j != label
//   d loss / dx_j = alpha (miss^gamma + gamma miss^(gamma - 1) p_label entropy) (p_j - [j = label])
//
// All from the row's maximum, rest = the sum of e^(x_j - maximum) over j != label, and own = e^(x_label - maximum).
template <typename A>
struct SoftmaxTerms {
  A entropy, miss, p;
};

template <typename A>
MD_HD SoftmaxTerms<A> softmax_terms(A maximum, A x_label, A own, A rest) {
  const A total = own + rest;
  // rest < 1 only where the label has the row's maximum: there entropy = log(1 + rest), right to the last digit for a tiny rest
  const A entropy = (rest < A(1) ? log1p_of(rest) : log_of(total)) + (maximum - x_label);  // the difference is NaN for infinite logits
  return {entropy, rest / total, own / total};
}

template <Gamma G, typename A>
MD_HD A softmax_focal_value(const FocalLoss<A>& focal, const SoftmaxTerms<A>& terms) {
  A power, power_below;
  miss_powers<G>(terms.miss, focal.gamma, power, power_below);
  return (focal.alpha < A(0) ? A(1) : focal.alpha) * (power * terms.entropy);
}

// d loss / dx_j = this * (p_j - [j = label]); for j = label the difference is -miss.
template <Gamma G, typename A>
MD_HD A softmax_focal_slope(const FocalLoss<A>& focal, const SoftmaxTerms<A>& terms) {
  A power, power_below;
  miss_powers<G>(terms.miss, focal.gamma, power, power_below);
  const A p_log_p = terms.p == A(0) ? A(0) : terms.p * terms.entropy;  // 0 Inf where the label's logit is -Inf
  return (focal.alpha < A(0) ? A(1) : focal.alpha) * (power + focal.gamma * power_below * p_log_p);
}

// ---- CPU, cpu/focal_loss.cpp; T is float or double -------------------------------------------------------------------------------
//
// Element i: inputs[i], targets[i]. Every call works on elements (or rows) [begin, end). Sums are of chunks of fixed size, each to a
// partial of its own, which the caller adds in order: the same bytes on any number of threads.
constexpr int64_t FOCAL_CHUNK = 4096;  // elements
constexpr int64_t FOCAL_ROWS = 16;     // rows of logits that a SIMD register walks together
template <typename T>
void sigmoid_focal_loss_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, T* output, int64_t begin, int64_t end);
template <typename T>
double sigmoid_focal_sum_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, int64_t begin, int64_t end);
// grad_inputs[i] = scale * gradient, times grad_output[i] where grad_output is not null.
template <typename T>
void sigmoid_focal_backward_cpu(const FocalLoss<T>& focal, const T* inputs, const T* targets, const T* grad_output, T scale,
                                T* grad_inputs, int64_t begin, int64_t end);

// logits [R, C], labels [R] in 0..C - 1, or ignore_index, which gives 0. output [R], or null: the sum is returned all the same.
template <typename T>
double softmax_focal_loss_cpu(const FocalLoss<T>& focal, const T* logits, const int64_t* labels, int64_t C, int64_t ignore_index,
                              T* output, int64_t begin, int64_t end);
template <typename T>
void softmax_focal_backward_cpu(const FocalLoss<T>& focal, const T* logits, const int64_t* labels, int64_t C, int64_t ignore_index,
                                const T* grad_output, T scale, T* grad_logits, int64_t begin, int64_t end);

// ---- CUDA, cuda/focal_loss.cu; arrays of dtype, sums between threads in double ----------------------------------------------------------
constexpr int64_t FOCAL_PARTIALS = 1024;  // blocks of a reduction, at most
// reduction none: output [count]. mean, sum: output [1]; partials [FOCAL_PARTIALS] is working memory. Equal bytes in every run.
template <typename A>
void sigmoid_focal_loss_cuda(const FocalLoss<A>& focal, DType dtype, const void* inputs, const void* targets, int64_t count,
                             Reduction reduction, double* partials, void* output, void* stream);
// grad_output [count], or [1] where reduction is mean or sum.
template <typename A>
void sigmoid_focal_backward_cuda(const FocalLoss<A>& focal, DType dtype, const void* inputs, const void* targets, int64_t count,
                                 Reduction reduction, const void* grad_output, void* grad_inputs, void* stream);
// logits [R, C]; partials [2, FOCAL_PARTIALS]. A label that does not exist gives NaN: a GPU cannot raise without waiting for it.
template <typename A>
void softmax_focal_loss_cuda(const FocalLoss<A>& focal, DType dtype, const void* logits, const int64_t* labels, int64_t R, int64_t C,
                             int64_t ignore_index, Reduction reduction, double* partials, void* output, void* stream);
// grad_output [R], or [1] where reduction is mean or sum; counted [1]: the rows of the mean, read where reduction is mean.
template <typename A>
void softmax_focal_backward_cuda(const FocalLoss<A>& focal, DType dtype, const void* logits, const int64_t* labels, int64_t R, int64_t C,
                                 int64_t ignore_index, Reduction reduction, const int64_t* counted, const void* grad_output,
                                 void* grad_logits, void* stream);

}  // namespace minidamage
