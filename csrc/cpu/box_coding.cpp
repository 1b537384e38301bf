// Box coding on the CPU: the plain form of ../cuda/box_coding.cu. Read ../box_coding.h first.
//
// BLOCK boxes at a time are turned on their side, x1 beside x1, so that a SIMD lane owns a box: the arithmetic has no branch and no call.
// The framework's form is a dozen passes, each over every fourth number of its arrays.
#include "../box_coding.h"

#include <algorithm>

namespace minidamage {
namespace {

constexpr int64_t BLOCK = 128;

template <typename T>
struct Lanes {
  T v[4][BLOCK];

  MD_HD Box<T> box(int64_t k) const { return {{v[0][k], v[1][k], v[2][k], v[3][k]}}; }
  MD_HD void set(int64_t k, const Box<T>& box) { v[0][k] = box.v[0], v[1][k] = box.v[1], v[2][k] = box.v[2], v[3][k] = box.v[3]; }
};

// `count` boxes from `source`, `stride` elements apart, into the lanes from `first` on.
template <typename T>
void turn(const T* source, int64_t stride, Lanes<T>& lanes, int64_t first, int64_t count) {
  if (stride == 4) {  // known to the compiler: whole registers, taken apart
    for (int64_t k = 0; k < count; ++k)
      for (int c = 0; c < 4; ++c) lanes.v[c][first + k] = source[4 * k + c];
  } else {
    for (int64_t k = 0; k < count; ++k)
      for (int c = 0; c < 4; ++c) lanes.v[c][first + k] = source[stride * k + c];
  }
}

template <typename T>
void turn_back(const Lanes<T>& lanes, T* target, int64_t count) {
  for (int64_t k = 0; k < count; ++k)
    for (int c = 0; c < 4; ++c) target[4 * k + c] = lanes.v[c][k];
}

// work(a, b, first, count) for rows [begin, end) of the result, BLOCK at a time.
template <typename T, typename Work>
void in_blocks(const BoxRows& rows, const T* a, const T* b, int64_t begin, int64_t end, const Work& work) {
  Lanes<T> of_a, of_b;
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t count = std::min(BLOCK, end - first);
    for (int64_t done = 0; done < count;) {  // runs of rows that lie evenly in memory
      const int64_t outer = (first + done) / rows.inner, inner = (first + done) % rows.inner;
      const int64_t run = std::min(count - done, rows.inner - inner);
      turn(a + outer * rows.a_outer + inner * rows.a_inner, rows.a_inner, of_a, done, run);
      turn(b + outer * rows.b_outer + inner * rows.b_inner, rows.b_inner, of_b, done, run);
      done += run;
    }
    work(of_a, of_b, first, count);
  }
}

}  // namespace

template <typename T>
void encode_boxes_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* a, const T* b, T* output, int64_t begin, int64_t end) {
  const BoxCoding<T> own = coding;
  Lanes<T> codes;
  in_blocks(rows, a, b, begin, end, [&](const Lanes<T>& boxes, const Lanes<T>& proposals, int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; ++k) codes.set(k, encode_box(own, boxes.box(k), proposals.box(k)));
    turn_back(codes, output + 4 * first, count);
  });
}

template <typename T>
void decode_boxes_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* a, const T* b, T* output, int64_t begin, int64_t end) {
  const BoxCoding<T> own = coding;
  Lanes<T> decoded;
  in_blocks(rows, a, b, begin, end, [&](const Lanes<T>& deltas, const Lanes<T>& boxes, int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; ++k) decoded.set(k, decode_box(own, deltas.box(k), boxes.box(k)));
    turn_back(decoded, output + 4 * first, count);
  });
}

template <typename T>
void decode_boxes_backward_cpu(const BoxCoding<T>& coding, const BoxRows& rows, const T* grad, const T* a, const T* b, T* grad_deltas,
                               int64_t begin, int64_t end) {
  const BoxCoding<T> own = coding;
  Lanes<T> grads, result;
  in_blocks(rows, a, b, begin, end, [&](const Lanes<T>& deltas, const Lanes<T>& boxes, int64_t first, int64_t count) {
    turn(grad + 4 * first, 4, grads, 0, count);
    for (int64_t k = 0; k < count; ++k) result.set(k, decode_box_backward(own, grads.box(k), deltas.box(k), boxes.box(k)));
    turn_back(result, grad_deltas + 4 * first, count);
  });
}

#define INSTANTIATE(T)                                                                                                     \
  template void encode_boxes_cpu<T>(const BoxCoding<T>&, const BoxRows&, const T*, const T*, T*, int64_t, int64_t);        \
  template void decode_boxes_cpu<T>(const BoxCoding<T>&, const BoxRows&, const T*, const T*, T*, int64_t, int64_t);        \
  template void decode_boxes_backward_cpu<T>(const BoxCoding<T>&, const BoxRows&, const T*, const T*, const T*, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
