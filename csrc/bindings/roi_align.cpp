// RoIAlign over all levels of a pyramid: tensors in, launches out (see tensors.h).
#include "roi_align.h"

#include "tensors.h"

namespace minidamage {
namespace {

// Holds the tensors that a RoiAlign problem points into.
template <typename A>
struct RoiAlignArguments {
  RoiAlign<A> problem = {};
  Tensor rois, levels;

  RoiAlignArguments(const std::vector<Tensor>& maps, const Tensor& boxes, const Tensor& roi_levels, at::IntArrayRef output_size,
                    at::ArrayRef<double> spatial_scales, int64_t sampling_ratio, bool aligned)
      : rois(boxes.to(std::is_same_v<A, double> ? at::kDouble : at::kFloat).contiguous()), levels(roi_levels.contiguous()) {
    problem.level_count = static_cast<int64_t>(maps.size());
    for (size_t l = 0; l < maps.size(); l++)
      problem.levels[l] = {maps[l].data_ptr(), maps[l].size(1), maps[l].size(2), spatial_scales[l]};
    problem.N = maps[0].size(0), problem.C = maps[0].size(3);
    problem.rois = rois.const_data_ptr<A>(), problem.roi_levels = levels.const_data_ptr<int64_t>();
    problem.R = rois.size(0), problem.PH = output_size[0], problem.PW = output_size[1];
    problem.sampling_ratio = sampling_ratio, problem.aligned = aligned;
  }
};

void check_rois(const Tensor& rois, const Tensor& levels, size_t level_count, size_t scale_count, at::Device device) {
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be [R, 5], got ", rois.sizes());
  TORCH_CHECK(levels.dim() == 1 && levels.size(0) == rois.size(0) && levels.scalar_type() == at::kLong, "roi_align: levels must be [",
              rois.size(0), "] int64, got ", levels.sizes(), " ", levels.scalar_type());
  TORCH_CHECK(rois.device() == device && levels.device() == device, "roi_align: features are on ", device, ", rois on ", rois.device(),
              ", levels on ", levels.device());
  TORCH_CHECK(level_count > 0 && level_count <= MAX_FEATURE_LEVELS && scale_count == level_count, "roi_align: expected 1 to ",
              MAX_FEATURE_LEVELS, " levels with a scale each, got ", level_count, " levels and ", scale_count, " scales");
}

void check_sampling(int64_t sampling_ratio) {
  TORCH_CHECK_VALUE(sampling_ratio <= ROI_ALIGN_MAX_SAMPLES, "roi_align: sampling_ratio must be at most ", ROI_ALIGN_MAX_SAMPLES,
                    " samples a bin and axis, or <= 0 for one a pixel, got ", sampling_ratio);
}

bool is_side(int64_t pixels) { return pixels > 0 && pixels <= ROI_ALIGN_MAX_SIDE; }

void check_features(at::TensorList features, at::IntArrayRef output_size) {
  TORCH_CHECK(!features.empty(), "roi_align: no features");
  TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, "roi_align: output_size must be (PH, PW), got ",
              output_size);
}

void check_grad(const Tensor& grad, const Tensor& rois, int64_t N, at::IntArrayRef heights, at::IntArrayRef widths) {
  TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(2) > 0 && grad.size(3) > 0, "roi_align: grad must be [",
              rois.size(0), ", C, PH, PW], got ", grad.sizes());
  TORCH_CHECK(heights.size() == widths.size(), "roi_align: ", heights.size(), " heights and ", widths.size(), " widths");
  for (size_t l = 0; l < heights.size(); l++) {
    TORCH_CHECK(is_side(heights[l]) && is_side(widths[l]), "roi_align: a level must have 1 to ", ROI_ALIGN_MAX_SIDE,
                " pixels a side, got ", heights[l], " x ", widths[l]);
    uint64_t count = 0;
    const int64_t sizes[4] = {N, heights[l], widths[l], grad.size(1)};
    TORCH_CHECK(N >= 0 && !c10::safe_multiplies_u64(at::IntArrayRef(sizes), &count) && count < uint64_t(1) << 47,
                "roi_align: no memory for the gradient of ", N, " pictures of ", heights[l], " x ", widths[l], " x ", grad.size(1));
  }
}

