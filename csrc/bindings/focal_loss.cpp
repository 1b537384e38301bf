// Focal losses: tensors in, launches out (see tensors.h).
#include "focal_loss.h"

#include <ATen/ops/empty_like.h>

#include "tensors.h"

namespace minidamage {
namespace {

Reduction check_reduction(int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2, "focal_loss: reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  return static_cast<Reduction>(reduction);
}

void check_sigmoid(const Tensor& inputs, const Tensor& targets) {
  TORCH_CHECK(targets.sizes() == inputs.sizes() && targets.scalar_type() == inputs.scalar_type() && targets.device() == inputs.device(),
              "sigmoid_focal_loss: targets must be ", inputs.sizes(), " ", inputs.scalar_type(), " on ", inputs.device(), ", got ",
              targets.sizes(), " ", targets.scalar_type(), " on ", targets.device());
}

void check_softmax(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "softmax_focal_loss: logits must be [R, C], got ", logits.sizes());
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0) && labels.scalar_type() == at::kLong &&
                  labels.device() == logits.device(),
              "softmax_focal_loss: labels must be [", logits.size(0), "] int64 on ", logits.device(), ", got ", labels.sizes(), " ",
              labels.scalar_type(), " on ", labels.device());
}

// The gradient of a loss of `sizes` under none, of one number under mean and sum.
void check_focal_grad(const Tensor& grad, const Tensor& inputs, at::IntArrayRef sizes, Reduction reduction) {
  const bool right = reduction == Reduction::none ? grad.sizes() == sizes : grad.numel() == 1;
  TORCH_CHECK(right && grad.scalar_type() == inputs.scalar_type() && grad.device() == inputs.device(), "focal_loss: grad must be ",
              reduction == Reduction::none ? sizes : at::IntArrayRef(), " ", inputs.scalar_type(), " on ", inputs.device(), ", got ",
              grad.sizes(), " ", grad.scalar_type(), " on ", grad.device());
}

// Element i of one tensor belongs to element i of the other in memory: any order of dimensions, but the same one, and no gaps.
Tensor dense(const Tensor& t) { return t.is_non_overlapping_and_dense() ? t : at::empty_like(t).copy_(t); }
Tensor laid_out_as(const Tensor& like, const Tensor& t) { return t.strides() == like.strides() ? t : at::empty_like(like).copy_(t); }

// One number for all elements, as the gradient of a sum is.
bool is_one_number(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.stride(d) != 0 && t.size(d) != 1) return false;
  return true;
}

template <typename A>
FocalLoss<A> focal_of(double alpha, double gamma) {
  return {static_cast<A>(alpha), static_cast<A>(gamma)};
}

#if !defined(MINIDAMAGE_EMULATED)
constexpr int64_t FOCAL_GRAIN = 4 * FOCAL_CHUNK;  // elements: below, waking a thread costs more than it saves

void check_focal_type(const Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "focal_loss: float32 or float64 on a CPU, got ",
                    t.scalar_type());
}

// sum(begin, end) over [0, count) in chunks, added in order: the same bytes on any number of threads.
template <typename Sum>
double sum_of_chunks(int64_t count, int64_t chunk, int64_t chunks_a_thread, const Sum& sum) {
  std::vector<double> partials(static_cast<size_t>(ceil_div(count, chunk)));
  at::parallel_for(0, static_cast<int64_t>(partials.size()), chunks_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) partials[k] = sum(k * chunk, std::min(count, (k + 1) * chunk));
  });
  double total = 0;
  for (const double partial : partials) total += partial;
  return total;
}

Tensor sigmoid_focal_loss_on_cpu(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, int64_t code) {
  check_sigmoid(inputs, targets);
  check_focal_type(inputs);
  const Reduction reduction = check_reduction(code);
  const Tensor x = dense(inputs), t = laid_out_as(x, targets);
  Tensor output = reduction == Reduction::none ? at::empty_like(x) : at::empty({}, x.options());
  const int64_t count = x.numel();
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const FocalLoss<T> focal = focal_of<T>(alpha, gamma);
    const T *in = x.const_data_ptr<T>(), *to = t.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    if (reduction == Reduction::none) {
      at::parallel_for(0, count, FOCAL_GRAIN, [&](int64_t begin, int64_t end) { sigmoid_focal_loss_cpu(focal, in, to, out, begin, end); });
      return;
    }
    const double sum = sum_of_chunks(count, FOCAL_CHUNK, FOCAL_GRAIN / FOCAL_CHUNK,
                                     [&](int64_t begin, int64_t end) { return sigmoid_focal_sum_cpu(focal, in, to, begin, end); });
    *out = static_cast<T>(reduction == Reduction::mean ? sum / static_cast<double>(count) : sum);
  });
  return output;
}

