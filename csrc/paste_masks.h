// Pasting M x M mask probabilities into the picture (Mask R-CNN, section 3.1, "resized to the RoI size"): the geometry, written once
// for both machines. Read this, then cpu/paste_masks.cpp.
//
// The mask, with a border of `padding` zeros, is stretched bilinearly over its box, which was widened by the same factor and truncated
// to whole pixels (minidamage/ops/paste_masks.py does that): cells = M + 2 padding cells cover the w = x2 - x1 + 1 pixels of the box,
//     position(x) = (x - x1 + 0.5) cells / w - 0.5, not below 0,
// and a pixel mixes the two cells beside it, first along the row and then down the column. What lies outside the box is zero.
//
// The boolean form and the run-length form must agree with the float form to the last bit, because all three are compared with a
// threshold. So there is one lerp(), which no compiler may contract into a fused multiply-add, and one order of mixing.
#pragma once

#include "common.h"

namespace minidamage {

constexpr int64_t PASTE_MAX_PADDING = 1024;  // cells; Mask R-CNN has 1. M + 2 padding cells squared stay far inside 64 bits

// A is the type it computes in (double for double, else float); masks may be narrower.
template <typename A>
struct PasteMasks {
  const void* masks;     // [N, mask_height, mask_width]
  const int64_t* boxes;  // [N, 4]: x1, y1, x2, y2, whole pixels, both ends inclusive
  int64_t N, mask_height, mask_width, padding;
  int64_t height, width;  // of the picture
};

// One axis of one box: its cells, where it starts, and the pixels [begin, end) of the picture that it covers.
template <typename A>
struct PasteAxis {
  int64_t cells, start, begin, end;
  A cells_per_pixel;
};

template <typename A>
MD_HD PasteAxis<A> paste_axis(int64_t low, int64_t high, int64_t cells, int64_t picture_size) {
  constexpr int64_t far = int64_t(1) << 40;  // beyond any picture; the differences below must not overflow
  low = low < -far ? -far : low < far ? low : far;
  high = high < -far ? -far : high < far ? high : far;
  const int64_t size = high - low + 1 > 1 ? high - low + 1 : 1;
  const int64_t begin = low > 0 ? low : 0, end = high + 1 < picture_size ? high + 1 : picture_size;
  return {cells, low, begin, end > begin ? end : begin, A(cells) / A(size)};
}

// The cells beside a pixel, and how far the pixel is from `low` towards `high`.
template <typename A>
struct PasteTap {
  int64_t low, high;
  A fraction;
};

template <typename A>
MD_HD PasteTap<A> paste_tap(const PasteAxis<A>& axis, int64_t pixel) {
  A position = mul_rn(axis.cells_per_pixel, A(pixel - axis.start) + A(0.5)) - A(0.5);
  if (!(position > A(0))) position = A(0);
  if (position > A(axis.cells)) position = A(axis.cells);  // or no integer holds it
  int64_t low = static_cast<int64_t>(position);
  if (low > axis.cells - 1) low = axis.cells - 1;
  return {low, low < axis.cells - 1 ? low + 1 : low, position - A(low)};
}

template <typename A>
MD_HD A lerp(A from, A to, A fraction) {
  return from + mul_rn(fraction, to - from);
}

// ---- CPU, cpu/paste_masks.cpp; T is float or double, the dtype of the masks too -----------------------------------------------
//
// output [N, height, width], zero on entry: a paste writes inside the boxes only. Work is counted in bands: band b is mask
// b / paste_bands(height), rows [64 k, 64 k + 64) of the picture with k = b % paste_bands(height).
constexpr int64_t PASTE_BAND = 64;
inline int64_t paste_bands(int64_t height) { return ceil_div(height, PASTE_BAND); }
template <typename T>
void paste_masks_cpu(const PasteMasks<T>& problem, T* output, int64_t begin, int64_t end);
// output: value > threshold.
template <typename T>
void paste_masks_bool_cpu(const PasteMasks<T>& problem, T threshold, bool* output, int64_t begin, int64_t end);
// COCO's compressed run lengths of the boolean form of masks [begin, end), without the boolean form: calls
// emit(context, n, counts, bytes) once for each mask n.
using EmitCounts = void (*)(void* context, int64_t n, const char* counts, size_t bytes);
template <typename T>
void paste_masks_rle_cpu(const PasteMasks<T>& problem, T threshold, EmitCounts emit, void* context, int64_t begin, int64_t end);

// ---- CUDA, cuda/paste_masks.cu; every element of output is written ---------------------------------------------------------------
//
// masks and output [N, height, width] of `dtype`.
template <typename A>
void paste_masks_cuda(const PasteMasks<A>& problem, DType dtype, void* output, void* stream);
// masks of A.
template <typename A>
void paste_masks_bool_cuda(const PasteMasks<A>& problem, double threshold, bool* output, void* stream);

}  // namespace minidamage