// The features as [N, H, W, C], converted by `convert`, checked to agree.
std::vector<Tensor> feature_rows(at::TensorList features, Tensor (*convert)(const Tensor&)) {
  std::vector<Tensor> rows;
  for (const Tensor& feature : features) {
    const Tensor& first = features[0];
    TORCH_CHECK(feature.dim() == 4 && feature.size(0) == first.size(0) && feature.size(1) == first.size(1) &&
                    feature.scalar_type() == first.scalar_type() && feature.device() == first.device() && is_side(feature.size(2)) &&
                    is_side(feature.size(3)),
                "roi_align: every level must be [N, C, H, W] with the N, C, dtype and device of the first, ", first.sizes(), ", got ",
                feature.sizes(), " ", feature.scalar_type(), " on ", feature.device());
    rows.push_back(convert(feature));
  }
  return rows;
}

#if !defined(MINIDAMAGE_EMULATED)
template <typename T>
void check_pictures(const RoiAlign<T>& problem) {
  int64_t level, n;
  for (int64_t r = 0; r < problem.R; r++)
    TORCH_CHECK_VALUE(find_picture(problem, r, level, n), "roi_align: RoI ", r, " asks for picture ", problem.rois[5 * r], " of level ",
                      problem.roi_levels[r], ", but there are ", problem.N, " pictures and ", problem.level_count, " levels");
}

template <typename T>
void run_roi_align_cpu(const RoiAlign<T>& problem, Tensor& output) {
  check_pictures(problem);
  std::vector<int64_t> order(problem.R);
  roi_align_order(problem, order.data());
  T* data = output.mutable_data_ptr<T>();
  parallel_chunks(problem.R, 16, [&](int64_t begin, int64_t end) { roi_align_cpu(problem, order.data(), data, begin, end); });
}

Tensor roi_align_on_cpu(at::TensorList features, const Tensor& rois, const Tensor& levels, at::IntArrayRef output_size,
                        at::ArrayRef<double> spatial_scales, int64_t sampling_ratio, bool aligned) {
  check_features(features, output_size);
  check_sampling(sampling_ratio);
  check_rois(rois, levels, features.size(), spatial_scales.size(), features[0].device());
  const std::vector<Tensor> maps = feature_rows(features, to_rows_cpu);
  TORCH_CHECK_VALUE(maps[0].scalar_type() == at::kFloat || maps[0].scalar_type() == at::kDouble,
                    "roi_align: float32 or float64 on a CPU, got ", maps[0].scalar_type());
  Tensor output = empty_large({rois.size(0), output_size[0], output_size[1], maps[0].size(3)}, maps[0].options());
  in_compute_type(output, [&](auto zero) {
    using T = decltype(zero);
    const RoiAlignArguments<T> arguments(maps, rois, levels, output_size, spatial_scales, sampling_ratio, aligned);
    if (output.numel() > 0) run_roi_align_cpu<T>(arguments.problem, output);
  });
  return from_rows_cpu(output, is_channels_last(features[0]));
}

template <typename T>
void run_roi_align_backward_cpu(const RoiAlign<T>& problem, const Tensor& grad) {
  check_pictures(problem);
  if (problem.C == 0) return;  // nothing to write, however many pictures
  int64_t tiles = 0;
  const std::unique_ptr<RoiAlignPlan<T>, void (*)(RoiAlignPlan<T>*)> plan(roi_align_plan(problem, tiles), roi_align_free<T>);
  const T* data = grad.const_data_ptr<T>();
  parallel_chunks(tiles, 1, [&](int64_t begin, int64_t end) { roi_align_backward_cpu(problem, *plan, data, begin, end); });
}

