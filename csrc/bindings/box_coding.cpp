// Box coding: tensors in, launches out (see tensors.h).
#include "box_coding.h"

#include <ATen/ExpandUtils.h>

#include "tensors.h"

namespace minidamage {
namespace {

using PictureSize = at::OptionalIntArrayRef;

void check_boxes(const Tensor& a, const Tensor& b, const char* op, const char* a_name, const char* b_name) {
  TORCH_CHECK(a.dim() > 0 && a.size(-1) == 4 && b.dim() > 0 && b.size(-1) == 4 && at::is_expandable_to(b.sizes(), a.sizes()), op, ": ",
              b_name, " must be [..., 4] and expand to ", a_name, " [..., 4], got ", b.sizes(), " and ", a.sizes());
  TORCH_CHECK(a.device() == b.device(), op, ": ", b_name, " must be on ", a.device(), ", got ", b.device());
  TORCH_CHECK_VALUE(b.scalar_type() == at::kFloat || b.scalar_type() == at::kDouble, op, ": ", b_name, " must be float32 or float64, got ",
                    b.scalar_type());
}

// Deltas are of the boxes' type; where `narrow`, 16-bit deltas of float32 boxes are read as they are.
void check_type(const Tensor& a, const Tensor& b, const char* op, bool narrow) {
  const bool sixteen = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type() || (narrow && sixteen && b.scalar_type() == at::kFloat), op, ": expected ",
                    b.scalar_type(), narrow ? " or a 16-bit type, got " : ", got ", a.scalar_type());
}

void check_decode_grad(const Tensor& grad, const Tensor& deltas, const Tensor& boxes) {
  TORCH_CHECK(grad.sizes() == deltas.sizes() && grad.scalar_type() == boxes.scalar_type() && grad.device() == deltas.device(),
              "decode_boxes: grad must be ", deltas.sizes(), " ", boxes.scalar_type(), " on ", deltas.device(), ", got ", grad.sizes(), " ",
              grad.scalar_type(), " on ", grad.device());
}

template <typename A>
BoxCoding<A> coding_of(at::ArrayRef<double> weights, double clip, PictureSize size) {
  TORCH_CHECK(weights.size() == 4, "box coding: weights must be four numbers, got ", weights.size());
  TORCH_CHECK(!size.has_value() || size->size() == 2, "box coding: size must be (height, width), got ", size->size(), " numbers");
  BoxCoding<A> coding = {};
  for (int k = 0; k < 4; k++) coding.weights[k] = static_cast<A>(weights[k]);
  coding.clip = static_cast<A>(clip);
  coding.bounded = size.has_value();
  if (coding.bounded) coding.height = static_cast<A>((*size)[0]), coding.width = static_cast<A>((*size)[1]);
  return coding;
}

// Two arrays of boxes as the kernels walk them.
struct Pair {
  Tensor a, b;
  BoxRows rows;
};

// b is expanded to a's shape. Neighbouring dimensions that both arrays step through evenly are one; where more than two remain, a copy
// makes them one.
Pair pair_of(const Tensor& first, const Tensor& second) {
  Tensor a = first.stride(-1) == 1 ? first : first.contiguous();
  Tensor b = (second.stride(-1) == 1 ? second : second.contiguous()).expand(first.sizes());
  const auto merged = [](const Tensor& a, const Tensor& b, BoxRows& rows) {
    int found = 0;
    rows = {1, 1, 0, 4, 0, 4};
    for (int64_t d = a.dim() - 2; d >= 0; d--) {
      const int64_t size = a.size(d), a_step = a.stride(d), b_step = b.stride(d);
      if (size == 1) continue;
      if (found == 0) {
        rows = {size, size, 0, a_step, 0, b_step};
        found = 1;
      } else if (found == 1 && a_step == rows.a_inner * rows.inner && b_step == rows.b_inner * rows.inner) {
        rows.inner *= size, rows.rows *= size;
      } else if (found == 1) {
        rows.a_outer = a_step, rows.b_outer = b_step, rows.rows *= size;
        found = 2;
      } else if (a_step == rows.a_outer * (rows.rows / rows.inner) && b_step == rows.b_outer * (rows.rows / rows.inner)) {
        rows.rows *= size;
      } else {
        return false;
      }
    }
    return true;
  };
  BoxRows rows;
  if (!merged(a, b, rows)) {
    a = a.contiguous(), b = b.contiguous();
    merged(a, b, rows);
  }
  return {a, b, rows};
}

#if !defined(MINIDAMAGE_EMULATED)
constexpr int64_t BOX_GRAIN = 8192;  // boxes: below, waking a thread costs more than it saves

Tensor encode_boxes_on_cpu(const Tensor& reference_boxes, const Tensor& proposals, at::ArrayRef<double> weights) {
  check_boxes(reference_boxes, proposals, "encode_boxes", "reference_boxes", "proposals");
  check_type(reference_boxes, proposals, "encode_boxes", false);
  Tensor output = at::empty(reference_boxes.sizes(), proposals.options());
  if (output.numel() == 0) return output;
  const Pair pair = pair_of(reference_boxes, proposals);
  in_compute_type(output, [&](auto zero) {
    using T = decltype(zero);
    const BoxCoding<T> coding = coding_of<T>(weights, 0, std::nullopt);
    const T *a = pair.a.const_data_ptr<T>(), *b = pair.b.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    at::parallel_for(0, pair.rows.rows, BOX_GRAIN,
                     [&](int64_t begin, int64_t end) { encode_boxes_cpu(coding, pair.rows, a, b, out, begin, end); });
  });
  return output;
}

Tensor decode_boxes_on_cpu(const Tensor& deltas, const Tensor& boxes, at::ArrayRef<double> weights, double clip, PictureSize size) {
  check_boxes(deltas, boxes, "decode_boxes", "bbox_deltas", "boxes");
  check_type(deltas, boxes, "decode_boxes", false);
  Tensor output = at::empty(deltas.sizes(), boxes.options());
  if (output.numel() == 0) return output;
  const Pair pair = pair_of(deltas, boxes);
  in_compute_type(output, [&](auto zero) {
    using T = decltype(zero);
    const BoxCoding<T> coding = coding_of<T>(weights, clip, size);
    const T *a = pair.a.const_data_ptr<T>(), *b = pair.b.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    at::parallel_for(0, pair.rows.rows, BOX_GRAIN,
                     [&](int64_t begin, int64_t end) { decode_boxes_cpu(coding, pair.rows, a, b, out, begin, end); });
  });
  return output;
}

Tensor decode_boxes_backward_on_cpu(const Tensor& grad, const Tensor& deltas, const Tensor& boxes, at::ArrayRef<double> weights,
                                    double clip, PictureSize size) {
  check_boxes(deltas, boxes, "decode_boxes", "bbox_deltas", "boxes");
  check_type(deltas, boxes, "decode_boxes", false);
  check_decode_grad(grad, deltas, boxes);
  Tensor grad_deltas = at::empty(deltas.sizes(), deltas.options());
  if (grad_deltas.numel() == 0) return grad_deltas;
  const Pair pair = pair_of(deltas, boxes);
  const Tensor g = grad.contiguous();
  in_compute_type(grad_deltas, [&](auto zero) {
    using T = decltype(zero);
    const BoxCoding<T> coding = coding_of<T>(weights, clip, size);
    const T *a = pair.a.const_data_ptr<T>(), *b = pair.b.const_data_ptr<T>(), *slope = g.const_data_ptr<T>();
    T* out = grad_deltas.mutable_data_ptr<T>();
    at::parallel_for(0, pair.rows.rows, BOX_GRAIN, [&](int64_t begin, int64_t end) {
      decode_boxes_backward_cpu(coding, pair.rows, slope, a, b, out, begin, end);
    });
  });
  return grad_deltas;
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("encode_boxes", encode_boxes_on_cpu);
  m.impl("decode_boxes", decode_boxes_on_cpu);
  m.impl("decode_boxes_backward", decode_boxes_backward_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
Tensor encode_boxes_on_cuda(const Tensor& reference_boxes, const Tensor& proposals, at::ArrayRef<double> weights) {
  check_boxes(reference_boxes, proposals, "encode_boxes", "reference_boxes", "proposals");
  check_type(reference_boxes, proposals, "encode_boxes", false);
  const OnDevice device(reference_boxes);
  Tensor output = at::empty(reference_boxes.sizes(), proposals.options());
  if (output.numel() == 0) return output;
  const Pair pair = pair_of(reference_boxes, proposals);
  in_compute_type(output, [&](auto zero) {
    using A = decltype(zero);
    encode_boxes_cuda(coding_of<A>(weights, 0, std::nullopt), pair.rows, pair.a.const_data_ptr<A>(), pair.b.const_data_ptr<A>(),
                      output.mutable_data_ptr<A>(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

Tensor decode_boxes_on_cuda(const Tensor& deltas, const Tensor& boxes, at::ArrayRef<double> weights, double clip, PictureSize size) {
  check_boxes(deltas, boxes, "decode_boxes", "bbox_deltas", "boxes");
  check_type(deltas, boxes, "decode_boxes", true);
  const DType dtype = dtype_of(deltas);
  const OnDevice device(deltas);
  Tensor output = at::empty(deltas.sizes(), boxes.options());
  if (output.numel() == 0) return output;
  const Pair pair = pair_of(deltas, boxes);
  in_compute_type(output, [&](auto zero) {
    using A = decltype(zero);
    decode_boxes_cuda(coding_of<A>(weights, clip, size), pair.rows, dtype, pair.a.const_data_ptr(), pair.b.const_data_ptr<A>(),
                      output.mutable_data_ptr<A>(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

Tensor decode_boxes_backward_on_cuda(const Tensor& grad, const Tensor& deltas, const Tensor& boxes, at::ArrayRef<double> weights,
                                     double clip, PictureSize size) {
  check_boxes(deltas, boxes, "decode_boxes", "bbox_deltas", "boxes");
  check_type(deltas, boxes, "decode_boxes", true);
  check_decode_grad(grad, deltas, boxes);
  const DType dtype = dtype_of(deltas);
  const OnDevice device(deltas);
  Tensor grad_deltas = at::empty(deltas.sizes(), deltas.options());
  if (grad_deltas.numel() == 0) return grad_deltas;
  const Pair pair = pair_of(deltas, boxes);
  const Tensor g = grad.contiguous();
  in_compute_type(g, [&](auto zero) {
    using A = decltype(zero);
    decode_boxes_backward_cuda(coding_of<A>(weights, clip, size), pair.rows, dtype, g.const_data_ptr<A>(), pair.a.const_data_ptr(),
                               pair.b.const_data_ptr<A>(), grad_deltas.mutable_data_ptr(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return grad_deltas;
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("encode_boxes", encode_boxes_on_cuda);
  m.impl("decode_boxes", decode_boxes_on_cuda);
  m.impl("decode_boxes_backward", decode_boxes_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
