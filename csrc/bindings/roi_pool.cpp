// RoI max pooling: tensors in, launches out (see tensors.h).
#include "roi_pool.h"

#include "tensors.h"

namespace minidamage {
namespace {

// Everything that a RoiPool problem points into or was converted for it.
template <typename A>
struct RoiPoolArguments {
  RoiPool<A> problem = {};
  Tensor rois;

  RoiPoolArguments(const Tensor& boxes, at::IntArrayRef map, int64_t PH, int64_t PW, double spatial_scale)  // map: N, H, W, C
      : rois(boxes.to(std::is_same_v<A, double> ? at::kDouble : at::kFloat).contiguous()) {
    problem = {rois.const_data_ptr<A>(), rois.size(0), map[0], map[1], map[2], map[3], PH, PW, static_cast<A>(spatial_scale)};
  }
};

void check_pool_map(int64_t N, int64_t H, int64_t W) {
  TORCH_CHECK(N >= 0 && H > 0 && W > 0 && H <= std::numeric_limits<int32_t>::max() / W,
              "roi_pool: features must have 1 to 2^31 - 1 pixels a picture, got ", N, " pictures of ", H, " x ", W);
}

void check_pool_rois(const Tensor& rois, at::Device device) {
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5 && rois.device() == device, "roi_pool: rois must be [R, 5] on ", device, ", got ",
              rois.sizes(), " on ", rois.device());
}

void check_pool(const Tensor& input, const Tensor& rois, at::IntArrayRef output_size) {
  TORCH_CHECK(input.dim() == 4, "roi_pool: input must be [N, C, H, W], got ", input.sizes());
  check_pool_map(input.size(0), input.size(2), input.size(3));
  check_pool_rois(rois, input.device());
  TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, "roi_pool: output_size must be (PH, PW), got ",
              output_size);
}

void check_pool_grad(const Tensor& grad, const Tensor& argmax, const Tensor& rois, int64_t N, int64_t H, int64_t W) {
  check_pool_map(N, H, W);
  check_pool_rois(rois, grad.device());
  TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(2) > 0 && grad.size(3) > 0, "roi_pool: grad must be [",
              rois.size(0), ", C, PH, PW], got ", grad.sizes());
  TORCH_CHECK(argmax.sizes() == grad.sizes() && argmax.scalar_type() == at::kInt && argmax.device() == grad.device(),
              "roi_pool: argmax must be ", grad.sizes(), " int32 on ", grad.device(), ", got ", argmax.sizes(), " ", argmax.scalar_type(),
              " on ", argmax.device());
}

#if !defined(MINIDAMAGE_EMULATED)
template <typename T>
void check_pool_pictures(const RoiPool<T>& problem) {
  int64_t n;
  for (int64_t r = 0; r < problem.R; r++)
    TORCH_CHECK_VALUE(find_pool_picture(problem, r, n), "roi_pool: RoI ", r, " asks for picture ", problem.rois[5 * r],
                      ", but there are ", problem.N, " pictures");
}

void check_pool_type(const Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "roi_pool: float32 or float64 on a CPU, got ",
                    t.scalar_type());
}

std::tuple<Tensor, Tensor> roi_pool_on_cpu(const Tensor& input, const Tensor& rois, at::IntArrayRef output_size, double spatial_scale) {
  check_pool(input, rois, output_size);
  check_pool_type(input);
  const Tensor map = to_rows_cpu(input);
  const int64_t sizes[4] = {rois.size(0), output_size[0], output_size[1], map.size(3)};
  Tensor output = empty_large(sizes, map.options()), argmax = empty_large(sizes, map.options().dtype(at::kInt));
  in_compute_type(map, [&](auto zero) {
    using T = decltype(zero);
    const RoiPoolArguments<T> arguments(rois, map.sizes(), output_size[0], output_size[1], spatial_scale);
    check_pool_pictures(arguments.problem);
    if (output.numel() == 0) return;
    const T* features = map.const_data_ptr<T>();
    T* pooled = output.mutable_data_ptr<T>();
    int32_t* position = argmax.mutable_data_ptr<int32_t>();
    parallel_chunks(rois.size(0), 4, [&](int64_t begin, int64_t end) {
      roi_pool_cpu(arguments.problem, features, pooled, position, begin, end);
    });
  });
  return {from_rows_cpu(output, is_channels_last(input)), from_rows(argmax, true)};
}

