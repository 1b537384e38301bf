// Bilinear sampling, one axis at a time. Read first; roi_align.h is built on it.
//
// A bilinear sample is separable: value(y, x) = sum_i sum_j w_y(i) w_x(j) F[i, j], and along one axis only two pixels have a weight.
// So everything here is about one axis: the position, the two neighbours and their weights.
#pragma once

#include "common.h"

namespace minidamage {

// The two pixels beside a sampling position along one axis, and their weights (which add up to 1).
template <typename T>
struct AxisTaps {
  int64_t low, high;
  T weight_low, weight_high;
};

// RoIAlign's rule at the border (Detectron, kept by every descendant): pixel centres lie on integers; a position up to one pixel
// outside [0, size - 1] is moved onto the border, one further away contributes nothing (false is returned).
// Written as !(inside) so that NaN counts as outside and never becomes an index.
template <typename T>
MD_HD bool clamped_taps(T position, int64_t size, AxisTaps<T>& taps) {
  if (!(position >= T(-1) && position <= T(size))) return false;
  if (position < T(0)) position = T(0);
  taps.low = static_cast<int64_t>(position);
  if (taps.low >= size - 1) {
    taps.low = taps.high = size - 1;
    position = T(size - 1);
  } else {
    taps.high = taps.low + 1;
  }
  taps.weight_high = position - T(taps.low);
  taps.weight_low = T(1) - taps.weight_high;
  return true;
}

}  // namespace minidamage
