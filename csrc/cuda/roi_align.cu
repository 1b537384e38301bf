// RoIAlign on a GPU. Read ../roi_align.h first, then ../cpu/roi_align.cpp, the plain form.
//
// The plain algorithm: each thread owns one output element (r, c, p, q) and adds up grid_h x grid_w bilinear samples, 4 loads each. At two
// samples a bin that is 16 loads, 32 flops and two dozen index operations an element, and the 4 loads of a sample in NCHW lie on two
// rows of one channel: neighbouring threads read neighbouring bins, far apart, 4 useful bytes of each 32-byte sector.
// What is done about it:
//  1. channels_last, 16 bytes a thread (4 float32 or 8 float16 neighbouring channels): a warp reads 512 consecutive bytes, all useful.
//  2. Positions and weights do not depend on the channel: a block owns one row of bins of one RoI, (r, p), and builds its taps once in
//     shared memory. Samples that meet at a pixel are merged: a bin of one or two pixels, which is what an FPN's level assignment
//     gives, reads 4 to 9 pixels in place of 16.
//  3. An index is taken apart in 32 bits where it fits (common.h counts the instructions).
// Bytes for R RoIs: the output once, R PH PW C elements; features, each touched pixel once from memory and 4 to 16 times per
// bin from the caches. 1,000 RoIs, 7 x 7, C = 256, float32: 50 MB out, at most 28 x 28 KB x 1,000 = 784 MB through the cache; in float16
// half. Arithmetic, 2 flops a load, is under 0.5 flop a byte: the bound is the cache, and that is what the two points above spare.
// Backward, by default: the same walk with atomic adds, in float32 whatever the dtype; 4 at once on sm_90. Deterministic: each
// thread owns 16 bytes of one pixel of the gradient and looks for the RoIs that touch its tile, in order. No atomics, no zero fill, no
// float32 copy of a float16 gradient; it pays R (tiles) box tests, and adds up overlapping RoIs one after the other in one block.
// On an H200, 1,024 RoIs of 7 x 7 on (2, 256, 200, 200), float32: forward 0.11 ms, torchvision 0.35; backward 0.36 ms, in the deterministic
// form 3.7 (results/speed.md). The gain of each step alone is not measured.
#include "../roi_align.h"

namespace minidamage {
namespace {

constexpr int THREADS = 128;
constexpr int64_t MOST_TAPS = 16;             // merged taps of a bin that are kept; more (adaptive bins of 15 pixels): sample by sample
constexpr size_t TABLE_BYTES = 40 << 10;      // shared memory for taps
constexpr int TILE = ROI_ALIGN_TILE;

template <typename A>
struct Tap {
  A weight;
  int pixel;
};

// Shared memory of a block: the taps of Ay[p] (bin 0) and of Ax (bins 1 .. PW), at most `capacity` each, and how many; -1: too many.
template <typename A>
struct TapTable {
  Tap<A>* taps;  // [1 + PW, capacity]
  int* counts;   // [1 + PW]
  int capacity;