Tensor sigmoid_focal_backward_on_cpu(const Tensor& grad, const Tensor& inputs, const Tensor& targets, double alpha, double gamma,
                                     int64_t code) {
  check_sigmoid(inputs, targets);
  check_focal_type(inputs);
  const Reduction reduction = check_reduction(code);
  check_focal_grad(grad, inputs, inputs.sizes(), reduction);
  const Tensor x = dense(inputs), t = laid_out_as(x, targets);
  Tensor grad_inputs = at::empty_like(x);
  const int64_t count = x.numel();
  if (count == 0) return grad_inputs;
  const bool one_number = reduction != Reduction::none || is_one_number(grad);
  const Tensor g = one_number ? grad : laid_out_as(x, grad);
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const FocalLoss<T> focal = focal_of<T>(alpha, gamma);
    const T *in = x.const_data_ptr<T>(), *to = t.const_data_ptr<T>(), *grad_output = g.const_data_ptr<T>();
    T* out = grad_inputs.mutable_data_ptr<T>();
    const T scale = (one_number ? *grad_output : T(1)) / (reduction == Reduction::mean ? static_cast<T>(count) : T(1));
    at::parallel_for(0, count, FOCAL_GRAIN, [&](int64_t begin, int64_t end) {
      sigmoid_focal_backward_cpu(focal, in, to, one_number ? nullptr : grad_output, scale, out, begin, end);
    });
  });
  return grad_inputs;
}

// Checks every label; how many rows are not ignored.
int64_t counted_rows(const Tensor& labels, int64_t C, int64_t ignore_index) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t r = 0; r < labels.size(0); r++) {
    TORCH_CHECK_VALUE((label[r] >= 0 && label[r] < C) || label[r] == ignore_index, "softmax_focal_loss: row ", r, " has label ",
                      label[r], ", but there are ", C, " classes, 0 to ", C - 1, ", and ignore_index is ", ignore_index);
    counted += label[r] != ignore_index;
  }
  return counted;
}

int64_t row_grain(int64_t C) { return ceil_div(ceil_div(FOCAL_GRAIN, C), FOCAL_ROWS) * FOCAL_ROWS; }

Tensor softmax_focal_loss_on_cpu(const Tensor& logits, const Tensor& labels, double alpha, double gamma, int64_t code,
                                 int64_t ignore_index) {
  check_softmax(logits, labels);
  check_focal_type(logits);
  const Reduction reduction = check_reduction(code);
  const Tensor x = logits.contiguous(), l = labels.contiguous();
  const int64_t R = x.size(0), C = x.size(1), counted = counted_rows(l, C, ignore_index);
  Tensor output = reduction == Reduction::none ? at::empty({R}, x.options()) : at::empty({}, x.options());
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const FocalLoss<T> focal = focal_of<T>(alpha, gamma);
    const T* in = x.const_data_ptr<T>();
    const int64_t* label = l.const_data_ptr<int64_t>();
    T* out = output.mutable_data_ptr<T>();
    T* rows = reduction == Reduction::none ? out : nullptr;
    const double sum = sum_of_chunks(R, row_grain(C), 1, [&](int64_t begin, int64_t end) {
      return softmax_focal_loss_cpu(focal, in, label, C, ignore_index, rows, begin, end);
    });
    if (reduction == Reduction::none) return;
    const double divisor = reduction == Reduction::mean ? static_cast<double>(std::max<int64_t>(counted, 1)) : 1;
    *out = static_cast<T>(sum / divisor);
  });
  return output;
}