std::vector<Tensor> roi_align_backward_on_cpu(const Tensor& grad, const Tensor& rois, const Tensor& levels, int64_t N,
                                              at::IntArrayRef heights, at::IntArrayRef widths, at::ArrayRef<double> spatial_scales,
                                              int64_t sampling_ratio, bool aligned, bool channels_last) {
  check_rois(rois, levels, heights.size(), spatial_scales.size(), grad.device());
  check_grad(grad, rois, N, heights, widths);
  check_sampling(sampling_ratio);
  const Tensor rows = to_rows_cpu(grad);  // [R, PH, PW, C]
  const int64_t output_size[2] = {grad.size(2), grad.size(3)};
  std::vector<Tensor> maps;
  for (size_t l = 0; l < heights.size(); l++) maps.push_back(empty_large({N, heights[l], widths[l], grad.size(1)}, grad.options()));
  in_compute_type(grad, [&](auto zero) {
    using T = decltype(zero);
    const RoiAlignArguments<T> arguments(maps, rois, levels, output_size, spatial_scales, sampling_ratio, aligned);
    run_roi_align_backward_cpu<T>(arguments.problem, rows);
  });
  for (Tensor& map : maps) map = from_rows_cpu(map, channels_last);
  return maps;
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("multiscale_roi_align", roi_align_on_cpu);
  m.impl("multiscale_roi_align_backward", roi_align_backward_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
Tensor roi_align_on_cuda(at::TensorList features, const Tensor& rois, const Tensor& levels, at::IntArrayRef output_size,
                         at::ArrayRef<double> spatial_scales, int64_t sampling_ratio, bool aligned) {
  check_features(features, output_size);
  check_sampling(sampling_ratio);
  check_rois(rois, levels, features.size(), spatial_scales.size(), features[0].device());
  TORCH_CHECK_VALUE(output_size[0] <= ROI_ALIGN_MAX_BINS && output_size[1] <= ROI_ALIGN_MAX_BINS, "roi_align: at most ", ROI_ALIGN_MAX_BINS,
                    " bins an axis on a GPU, got ", output_size);
  check_grid("roi_align", rois.size(0), output_size[0]);
  const OnDevice device(features[0]);
  const std::vector<Tensor> maps = feature_rows(features, to_rows);
  Tensor output = at::empty({rois.size(0), output_size[0], output_size[1], maps[0].size(3)}, maps[0].options());
  if (output.numel() > 0) {
    in_compute_type(output, [&](auto zero) {
      const RoiAlignArguments<decltype(zero)> arguments(maps, rois, levels, output_size, spatial_scales, sampling_ratio, aligned);
      roi_align_cuda(arguments.problem, dtype_of(output), output.data_ptr(), device.stream());
    });
    MD_LAUNCH_CHECK();
  }
  return from_rows(output, is_channels_last(features[0]));
}

std::vector<Tensor> roi_align_backward_on_cuda(const Tensor& grad, const Tensor& rois, const Tensor& levels, int64_t N,
                                               at::IntArrayRef heights, at::IntArrayRef widths, at::ArrayRef<double> spatial_scales,
                                               int64_t sampling_ratio, bool aligned, bool channels_last) {
  check_rois(rois, levels, heights.size(), spatial_scales.size(), grad.device());
  check_grad(grad, rois, N, heights, widths);
  check_sampling(sampling_ratio);
  TORCH_CHECK_VALUE(grad.size(2) <= ROI_ALIGN_MAX_BINS && grad.size(3) <= ROI_ALIGN_MAX_BINS, "roi_align: at most ", ROI_ALIGN_MAX_BINS,
                    " bins an axis on a GPU, got ", grad.sizes());
  check_grid("roi_align", rois.size(0), grad.size(2));
  const OnDevice device(grad);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const Tensor rows = to_rows(grad);  // [R, PH, PW, C]
  const int64_t output_size[2] = {grad.size(2), grad.size(3)};
  // Atomic sums are kept in float32; each tile of the deterministic form is added up before it is rounded.
  const bool as_grad = deterministic || grad.scalar_type() == at::kDouble;
  const at::TensorOptions options = grad.options().dtype(as_grad ? grad.scalar_type() : at::kFloat);
  std::vector<Tensor> maps;
  for (size_t l = 0; l < heights.size(); l++) {
    const int64_t sizes[4] = {N, heights[l], widths[l], grad.size(1)};
    maps.push_back(deterministic ? at::empty(sizes, options) : at::zeros(sizes, options));
  }
  const bool nothing_to_add = rows.numel() == 0 && !deterministic, nothing_to_write = N == 0 || grad.size(1) == 0;
  if (deterministic && !nothing_to_write) {
    int64_t tiles = 0;
    for (const Tensor& map : maps) tiles += roi_align_tiles(map.size(0), map.size(1), map.size(2));
    check_grid("roi_align", tiles, 1, ceil_div(grad.size(1), 32));
  }
  if (!nothing_to_add && !nothing_to_write) {
    in_compute_type(grad, [&](auto zero) {
      using A = decltype(zero);
      const RoiAlignArguments<A> arguments(maps, rois, levels, output_size, spatial_scales, sampling_ratio, aligned);
      const auto run = deterministic ? roi_align_backward_deterministic_cuda<A> : roi_align_backward_cuda<A>;
      run(arguments.problem, dtype_of(rows), rows.const_data_ptr(), device.stream());
    });
    MD_LAUNCH_CHECK();
  }
  for (Tensor& map : maps) map = from_rows(map.to(grad.scalar_type()), channels_last);
  return maps;
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("multiscale_roi_align", roi_align_on_cuda);
  m.impl("multiscale_roi_align_backward", roi_align_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
