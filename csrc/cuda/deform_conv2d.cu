// Deformable convolution on a GPU. Read ../deform_conv2d.h first, then ../cpu/deform_conv2d.cpp, the plain form.
//
// The plain algorithm (Dai et al.; every descendant): a thread owns one (position, channel) of an NCHW input, finds the corners of all K
// taps and writes K columns; a matrix product makes the output. Backward, a thread owns one column and adds four numbers to grad_input
// with atomics; another kernel owns one (position, tap, offset group) and loops over the channels, one thread, strided.
// Bytes at [2, 256, 64, 64], 3 x 3, 256 out, float32: input 8 MB, columns 75 MB written and read, output 8 MB; the four corners of a
// column come from the caches, 302 MB. Flops: 9.7 G in the product, 0.13 G here. So on a GPU the product is bound by arithmetic and
// these kernels by the caches: what counts is whole sectors, and finding a sample (two dozen instructions) once, not once a channel.
// What is done about it:
//  1. channels_last: a warp owns one sample (position, tap, offset group), its lanes 16 bytes of neighbouring channels each. The sample
//     is found once, and every load and store is a run of 512 bytes: 128 float32 channels, 256 of 16 bits.
//  2. Backward, the same warp adds to the four pixels of grad_input (four float32 in one atomic on sm_90) and takes the four dots of
//     grad_offset and grad_mask in the same pass, which shuffles add up: grad_columns is read once, and no second kernel walks channels.
//  3. The columns are tiled by the caller at 256 MiB; the products are the framework's (tensor cores).
//  4. Where a sample stands takes five divisions, and a pack of its column one: much beside the two packs a lane of 256 channels. They are
//     of 32 bits where the counts allow it (common.h). In nvcc 13's output for sm_90, float32, packs of 4, deform_columns has 690
//     instructions in place of 1121, deform_backward 732 of 1161, deform_cells_of 236 of 578, deform_gather 460 of 866, and the calls are
//     gone: 11, 9, 6 and 11 of the subroutine of a 64-bit division.
// Deterministic: only the additions to grad_input depend on the order of threads. In place of atomics each pixel gathers what its samples
// send, in the order of the samples: they are sorted by the cell they lie in (P K offset_groups keys of 8 bytes, 74 k at the size
// above), and a warp owns a pixel and an offset group and walks four cells, in the pictures that a tile of columns touches, once for every
// 128 channels (256 of 16 bits). It costs the sort
// and reads each column up to four times; it spares the read-modify-write of the atomics.
// On an H200, (2, 256, 64, 64), 3 x 3, version 2: forward 0.29 ms in float32 and 0.10 in bfloat16, torchvision 0.35 and 0.38; the
// deterministic backward takes 1.35 times the other's time (results/speed.md). The gain of each step alone is not measured.
#include "../deform_conv2d.h"

