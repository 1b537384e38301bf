// RoI max pooling on a GPU. Read ../roi_pool.h first, then ../cpu/roi_pool.cpp, the plain form.
//
// The plain algorithm: a thread owns one output element (r, c, p, q), works out its bin with four divisions of 64-bit integers, and
// reads the bin's pixels; in NCHW the threads of a warp read neighbouring bins of one channel, scattered 4-byte loads.
// Bytes for R RoIs: output and argmax once, R PH PW C (4 + 4); features: each pixel of each box, mostly from the caches. 1,000 RoIs of
// 14 x 14 pixels, 7 x 7 bins, C = 256, float32: 100 MB written, 200 MB read through the caches. One comparison to 4 bytes: the bound is
// the memory and the caches.
// What is done about it:
//  1. channels_last, 16 bytes a thread: a warp reads 512 consecutive bytes of a pixel.
//  2. The index is taken apart in 32 bits where the count allows it.
// Backward, by default: a thread an element, one atomic add; neighbouring channels mostly add to neighbouring addresses. Deterministic: a
// warp owns a pixel of the gradient, 32 channels, and gathers from the bins that hold the pixel, RoI by RoI in order; no zero fill and no
// float32 copy of a float16 gradient, but R box tests a warp, and argmax read once for every pixel of a bin in place of once.
// On an H200, 512 RoIs of 7 x 7 on (2, 256, 100, 100), float32: forward 0.076 ms, torchvision 0.12; with its gradient 0.42 and 0.22
// (results/speed.md). The gain of each step, and the price of the deterministic form, are not measured.
#include "../roi_pool.h"

namespace minidamage {
namespace {

constexpr int THREADS = 256;

// input: [N, H, W, C]; output, argmax: [R, PH, PW, C]. Thread: V neighbouring channels of a bin.
template <typename T, int V, typename Index>
__global__ void roi_pool_forward(const RoiPool<accumulate_t<T>> problem, const T* __restrict__ input, T* __restrict__ output,
                                 int32_t* __restrict__ argmax) {
  using A = accumulate_t<T>;
  const int64_t H = problem.H, W = problem.W, C = problem.C;
  const Index chunks = static_cast<Index>(C / V), PH = static_cast<Index>(problem.PH), PW = static_cast<Index>(problem.PW);
  MD_GRID_STRIDE_OF(Index, index, problem.R * problem.PH * problem.PW * (C / V)) {
    const Index bin = index / chunks, row = bin / PW, q = bin - row * PW;
    const int64_t c = static_cast<int64_t>(index - bin * chunks) * V, r = row / PH, p = row % PH;
    A best[V];
    Pack<int32_t, V> position;
    int64_t n = 0, y0 = 0, y1 = 0, x0 = 0, x1 = 0;
    const bool exists = find_pool_picture(problem, r, n);
    if (exists) {
      PoolAxis<A> axis_y, axis_x;
      pool_axes(problem, r, axis_y, axis_x);
      pool_range(axis_y, p, H, y0, y1);
      pool_range(axis_x, static_cast<int64_t>(q), W, x0, x1);
    }
    for (int v = 0; v < V; ++v) best[v] = exists ? A(0) : A(NAN), position.v[v] = -1;
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x) {
        const Pack<T, V> pixel = *reinterpret_cast<const Pack<T, V>*>(input + ((n * H + y) * W + x) * C + c);
        for (int v = 0; v < V; ++v) {
          const A value = to_accumulate(pixel.v[v]);
          if (position.v[v] >= 0 && !replaces(value, best[v])) continue;
          best[v] = value;
          position.v[v] = static_cast<int32_t>(y * W + x);
        }
      }
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.v[v] = from_accumulate<T>(best[v]);
    *reinterpret_cast<Pack<T, V>*>(output + static_cast<int64_t>(bin) * C + c) = result;
    *reinterpret_cast<Pack<int32_t, V>*>(argmax + static_cast<int64_t>(bin) * C + c) = position;
  }
}

// grad_output, argmax: [R, PH, PW, C]; grad_input: [N, H, W, C] of A, zeroed before. Thread: one element of grad_output.
template <typename T, typename Index>
__global__ void roi_pool_backward(const RoiPool<accumulate_t<T>> problem, const T* __restrict__ grad_output,
                                  const int32_t* __restrict__ argmax, accumulate_t<T>* __restrict__ grad_input) {
  const Index C = static_cast<Index>(problem.C), bins = static_cast<Index>(problem.PH * problem.PW);
  const int64_t pixels = problem.H * problem.W;
  MD_GRID_STRIDE_OF(Index, index, problem.R * problem.PH * problem.PW * problem.C) {
    const Index bin = index / C;
    const int64_t c = index - bin * C, pixel = argmax[index];
    int64_t n;
    if (pixel < 0 || pixel >= pixels || !find_pool_picture(problem, static_cast<int64_t>(bin / bins), n)) continue;
    atomicAdd(grad_input + (n * pixels + pixel) * problem.C + c, to_accumulate(grad_output[index]));
  }
}

// The bins [first, last) of an axis that may hold a pixel, one too many a side; pool_range() has the last word.
template <typename A>
MD_DEVICE void bins_of_pixel(const PoolAxis<A>& axis, int64_t pixel, int64_t bins, int64_t& first, int64_t& last) {
  first = last = 0;
  const int64_t offset = pixel - axis.start;
  const int64_t slack = axis.size / (1 << 20) + 1;  // the last bin ends where a rounded product says
  if (axis.size == 0 || offset < 0 || offset > axis.size + slack) return;
  const A low = A(offset) / axis.bin - A(2), high = A(offset + 1) / axis.bin + A(2);
  first = low > A(0) ? static_cast<int64_t>(low) : 0;
  last = high < A(bins) ? static_cast<int64_t>(high) + 1 : bins;
  if (last > bins) last = bins;
}

// grad_output, argmax: [R, PH, PW, C]; grad_input: [N, H, W, C], overwritten. Block (LANES, THREADS / LANES), grid (pixels, channels):
// a warp owns a pixel of a picture, a lane one channel of it. RoIs are added in increasing r.
template <typename T>
__global__ void roi_pool_backward_pixels(const RoiPool<accumulate_t<T>> problem, const T* __restrict__ grad_output,
                                         const int32_t* __restrict__ argmax, T* __restrict__ grad_input) {
  using A = accumulate_t<T>;
  const int64_t H = problem.H, W = problem.W, C = problem.C, PH = problem.PH, PW = problem.PW;
  const int64_t owned = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * LANES + threadIdx.x;
  if (owned >= problem.N * H * W || c >= C) return;
  const int64_t picture = owned / (H * W), pixel = owned % (H * W), y = pixel / W, x = pixel % W;
  A sum = A(0);
  for (int64_t r = 0; r < problem.R; ++r) {
    int64_t n;
    if (!find_pool_picture(problem, r, n) || n != picture) continue;
    PoolAxis<A> axis_y, axis_x;
    pool_axes(problem, r, axis_y, axis_x);
    int64_t p, p_end, q_begin, q_end;
    bins_of_pixel(axis_y, y, PH, p, p_end);
    bins_of_pixel(axis_x, x, PW, q_begin, q_end);
    for (; p < p_end; ++p) {
      int64_t begin, end;
      pool_range(axis_y, p, H, begin, end);
      if (y < begin || y >= end) continue;
      for (int64_t q = q_begin; q < q_end; ++q) {
        pool_range(axis_x, q, W, begin, end);
        if (x < begin || x >= end) continue;
        const int64_t element = ((r * PH + p) * PW + q) * C + c;
        if (argmax[element] == pixel) sum += to_accumulate(grad_output[element]);
      }
    }
  }
  grad_input[owned * C + c] = from_accumulate<T>(sum);
}

template <typename T, int V>
void launch_forward(const RoiPool<accumulate_t<T>>& problem, const T* input, T* output, int32_t* argmax, void* stream) {
  const int64_t count = problem.R * problem.PH * problem.PW * (problem.C / V);
  const auto kernel = fits_int32(count) ? &roi_pool_forward<T, V, uint32_t> : &roi_pool_forward<T, V, int64_t>;
  MD_LAUNCH(kernel, blocks_for(count, THREADS), THREADS, 0, stream, problem, input, output, argmax);
}

}  // namespace

