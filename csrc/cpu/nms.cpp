// Non-maximum suppression on a CPU. Two ideas over the plain double loop, both exact:
//  1. Kept boxes lie in a grid over the picture. A box that suppresses another with IoU > t covers more than t of its width
//     and height, so it reaches into the other's core, [x1 + s w, x2 - s w] with s just under min(t, 1/2): at t >= 1/2 the
//     core is hardly more than the centre, and one cell is searched instead of all kept boxes.
//  2. Each cell stores coordinates apart, sixteen floats a row, so one SIMD instruction tests sixteen boxes.
#include "../nms.h"

#include <algorithm>
#include <cstring>

namespace minidamage {
namespace {

// Stable sort of indices by an unsigned key, least significant byte first; bytes that all keys share cost one pass of counting.
void radix_sort(std::vector<uint64_t>& keys, std::vector<int64_t>& indices) {
  const size_t n = keys.size();
  std::vector<uint64_t> sorted_keys(n);
  std::vector<int64_t> sorted_indices(n);
  uint64_t differing = 0;
  for (size_t i = 1; i < n; i++) differing |= keys[i] ^ keys[0];
  for (int shift = 0; shift < 64; shift += 8) {
    if (!(differing >> shift & 255)) continue;
    size_t start[257] = {};
    for (uint64_t key : keys) start[(key >> shift & 255) + 1]++;
    for (int digit = 0; digit < 256; digit++) start[digit + 1] += start[digit];
    for (size_t i = 0; i < n; i++) {
      const size_t to = start[keys[i] >> shift & 255]++;
      sorted_keys[to] = keys[i], sorted_indices[to] = indices[i];
    }
    keys.swap(sorted_keys), indices.swap(sorted_indices);
  }
}

// Keys whose increasing order is torch.sort's decreasing order: NaN first, then +inf ... -inf; -0 and 0 tie.
uint64_t descending_key(float score) {
  if (score != score) return 0;
  uint32_t bits;
  score += 0.f;
  std::memcpy(&bits, &score, 4);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint32_t>(~ascending);
}
uint64_t descending_key(double score) {
  if (score != score) return 0;
  uint64_t bits;
  score += 0.;
  std::memcpy(&bits, &score, 8);
  return ~(bits >> 63 ? ~bits : bits | 0x8000000000000000u);
}

template <typename T>
struct Row {  // kept boxes side by side; empty places hold NaN, which suppresses nothing
  static constexpr int LANES = 64 / sizeof(T);
  T x1[LANES], y1[LANES], x2[LANES], y2[LANES], area[LANES];
};

template <typename T>
struct Cell {
  std::vector<Row<T>> rows;
  int used = Row<T>::LANES;  // places taken in the last row

  void insert(const T* box, T area) {
    if (used == Row<T>::LANES) {
      rows.emplace_back();
      std::fill_n(&rows.back().x1[0], 5 * Row<T>::LANES, std::numeric_limits<T>::quiet_NaN());
      used = 0;
    }
    Row<T>& row = rows.back();
    row.x1[used] = box[0], row.y1[used] = box[1], row.x2[used] = box[2], row.y2[used] = box[3], row.area[used] = area;
    used++;
  }

  bool suppresses(const T* box, T area, T iou_threshold) const {
    const T x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
    for (const Row<T>& row : rows) {
      int hits = 0;
      for (int k = 0; k < Row<T>::LANES; k++)
        hits |= overlaps(row.x1[k], row.y1[k], row.x2[k], row.y2[k], row.area[k], x1, y1, x2, y2, area, iou_threshold);
      if (hits) return true;
    }
    return false;
  }
};

template <typename T>
class KeptBoxes {
 public:
  // boxes: [n, 4]; members: indices of the `count` boxes that may come
  KeptBoxes(const T* boxes, const int64_t* members, int64_t count, T iou_threshold)
      : iou_threshold_(iou_threshold), share_(T(0.98) * std::min(iou_threshold, T(0.5))) {
    if (iou_threshold >= 0 && count > 64) fit_grid(boxes, members, count);  // below 0 boxes that do not touch suppress too
    cells_.resize(static_cast<size_t>(x_.cells) * y_.cells);
  }

  // Tests a box and, unless a kept one suppresses it, keeps it.
  bool try_keep(const T* box) {
    const T area = box_area(box[0], box[1], box[2], box[3]);
    if (iou_threshold_ >= 0 && !std::isfinite(area)) return true;  // its IoU is 0 or NaN with every box
    if (wide_.suppresses(box, area, iou_threshold_)) return false;
    const Span across = core(x_, box[0], box[2], area), down = core(y_, box[1], box[3], area);
    for (int row = down.first; row <= down.last; row++)
      for (int column = across.first; column <= across.last; column++)
        if (cells_[row * x_.cells + column].suppresses(box, area, iou_threshold_)) return false;
    insert(box, area);
    return true;
  }

 private:
  static constexpr int MOST_CELLS = 128;   // along an axis
  static constexpr int WIDE = 64;          // a box over more cells than this goes into a list that everybody searches