namespace minidamage {
namespace {

constexpr int THREADS = 256;

// The warps of the grid, in steps: for (w = this warp; w < count; w += all warps). Whole warps: the shuffles below need all lanes.
#define MD_WARP_STRIDE(Index, w, count)                                                                                      \
  for (Index w = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES; w < static_cast<Index>(count);         \
       w += static_cast<Index>(gridDim.x) * blockDim.x / LANES)

// Sample number `index` of a tile [count, offset_groups, K] that begins at position `first`. Index holds the number of samples, of pixels
// times offset_groups, and of channels: see is_narrow().
template <typename Index>
struct SampleIndex {
  Index position, q, k;  // position counted from `first`
  template <typename A>
  MD_DEVICE SampleIndex(const DeformConv2d<A>& problem, Index index) {
    const Index taps = static_cast<Index>(problem.taps()), groups = static_cast<Index>(problem.offset_groups), column = index / taps;
    k = index - column * taps, position = column / groups, q = column - position * groups;
  }
  template <typename A>
  MD_DEVICE GridPlace place(const DeformConv2d<A>& problem, int64_t first) const {
    return grid_place(problem, static_cast<Index>(first) + position, q, k);
  }
};

// Where channel c of a column stands in columns [groups, count, K, C / groups].
template <typename Index, typename A>
MD_DEVICE int64_t column_index(const DeformConv2d<A>& problem, int64_t count, const SampleIndex<Index>& at, int64_t c) {
  const Index channels = problem.template group_channels<Index>(), g = static_cast<Index>(c) / channels;
  return ((g * count + at.position) * problem.taps() + at.k) * channels + (c - g * channels);
}

template <typename T, int V, typename A>
MD_DEVICE void load_pack(const T* address, A* values) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(address);
  for (int v = 0; v < V; ++v) values[v] = to_accumulate(pack.v[v]);
}

// input [N, H, W, C]; columns [groups, count, K, C / groups]. Warp: one sample. Lane: V neighbouring channels at a time.
template <typename T, int V, typename Index>
__global__ void deform_columns(const DeformConv2d<accumulate_t<T>> problem, const T* __restrict__ input, int64_t first, int64_t count,
                               T* __restrict__ columns) {
  using A = accumulate_t<T>;
  const int64_t C = problem.C;
  const Index channels = problem.template offset_channels<Index>();
  MD_WARP_STRIDE(Index, index, count * problem.offset_groups * problem.taps()) {
    const SampleIndex<Index> at(problem, index);
    const GridPlace place = at.place(problem, first);
    Sample<A> sample = {};
    const bool inside = find_sample(problem, place, sample);
    const T* picture = input + place.n * problem.H * problem.W * C;
    int64_t pixel[4];
    A weight[4];
    for (int i = 0; i < 4; ++i) {
      pixel[i] = inside ? corner_pixel(problem, sample, i) : -1;
      weight[i] = pixel[i] >= 0 ? sample.mask * corner_weight(sample, i) : A(0);
    }
    for (int64_t c = at.q * channels + threadIdx.x % LANES * V; c < (at.q + 1) * channels; c += LANES * V) {
      A sum[V];
      for (int v = 0; v < V; ++v) sum[v] = inside ? A(0) : sample.mask * A(0);  // a mask of NaN shows
      for (int i = 0; i < 4; ++i) {
        if (pixel[i] < 0) continue;
        A row[V];
        load_pack<T, V>(picture + pixel[i] * C + c, row);
        for (int v = 0; v < V; ++v) sum[v] += weight[i] * row[v];
      }
      Pack<T, V> result;
      for (int v = 0; v < V; ++v) result.v[v] = from_accumulate<T>(sum[v]);
      *reinterpret_cast<Pack<T, V>*>(columns + column_index(problem, count, at, c)) = result;
    }
  }
}

// grad_columns [groups, count, K, C / groups]; grad_input [N, H, W, C], added to unless null; grad_offset [P, offset_groups, K, 2];
// grad_mask [P, offset_groups, K] or null. Warp: one sample. Lane: V neighbouring channels at a time, then the lanes' dots are added up.
template <typename T, int V, typename Index>
__global__ void deform_backward(const DeformConv2d<accumulate_t<T>> problem, const T* __restrict__ input,
                                const T* __restrict__ grad_columns, int64_t first, int64_t count, accumulate_t<T>* grad_input,
                                accumulate_t<T>* __restrict__ grad_offset, accumulate_t<T>* __restrict__ grad_mask) {
  using A = accumulate_t<T>;
  const int64_t C = problem.C;
  const Index channels = problem.template offset_channels<Index>();
  const int lane = threadIdx.x % LANES;
  MD_WARP_STRIDE(Index, index, count * problem.offset_groups * problem.taps()) {
    const SampleIndex<Index> at(problem, index);
    const GridPlace place = at.place(problem, first);
    Sample<A> sample = {};
    const bool inside = find_sample(problem, place, sample);  // the same for all lanes
    A dots[4] = {};
    if (inside) {
      const int64_t picture = place.n * problem.H * problem.W * C;
      for (int64_t c = at.q * channels + lane * V; c < (at.q + 1) * channels; c += LANES * V) {
        A gradient[V], row[V];
        load_pack<T, V>(grad_columns + column_index(problem, count, at, c), gradient);
        for (int i = 0; i < 4; ++i) {
          const int64_t pixel = corner_pixel(problem, sample, i);
          if (pixel < 0) continue;
          load_pack<T, V>(input + picture + pixel * C + c, row);
          for (int v = 0; v < V; ++v) dots[i] += gradient[v] * row[v];
          if (!grad_input) continue;
          const A weight = sample.mask * corner_weight(sample, i);
          for (int v = 0; v < V; ++v) row[v] = weight * gradient[v];
          atomic_add_row<V>(grad_input + picture + pixel * C + c, row);
        }
      }
    }
    for (int i = 0; i < 4; ++i) dots[i] = sum_of_warp(dots[i]);
    if (lane > 0) continue;
    SampleGradient<A> result = {};
    if (inside) result = sample_gradient(sample, dots);
    grad_offset[2 * place.index] = result.y, grad_offset[2 * place.index + 1] = result.x;
    if (grad_mask) grad_mask[place.index] = result.mask;
  }
}

// cells [count, offset_groups, K]. Thread: one sample.
template <typename A, typename Index>
__global__ void deform_cells_of(const DeformConv2d<A> problem, int64_t first, int64_t count, int64_t* __restrict__ cells) {
  MD_GRID_STRIDE_OF(Index, index, count * problem.offset_groups * problem.taps()) {
    const SampleIndex<Index> at(problem, index);
    const GridPlace place = at.place(problem, first);
    Sample<A> sample = {};
    const bool inside = find_sample(problem, place, sample);
    cells[index] = inside ? ((place.n * problem.offset_groups + at.q) * (problem.H + 1) + sample.y + 1) * (problem.W + 1) + sample.x + 1
                          : deform_cells(problem);
  }
}

// order [count offset_groups K], starts [deform_cells() + 1]; grad_input [N, H, W, C], added to. Warp: one pixel and offset group. Lane: V
// neighbouring channels at a time.
template <typename T, int V, typename Index>
__global__ void deform_gather(const DeformConv2d<accumulate_t<T>> problem, const T* __restrict__ grad_columns, int64_t first,
                              int64_t count, const int64_t* __restrict__ order, const int64_t* __restrict__ starts,
                              accumulate_t<T>* __restrict__ grad_input) {
  using A = accumulate_t<T>;
  const int64_t H = problem.H, W = problem.W;
  const Index channels = problem.template offset_channels<Index>(), groups = static_cast<Index>(problem.offset_groups);
  const Index width = static_cast<Index>(W), height = static_cast<Index>(H);
  MD_WARP_STRIDE(Index, index, problem.N * H * W * problem.offset_groups) {
    const Index pixel = index / groups, row = pixel / width, n = row / height;  // pixel and row counted through the pictures
    const int64_t q = index - pixel * groups, x = pixel - row * width, y = row - n * height;
    for (int64_t c = q * channels + threadIdx.x % LANES * V; c < (q + 1) * channels; c += LANES * V) {
      A* target = grad_input + pixel * problem.C + c;
      A sum[V];
      for (int v = 0; v < V; ++v) sum[v] = target[v];
      for (int i = 0; i < 4; ++i) {  // the pixel is corner i of the cell
        const int64_t cell = ((n * problem.offset_groups + q) * (H + 1) + y + 1 - i / 2) * (W + 1) + x + 1 - i % 2;
        for (int64_t s = starts[cell]; s < starts[cell + 1]; ++s) {
          const SampleIndex<Index> at(problem, static_cast<Index>(order[s]));
          Sample<A> sample;
          if (!find_sample(problem, at.place(problem, first), sample)) continue;
          const A weight = sample.mask * corner_weight(sample, i);
          A gradient[V];
          load_pack<T, V>(grad_columns + column_index(problem, count, at, c), gradient);
          for (int v = 0; v < V; ++v) sum[v] += weight * gradient[v];
        }
      }
      for (int v = 0; v < V; ++v) target[v] = sum[v];
    }
  }
}

// 16 bytes a lane where no pack crosses a group and all addresses allow it.
template <typename T, typename... Pointers>
bool is_wide(const DeformConv2d<accumulate_t<T>>& problem, Pointers... pointers) {
  constexpr int V = 16 / sizeof(T);
  return problem.offset_channels() % V == 0 && problem.group_channels() % V == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Whether 32 bits hold every count that a kernel divides.
template <typename A>
bool is_narrow(const DeformConv2d<A>& problem) {
  return fits_int32(problem.positions() * problem.offset_groups * problem.taps()) &&
         fits_int32(problem.N * problem.H * problem.W * problem.offset_groups) && fits_int32(problem.C);
}

unsigned blocks_of_warps(int64_t warps) { return blocks_for(warps * LANES, THREADS); }

}  // namespace

template <typename A>
void deform_columns_cuda(const DeformConv2d<A>& problem, DType dtype, const void* input, int64_t first, int64_t count, void* columns,
                         void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const bool wide = is_wide<T>(problem, input, columns);
    const auto kernel = is_narrow(problem) ? (wide ? &deform_columns<T, V, uint32_t> : &deform_columns<T, 1, uint32_t>)
                                           : (wide ? &deform_columns<T, V, int64_t> : &deform_columns<T, 1, int64_t>);
    MD_LAUNCH(kernel, blocks_of_warps(count * problem.offset_groups * problem.taps()), THREADS, 0, stream, problem,
              static_cast<const T*>(input), first, count, static_cast<T*>(columns));
  });
}

