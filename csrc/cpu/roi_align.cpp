// RoIAlign on the CPU: the plain form of ../cuda/roi_align.cu. Read ../roi_align.h first.
//
// Forward: a RoI's Ay and Ax are built once (a few hundred numbers), then each bin is a weighted sum of a few pixels, each a row of C
// neighbouring channels: the inner loop runs over channels and vectorises. RoIs are visited in an order in which neighbours share
// pixels, because the arithmetic is small and the time goes into fetching the features.
// Backward: the feature gradient is cut into tiles that fit the second-level cache. A tile zeroes itself, adds what every RoI that
// touches it sends, and is done: every gradient pixel goes to memory once, no atomics, no second pass, the same bytes on any number of
// threads.
#include "../roi_align.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace minidamage {
namespace {

// One entry of Ay or Ax.
template <typename T>
struct Tap {
  int64_t bin, pixel;
  T weight;
};

// Adds weight at (bin, pixel). Consecutive samples share pixels, so it is enough to look at the last two entries to merge them.
template <typename T>
void add_tap(std::vector<Tap<T>>& taps, size_t first_of_bin, int64_t bin, int64_t pixel, T weight) {
  for (size_t k = taps.size(); k > first_of_bin && k + 2 > taps.size(); --k) {
    if (taps[k - 1].pixel == pixel) {
      taps[k - 1].weight += weight;
      return;
    }
  }
  taps.push_back({bin, pixel, weight});
}

// Appends the rows of Ay (or Ax) of one RoI, all weights times `scale`.
template <typename T>
void append_taps(const RoiAxis<T>& axis, int64_t bins, int64_t size, T scale, std::vector<Tap<T>>& taps) {
  for (int64_t p = 0; p < bins; ++p) {
    const size_t first_of_bin = taps.size();
    int64_t first, last;
    sample_range(axis, p, size, first, last);
    for (int64_t i = first; i < last; ++i) {
      AxisTaps<T> sample;
      if (!clamped_taps(sample_position(axis, p, i), size, sample)) continue;
      add_tap(taps, first_of_bin, p, sample.low, sample.weight_low * scale);
      add_tap(taps, first_of_bin, p, sample.high, sample.weight_high * scale);
    }
  }
}

// Ay and Ax of RoI r, appended; the 1 / count of the mean goes into Ay.
template <typename T>
void append_roi(const RoiAlign<T>& problem, int64_t r, std::vector<Tap<T>>& taps_y, std::vector<Tap<T>>& taps_x) {
  const FeatureLevel& level = problem.levels[problem.roi_levels[r]];
  RoiAxis<T> axis_y, axis_x;
  roi_axes(problem, r, problem.roi_levels[r], axis_y, axis_x);
  append_taps(axis_y, problem.PH, level.height, bin_weight(axis_y, axis_x), taps_y);
  append_taps(axis_x, problem.PW, level.width, T(1), taps_x);
}

// out[c] (+)= sum_k weight[k] source[k][c], for K rows at a time.
template <int K, bool ADD, typename T>
inline void combine(T* __restrict out, const T* const* source, const T* weight, int64_t C) {
  const T* __restrict s0 = source[0];
  const T* __restrict s1 = source[K > 1 ? 1 : 0];
  const T* __restrict s2 = source[K > 2 ? 2 : 0];
  const T* __restrict s3 = source[K > 2 ? 3 : 0];
  const T w0 = weight[0], w1 = weight[K > 1 ? 1 : 0], w2 = weight[K > 2 ? 2 : 0], w3 = weight[K > 2 ? 3 : 0];
  for (int64_t c = 0; c < C; ++c) {
    T sum = w0 * s0[c];
    if (K > 1) sum += w1 * s1[c];
    if (K > 2) sum += w2 * s2[c] + w3 * s3[c];
    out[c] = ADD ? out[c] + sum : sum;
  }
}

template <typename T>
void weighted_sum(T* out, const T* const* source, const T* weight, size_t count, int64_t C, bool add) {
  if (count == 0 && !add) std::fill(out, out + C, T(0));
  for (size_t k = 0; k < count;) {
    const size_t left = count - k;
    if (left >= 4) {
      add ? combine<4, true>(out, source + k, weight + k, C) : combine<4, false>(out, source + k, weight + k, C);
      k += 4;
    } else if (left >= 2) {
      add ? combine<2, true>(out, source + k, weight + k, C) : combine<2, false>(out, source + k, weight + k, C);
      k += 2;
    } else {
      add ? combine<1, true>(out, source + k, weight + k, C) : combine<1, false>(out, source + k, weight + k, C);
      k += 1;
    }
    add = true;
  }
}

// The end of the run of taps from `begin` on that share their bin.
template <typename T>
size_t end_of_bin(const std::vector<Tap<T>>& taps, size_t begin, int64_t bin) {
  while (begin < taps.size() && taps[begin].bin == bin) ++begin;
  return begin;
}

}  // namespace

