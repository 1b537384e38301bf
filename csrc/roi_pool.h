// RoI max pooling (Girshick, Fast R-CNN, ICCV 2015, section 2.1): the geometry, written once for both machines.
// Read this, then cpu/roi_pool.cpp, the plain form, then cuda/roi_pool.cu.
//
// A box is rounded to whole feature pixels, both ends inclusive, and cut into PH x PW bins. Bin p of an axis covers the pixels
//     floor(p size / PH) ... ceil((p + 1) size / PH) - 1   after `start`, cut at the picture,
// so neighbouring bins share a pixel where the size is no multiple. A bin's value is the largest of its pixels, channel by channel, and
// argmax says which, row by row from the picture's first pixel; -1 and the value 0 for a bin without pixels. Equal pixels: the first wins.
// NaN is larger than every number. The gradient goes to that pixel alone.
//
// Layout: input and its gradient are [N, H, W, C] in memory, output and argmax [R, PH, PW, C] (channels_last of [N, C, H, W]).
#pragma once

#include "common.h"

namespace minidamage {

// A is the type of the rois (double for double, else float); the features may be narrower.
template <typename A>
struct RoiPool {
  const A* rois;  // [R, 5]: index in the batch, x1, y1, x2, y2 in image pixels
  int64_t R, N, H, W, C, PH, PW;
  A spatial_scale;  // feature pixels per image pixel
};

// The picture that RoI r looks at; false if there is no such picture.
template <typename A>
MD_HD bool find_pool_picture(const RoiPool<A>& problem, int64_t r, int64_t& n) {
  const A batch_index = problem.rois[5 * r];
  if (!(batch_index >= A(0) && batch_index < A(problem.N))) return false;
  n = static_cast<int64_t>(batch_index);
  return true;
}

// One axis of one RoI, in feature pixels. size 0: NaN, Inf or beyond 2^30 pixels; no bin has pixels then.
template <typename A>
struct PoolAxis {
  int64_t start, size;
  A bin;
};

template <typename A>
MD_HD PoolAxis<A> pool_axis(A low, A high, A spatial_scale, int64_t bins) {
  const A first = round(low * spatial_scale), last = round(high * spatial_scale), limit = A(1 << 30);
  if (!(-limit < first && first < limit && -limit < last && last < limit)) return {0, 0, A(0)};
  PoolAxis<A> axis;
  axis.start = static_cast<int64_t>(first);
  axis.size = static_cast<int64_t>(last) - axis.start + 1;
  if (axis.size < 1) axis.size = 1;  // an inverted box is one pixel
  axis.bin = A(axis.size) / A(bins);
  return axis;
}

// Both axes of RoI r.
template <typename A>
MD_HD void pool_axes(const RoiPool<A>& problem, int64_t r, PoolAxis<A>& axis_y, PoolAxis<A>& axis_x) {
  const A* roi = problem.rois + 5 * r;
  axis_y = pool_axis(roi[2], roi[4], problem.spatial_scale, problem.PH);
  axis_x = pool_axis(roi[1], roi[3], problem.spatial_scale, problem.PW);
}

// The pixels [begin, end) of bin p inside a picture of `extent` pixels.
template <typename A>
MD_HD void pool_range(const PoolAxis<A>& axis, int64_t p, int64_t extent, int64_t& begin, int64_t& end) {
  begin = end = 0;
  if (axis.size == 0) return;
  begin = axis.start + static_cast<int64_t>(floor(A(p) * axis.bin));
  end = axis.start + static_cast<int64_t>(ceil(A(p + 1) * axis.bin));
  begin = begin < 0 ? 0 : begin > extent ? extent : begin;
  end = end < 0 ? 0 : end > extent ? extent : end;
}

// Whether `value` takes the place of `best`, which came before it.
template <typename A>
MD_HD bool replaces(A value, A best) {
  return value > best || (value != value && best == best);
}

// ---- CPU, cpu/roi_pool.cpp; T is float or double, the dtype of the features too -----------------------------------------------
//
// RoIs [begin, end): each owns its output.
template <typename T>
void roi_pool_cpu(const RoiPool<T>& problem, const T* input, T* output, int32_t* argmax, int64_t begin, int64_t end);
// Adds to grad_input [N, H, W, C], zero on entry. Work is counted in strips, which own their part of it: strip s is picture
// s / pool_strips(C), POOL_STRIP of its channels. RoIs are added in increasing order: the same bytes on any number of threads.
constexpr int64_t POOL_STRIP = 64;  // channels
inline int64_t pool_strips(int64_t C) { return ceil_div(C, POOL_STRIP); }
template <typename T>
void roi_pool_backward_cpu(const RoiPool<T>& problem, const T* grad_output, const int32_t* argmax, T* grad_input, int64_t begin,
                           int64_t end);

// ---- CUDA, cuda/roi_pool.cu; dtype is that of the features ----------------------------------------------------------------------
//
// A RoI of a picture that does not exist gets NaN and -1: a GPU cannot raise without waiting for it.
template <typename A>
void roi_pool_cuda(const RoiPool<A>& problem, DType dtype, const void* input, void* output, int32_t* argmax, void* stream);
// Adds to grad_input, of type A whatever dtype is, zeroed by the caller. Atomic: the order of summation varies.
template <typename A>
void roi_pool_backward_cuda(const RoiPool<A>& problem, DType dtype, const void* grad_output, const int32_t* argmax, A* grad_input,
                            void* stream);
// Overwrites grad_input, of type dtype. Equal bytes in every run.
template <typename A>
void roi_pool_backward_deterministic_cuda(const RoiPool<A>& problem, DType dtype, const void* grad_output, const int32_t* argmax,
                                          void* grad_input, void* stream);

}  // namespace minidamage
