// Greedy non-maximum suppression (minidamage/ops/nms.py says what it computes and holds the readable reference).
// Here: the pair test, written once for both machines, and what the bindings call.
#pragma once
#include <vector>

#include "common.h"

namespace minidamage {

// boxes: x1, y1, x2, y2. A NaN coordinate makes the area, and with it every IoU, NaN: such a box suppresses nothing and stays.
template <typename T>
MD_HD T box_area(T x1, T y1, T x2, T y2) {
  return mul_rn(x2 - x1, y2 - y1);
}

// True where IoU(a, b) > iou_threshold. Each step is rounded by itself, in torchvision's order: same boxes, same decision.
template <typename T>
MD_HD bool overlaps(T ax1, T ay1, T ax2, T ay2, T area_a, T bx1, T by1, T bx2, T by2, T area_b, T iou_threshold) {
  const T w = (bx2 < ax2 ? bx2 : ax2) - (ax1 < bx1 ? bx1 : ax1);
  const T h = (by2 < ay2 ? by2 : ay2) - (ay1 < by1 ? by1 : ay1);
  const T intersection = mul_rn(w > 0 ? w : T(0), h > 0 ? h : T(0));
  return intersection / ((area_a + area_b) - intersection) > iou_threshold;
}

// The largest T that is not above the threshold: for x of type T, `x > threshold` and `x > round_down<T>(threshold)` agree.
template <typename T>
T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return rounded > threshold ? std::nextafter(rounded, -std::numeric_limits<T>::infinity()) : rounded;
}

// ---- CPU: groups of boxes that may suppress one another, each in order of decreasing score -----------------------------
struct NmsGroups {
  std::vector<int64_t> by_score;  // [V] indices of the valid boxes, best first, ties in input order
  std::vector<int64_t> by_group;  // [V] the same, group after group
  std::vector<int64_t> offsets;   // [G + 1] where each group begins in by_group
};
// scores: [n]; idxs: [n] group of each box, or null (one group); valid: [n], or null (all)
template <typename T>
NmsGroups nms_groups_cpu(const T* scores, const int64_t* idxs, const bool* valid, int64_t n);
// Marks in kept [n] (zeroed by the caller) what survives of the groups [begin, end). boxes: [n, 4].
template <typename T>
void nms_cpu(const T* boxes, const NmsGroups& groups, double iou_threshold, int64_t max_keep, int64_t begin, int64_t end,
             uint8_t* kept);

// ---- CUDA ----------------------------------------------------------------------------------------------------------------
constexpr int64_t NMS_WORD = 64;    // boxes per mask word
constexpr int64_t NMS_ROWS = 4096;  // rows of the mask held at a time: memory grows with n, not with n squared
// boxes: [n, 4], idxs: [n] or null, valid: [n] or null, order: [n], all by decreasing score; order holds the input indices.
// Work space: mask [min(n, NMS_ROWS), words], removed [words], words = ceil(n / 64). Out: keep [max_keep], zeroed by the
// caller, and count, one number, zeroed too. Nothing is read back to the host.
template <typename T>
void nms_cuda(const T* boxes, const int64_t* idxs, const bool* valid, const int64_t* order, int64_t n, double iou_threshold,
              int64_t max_keep, uint64_t* mask, uint64_t* removed, int64_t* keep, int64_t* count, void* stream);

}  // namespace minidamage
