// Box coding (Girshick et al., CVPR 2014, appendix C; torchvision's BoxCoder): the four numbers that take one box to another, and back.
// Written once for both machines. Read this, then cpu/box_coding.cpp, then cuda/box_coding.cu.
//
//   encode   t_x = w_x (x - x_a) / w_a,  t_w = w_w log(w / w_a)      (x, y) the centre, (w, h) the size, a: of the proposal;
//   decode   x = d_x / w_x w_a + x_a,    w = w_a e^min(d_w / w_w, clip)              the same for y and h
//
// The order of operations is the reference's, and so is the rounding on both machines; only e^x and log x round otherwise than the
// framework's (exp_log.h).
#pragma once

#include "exp_log.h"

namespace minidamage {

template <typename A>
struct BoxCoding {
  A weights[4];     // w_x, w_y, w_w, w_h
  A clip;           // upper bound of d_w / w_w and d_h / w_h
  bool bounded;     // decoded boxes are cut at the picture's border
  A width, height;  // of the picture, where bounded
};

// Row n of a result [rows, 4] is made of row (n / inner, n % inner) of two arrays, each with strides of its own, in elements; the four
// numbers of a box are neighbours. So one box serves the deltas of all classes, and a box is read out of a RoI, without a copy.
struct BoxRows {
  int64_t rows, inner;
  int64_t a_outer, a_inner, b_outer, b_inner;
};

template <typename A>
struct Box {  // x1, y1, x2, y2, or the four deltas, or the gradients of either
  A v[4];
};

template <typename A>
MD_HD void centre_and_size(A low, A high, A& centre, A& size) {
  size = high - low;
  centre = low + A(0.5) * size;
}

// log x, with log Inf = Inf: the ratio of a size to none at all.
template <typename A>
MD_HD A log_of_ratio(A x) {
  return x == A(INFINITY) ? x : log_of(x);
}

template <typename A>
MD_HD Box<A> encode_box(const BoxCoding<A>& coding, const Box<A>& box, const Box<A>& proposal) {
  A x, y, w, h, x_a, y_a, w_a, h_a;
  centre_and_size(box.v[0], box.v[2], x, w);
  centre_and_size(box.v[1], box.v[3], y, h);
  centre_and_size(proposal.v[0], proposal.v[2], x_a, w_a);
  centre_and_size(proposal.v[1], proposal.v[3], y_a, h_a);
  return {{coding.weights[0] * (x - x_a) / w_a, coding.weights[1] * (y - y_a) / h_a, coding.weights[2] * log_of_ratio(w / w_a),
           coding.weights[3] * log_of_ratio(h / h_a)}};
}

// One axis, x or y: `shift` and `growth` are the deltas over their weights. NaN stays NaN.
template <typename A>
MD_HD void decode_axis(A shift, A growth, A clip, A low, A high, A& decoded_low, A& decoded_high) {
  A centre, size;
  centre_and_size(low, high, centre, size);
  const A x = mul_rn(shift, size) + centre, half = mul_rn(A(0.5) * exp_of(growth > clip ? clip : growth), size);
  decoded_low = x - half;
  decoded_high = x + half;
}

template <typename A>
MD_HD Box<A> decode_box(const BoxCoding<A>& coding, const Box<A>& delta, const Box<A>& box) {
  const A* w = coding.weights;
  Box<A> decoded;
  decode_axis(delta.v[0] / w[0], delta.v[2] / w[2], coding.clip, box.v[0], box.v[2], decoded.v[0], decoded.v[2]);
  decode_axis(delta.v[1] / w[1], delta.v[3] / w[3], coding.clip, box.v[1], box.v[3], decoded.v[1], decoded.v[3]);
  const A width = coding.bounded ? coding.width : A(INFINITY), height = coding.bounded ? coding.height : A(INFINITY);
  const A least = coding.bounded ? A(0) : -A(INFINITY);
  for (int k = 0; k < 4; ++k) {
    const A border = k % 2 ? height : width, above = decoded.v[k] < least ? least : decoded.v[k];
    decoded.v[k] = above > border ? border : above;
  }
  return decoded;
}

// The gradient with respect to the deltas, from that of the decoded box; it stops at the picture's border and at the clip, as in clamp():
//   d_x: (g_x1 + g_x2) w_a / w_x      d_w: (g_x2 - g_x1) w / 2 / w_w  where d_w / w_w <= clip, else 0
template <typename A>
MD_HD void decode_axis_backward(A shift, A growth, A clip, A low, A high, bool bounded, A border, A grad_low, A grad_high, A& grad_shift,
                                A& grad_growth) {
  A decoded_low, decoded_high;
  decode_axis(shift, growth, clip, low, high, decoded_low, decoded_high);
  const A size = high - low, half = A(0.5) * exp_of(growth > clip ? clip : growth) * size;
  const bool open = !bounded;  // and no branch: the loop over boxes is to become SIMD
  grad_low = (open | ((decoded_low >= A(0)) & (decoded_low <= border))) ? grad_low : A(0);
  grad_high = (open | ((decoded_high >= A(0)) & (decoded_high <= border))) ? grad_high : A(0);
  grad_shift = (grad_low + grad_high) * size;
  grad_growth = growth <= clip ? (grad_high - grad_low) * half : A(0);
}

template <typename A>
MD_HD Box<A> decode_box_backward(const BoxCoding<A>& coding, const Box<A>& grad, const Box<A>& delta, const Box<A>& box) {
  const A* w = coding.weights;
  Box<A> result;
  decode_axis_backward(delta.v[0] / w[0], delta.v[2] / w[2], coding.clip, box.v[0], box.v[2], coding.bounded, coding.width, grad.v[0],
                       grad.v[2], result.v[0], result.v[2]);
  decode_axis_backward(delta.v[1] / w[1], delta.v[3] / w[3], coding.clip, box.v[1], box.v[3], coding.bounded, coding.height, grad.v[1],
                       grad.v[3], result.v[1], result.v[3]);
  for (int k = 0; k < 4; ++k) result.v[k] /= w[k];
  return result;
}

// ---- CPU, cpu/box_coding.cpp; T is float or double. Every call makes rows [begin, end) of the result -----------------------------------
//
// a: reference_boxes, b: proposals; output [rows, 4].
template <typename T>
void encode_boxes_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* a, const T* b, T* output, int64_t begin, int64_t end);
// a: deltas, b: boxes; output [rows, 4].
template <typename T>
void decode_boxes_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* a, const T* b, T* output, int64_t begin, int64_t end);
// grad [rows, 4], of what was decoded; grad_deltas [rows, 4].
template <typename T>
void decode_boxes_backward_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* grad, const T* a, const T* b, T* grad_deltas,
                               int64_t begin, int64_t end);

// ---- CUDA, cuda/box_coding.cu; deltas and their gradient of `dtype`, all else of type A ------------------------------------------------
template <typename A>
void encode_boxes_cuda(const BoxCoding<A>& coding, const BoxRows& rows, const A* a, const A* b, A* output, void* stream);
template <typename A>
void decode_boxes_cuda(const BoxCoding<A>& coding, const BoxRows& rows, DType dtype, const void* a, const A* b, A* output, void* stream);
template <typename A>
void decode_boxes_backward_cuda(const BoxCoding<A>& coding, const BoxRows& rows, DType dtype, const A* grad, const void* a, const A* b,
                                void* grad_deltas, void* stream);

}  // namespace minidamage
