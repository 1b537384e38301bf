// Mask pasting on a GPU. Read ../paste_masks.h first.
//
// The plain algorithm: one thread a pixel of the output, [N, H, W], which reads 4 cells if the pixel lies in its mask's box and writes one
// number. The masks are small (N x 28 x 28: they stay in the cache), so the bytes are the output's: 100 masks of 1024 x 1024 are
// 419 MB in float32, 105 MB as bool; and 9 flops a pixel inside a box (three blends of 3). By these numbers the bound is the write, as long
// as a thread's address arithmetic hides behind it.
// What is done about it: a thread owns 16 neighbouring bytes of a row (4 float32, 8 float16, 16 bool), writes them at once, zeros
// included, so that there is no separate fill, and finds its cells of the two mask rows once. Outside the box it does nothing else. Its
// place, (n, y, x), takes two divisions, of 32 bits where the count of pieces allows it.
// On an H200, 100 masks of 28 x 28 into 1024 x 1024: 0.58 ms in float32, a fifth of the copy bandwidth, torchvision 51 ms; 0.46 ms as bool
// (results/speed.md). The gain of each step alone is not measured.
#include "../paste_masks.h"

namespace minidamage {
namespace {

constexpr int THREADS = 256;

// Cell (i, j) of mask n with its border of zeros.
template <typename T>
MD_DEVICE accumulate_t<T> cell(const PasteMasks<accumulate_t<T>>& problem, int64_t n, int64_t i, int64_t j) {
  const int64_t y = i - problem.padding, x = j - problem.padding;
  if (y < 0 || y >= problem.mask_height || x < 0 || x >= problem.mask_width) return accumulate_t<T>(0);
  return to_accumulate(static_cast<const T*>(problem.masks)[(n * problem.mask_height + y) * problem.mask_width + x]);
}

// masks: [N, mask_height, mask_width]; output: [N, height, width]. Thread: V neighbouring pixels of a row, finish(value) each.
// Index holds the number of such pieces.
template <typename T, typename Out, int V, typename Index, typename Finish>
MD_DEVICE void paste_pixels(const PasteMasks<accumulate_t<T>>& problem, Out* __restrict__ output, Finish finish) {
  using A = accumulate_t<T>;
  const Index chunks = static_cast<Index>(problem.width / V), height = static_cast<Index>(problem.height);
  MD_GRID_STRIDE_OF(Index, index, problem.N * problem.height * (problem.width / V)) {
    const Index row = index / chunks, picture = row / height;
    const int64_t first = static_cast<int64_t>(index - row * chunks) * V, y = row - picture * height, n = picture;
    const int64_t* box = problem.boxes + 4 * n;
    const PasteAxis<A> axis_y = paste_axis<A>(box[1], box[3], problem.mask_height + 2 * problem.padding, problem.height);
    const PasteAxis<A> axis_x = paste_axis<A>(box[0], box[2], problem.mask_width + 2 * problem.padding, problem.width);
    const bool row_inside = y >= axis_y.begin && y < axis_y.end;
    const PasteTap<A> tap_y = paste_tap(axis_y, y);
    Pack<Out, V> pack;
    for (int v = 0; v < V; ++v) {
      const int64_t x = first + v;
      A value = A(0);
      if (row_inside && x >= axis_x.begin && x < axis_x.end) {
        const PasteTap<A> tap_x = paste_tap(axis_x, x);
        const A low = lerp(cell<T>(problem, n, tap_y.low, tap_x.low), cell<T>(problem, n, tap_y.low, tap_x.high), tap_x.fraction);
        const A high = lerp(cell<T>(problem, n, tap_y.high, tap_x.low), cell<T>(problem, n, tap_y.high, tap_x.high), tap_x.fraction);
        value = lerp(low, high, tap_y.fraction);
      }
      pack.v[v] = finish(from_accumulate<T>(value));
    }
    *reinterpret_cast<Pack<Out, V>*>(output + static_cast<int64_t>(index) * V) = pack;
  }
}

template <typename T, int V, typename Index>
__global__ void paste_masks_kernel(const PasteMasks<accumulate_t<T>> problem, T* __restrict__ output) {
  paste_pixels<T, T, V, Index>(problem, output, [](T value) { return value; });
}

template <typename T, int V, typename Index>
__global__ void paste_masks_bool_kernel(const PasteMasks<accumulate_t<T>> problem, T threshold, bool* __restrict__ output) {
  paste_pixels<T, bool, V, Index>(problem, output, [=](T value) { return value > threshold; });
}

template <typename T>
void launch_float(const PasteMasks<accumulate_t<T>>& problem, void* output, void* stream) {
  constexpr int WIDE = 16 / sizeof(T);
  const bool wide = problem.width % WIDE == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
  const int64_t pieces = problem.N * problem.height * problem.width / (wide ? WIDE : 1);
  const auto kernel = fits_int32(pieces) ? (wide ? &paste_masks_kernel<T, WIDE, uint32_t> : &paste_masks_kernel<T, 1, uint32_t>)
                                         : (wide ? &paste_masks_kernel<T, WIDE, int64_t> : &paste_masks_kernel<T, 1, int64_t>);
  MD_LAUNCH(kernel, blocks_for(pieces, THREADS), THREADS, 0, stream, problem, static_cast<T*>(output));
}

template <typename T>
void launch_bool(const PasteMasks<accumulate_t<T>>& problem, double threshold, bool* output, void* stream) {
  constexpr int WIDE = 16;
  const bool wide = problem.width % WIDE == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
  const int64_t pieces = problem.N * problem.height * problem.width / (wide ? WIDE : 1);
  const auto kernel = fits_int32(pieces) ? (wide ? &paste_masks_bool_kernel<T, WIDE, uint32_t> : &paste_masks_bool_kernel<T, 1, uint32_t>)
                                         : (wide ? &paste_masks_bool_kernel<T, WIDE, int64_t> : &paste_masks_bool_kernel<T, 1, int64_t>);
  MD_LAUNCH(kernel, blocks_for(pieces, THREADS), THREADS, 0, stream, problem, static_cast<T>(threshold), output);
}

}  // namespace

template <typename A>
void paste_masks_cuda(const PasteMasks<A>& problem, DType dtype, void* output, void* stream) {
  with_storage<A>(dtype, [&](auto zero) { launch_float<decltype(zero)>(problem, output, stream); });
}
template <typename A>
void paste_masks_bool_cuda(const PasteMasks<A>& problem, double threshold, bool* output, void* stream) {
  launch_bool<A>(problem, threshold, output, stream);
}

#define INSTANTIATE(A)                                                                  \
  template void paste_masks_cuda<A>(const PasteMasks<A>&, DType, void*, void*);         \
  template void paste_masks_bool_cuda<A>(const PasteMasks<A>&, double, bool*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