template <typename A>
void deform_backward_cuda(const DeformConv2d<A>& problem, DType dtype, const void* input, const void* grad_columns, int64_t first,
                          int64_t count, A* grad_input, A* grad_offset, A* grad_mask, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const bool wide = is_wide<T>(problem, input, grad_columns, static_cast<const void*>(grad_input));
    const auto kernel = is_narrow(problem) ? (wide ? &deform_backward<T, V, uint32_t> : &deform_backward<T, 1, uint32_t>)
                                           : (wide ? &deform_backward<T, V, int64_t> : &deform_backward<T, 1, int64_t>);
    MD_LAUNCH(kernel, blocks_of_warps(count * problem.offset_groups * problem.taps()), THREADS, 0, stream, problem,
              static_cast<const T*>(input), static_cast<const T*>(grad_columns), first, count, grad_input, grad_offset, grad_mask);
  });
}

template <typename A>
void deform_cells_cuda(const DeformConv2d<A>& problem, int64_t first, int64_t count, int64_t* cells, void* stream) {
  const auto kernel = is_narrow(problem) ? &deform_cells_of<A, uint32_t> : &deform_cells_of<A, int64_t>;
  MD_LAUNCH(kernel, blocks_for(count * problem.offset_groups * problem.taps(), THREADS), THREADS, 0, stream, problem, first, count, cells);
}