template <typename T>
void roi_align_order(const RoiAlign<T>& problem, int64_t* order) {
  constexpr int64_t band = 16;  // pixels; rows of a band stay in the cache while the band is walked from left to right
  std::vector<std::pair<std::pair<int64_t, int64_t>, int64_t>> keys(problem.R);
  for (int64_t r = 0; r < problem.R; ++r) {
    const FeatureLevel& level = problem.levels[problem.roi_levels[r]];
    const T* roi = problem.rois + 5 * r;
    const auto centre = [&](T low, T high, int64_t size) {
      const T position = (low + high) * T(0.5) * static_cast<T>(level.spatial_scale);
      return position > T(0) ? (position < T(size) ? static_cast<int64_t>(position) : size) : int64_t(0);
    };
    const int64_t y = centre(roi[2], roi[4], level.height) / band, x = centre(roi[1], roi[3], level.width);
    keys[r] = {{problem.roi_levels[r] * problem.N + static_cast<int64_t>(roi[0]), y * (level.width + 1) + x}, r};
  }
  std::sort(keys.begin(), keys.end());
  for (int64_t k = 0; k < problem.R; ++k) order[k] = keys[k].second;
}

template <typename T>
void roi_align_cpu(const RoiAlign<T>& problem, const int64_t* order, T* output, int64_t begin, int64_t end) {
  const int64_t PH = problem.PH, PW = problem.PW, C = problem.C;
  std::vector<Tap<T>> taps_y, taps_x;
  std::vector<const T*> source;
  std::vector<T> weight;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t r = order[k];
    const FeatureLevel& level = problem.levels[problem.roi_levels[r]];
    const T* picture = static_cast<const T*>(level.data) + static_cast<int64_t>(problem.rois[5 * r]) * level.height * level.width * C;
    taps_y.clear();
    taps_x.clear();
    append_roi(problem, r, taps_y, taps_x);
    size_t begin_y = 0;
    for (int64_t p = 0; p < PH; ++p) {
      const size_t end_y = end_of_bin(taps_y, begin_y, p);
      size_t begin_x = 0;
      for (int64_t q = 0; q < PW; ++q) {
        const size_t end_x = end_of_bin(taps_x, begin_x, q);
        source.clear();
        weight.clear();
        for (size_t i = begin_y; i < end_y; ++i) {
          for (size_t j = begin_x; j < end_x; ++j) {
            source.push_back(picture + (taps_y[i].pixel * level.width + taps_x[j].pixel) * C);
            weight.push_back(taps_y[i].weight * taps_x[j].weight);
          }
        }
        weighted_sum(output + ((r * PH + p) * PW + q) * C, source.data(), weight.data(), source.size(), C, false);
        begin_x = end_x;
      }
      begin_y = end_y;
    }
  }
}