  struct Span {
    int first, last;
  };
  struct Axis {
    T begin = 0, cells_per_pixel = 0;
    int cells = 1;
    int at(T position) const {  // never decreasing in position
      const T cell = (position - begin) * cells_per_pixel;
      return !(cell > 0) ? 0 : cell < cells ? static_cast<int>(cell) : cells - 1;
    }
    // Cells as large as the mean box; half and twice that gained nothing (20,000 boxes, IoU 0.5: 1.4 ms on one core, EPYC).
    void fit(T low, T high, T mean_size, int64_t count) {
      const T wanted = (high - low) / mean_size, most = std::sqrt(static_cast<T>(count));
      if (!std::isfinite(wanted) || !(wanted > 1)) return;
      cells = static_cast<int>(std::min({wanted, most, T(MOST_CELLS)}));
      begin = low, cells_per_pixel = cells / (high - low);
    }
  };
  void fit_grid(const T* boxes, const int64_t* members, int64_t count) {
    const T infinity = std::numeric_limits<T>::infinity();
    T low[2] = {infinity, infinity}, high[2] = {-infinity, -infinity}, size[2] = {0, 0};
    int64_t finite = 0;
    for (int64_t m = 0; m < count; m++) {
      const T* box = boxes + 4 * members[m];
      if (!std::isfinite(box_area(box[0], box[1], box[2], box[3]))) continue;
      finite++;
      for (int axis = 0; axis < 2; axis++) {
        low[axis] = std::min(low[axis], box[axis]);
        high[axis] = std::max(high[axis], box[axis + 2]);
        size[axis] += std::max(box[axis + 2] - box[axis], T(0));
      }
    }
    if (!finite) return;
    x_.fit(low[0], high[0], size[0] / finite, finite);
    y_.fit(low[1], high[1], size[1] / finite, finite);
  }

  // The cells of one side's core. The share is 0, the whole side, where rounding could make it wrong.
  Span core(const Axis& axis, T low, T high, T area) const {
    const T size = high - low, exact = T(1e-4) * std::max(std::abs(low), std::abs(high));
    const T margin = area > T(1e-30) && size > exact ? share_ * size : T(0);
    return {axis.at(low + margin), axis.at(high - margin)};
  }

  void insert(const T* box, T area) {
    const Span across = {x_.at(box[0]), x_.at(box[2])}, down = {y_.at(box[1]), y_.at(box[3])};
    if ((across.last - across.first + 1) * (down.last - down.first + 1) > WIDE) return wide_.insert(box, area);
    for (int row = down.first; row <= down.last; row++)
      for (int column = across.first; column <= across.last; column++) cells_[row * x_.cells + column].insert(box, area);
  }

  T iou_threshold_, share_;
  Axis x_, y_;
  std::vector<Cell<T>> cells_;  // [rows, columns]
  Cell<T> wide_;
};

}  // namespace

template <typename T>
NmsGroups nms_groups_cpu(const T* scores, const int64_t* idxs, const bool* valid, int64_t n) {
  NmsGroups groups;
  std::vector<uint64_t> keys;
  for (int64_t i = 0; i < n; i++) {
    if (valid && !valid[i]) continue;
    groups.by_score.push_back(i);
    keys.push_back(descending_key(scores[i]));
  }
  radix_sort(keys, groups.by_score);
  groups.by_group = groups.by_score;
  if (idxs) {
    for (size_t rank = 0; rank < keys.size(); rank++) keys[rank] = static_cast<uint64_t>(idxs[groups.by_score[rank]]);
    radix_sort(keys, groups.by_group);
  }
  for (size_t rank = 0; rank < keys.size(); rank++)
    if (rank == 0 || (idxs && keys[rank] != keys[rank - 1])) groups.offsets.push_back(static_cast<int64_t>(rank));
  groups.offsets.push_back(static_cast<int64_t>(keys.size()));
  return groups;
}

template <typename T>
void nms_cpu(const T* boxes, const NmsGroups& groups, double iou_threshold, int64_t max_keep, int64_t begin, int64_t end,
             uint8_t* kept) {
  const T threshold = round_down<T>(iou_threshold);
  for (int64_t group = begin; group < end; group++) {
    const int64_t first = groups.offsets[group], last = groups.offsets[group + 1];
    KeptBoxes<T> kept_boxes(boxes, groups.by_group.data() + first, last - first, threshold);
    int64_t count = 0;
    for (int64_t rank = first; rank < last && count < max_keep; rank++) {
      const int64_t i = groups.by_group[rank];
      kept[i] = kept_boxes.try_keep(boxes + 4 * i);
      count += kept[i];
    }
  }
}

template NmsGroups nms_groups_cpu(const float*, const int64_t*, const bool*, int64_t);
template NmsGroups nms_groups_cpu(const double*, const int64_t*, const bool*, int64_t);
template void nms_cpu(const float*, const NmsGroups&, double, int64_t, int64_t, int64_t, uint8_t*);
template void nms_cpu(const double*, const NmsGroups&, double, int64_t, int64_t, int64_t, uint8_t*);

}  // namespace minidamage