template <typename A>
void deform_gather_cuda(const DeformConv2d<A>& problem, DType dtype, const void* grad_columns, int64_t first, int64_t count,
                        const int64_t* order, const int64_t* starts, A* grad_input, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const bool wide = is_wide<T>(problem, grad_columns, static_cast<const void*>(grad_input));
    const auto kernel = is_narrow(problem) ? (wide ? &deform_gather<T, V, uint32_t> : &deform_gather<T, 1, uint32_t>)
                                           : (wide ? &deform_gather<T, V, int64_t> : &deform_gather<T, 1, int64_t>);
    MD_LAUNCH(kernel, blocks_of_warps(problem.N * problem.H * problem.W * problem.offset_groups), THREADS, 0, stream, problem,
              static_cast<const T*>(grad_columns), first, count, order, starts, grad_input);
  });
}

#define INSTANTIATE(A)                                                                                                                \
  template void deform_columns_cuda<A>(const DeformConv2d<A>&, DType, const void*, int64_t, int64_t, void*, void*);                   \
  template void deform_backward_cuda<A>(const DeformConv2d<A>&, DType, const void*, const void*, int64_t, int64_t, A*, A*, A*, void*); \
  template void deform_cells_cuda<A>(const DeformConv2d<A>&, int64_t, int64_t, int64_t*, void*);                                      \
  template void deform_gather_cuda<A>(const DeformConv2d<A>&, DType, const void*, int64_t, int64_t, const int64_t*, const int64_t*,   \
                                      A*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
