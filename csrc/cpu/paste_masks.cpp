// Mask pasting on the CPU. Read ../paste_masks.h first.
//
// Float and bool, row by row: the cells of a box are first mixed along the row into columns [cells, w], once; a pixel row is then one
// lerp of two of these, contiguous and vectorised. The run-length form goes down the columns, as COCO's runs do, and looks at single
// pixels only where the threshold lies between the two cells above and below: elsewhere all pixels between two cells are on one side.
#include "../paste_masks.h"
#include "../rle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace minidamage {
namespace {

// One mask with its border of zeros, and its place in the picture.
template <typename T>
struct PlacedMask {
  PasteAxis<T> y, x;
  std::vector<T> cells;             // [y.cells, x.cells]
  std::vector<PasteTap<T>> x_taps;  // of the pixels [x.begin, x.end)

  PlacedMask(const PasteMasks<T>& problem, int64_t n) {
    const int64_t padding = problem.padding;
    const int64_t* box = problem.boxes + 4 * n;
    y = paste_axis<T>(box[1], box[3], problem.mask_height + 2 * padding, problem.height);
    x = paste_axis<T>(box[0], box[2], problem.mask_width + 2 * padding, problem.width);
    if (empty()) return;
    cells.assign(y.cells * x.cells, T(0));
    for (int64_t i = 0; i < problem.mask_height; ++i) {
      const T* row = static_cast<const T*>(problem.masks) + (n * problem.mask_height + i) * problem.mask_width;
      std::copy(row, row + problem.mask_width, cells.begin() + (i + padding) * x.cells + padding);
    }
    x_taps.reserve(x.end - x.begin);
    for (int64_t pixel = x.begin; pixel < x.end; ++pixel) x_taps.push_back(paste_tap(x, pixel));
  }

  bool empty() const { return y.begin >= y.end || x.begin >= x.end; }

  T along_row(int64_t i, const PasteTap<T>& tap) const {
    return lerp(cells[i * x.cells + tap.low], cells[i * x.cells + tap.high], tap.fraction);
  }
};

// Calls paint(row of the picture, first column, lower cells, upper cells, fraction, count) for the rows of bands [begin, end).
template <typename T, typename Paint>
void for_each_row(const PasteMasks<T>& problem, int64_t begin, int64_t end, Paint paint) {
  const int64_t bands = paste_bands(problem.height);
  std::vector<T> columns;
  while (begin < end) {
    const int64_t n = begin / bands, end_of_mask = std::min(end, (n + 1) * bands);
    const PlacedMask<T> mask(problem, n);
    const int64_t y_begin = std::max(mask.y.begin, (begin - n * bands) * PASTE_BAND);
    const int64_t y_end = std::min(mask.y.end, (end_of_mask - n * bands) * PASTE_BAND);
    begin = end_of_mask;
    if (mask.empty() || y_begin >= y_end) continue;
    const int64_t w = mask.x.end - mask.x.begin;
    const int64_t first = paste_tap(mask.y, y_begin).low, last = paste_tap(mask.y, y_end - 1).high;
    columns.resize((last - first + 1) * w);  // [last - first + 1, w]
    for (int64_t i = first; i <= last; ++i)
      for (int64_t j = 0; j < w; ++j) columns[(i - first) * w + j] = mask.along_row(i, mask.x_taps[j]);
    for (int64_t y = y_begin; y < y_end; ++y) {
      const PasteTap<T> tap = paste_tap(mask.y, y);
      const T* low = columns.data() + (tap.low - first) * w;
      paint((n * problem.height + y) * problem.width + mask.x.begin, low, columns.data() + (tap.high - first) * w, tap.fraction, w);
    }
  }
}

// Runs of 0 and 1 in turn, starting with 0, as COCO stores them.
struct Runs {
  std::vector<int64_t> lengths;
  int64_t run = 0;
  bool value = false;

  void clear() {
    lengths.clear();
    run = 0;
    value = false;
  }

  void push(bool next, int64_t length) {
    if (next != value && length > 0) {
      lengths.push_back(run);
      run = 0;
      value = next;
    }
    run += length;
  }