// Ay and Ax of all RoIs sorted by pixel, the tiles, and the RoIs of every tile.
template <typename T>
struct RoiAlignPlan {
  struct Tile {
    int64_t level, n, y0, y1, x0, x1;  // picture n of a level, rows [y0, y1), columns [x0, x1)
  };
  std::vector<Tile> tiles;
  std::vector<std::vector<int64_t>> rois_of_tile;  // increasing: the order of summation is fixed
  std::vector<Tap<T>> taps_y, taps_x;              // of RoI r: [begin_y[r], begin_y[r + 1]), by pixel, then bin
  std::vector<size_t> begin_y, begin_x;            // [R + 1]
};

template <typename T>
RoiAlignPlan<T>* roi_align_plan(const RoiAlign<T>& problem, int64_t& tile_count) {
  constexpr int64_t tile_width = 32, tile_bytes = 512 * 1024;
  const int64_t tile_height = std::max<int64_t>(1, tile_bytes / (tile_width * std::max<int64_t>(1, problem.C) * int64_t(sizeof(T))));
  auto* plan = new RoiAlignPlan<T>();
  std::vector<int64_t> first_tile;  // of every (level, n)
  for (int64_t l = 0; l < problem.level_count; ++l) {
    const FeatureLevel& level = problem.levels[l];
    for (int64_t n = 0; n < problem.N; ++n) {
      first_tile.push_back(plan->tiles.size());
      for (int64_t y = 0; y < level.height; y += tile_height)
        for (int64_t x = 0; x < level.width; x += tile_width)
          plan->tiles.push_back({l, n, y, std::min(y + tile_height, level.height), x, std::min(x + tile_width, level.width)});
    }
  }
  plan->rois_of_tile.resize(plan->tiles.size());
  plan->begin_y.push_back(0);
  plan->begin_x.push_back(0);
  const auto by_pixel = [](const Tap<T>& a, const Tap<T>& b) { return a.pixel != b.pixel ? a.pixel < b.pixel : a.bin < b.bin; };
  for (int64_t r = 0; r < problem.R; ++r) {
    append_roi(problem, r, plan->taps_y, plan->taps_x);
    std::sort(plan->taps_y.begin() + plan->begin_y[r], plan->taps_y.end(), by_pixel);
    std::sort(plan->taps_x.begin() + plan->begin_x[r], plan->taps_x.end(), by_pixel);
    const bool outside = plan->taps_y.size() == plan->begin_y[r] || plan->taps_x.size() == plan->begin_x[r];
    const int64_t y0 = outside ? 0 : plan->taps_y[plan->begin_y[r]].pixel, x0 = outside ? 0 : plan->taps_x[plan->begin_x[r]].pixel;
    plan->begin_y.push_back(plan->taps_y.size());
    plan->begin_x.push_back(plan->taps_x.size());
    if (outside) continue;
    const int64_t y1 = plan->taps_y.back().pixel, x1 = plan->taps_x.back().pixel;
    const int64_t l = problem.roi_levels[r], across = (problem.levels[l].width + tile_width - 1) / tile_width;
    const int64_t first = first_tile[l * problem.N + static_cast<int64_t>(problem.rois[5 * r])];
    for (int64_t y = y0 / tile_height; y <= y1 / tile_height; ++y)
      for (int64_t x = x0 / tile_width; x <= x1 / tile_width; ++x) plan->rois_of_tile[first + y * across + x].push_back(r);
  }
  tile_count = plan->tiles.size();
  return plan;
}