template <typename A>
void roi_pool_cuda(const RoiPool<A>& problem, DType dtype, const void* input, void* output, int32_t* argmax, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const auto aligned = [](const void* array, size_t bytes) { return reinterpret_cast<uintptr_t>(array) % bytes == 0; };
    const bool wide = problem.C % V == 0 && aligned(input, 16) && aligned(output, 16) && aligned(argmax, V * sizeof(int32_t));
    const T* features = static_cast<const T*>(input);
    if (wide) launch_forward<T, V>(problem, features, static_cast<T*>(output), argmax, stream);
    else launch_forward<T, 1>(problem, features, static_cast<T*>(output), argmax, stream);
  });
}

template <typename A>
void roi_pool_backward_cuda(const RoiPool<A>& problem, DType dtype, const void* grad_output, const int32_t* argmax, A* grad_input,
                            void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = problem.R * problem.PH * problem.PW * problem.C;
    const auto kernel = fits_int32(count) ? &roi_pool_backward<T, uint32_t> : &roi_pool_backward<T, int64_t>;
    MD_LAUNCH(kernel, blocks_for(count, THREADS), THREADS, 0, stream, problem, static_cast<const T*>(grad_output), argmax, grad_input);
  });
}

template <typename A>
void roi_pool_backward_deterministic_cuda(const RoiPool<A>& problem, DType dtype, const void* grad_output, const int32_t* argmax,
                                          void* grad_input, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t pixels = problem.N * problem.H * problem.W;
    const dim3 grid(static_cast<unsigned>(ceil_div(pixels, THREADS / LANES)), static_cast<unsigned>(ceil_div(problem.C, LANES)));
    const auto kernel = &roi_pool_backward_pixels<T>;
    MD_LAUNCH(kernel, grid, dim3(LANES, THREADS / LANES), 0, stream, problem, static_cast<const T*>(grad_output), argmax,
              static_cast<T*>(grad_input));
  });
}

#define INSTANTIATE(A)                                                                                                        \
  template void roi_pool_cuda<A>(const RoiPool<A>&, DType, const void*, void*, int32_t*, void*);                              \
  template void roi_pool_backward_cuda<A>(const RoiPool<A>&, DType, const void*, const int32_t*, A*, void*);                  \
  template void roi_pool_backward_deterministic_cuda<A>(const RoiPool<A>&, DType, const void*, const int32_t*, void*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