Tensor softmax_focal_backward_on_cpu(const Tensor& grad, const Tensor& logits, const Tensor& labels, double alpha, double gamma,
                                     int64_t code, int64_t ignore_index) {
  check_softmax(logits, labels);
  check_focal_type(logits);
  const Reduction reduction = check_reduction(code);
  check_focal_grad(grad, logits, labels.sizes(), reduction);
  const Tensor x = logits.contiguous(), l = labels.contiguous();
  const int64_t R = x.size(0), C = x.size(1), counted = counted_rows(l, C, ignore_index);
  Tensor grad_logits = at::empty({R, C}, x.options());
  if (R == 0) return grad_logits;
  const bool one_number = reduction != Reduction::none || is_one_number(grad);
  const Tensor g = one_number ? grad : grad.contiguous();
  in_compute_type(x, [&](auto zero) {
    using T = decltype(zero);
    const FocalLoss<T> focal = focal_of<T>(alpha, gamma);
    const T *in = x.const_data_ptr<T>(), *grad_output = g.const_data_ptr<T>();
    const int64_t* label = l.const_data_ptr<int64_t>();
    T* out = grad_logits.mutable_data_ptr<T>();
    const T divisor = reduction == Reduction::mean ? static_cast<T>(std::max<int64_t>(counted, 1)) : T(1);
    const T scale = (one_number ? *grad_output : T(1)) / divisor;
    at::parallel_for(0, R, row_grain(C), [&](int64_t begin, int64_t end) {
      softmax_focal_backward_cpu(focal, in, label, C, ignore_index, one_number ? nullptr : grad_output, scale, out, begin, end);
    });
  });
  return grad_logits;
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("sigmoid_focal_loss", sigmoid_focal_loss_on_cpu);
  m.impl("sigmoid_focal_loss_backward", sigmoid_focal_backward_on_cpu);
  m.impl("softmax_focal_loss", softmax_focal_loss_on_cpu);
  m.impl("softmax_focal_loss_backward", softmax_focal_backward_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
// Working memory of a reduction over `lists` lists of numbers.
Tensor partials_for(const Tensor& t, Reduction reduction, int64_t lists) {
  return at::empty({reduction == Reduction::none ? 0 : lists * FOCAL_PARTIALS}, t.options().dtype(at::kDouble));
}

Tensor sigmoid_focal_loss_on_cuda(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, int64_t code) {
  check_sigmoid(inputs, targets);
  const DType dtype = dtype_of(inputs);
  const Reduction reduction = check_reduction(code);
  const OnDevice device(inputs);
  const Tensor x = dense(inputs), t = laid_out_as(x, targets);
  Tensor output = reduction == Reduction::none ? at::empty_like(x) : at::empty({}, x.options());
  if (x.numel() == 0) return output.fill_(reduction == Reduction::mean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  Tensor partials = partials_for(x, reduction, 1);
  in_compute_type(x, [&](auto zero) {
    sigmoid_focal_loss_cuda(focal_of<decltype(zero)>(alpha, gamma), dtype, x.const_data_ptr(), t.const_data_ptr(), x.numel(), reduction,
                            partials.mutable_data_ptr<double>(), output.mutable_data_ptr(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

Tensor sigmoid_focal_backward_on_cuda(const Tensor& grad, const Tensor& inputs, const Tensor& targets, double alpha, double gamma,
                                      int64_t code) {
  check_sigmoid(inputs, targets);
  const DType dtype = dtype_of(inputs);
  Reduction reduction = check_reduction(code);
  check_focal_grad(grad, inputs, inputs.sizes(), reduction);
  const OnDevice device(inputs);
  const Tensor x = dense(inputs), t = laid_out_as(x, targets);
  Tensor grad_inputs = at::empty_like(x);
  if (x.numel() == 0) return grad_inputs;
  if (reduction == Reduction::none && is_one_number(grad)) reduction = Reduction::sum;  // the gradient of a sum over the losses
  const Tensor g = reduction == Reduction::none ? laid_out_as(x, grad) : grad;
  in_compute_type(x, [&](auto zero) {
    sigmoid_focal_backward_cuda(focal_of<decltype(zero)>(alpha, gamma), dtype, x.const_data_ptr(), t.const_data_ptr(), x.numel(),
                                reduction, g.const_data_ptr(), grad_inputs.mutable_data_ptr(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return grad_inputs;
}

Tensor softmax_focal_loss_on_cuda(const Tensor& logits, const Tensor& labels, double alpha, double gamma, int64_t code,
                                  int64_t ignore_index) {
  check_softmax(logits, labels);
  const DType dtype = dtype_of(logits);
  const Reduction reduction = check_reduction(code);
  const OnDevice device(logits);
  const Tensor x = logits.contiguous(), l = labels.contiguous();
  Tensor output = reduction == Reduction::none ? at::empty({x.size(0)}, x.options()) : at::zeros({}, x.options());
  if (x.numel() == 0) return output;
  Tensor partials = partials_for(x, reduction, 2);
  in_compute_type(x, [&](auto zero) {
    softmax_focal_loss_cuda(focal_of<decltype(zero)>(alpha, gamma), dtype, x.const_data_ptr(), l.const_data_ptr<int64_t>(), x.size(0),
                            x.size(1), ignore_index, reduction, partials.mutable_data_ptr<double>(), output.mutable_data_ptr(),
                            device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

Tensor softmax_focal_backward_on_cuda(const Tensor& grad, const Tensor& logits, const Tensor& labels, double alpha, double gamma,
                                      int64_t code, int64_t ignore_index) {
  check_softmax(logits, labels);
  const DType dtype = dtype_of(logits);
  const Reduction reduction = check_reduction(code);
  check_focal_grad(grad, logits, labels.sizes(), reduction);
  const OnDevice device(logits);
  const Tensor x = logits.contiguous(), l = labels.contiguous(), g = grad.contiguous();
  Tensor grad_logits = at::empty_like(x);
  if (x.numel() == 0) return grad_logits;
  const Tensor counted = reduction == Reduction::mean ? l.ne(ignore_index).sum() : l;  // int64 []; read under mean alone
  in_compute_type(x, [&](auto zero) {
    softmax_focal_backward_cuda(focal_of<decltype(zero)>(alpha, gamma), dtype, x.const_data_ptr(), l.const_data_ptr<int64_t>(), x.size(0),
                                x.size(1), ignore_index, reduction, counted.const_data_ptr<int64_t>(), g.const_data_ptr(),
                                grad_logits.mutable_data_ptr(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return grad_logits;
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("sigmoid_focal_loss", sigmoid_focal_loss_on_cuda);
  m.impl("sigmoid_focal_loss_backward", sigmoid_focal_backward_on_cuda);
  m.impl("softmax_focal_loss", softmax_focal_loss_on_cuda);
  m.impl("softmax_focal_loss_backward", softmax_focal_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