  // COCO's compressed text.
  std::string counts() {
    lengths.push_back(run);
    return compress(lengths);
  }
};

// A stretch of pixels [begin, end) between cells `low` and `high`.
struct Stretch {
  int64_t low, high, begin, end;
};

template <typename T>
void push_column(const std::vector<T>& column, const std::vector<Stretch>& stretches, const std::vector<PasteTap<T>>& y_taps,
                 int64_t y_begin, T threshold, Runs& runs) {
  for (const Stretch& stretch : stretches) {
    const T low = column[stretch.low], high = column[stretch.high];
    // lerp() may leave [low, high] by rounding, by less than this. NaN and Inf fail both tests and are looked at pixel by pixel.
    const T slack = T(4) * std::numeric_limits<T>::epsilon() * (std::abs(low) + std::abs(high));
    if (std::max(low, high) + slack <= threshold && low == low && high == high) {
      runs.push(false, stretch.end - stretch.begin);
    } else if (std::min(low, high) - slack > threshold && low == low && high == high) {
      runs.push(true, stretch.end - stretch.begin);
    } else {
      for (int64_t y = stretch.begin; y < stretch.end; ++y) runs.push(lerp(low, high, y_taps[y - y_begin].fraction) > threshold, 1);
    }
  }
}

}  // namespace

template <typename T>
void paste_masks_cpu(const PasteMasks<T>& problem, T* output, int64_t begin, int64_t end) {
  for_each_row(problem, begin, end, [=](int64_t first, const T* __restrict low, const T* __restrict high, T fraction, int64_t w) {
    T* __restrict row = output + first;
    for (int64_t x = 0; x < w; ++x) row[x] = lerp(low[x], high[x], fraction);
  });
}

template <typename T>
void paste_masks_bool_cpu(const PasteMasks<T>& problem, T threshold, bool* output, int64_t begin, int64_t end) {
  for_each_row(problem, begin, end, [=](int64_t first, const T* __restrict low, const T* __restrict high, T fraction, int64_t w) {
    bool* __restrict row = output + first;
    for (int64_t x = 0; x < w; ++x) row[x] = lerp(low[x], high[x], fraction) > threshold;
  });
}

template <typename T>
void paste_masks_rle_cpu(const PasteMasks<T>& problem, T threshold, EmitCounts emit, void* context, int64_t begin, int64_t end) {
  const bool outside = T(0) > threshold;  // a negative threshold counts the picture outside the box as mask
  Runs runs;
  std::vector<T> column;
  std::vector<Stretch> stretches;
  std::vector<PasteTap<T>> y_taps;
  for (int64_t n = begin; n < end; ++n) {
    const PlacedMask<T> mask(problem, n);
    runs.clear();
    if (mask.empty()) {
      runs.push(outside, problem.height * problem.width);
    } else {
      const int64_t y_begin = mask.y.begin, y_end = mask.y.end;
      stretches.clear();
      y_taps.clear();
      for (int64_t y = y_begin; y < y_end; ++y) {
        const PasteTap<T> tap = paste_tap(mask.y, y);
        y_taps.push_back(tap);
        if (stretches.empty() || stretches.back().low != tap.low) stretches.push_back({tap.low, tap.high, y, y});
        stretches.back().end = y + 1;
      }
      const int64_t first = stretches.front().low, last = stretches.back().high;
      column.resize(mask.y.cells);
      runs.push(outside, mask.x.begin * problem.height);
      for (const PasteTap<T>& tap : mask.x_taps) {
        for (int64_t i = first; i <= last; ++i) column[i] = mask.along_row(i, tap);
        runs.push(outside, y_begin);
        push_column(column, stretches, y_taps, y_begin, threshold, runs);
        runs.push(outside, problem.height - y_end);
      }
      runs.push(outside, (problem.width - mask.x.end) * problem.height);
    }
    const std::string counts = runs.counts();
    emit(context, n, counts.data(), counts.size());
  }
}

#define INSTANTIATE(T)                                                                          \
  template void paste_masks_cpu<T>(const PasteMasks<T>&, T*, int64_t, int64_t);                 \
  template void paste_masks_bool_cpu<T>(const PasteMasks<T>&, T, bool*, int64_t, int64_t);      \
  template void paste_masks_rle_cpu<T>(const PasteMasks<T>&, T, EmitCounts, void*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