  MD_DEVICE TapTable(unsigned char* shared, int64_t PW, int capacity)
      : taps(reinterpret_cast<Tap<A>*>(shared)), counts(reinterpret_cast<int*>(taps + (1 + PW) * capacity)), capacity(capacity) {}
};

template <typename A>
size_t table_bytes(int64_t PW, int capacity) {
  return static_cast<size_t>(1 + PW) * (capacity * sizeof(Tap<A>) + sizeof(int));
}

template <typename A>
int table_capacity(int64_t PW) {
  const int64_t fits = static_cast<int64_t>(TABLE_BYTES / sizeof(Tap<A>)) / (1 + PW);
  return static_cast<int>(fits < MOST_TAPS ? fits : MOST_TAPS);
}

// One thread: the taps of bin p of an axis into one row of the table.
template <typename A>
MD_DEVICE int fill_taps(const RoiAxis<A>& axis, int64_t p, int64_t size, Tap<A>* taps, int capacity) {
  int count = 0;
  int64_t first, last;
  sample_range(axis, p, size, first, last);
  for (int64_t i = first; i < last; ++i) {
    AxisTaps<A> sample;
    if (!clamped_taps(sample_position(axis, p, i), size, sample)) continue;
    for (int side = 0; side < 2; ++side) {
      const int pixel = static_cast<int>(side ? sample.high : sample.low);
      const A weight = side ? sample.weight_high : sample.weight_low;
      int k = count - 1;
      while (k >= 0 && k > count - 3 && taps[k].pixel != pixel) --k;
      if (k >= 0 && k > count - 3) {
        taps[k].weight += weight;
      } else if (count == capacity) {
        return -1;
      } else {
        taps[count].pixel = pixel;
        taps[count++].weight = weight;
      }
    }
  }
  return count;
}

// All threads of a block: fills the table for row p of RoI r. Barriers: one, at the end.
template <typename A>
MD_DEVICE void fill_table(const TapTable<A>& table, const RoiAxis<A>& axis_y, const RoiAxis<A>& axis_x, const FeatureLevel& level,
                          int64_t p, int64_t PW) {
  for (int64_t b = threadIdx.x; b <= PW; b += blockDim.x) {
    Tap<A>* taps = table.taps + b * table.capacity;
    table.counts[b] = b == 0 ? fill_taps(axis_y, p, level.height, taps, table.capacity)
                             : fill_taps(axis_x, b - 1, level.width, taps, table.capacity);
  }
  __syncthreads();
}

// Calls visit(pixel index in the picture, weight) for every pixel of bin (p, q), weights without the 1 / count.
template <typename A, typename Visit>
MD_DEVICE void for_each_tap(const TapTable<A>& table, const RoiAxis<A>& axis_y, const RoiAxis<A>& axis_x, const FeatureLevel& level,
                            int64_t p, int64_t q, Visit visit) {
  const int count_y = table.counts[0], count_x = table.counts[1 + q];
  if (count_y >= 0 && count_x >= 0) {
    const Tap<A>* taps_x = table.taps + (1 + q) * table.capacity;
    for (int i = 0; i < count_y; ++i) {
      const Tap<A> y = table.taps[i];
      for (int j = 0; j < count_x; ++j) visit(y.pixel * level.width + taps_x[j].pixel, y.weight * taps_x[j].weight);
    }
    return;
  }
  int64_t first_y, last_y, first_x, last_x;
  sample_range(axis_y, p, level.height, first_y, last_y);
  sample_range(axis_x, q, level.width, first_x, last_x);
  for (int64_t i = first_y; i < last_y; ++i) {
    AxisTaps<A> y, x;
    if (!clamped_taps(sample_position(axis_y, p, i), level.height, y)) continue;
    for (int64_t j = first_x; j < last_x; ++j) {
      if (!clamped_taps(sample_position(axis_x, q, j), level.width, x)) continue;
      visit(y.low * level.width + x.low, y.weight_low * x.weight_low);
      visit(y.low * level.width + x.high, y.weight_low * x.weight_high);
      visit(y.high * level.width + x.low, y.weight_high * x.weight_low);
      visit(y.high * level.width + x.high, y.weight_high * x.weight_high);
    }
  }
}

// levels[l].data: [N, H, W, C]; output: [R, PH, PW, C]. Block: one row of bins (r, p). Thread: V neighbouring channels of a bin.
// Index holds PW C. A grid has less than 2^31 blocks, so (r, p) are found in 32 bits whatever Index is.
template <typename T, int V, typename Index>
__global__ void roi_align_forward(const RoiAlign<accumulate_t<T>> problem, T* __restrict__ output, int capacity) {
  using A = accumulate_t<T>;
  MD_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t PW = problem.PW, C = problem.C;
  const unsigned PH = static_cast<unsigned>(problem.PH);
  const int64_t r = blockIdx.x / PH, p = blockIdx.x % PH;
  const Index chunks = static_cast<Index>(C / V), pieces = static_cast<Index>(PW) * chunks;
  T* row = output + blockIdx.x * PW * C;  // [PW, C]
  int64_t l, n;
  if (!find_picture(problem, r, l, n)) {
    for (int64_t k = threadIdx.x; k < PW * C; k += blockDim.x) row[k] = from_accumulate<T>(A(NAN));
    return;
  }
  const FeatureLevel level = problem.levels[l];
  const T* picture = static_cast<const T*>(level.data) + n * level.height * level.width * C;
  RoiAxis<A> axis_y, axis_x;
  roi_axes(problem, r, l, axis_y, axis_x);
  const TapTable<A> table(shared, PW, capacity);
  fill_table(table, axis_y, axis_x, level, p, PW);
  const A scale = bin_weight(axis_y, axis_x);
  for (Index k = threadIdx.x; k < pieces; k += blockDim.x) {
    const Index bin = k / chunks;
    const int64_t q = bin, c = static_cast<int64_t>(k - bin * chunks) * V;
    A sum[V] = {};
    for_each_tap(table, axis_y, axis_x, level, p, q, [&](int64_t pixel, A weight) {
      const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(picture + pixel * C + c);
      for (int v = 0; v < V; ++v) sum[v] += weight * to_accumulate(pack.v[v]);
    });
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.v[v] = from_accumulate<T>(sum[v] * scale);
    *reinterpret_cast<Pack<T, V>*>(row + q * C + c) = result;
  }
}

// grad_output: [R, PH, PW, C]; levels[l].data: [N, H, W, C] of A, zeroed before. Block and thread as in roi_align_forward.
template <typename T, int V, typename Index>
__global__ void roi_align_backward(const RoiAlign<accumulate_t<T>> problem, const T* __restrict__ grad_output, int capacity) {
  using A = accumulate_t<T>;
  MD_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t PW = problem.PW, C = problem.C;
  const unsigned PH = static_cast<unsigned>(problem.PH);
  const int64_t r = blockIdx.x / PH, p = blockIdx.x % PH;
  const Index chunks = static_cast<Index>(C / V), pieces = static_cast<Index>(PW) * chunks;
  int64_t l, n;
  if (!find_picture(problem, r, l, n)) return;
  const FeatureLevel level = problem.levels[l];
  A* picture = static_cast<A*>(level.data) + n * level.height * level.width * C;
  RoiAxis<A> axis_y, axis_x;
  roi_axes(problem, r, l, axis_y, axis_x);
  const TapTable<A> table(shared, PW, capacity);
  fill_table(table, axis_y, axis_x, level, p, PW);
  const A scale = bin_weight(axis_y, axis_x);
  const T* row = grad_output + blockIdx.x * PW * C;  // [PW, C]
  for (Index k = threadIdx.x; k < pieces; k += blockDim.x) {
    const Index bin = k / chunks;
    const int64_t q = bin, c = static_cast<int64_t>(k - bin * chunks) * V;
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(row + q * C + c);
    A grad[V];
    for (int v = 0; v < V; ++v) grad[v] = to_accumulate(pack.v[v]) * scale;
    for_each_tap(table, axis_y, axis_x, level, p, q, [&](int64_t pixel, A weight) {
      A part[V];
      for (int v = 0; v < V; ++v) part[v] = grad[v] * weight;
      atomic_add_row<V>(picture + pixel * C + c, part);
    });
  }
}

// Where the tiles of each level begin in the grid.
struct Tiles {
  int64_t first[MAX_FEATURE_LEVELS + 1];
};

// False if an axis of the box surely has no tap in pixels [begin, begin + TILE): a quick test, one pixel of slack on each side.
template <typename A>
MD_DEVICE bool may_touch(const RoiAxis<A>& axis, int64_t bins, int64_t begin, int64_t size) {
  if (!is_finite_axis(axis)) return false;
  const A first = axis.start, last = axis.start + A(bins) * axis.bin;
  const A low = first < last ? first : last, high = first < last ? last : first;
  const bool at_start = begin == 0, at_end = begin + TILE >= size;  // the border pixel takes the samples up to one pixel outside
  return high > A(begin) - A(at_start ? 3 : 2) && low < A(begin + TILE) + A(at_end ? 3 : 2);
}

// Ay[p, pixel]: the weight of one pixel in bin p.
template <typename A>
MD_DEVICE A weight_of_pixel(const RoiAxis<A>& axis, int64_t p, int64_t size, int64_t pixel) {
  A weight = A(0);
  int64_t first, last;
  sample_range(axis, p, size, first, last);
  for (int64_t i = first; i < last; ++i) {
    AxisTaps<A> sample;
    if (!clamped_taps(sample_position(axis, p, i), size, sample)) continue;
    if (sample.low == pixel) weight += sample.weight_low;
    if (sample.high == pixel) weight += sample.weight_high;
  }
  return weight;
}

// grad_output: [R, PH, PW, C]; levels[l].data: [N, H, W, C] of T, overwritten. Block (LANES, TILE * TILE): a tile of TILE x TILE pixels of
// a picture, LANES * V channels. Thread: V neighbouring channels of one pixel. RoIs are added in increasing r.
template <typename T, int V>
__global__ void __launch_bounds__(LANES * TILE * TILE, 1)
    roi_align_backward_tiles(const RoiAlign<accumulate_t<T>> problem, const T* __restrict__ grad_output, const Tiles tiles) {
  using A = accumulate_t<T>;
  MD_DYNAMIC_SHARED(A, weights);  // [TILE, PH] of the rows, [TILE, PW] of the columns
  __shared__ int64_t matches[LANES * TILE * TILE];
  __shared__ int counts[TILE * TILE];
  const int64_t PH = problem.PH, PW = problem.PW, C = problem.C;
  int64_t l = 0;
  while (static_cast<int64_t>(blockIdx.x) >= tiles.first[l + 1]) ++l;
  const FeatureLevel level = problem.levels[l];
  const unsigned across = static_cast<unsigned>(ceil_div(level.width, TILE)), down = static_cast<unsigned>(ceil_div(level.height, TILE));
  const unsigned tile = static_cast<unsigned>(blockIdx.x - tiles.first[l]), tile_row = tile / across;  // a grid has less than 2^31 blocks
  const int64_t n = tile_row / down, y0 = static_cast<int64_t>(tile_row % down) * TILE, x0 = static_cast<int64_t>(tile % across) * TILE;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * LANES + lane, threads = LANES * TILE * TILE;
  const int i = warp / TILE, j = warp % TILE;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * LANES + lane) * V;
  const bool owns = y0 + i < level.height && x0 + j < level.width && c < C;
  A sum[V] = {};
  for (int64_t base = 0; base < problem.R; base += threads) {
    // Which of these RoIs touch the tile, in order: a vote of each warp, then each warp after the ones before it.
    int64_t roi_level, roi_n;
    bool touches = base + thread < problem.R && find_picture(problem, base + thread, roi_level, roi_n) && roi_level == l && roi_n == n;
    if (touches) {
      RoiAxis<A> axis_y, axis_x;
      roi_axes(problem, base + thread, l, axis_y, axis_x);
      touches = may_touch(axis_y, PH, y0, level.height) && may_touch(axis_x, PW, x0, level.width);
    }
    const unsigned votes = __ballot_sync(ALL_LANES, touches);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = 0, matched = 0;
    for (int w = 0; w < TILE * TILE; ++w) {
      if (w == warp) before = matched;
      matched += counts[w];
    }
    if (touches) matches[before + __popc(votes & ((1u << lane) - 1u))] = base + thread;
    __syncthreads();
    for (int m = 0; m < matched; ++m) {
      const int64_t r = matches[m];
      RoiAxis<A> axis_y, axis_x;
      roi_axes(problem, r, l, axis_y, axis_x);
      const int rows = static_cast<int>(PH), columns = static_cast<int>(PW);  // at most ROI_ALIGN_MAX_BINS
      for (int k = thread; k < TILE * (rows + columns); k += threads) {
        const int column = k - TILE * rows;
        weights[k] = column < 0 ? weight_of_pixel(axis_y, k % rows, level.height, y0 + k / rows)
                                : weight_of_pixel(axis_x, column % columns, level.width, x0 + column / columns);
      }
      __syncthreads();
      if (owns) {
        const A scale = bin_weight(axis_y, axis_x);
        const T* grad = grad_output + r * PH * PW * C + c;
        for (int64_t p = 0; p < PH; ++p) {
          const A weight_y = weights[i * PH + p] * scale;
          if (weight_y == A(0)) continue;
          for (int64_t q = 0; q < PW; ++q) {
            const A weight = weight_y * weights[TILE * PH + j * PW + q];
            if (weight == A(0)) continue;
            const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(grad + (p * PW + q) * C);
            for (int v = 0; v < V; ++v) sum[v] += weight * to_accumulate(pack.v[v]);
          }
        }
      }
      __syncthreads();  // before the weights are overwritten
    }
  }
  if (!owns) return;
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result.v[v] = from_accumulate<T>(sum[v]);
  T* pixel = static_cast<T*>(level.data) + ((n * level.height + y0 + i) * level.width + x0 + j) * C + c;
  *reinterpret_cast<Pack<T, V>*>(pixel) = result;
}

enum class Pass { forward, backward, backward_tiles };

template <typename T, int V>
void launch(Pass pass, const RoiAlign<accumulate_t<T>>& problem, void* array, void* stream) {
  using A = accumulate_t<T>;
  if (pass == Pass::backward_tiles) {
    Tiles tiles = {};
    for (int64_t l = 0; l < problem.level_count; ++l) {
      const FeatureLevel& level = problem.levels[l];
      tiles.first[l + 1] = tiles.first[l] + roi_align_tiles(problem.N, level.height, level.width);
    }
    const dim3 grid(static_cast<unsigned>(tiles.first[problem.level_count]), static_cast<unsigned>(ceil_div(problem.C, LANES * V)));
    const size_t bytes = TILE * (problem.PH + problem.PW) * sizeof(A);
    const auto kernel = &roi_align_backward_tiles<T, V>;
    MD_LAUNCH(kernel, grid, dim3(LANES, TILE * TILE), bytes, stream, problem, static_cast<const T*>(array), tiles);
    return;
  }
  const unsigned blocks = static_cast<unsigned>(problem.R * problem.PH);
  const int capacity = table_capacity<A>(problem.PW);
  const size_t bytes = table_bytes<A>(problem.PW, capacity);
  const bool narrow = fits_int32(problem.PW * problem.C);
  if (pass == Pass::forward) {
    const auto kernel = narrow ? &roi_align_forward<T, V, uint32_t> : &roi_align_forward<T, V, int64_t>;
    MD_LAUNCH(kernel, blocks, THREADS, bytes, stream, problem, static_cast<T*>(array), capacity);
  } else {
    const auto kernel = narrow ? &roi_align_backward<T, V, uint32_t> : &roi_align_backward<T, V, int64_t>;
    MD_LAUNCH(kernel, blocks, THREADS, bytes, stream, problem, static_cast<const T*>(array), capacity);
  }
}

// 16 bytes a thread where the channels and the addresses allow it.
template <typename T>
void launch_widest(Pass pass, const RoiAlign<accumulate_t<T>>& problem, void* array, void* stream) {
  constexpr int V = 16 / sizeof(T);
  bool wide = problem.C % V == 0 && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  for (int64_t l = 0; l < problem.level_count; ++l) wide = wide && reinterpret_cast<uintptr_t>(problem.levels[l].data) % 16 == 0;
  wide ? launch<T, V>(pass, problem, array, stream) : launch<T, 1>(pass, problem, array, stream);
}

template <typename A>
void dispatch(Pass pass, const RoiAlign<A>& problem, DType dtype, void* array, void* stream) {
  with_storage<A>(dtype, [&](auto zero) { launch_widest<decltype(zero)>(pass, problem, array, stream); });
}

}  // namespace

template <typename A>
void roi_align_cuda(const RoiAlign<A>& problem, DType dtype, void* output, void* stream) {
  dispatch(Pass::forward, problem, dtype, output, stream);
}
template <typename A>
void roi_align_backward_cuda(const RoiAlign<A>& problem, DType dtype, const void* grad_output, void* stream) {
  dispatch(Pass::backward, problem, dtype, const_cast<void*>(grad_output), stream);
}
template <typename A>
void roi_align_backward_deterministic_cuda(const RoiAlign<A>& problem, DType dtype, const void* grad_output, void* stream) {
  dispatch(Pass::backward_tiles, problem, dtype, const_cast<void*>(grad_output), stream);
}

#define INSTANTIATE(A)                                                                          \
  template void roi_align_cuda<A>(const RoiAlign<A>&, DType, void*, void*);                     \
  template void roi_align_backward_cuda<A>(const RoiAlign<A>&, DType, const void*, void*);      \
  template void roi_align_backward_deterministic_cuda<A>(const RoiAlign<A>&, DType, const void*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