namespace {

// Adds to one row of a tile what RoI r sends: taps_y [begin_y, end_y) share the row, taps_x [begin_x, end_x) lie in the tile.
// grad [PH, PW, C] of the RoI; row [W, C]; blend [PW, C] is working memory.
template <typename T>
void add_row(const Tap<T>* begin_y, const Tap<T>* end_y, const Tap<T>* begin_x, const Tap<T>* end_x, const T* grad, T* row, T* blend,
             int64_t PW, int64_t C) {
  T scale = begin_y->weight;
  const T* rows_of_bins = grad + begin_y->bin * PW * C;  // [PW, C]
  if (end_y - begin_y > 1) {  // the row belongs to several bins: blend them first, once for all columns
    int64_t first = PW, last = 0;
    for (const Tap<T>* x = begin_x; x < end_x; ++x) {
      first = std::min(first, x->bin);
      last = std::max(last, x->bin + 1);
    }
    const int64_t size = (last - first) * C;
    for (const Tap<T>* y = begin_y; y < end_y; ++y) {
      const T* source = grad + (y->bin * PW + first) * C;
      if (y == begin_y) combine<1, false>(blend + first * C, &source, &y->weight, size);
      else combine<1, true>(blend + first * C, &source, &y->weight, size);
    }
    rows_of_bins = blend;
    scale = T(1);
  }
  while (begin_x < end_x) {
    T* pixel = row + begin_x->pixel * C;
    const T* source[2] = {rows_of_bins + begin_x->bin * C, nullptr};
    T weight[2] = {begin_x->weight * scale, T(0)};
    if (begin_x + 1 < end_x && begin_x[1].pixel == begin_x->pixel) {
      source[1] = rows_of_bins + begin_x[1].bin * C;
      weight[1] = begin_x[1].weight * scale;
      combine<2, true>(pixel, source, weight, C);
      begin_x += 2;
    } else {
      combine<1, true>(pixel, source, weight, C);
      begin_x += 1;
    }
  }
}

}  // namespace

template <typename T>
void roi_align_backward_cpu(const RoiAlign<T>& problem, const RoiAlignPlan<T>& plan, const T* grad_output, int64_t begin, int64_t end) {
  const int64_t PH = problem.PH, PW = problem.PW, C = problem.C;
  std::vector<T> blend(PW * C);
  const auto before = [](const Tap<T>& tap, int64_t pixel) { return tap.pixel < pixel; };
  for (int64_t t = begin; t < end; ++t) {
    const auto& tile = plan.tiles[t];
    const FeatureLevel& level = problem.levels[tile.level];
    T* picture = static_cast<T*>(level.data) + tile.n * level.height * level.width * C;
    for (int64_t y = tile.y0; y < tile.y1; ++y)
      std::fill(picture + (y * level.width + tile.x0) * C, picture + (y * level.width + tile.x1) * C, T(0));
    for (const int64_t r : plan.rois_of_tile[t]) {
      const Tap<T>* all_y = plan.taps_y.data() + plan.begin_y[r];
      const Tap<T>* end_of_y = plan.taps_y.data() + plan.begin_y[r + 1];
      const Tap<T>* all_x = plan.taps_x.data() + plan.begin_x[r];
      const Tap<T>* end_of_x = plan.taps_x.data() + plan.begin_x[r + 1];
      const Tap<T>* y = std::lower_bound(all_y, end_of_y, tile.y0, before);
      const Tap<T>* begin_x = std::lower_bound(all_x, end_of_x, tile.x0, before);
      const Tap<T>* end_x = std::lower_bound(begin_x, end_of_x, tile.x1, before);
      if (begin_x == end_x) continue;
      while (y < end_of_y && y->pixel < tile.y1) {
        const Tap<T>* end_y = y;
        while (end_y < end_of_y && end_y->pixel == y->pixel) ++end_y;
        add_row(y, end_y, begin_x, end_x, grad_output + r * PH * PW * C, picture + y->pixel * level.width * C, blend.data(), PW, C);
        y = end_y;
      }
    }
  }
}

template <typename T>
void roi_align_free(RoiAlignPlan<T>* plan) {
  delete plan;
}

#define INSTANTIATE(T)                                                                                            \
  template void roi_align_order<T>(const RoiAlign<T>&, int64_t*);                                              \
  template void roi_align_cpu<T>(const RoiAlign<T>&, const int64_t*, T*, int64_t, int64_t);                    \
  template RoiAlignPlan<T>* roi_align_plan<T>(const RoiAlign<T>&, int64_t&);                                 \
  template void roi_align_backward_cpu<T>(const RoiAlign<T>&, const RoiAlignPlan<T>&, const T*, int64_t, int64_t); \
  template void roi_align_free<T>(RoiAlignPlan<T>*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