Tensor roi_pool_backward_on_cpu(const Tensor& grad, const Tensor& argmax, const Tensor& rois, int64_t N, int64_t H, int64_t W,
                                double spatial_scale, bool channels_last) {
  check_pool_grad(grad, argmax, rois, N, H, W);
  check_pool_type(grad);
  const Tensor rows = to_rows_cpu(grad), position = to_rows(argmax);  // [R, PH, PW, C]
  const int64_t C = grad.size(1);
  Tensor map = zeros_large({N, H, W, C}, grad.options());
  in_compute_type(grad, [&](auto zero) {
    using T = decltype(zero);
    const RoiPoolArguments<T> arguments(rois, map.sizes(), grad.size(2), grad.size(3), spatial_scale);
    check_pool_pictures(arguments.problem);
    if (rows.numel() == 0 || map.numel() == 0) return;
    const T* grad_output = rows.const_data_ptr<T>();
    const int32_t* pixel = position.const_data_ptr<int32_t>();
    T* grad_input = map.mutable_data_ptr<T>();
    parallel_chunks(N * pool_strips(C), 1, [&](int64_t begin, int64_t end) {
      roi_pool_backward_cpu(arguments.problem, grad_output, pixel, grad_input, begin, end);
    });
  });
  return from_rows_cpu(map, channels_last);
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("roi_pool", roi_pool_on_cpu);
  m.impl("roi_pool_backward", roi_pool_backward_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
std::tuple<Tensor, Tensor> roi_pool_on_cuda(const Tensor& input, const Tensor& rois, at::IntArrayRef output_size, double spatial_scale) {
  check_pool(input, rois, output_size);
  const DType dtype = dtype_of(input);
  const OnDevice device(input);
  const Tensor map = to_rows(input);
  const int64_t sizes[4] = {rois.size(0), output_size[0], output_size[1], map.size(3)};
  Tensor output = at::empty(sizes, map.options()), argmax = at::empty(sizes, map.options().dtype(at::kInt));
  if (output.numel() > 0) {
    in_compute_type(map, [&](auto zero) {
      const RoiPoolArguments<decltype(zero)> arguments(rois, map.sizes(), output_size[0], output_size[1], spatial_scale);
      roi_pool_cuda(arguments.problem, dtype, map.const_data_ptr(), output.mutable_data_ptr(), argmax.mutable_data_ptr<int32_t>(),
                    device.stream());
    });
    MD_LAUNCH_CHECK();
  }
  return {from_rows(output, is_channels_last(input)), from_rows(argmax, true)};
}

Tensor roi_pool_backward_on_cuda(const Tensor& grad, const Tensor& argmax, const Tensor& rois, int64_t N, int64_t H, int64_t W,
                                 double spatial_scale, bool channels_last) {
  check_pool_grad(grad, argmax, rois, N, H, W);
  const DType dtype = dtype_of(grad);
  const OnDevice device(grad);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const Tensor rows = to_rows(grad), position = to_rows(argmax);  // [R, PH, PW, C]
  // Atomic sums are kept in float32; the deterministic form rounds each pixel's sum once.
  const bool as_grad = deterministic || grad.scalar_type() == at::kDouble;
  const at::TensorOptions options = grad.options().dtype(as_grad ? grad.scalar_type() : at::kFloat);
  const int64_t sizes[4] = {N, H, W, grad.size(1)};
  Tensor map = deterministic ? at::empty(sizes, options) : at::zeros(sizes, options);
  if (map.numel() > 0 && (deterministic || rows.numel() > 0)) {
    in_compute_type(grad, [&](auto zero) {
      using A = decltype(zero);
      const RoiPoolArguments<A> arguments(rois, map.sizes(), grad.size(2), grad.size(3), spatial_scale);
      const int32_t* pixel = position.const_data_ptr<int32_t>();
      if (deterministic) {
        check_grid("roi_pool", ceil_div(N * H * W, 8), 1, ceil_div(grad.size(1), 32));  // 8 warps a block, 32 channels a warp
        roi_pool_backward_deterministic_cuda(arguments.problem, dtype, rows.const_data_ptr(), pixel, map.mutable_data_ptr(),
                                             device.stream());
      } else {
        roi_pool_backward_cuda(arguments.problem, dtype, rows.const_data_ptr(), pixel, map.mutable_data_ptr<A>(), device.stream());
      }
    });
    MD_LAUNCH_CHECK();
  }
  return from_rows(map.to(grad.scalar_type()), channels_last);
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("roi_pool", roi_pool_on_cuda);
  m.impl("roi_pool_backward", roi_pool_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
