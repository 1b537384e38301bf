// RoIAlign (He et al., Mask R-CNN, 2017, section 3), over one or several feature levels: the geometry, written once for both machines.
// Read bilinear.h first; then cpu/roi_align.cpp, which is the plain form, then cuda/roi_align.cu.
//
// A box is cut into PH x PW bins; a bin is the mean of grid_h x grid_w bilinear samples. Because a bilinear sample is separable and the
// samples of a bin stand on a grid, the mean is separable too:
//     out[r, p, q, c] = sum_i sum_j Ay[p, i] Ax[q, j] F[i, j, c],   Ay [PH, H], Ax [PW, W] sparse, rows summing to at most 1.
// Samples that touch the same pixel are merged in Ay and Ax: at two samples a bin this leaves 2x2 to 4x4 pixels in place of 16 loads.
// The gradient is the transpose: grad_F[i, j, c] = sum_r sum_p sum_q Ay[p, i] Ax[q, j] grad_out[r, p, q, c].
//
// Layout: every feature level and its gradient are [N, H, W, C] in memory, the output [R, PH, PW, C] (channels_last of [N, C, H, W]).
#pragma once

#include "bilinear.h"

namespace minidamage {

constexpr int MAX_FEATURE_LEVELS = 8;  // an FPN has four or five
// Samples a bin and axis, where their number is fixed: two are usual. Each costs time, wherever it lies; the adaptive number
// (sampling_ratio <= 0) needs no limit, because it follows the pixels and sample_range() skips those outside the level.
constexpr int64_t ROI_ALIGN_MAX_SAMPLES = 256;
constexpr int64_t ROI_ALIGN_MAX_SIDE = int64_t(1) << 30;  // feature pixels: boxes reach no farther

struct FeatureLevel {
  void* data;  // [N, height, width, C]: the features, or their gradient
  int64_t height, width;
  double spatial_scale;  // feature pixels per image pixel
};

// Everything a kernel needs to know. A is the type it computes in (double for double, else float); features may be narrower.
template <typename A>
struct RoiAlign {
  FeatureLevel levels[MAX_FEATURE_LEVELS];
  int64_t level_count, N, C;
  const A* rois;              // [R, 5]: index in the batch, x1, y1, x2, y2 in image pixels
  const int64_t* roi_levels;  // [R]
  int64_t R, PH, PW;
  int64_t sampling_ratio;  // samples a bin and axis, at most ROI_ALIGN_MAX_SAMPLES; <= 0: ceil(bin size)
  bool aligned;            // true: shift by half a pixel, so that pixel centres are at .5
};

// Which picture of which level RoI r looks at; false if there is no such picture.
template <typename A>
MD_HD bool find_picture(const RoiAlign<A>& problem, int64_t r, int64_t& level, int64_t& n) {
  const A batch_index = problem.rois[5 * r];
  level = problem.roi_levels[r];
  if (!(level >= 0 && level < problem.level_count && batch_index >= A(0) && batch_index < A(problem.N))) return false;
  n = static_cast<int64_t>(batch_index);
  return true;
}

// One axis of one RoI, in feature pixels: bin p covers [start + p bin, start + (p + 1) bin] and takes `grid` samples.
// grid is kept as a floating number: a box of 1e30 pixels must not overflow an index.
template <typename A>
struct RoiAxis {
  A start, bin, grid;
};

template <typename A>
MD_HD RoiAxis<A> roi_axis(A low, A high, A spatial_scale, int64_t bins, int64_t sampling_ratio, bool aligned) {
  RoiAxis<A> axis;
  const A offset = aligned ? A(0.5) : A(0);
  axis.start = mul_rn(low, spatial_scale) - offset;  // rounded as on the CPU: a bin of exactly 1 must not become a little more
  A size = (mul_rn(high, spatial_scale) - offset) - axis.start;
  if (!aligned && size < A(1)) size = A(1);  // the old form: a malformed box is one pixel
  axis.bin = size / A(bins);
  axis.grid = sampling_ratio > 0 ? A(sampling_ratio) : A(ceil(axis.bin));
  return axis;
}

// False for a box with NaN or Inf in it, or beyond 2^30 feature pixels: it has no samples, and its output is zero.
template <typename A>
MD_HD bool is_finite_axis(const RoiAxis<A>& axis) {
  const A start = axis.start, bin = axis.bin, limit = A(1 << 30);
  return -limit < start && start < limit && -limit < bin && bin < limit;
}

// 1 / number of samples of a bin.
template <typename A>
MD_HD A bin_weight(const RoiAxis<A>& axis_y, const RoiAxis<A>& axis_x) {
  const A count = axis_y.grid * axis_x.grid;
  return A(1) / (count > A(1) ? count : A(1));
}

// Both axes of RoI r on a level.
template <typename A>
MD_HD void roi_axes(const RoiAlign<A>& problem, int64_t r, int64_t level, RoiAxis<A>& axis_y, RoiAxis<A>& axis_x) {
  const A* roi = problem.rois + 5 * r;
  const A scale = static_cast<A>(problem.levels[level].spatial_scale);
  axis_y = roi_axis(roi[2], roi[4], scale, problem.PH, problem.sampling_ratio, problem.aligned);
  axis_x = roi_axis(roi[1], roi[3], scale, problem.PW, problem.sampling_ratio, problem.aligned);
}

template <typename A>
MD_HD A sample_position(const RoiAxis<A>& axis, int64_t p, int64_t i) {
  return axis.start + mul_rn(A(p), axis.bin) + (A(i) + A(0.5)) * axis.bin / axis.grid;
}

// The samples [first, last) of bin p that can lie inside the level. A box much larger than the picture has most of its samples
// outside; skipping them bounds the work by the picture. One sample of slack a side: clamped_taps() has the last word.
template <typename A>
MD_HD void sample_range(const RoiAxis<A>& axis, int64_t p, int64_t size, int64_t& first, int64_t& last) {
  first = 0;
  last = 0;
  if (!is_finite_axis(axis) || !(axis.grid >= A(1))) return;
  const A step = axis.bin / axis.grid;
  const A bin_start = axis.start + A(p) * axis.bin;
  A begin = A(0), end = axis.grid;
  if (step > A(0)) {
    const A enter = (A(-1) - bin_start) / step - A(1.5), leave = (A(size) - bin_start) / step + A(1.5);
    if (enter > begin) begin = enter;
    if (leave < end) end = leave;
  }
  if (!(begin < end)) return;
  first = static_cast<int64_t>(begin);
  last = static_cast<int64_t>(ceil(end));
}

// ---- CPU, cpu/roi_align.cpp; T is float or double, the dtype of the features too ----------------------------------------------
//
// RoIs in the order in which neighbours share pixels: by level, picture, then position. order [R].
template <typename T>
void roi_align_order(const RoiAlign<T>& problem, int64_t* order);
// Writes output [R, PH, PW, C] for the RoIs order[begin .. end): each owns its output.
template <typename T>
void roi_align_cpu(const RoiAlign<T>& problem, const int64_t* order, T* output, int64_t begin, int64_t end);

// The gradient in two steps: first the plan, Ay and Ax of all RoIs and the tiles of the feature gradient that they touch; then the tiles
// [begin, end). A tile owns its pixels, so there are no atomics, and the bytes are the same whatever the number of threads.
// problem.levels[l].data is the gradient and is wholly overwritten.
template <typename T>
struct RoiAlignPlan;
template <typename T>
RoiAlignPlan<T>* roi_align_plan(const RoiAlign<T>& problem, int64_t& tile_count);
template <typename T>
void roi_align_backward_cpu(const RoiAlign<T>& problem, const RoiAlignPlan<T>& plan, const T* grad_output, int64_t begin, int64_t end);
template <typename T>
void roi_align_free(RoiAlignPlan<T>* plan);

// ---- CUDA, cuda/roi_align.cu; dtype is that of output and grad_output -----------------------------------------------------------
constexpr int64_t ROI_ALIGN_MAX_BINS = 512;  // PH and PW on a GPU: the tables fit in 48 KiB of shared memory
constexpr int ROI_ALIGN_TILE = 4;            // deterministic backward: 4 x 4 pixels a block, a warp each
inline int64_t roi_align_tiles(int64_t N, int64_t height, int64_t width) {
  return N * ceil_div(height, ROI_ALIGN_TILE) * ceil_div(width, ROI_ALIGN_TILE);
}

// output [R, PH, PW, C]. A RoI whose batch index or level does not exist gets NaN: a GPU cannot raise without waiting for it.
template <typename A>
void roi_align_cuda(const RoiAlign<A>& problem, DType dtype, void* output, void* stream);
// Adds to problem.levels[l].data, of type A whatever dtype is, zeroed by the caller. Atomic: the order of summation varies.
template <typename A>
void roi_align_backward_cuda(const RoiAlign<A>& problem, DType dtype, const void* grad_output, void* stream);
// Overwrites problem.levels[l].data, of type dtype. Equal bytes in every run.
template <typename A>
void roi_align_backward_deterministic_cuda(const RoiAlign<A>& problem, DType dtype, const void* grad_output, void* stream);

}  // namespace minidamage
