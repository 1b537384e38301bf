// RoI max pooling on the CPU: the plain form of ../cuda/roi_pool.cu. Read ../roi_pool.h first.
//
// A pixel is a row of C neighbouring channels, so the inner loop runs over channels and is SIMD, values and positions together.
// Backward: a strip of channels of one picture belongs to one thread, which walks the RoIs in order. No atomics.
#include "../roi_pool.h"

#include <algorithm>

namespace minidamage {

template <typename T>
void roi_pool_cpu(const RoiPool<T>& problem, const T* input, T* output, int32_t* argmax, int64_t begin, int64_t end) {
  const int64_t H = problem.H, W = problem.W, C = problem.C;
  for (int64_t r = begin; r < end; ++r) {
    const T* picture = input + static_cast<int64_t>(problem.rois[5 * r]) * H * W * C;
    PoolAxis<T> axis_y, axis_x;
    pool_axes(problem, r, axis_y, axis_x);
    for (int64_t bin = 0; bin < problem.PH * problem.PW; ++bin) {
      T* __restrict best = output + (r * problem.PH * problem.PW + bin) * C;
      int32_t* __restrict position = argmax + (r * problem.PH * problem.PW + bin) * C;
      int64_t y0, y1, x0, x1;
      pool_range(axis_y, bin / problem.PW, H, y0, y1);
      pool_range(axis_x, bin % problem.PW, W, x0, x1);
      if (y0 >= y1 || x0 >= x1) {
        std::fill(best, best + C, T(0));
        std::fill(position, position + C, -1);
        continue;
      }
      std::copy(picture + (y0 * W + x0) * C, picture + (y0 * W + x0 + 1) * C, best);
      std::fill(position, position + C, static_cast<int32_t>(y0 * W + x0));
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t x = x0; x < x1; ++x) {
          const T* __restrict pixel = picture + (y * W + x) * C;
          const int32_t here = static_cast<int32_t>(y * W + x);
          for (int64_t c = 0; c < C; ++c) {
            const bool take = replaces(pixel[c], best[c]);
            best[c] = take ? pixel[c] : best[c];
            position[c] = take ? here : position[c];
          }
        }
      }
    }
  }
}

template <typename T>
void roi_pool_backward_cpu(const RoiPool<T>& problem, const T* grad_output, const int32_t* argmax, T* grad_input, int64_t begin,
                           int64_t end) {
  const int64_t pixels = problem.H * problem.W, C = problem.C, bins = problem.PH * problem.PW, strips = pool_strips(C);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = s % strips * POOL_STRIP, last = std::min(C, first + POOL_STRIP);
    T* picture = grad_input + s / strips * pixels * C;
    for (int64_t r = 0; r < problem.R; ++r) {
      int64_t n;
      if (!find_pool_picture(problem, r, n) || n != s / strips) continue;
      for (int64_t bin = r * bins; bin < (r + 1) * bins; ++bin) {
        for (int64_t c = first; c < last; ++c) {
          const int64_t pixel = argmax[bin * C + c];
          if (pixel >= 0 && pixel < pixels) picture[pixel * C + c] += grad_output[bin * C + c];
        }
      }
    }
  }
}

#define INSTANTIATE(T)                                                                                    \
  template void roi_pool_cpu<T>(const RoiPool<T>&, const T*, T*, int32_t*, int64_t, int64_t);             \
  template void roi_pool_backward_cpu<T>(const RoiPool<T>&, const T*, const int32_t*, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
