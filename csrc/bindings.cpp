// The only file that has heard of a Tensor: checks what protects memory, allocates, dispatches on dtype, launches.
// Schemas, fake kernels and autograd are in minidamage/ops/<op>.py; here are the implementations alone, registered per machine:
//   CPU      always
//   CUDA     with -DMINIDAMAGE_CUDA: the kernels that nvcc compiled
//   tests    with -DMINIDAMAGE_EMULATED: the CUDA half, its .cu files compiled for the CPU (cuda_on_cpu.h), under a namespace of its own
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "layout.h"
#include "nms.h"
#include "paste_masks.h"
#include "roi_align.h"

#if defined(MINIDAMAGE_EMULATED)
#define MINIDAMAGE_NAMESPACE minidamage_emulated
#define MINIDAMAGE_DEVICE_KEY CPU
struct OnDevice {  // stands for the device guard and the current stream
  explicit OnDevice(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};
#define MD_LAUNCH_CHECK() ((void)0)  // a failed emulated launch throws by itself
#elif defined(MINIDAMAGE_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MINIDAMAGE_NAMESPACE minidamage
#define MINIDAMAGE_DEVICE_KEY CUDA
struct OnDevice {  // the tensor's device, and the stream that PyTorch works on there
  explicit OnDevice(const at::Tensor& tensor) : guard(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  c10::cuda::CUDAGuard guard;
};
#define MD_LAUNCH_CHECK() C10_CUDA_KERNEL_LAUNCH_CHECK()
#endif

namespace minidamage {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- non-maximum suppression ---------------------------------------------------------------------------------------------

void check_nms(const Tensor& boxes, const Tensor& scores, const OptionalTensor& idxs, const OptionalTensor& valid) {
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4], got ", boxes.sizes());
  const int64_t n = boxes.size(0);
  TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "nms: scores must be [", n, "], got ", scores.sizes());
  TORCH_CHECK(scores.device() == boxes.device(), "nms: boxes are on ", boxes.device(), ", scores on ", scores.device());
  for (const auto& [name, tensor, type] : {std::tuple{"idxs", &idxs, at::kLong}, std::tuple{"valid", &valid, at::kBool}}) {
    if (!tensor->has_value()) continue;
    const Tensor& t = **tensor;
    TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.scalar_type() == type && t.device() == boxes.device(), "nms: ", name, " must be [", n,
                "] ", type, " on ", boxes.device(), ", got ", t.sizes(), " ", t.scalar_type(), " on ", t.device());
  }
}

// float64 stays; everything else is compared in float32 (exact for float16 and bfloat16).
Tensor comparable(const Tensor& t) { return t.to(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous(); }

template <typename T>
const T* pointer_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; }

#if !defined(MINIDAMAGE_EMULATED)
template <typename T>
int64_t run_nms_cpu(const Tensor& boxes, const NmsGroups& groups, double iou_threshold, int64_t max_keep, int64_t* keep) {
  std::vector<uint8_t> kept(static_cast<size_t>(boxes.size(0)));
  const int64_t count_groups = static_cast<int64_t>(groups.offsets.size()) - 1;
  const T* data = boxes.const_data_ptr<T>();
  const int64_t grain = ceil_div(4096 * count_groups, boxes.size(0));  // groups a thread: waking one pays from some thousand boxes on
  at::parallel_for(0, count_groups, grain, [&](int64_t begin, int64_t end) {
    nms_cpu<T>(data, groups, iou_threshold, max_keep, begin, end, kept.data());
  });
  int64_t count = 0;
  for (int64_t i : groups.by_score) {
    if (count == max_keep) break;
    if (kept[i]) keep[count++] = i;
  }
  return count;
}

std::tuple<Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores, const OptionalTensor& idxs, double iou_threshold,
                                          int64_t max_keep, const OptionalTensor& valid) {
  check_nms(boxes, scores, idxs, valid);
  TORCH_CHECK(max_keep >= 0, "nms: max_keep must not be negative, got ", max_keep);
  Tensor keep = at::zeros({max_keep}, boxes.options().dtype(at::kLong)), count = at::zeros({}, keep.options());
  const int64_t n = boxes.size(0);
  if (n == 0) return {keep, count};
  const Tensor b = comparable(boxes), s = comparable(scores);
  const OptionalTensor group = contiguous(idxs), usable = contiguous(valid);
  const int64_t* idx = pointer_or_null<int64_t>(group);
  const bool* use = pointer_or_null<bool>(usable);
  const NmsGroups groups = s.scalar_type() == at::kDouble ? nms_groups_cpu(s.const_data_ptr<double>(), idx, use, n)
                                                          : nms_groups_cpu(s.const_data_ptr<float>(), idx, use, n);
  int64_t* out = keep.mutable_data_ptr<int64_t>();
  *count.mutable_data_ptr<int64_t>() = b.scalar_type() == at::kDouble ? run_nms_cpu<double>(b, groups, iou_threshold, max_keep, out)
                                                                      : run_nms_cpu<float>(b, groups, iou_threshold, max_keep, out);
  return {keep, count};
}

Tensor nms_any_cpu(const Tensor& boxes, const Tensor& scores, const OptionalTensor& idxs, double iou_threshold) {
  const auto [keep, count] = nms_padded_cpu(boxes, scores, idxs, iou_threshold, boxes.size(0), std::nullopt);
  return keep.narrow(0, 0, *count.const_data_ptr<int64_t>()).clone();
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("nms", nms_any_cpu);
  m.impl("nms_padded", nms_padded_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
std::tuple<Tensor, Tensor> nms_padded_cuda(const Tensor& boxes, const Tensor& scores, const OptionalTensor& idxs, double iou_threshold,
                                           int64_t max_keep, const OptionalTensor& valid) {
  check_nms(boxes, scores, idxs, valid);
  TORCH_CHECK(max_keep >= 0, "nms: max_keep must not be negative, got ", max_keep);
  const OnDevice device(boxes);
  Tensor keep = at::zeros({max_keep}, boxes.options().dtype(at::kLong)), count = at::zeros({}, keep.options());
  const int64_t n = boxes.size(0);
  if (n == 0) return {keep, count};
  const Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true));
  const Tensor sorted = comparable(boxes).index_select(0, order);
  const OptionalTensor group = idxs.has_value() ? OptionalTensor(idxs->index_select(0, order)) : idxs;
  const OptionalTensor usable = valid.has_value() ? OptionalTensor(valid->index_select(0, order)) : valid;
  const int64_t words = ceil_div(n, NMS_WORD);
  Tensor mask = at::empty({std::min(n, NMS_ROWS), words}, keep.options()), removed = at::empty({words}, keep.options());
  const auto words_of = [](Tensor& t) { return reinterpret_cast<uint64_t*>(t.mutable_data_ptr<int64_t>()); };
  const auto launch = [&](const auto* data) {
    nms_cuda(data, pointer_or_null<int64_t>(group), pointer_or_null<bool>(usable), order.const_data_ptr<int64_t>(), n, iou_threshold,
             max_keep, words_of(mask), words_of(removed), keep.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(),
             device.stream());
  };
  if (sorted.scalar_type() == at::kDouble) launch(sorted.const_data_ptr<double>());
  else launch(sorted.const_data_ptr<float>());
  MD_LAUNCH_CHECK();
  return {keep, count};
}

// The one synchronisation: the length of the result.
Tensor nms_any_cuda(const Tensor& boxes, const Tensor& scores, const OptionalTensor& idxs, double iou_threshold) {
  const auto [keep, count] = nms_padded_cuda(boxes, scores, idxs, iou_threshold, boxes.size(0), std::nullopt);
  return keep.narrow(0, 0, count.item<int64_t>()).clone();
}

#define MD_REGISTER(ns, key, m) TORCH_LIBRARY_IMPL(ns, key, m)  // expands the two names first
MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("nms", nms_any_cuda);
  m.impl("nms_padded", nms_padded_cuda);
}
#endif

// ---- RoIAlign ------------------------------------------------------------------------------------------------------------

#if defined(MINIDAMAGE_DEVICE_KEY)
DType dtype_of(const Tensor& t) {  // the launchers take raw memory and believe this
  switch (t.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    case at::kHalf: return DType::float16;
    case at::kBFloat16: return DType::bfloat16;
    default: TORCH_CHECK_VALUE(false, "expected float32, float64, float16 or bfloat16, got ", t.scalar_type());
  }
}
#endif

bool is_channels_last(const Tensor& t) { return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous(); }

// [N, C, H, W] of any strides to [N, H, W, C]; without a copy for channels_last.
Tensor to_rows(const Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); }
// and back, in the memory format asked for.
Tensor from_rows(const Tensor& t, bool channels_last) {
  const Tensor view = t.permute({0, 3, 1, 2});
  return channels_last ? view : view.contiguous();
}

// run(double()) for float64, run(float()) for everything else: the type that a kernel computes in.
template <typename Run>
void in_compute_type(const Tensor& t, const Run& run) {
  if (t.scalar_type() == at::kDouble) run(double());
  else run(float());
}

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

void check_features(at::TensorList features, at::IntArrayRef output_size) {
  TORCH_CHECK(!features.empty(), "roi_align: no features");
  TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, "roi_align: output_size must be (PH, PW), got ",
              output_size);
}

void check_grad(const Tensor& grad, const Tensor& rois, at::IntArrayRef heights, at::IntArrayRef widths) {
  TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(2) > 0 && grad.size(3) > 0, "roi_align: grad must be [",
              rois.size(0), ", C, PH, PW], got ", grad.sizes());
  TORCH_CHECK(heights.size() == widths.size(), "roi_align: ", heights.size(), " heights and ", widths.size(), " widths");
  for (size_t l = 0; l < heights.size(); l++)
    TORCH_CHECK(heights[l] > 0 && widths[l] > 0, "roi_align: a level without pixels: ", heights[l], " x ", widths[l]);
}

// The features as [N, H, W, C], converted by `convert`, checked to agree.
std::vector<Tensor> feature_rows(at::TensorList features, Tensor (*convert)(const Tensor&)) {
  std::vector<Tensor> rows;
  for (const Tensor& feature : features) {
    const Tensor& first = features[0];
    TORCH_CHECK(feature.dim() == 4 && feature.size(0) == first.size(0) && feature.size(1) == first.size(1) &&
                    feature.scalar_type() == first.scalar_type() && feature.device() == first.device() && feature.size(2) > 0 &&
                    feature.size(3) > 0,
                "roi_align: every level must be [N, C, H, W] with the N, C, dtype and device of the first, ", first.sizes(), ", got ",
                feature.sizes(), " ", feature.scalar_type(), " on ", feature.device());
    rows.push_back(convert(feature));
  }
  return rows;
}

#if !defined(MINIDAMAGE_EMULATED)
// Memory for a result that is written once from end to end. Much of the time of such a kernel goes into the system's handing out pages
// one by one: on two cores RoIAlign's forward took 20 ms with pages of 4 KiB and 11 ms with huge ones, its backward 36 and 15.
Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t page = 4096, least = 8 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / page * page;
  if (t.nbytes() >= least) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure changes nothing
#endif
  return t;
}

// work(begin, end) over [0, count) in chunks, each to the thread that is free first: chunks differ in work.
template <typename Work>
void parallel_chunks(int64_t count, int64_t chunk, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), ceil_div(count, chunk)), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < count;) work(begin, std::min(count, begin + chunk));
  });
}

// [N, rows, columns] to [N, columns, rows].
Tensor transposed(const Tensor& t, int64_t rows, int64_t columns, at::IntArrayRef sizes) {
  Tensor result = empty_large(sizes, t.options());
  if (t.numel() == 0) return result;
  in_compute_type(t, [&](auto zero) {
    using T = decltype(zero);
    const T* source = t.const_data_ptr<T>();
    T* target = result.mutable_data_ptr<T>();
    parallel_chunks(t.numel() / (rows * columns) * transpose_strips(rows), 1,
                    [&](int64_t begin, int64_t end) { transpose_cpu(source, target, rows, columns, begin, end); });
  });
  return result;
}

// to_rows() and from_rows() with our own transpose, three times as fast as a copy between strides.
Tensor to_rows_cpu(const Tensor& t) {
  const int64_t N = t.size(0), C = t.size(1), H = t.size(2), W = t.size(3);
  const bool ours = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
  if (!ours || !t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast)) return to_rows(t);
  return transposed(t, C, H * W, {N, H, W, C});
}
Tensor from_rows_cpu(const Tensor& t, bool channels_last) {
  const int64_t N = t.size(0), H = t.size(1), W = t.size(2), C = t.size(3);
  return channels_last ? from_rows(t, true) : transposed(t, H * W, C, {N, C, H, W});
}

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
  int64_t tiles = 0;
  const std::unique_ptr<RoiAlignPlan<T>, void (*)(RoiAlignPlan<T>*)> plan(roi_align_plan(problem, tiles), roi_align_free<T>);
  const T* data = grad.const_data_ptr<T>();
  parallel_chunks(tiles, 1, [&](int64_t begin, int64_t end) { roi_align_backward_cpu(problem, *plan, data, begin, end); });
}

std::vector<Tensor> roi_align_backward_on_cpu(const Tensor& grad, const Tensor& rois, const Tensor& levels, int64_t N,
                                              at::IntArrayRef heights, at::IntArrayRef widths, at::ArrayRef<double> spatial_scales,
                                              int64_t sampling_ratio, bool aligned, bool channels_last) {
  check_rois(rois, levels, heights.size(), spatial_scales.size(), grad.device());
  check_grad(grad, rois, heights, widths);
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
  check_rois(rois, levels, features.size(), spatial_scales.size(), features[0].device());
  TORCH_CHECK_VALUE(output_size[0] <= ROI_ALIGN_MAX_BINS && output_size[1] <= ROI_ALIGN_MAX_BINS, "roi_align: at most ", ROI_ALIGN_MAX_BINS,
                    " bins an axis on a GPU, got ", output_size);
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
  check_grad(grad, rois, heights, widths);
  TORCH_CHECK_VALUE(grad.size(2) <= ROI_ALIGN_MAX_BINS && grad.size(3) <= ROI_ALIGN_MAX_BINS, "roi_align: at most ", ROI_ALIGN_MAX_BINS,
                    " bins an axis on a GPU, got ", grad.sizes());
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

// ---- pasting masks ---------------------------------------------------------------------------------------------------------

template <typename A>
PasteMasks<A> paste_problem(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding) {
  return {masks.const_data_ptr(), boxes.const_data_ptr<int64_t>(), masks.size(0), masks.size(2), masks.size(3), padding, height, width};
}

void check_paste(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding) {
  TORCH_CHECK(masks.dim() == 4 && masks.size(1) == 1 && masks.size(2) > 0 && masks.size(3) > 0,
              "paste_masks: masks must be [N, 1, M, M], got ", masks.sizes());
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4 && boxes.scalar_type() == at::kLong &&
                  boxes.device() == masks.device(),
              "paste_masks: boxes must be [", masks.size(0), ", 4] int64 on ", masks.device(), ", got ", boxes.sizes(), " ",
              boxes.scalar_type(), " on ", boxes.device());
  TORCH_CHECK(height >= 0 && width >= 0 && padding >= 0, "paste_masks: negative size or padding: ", height, ", ", width, ", ", padding);
}

#if !defined(MINIDAMAGE_EMULATED)
// Zeros from the system's own zeroed pages: a page that nobody writes to costs nothing, and most of a pasted mask is never written to.
Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t alignment = 64, least = 1 << 20;
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < least) return at::zeros(sizes, options);
  void* memory = std::calloc(bytes + alignment, 1);
  TORCH_CHECK(memory, "paste_masks: no memory for ", bytes, " bytes; paste_masks_rle needs a thousandth of it");
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + alignment - 1) / alignment * alignment);
  return at::from_blob(aligned, sizes, [memory](void*) { std::free(memory); }, options);
}

// Calls run(problem, T()) with T the dtype of the masks.
template <typename Run>
void with_paste_problem(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding, const Run& run) {
  TORCH_CHECK_VALUE(masks.scalar_type() == at::kFloat || masks.scalar_type() == at::kDouble,
                    "paste_masks: float32 or float64 on a CPU, got ", masks.scalar_type());
  const Tensor m = masks.contiguous(), b = boxes.contiguous();
  in_compute_type(m, [&](auto zero) { run(paste_problem<decltype(zero)>(m, b, height, width, padding), zero); });
}

Tensor paste_masks_on_cpu(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding) {
  check_paste(masks, boxes, height, width, padding);
  Tensor output = zeros_large({masks.size(0), 1, height, width}, masks.options());
  if (output.numel() == 0) return output;
  with_paste_problem(masks, boxes, height, width, padding, [&](const auto& problem, auto zero) {
    auto* data = output.mutable_data_ptr<decltype(zero)>();
    parallel_chunks(masks.size(0) * paste_bands(height), 4,
                    [&](int64_t begin, int64_t end) { paste_masks_cpu(problem, data, begin, end); });
  });
  return output;
}

Tensor paste_masks_bool_on_cpu(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding,
                               double threshold) {
  check_paste(masks, boxes, height, width, padding);
  Tensor output = zeros_large({masks.size(0), height, width}, masks.options().dtype(at::kBool));
  if (output.numel() == 0) return output;
  with_paste_problem(masks, boxes, height, width, padding, [&](const auto& problem, auto zero) {
    using T = decltype(zero);
    if (T(0) > static_cast<T>(threshold)) output.fill_(true);
    bool* data = output.mutable_data_ptr<bool>();
    parallel_chunks(masks.size(0) * paste_bands(height), 4, [&](int64_t begin, int64_t end) {
      paste_masks_bool_cpu(problem, static_cast<T>(threshold), data, begin, end);
    });
  });
  return output;
}

// All counts one after the other, uint8 [B], and where each begins, int64 [N + 1].
std::tuple<Tensor, Tensor> paste_masks_rle_on_cpu(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding,
                                                  double threshold) {
  check_paste(masks, boxes, height, width, padding);
  const int64_t N = masks.size(0);
  std::vector<std::string> counts(N);
  with_paste_problem(masks, boxes, height, width, padding, [&](const auto& problem, auto zero) {
    using T = decltype(zero);
    const EmitCounts emit = [](void* context, int64_t n, const char* text, size_t bytes) {
      (*static_cast<std::vector<std::string>*>(context))[n].assign(text, bytes);
    };
    parallel_chunks(N, 1, [&](int64_t begin, int64_t end) {
      paste_masks_rle_cpu(problem, static_cast<T>(threshold), emit, &counts, begin, end);
    });
  });
  Tensor offsets = at::zeros({N + 1}, boxes.options());
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; n++) offset[n + 1] = offset[n] + static_cast<int64_t>(counts[n].size());
  Tensor text = at::empty({offset[N]}, masks.options().dtype(at::kByte));
  for (int64_t n = 0; n < N; n++) std::copy(counts[n].begin(), counts[n].end(), text.mutable_data_ptr<uint8_t>() + offset[n]);
  return {text, offsets};
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("paste_masks", paste_masks_on_cpu);
  m.impl("paste_masks_bool", paste_masks_bool_on_cpu);
  m.impl("paste_masks_rle", paste_masks_rle_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
Tensor paste_masks_on_cuda(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding) {
  check_paste(masks, boxes, height, width, padding);
  const OnDevice device(masks);
  Tensor output = at::empty({masks.size(0), 1, height, width}, masks.options());
  if (output.numel() == 0) return output;
  const Tensor m = masks.contiguous(), b = boxes.contiguous();
  in_compute_type(m, [&](auto zero) {
    paste_masks_cuda(paste_problem<decltype(zero)>(m, b, height, width, padding), dtype_of(m), output.data_ptr(), device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

Tensor paste_masks_bool_on_cuda(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding,
                                double threshold) {
  check_paste(masks, boxes, height, width, padding);
  const OnDevice device(masks);
  Tensor output = at::empty({masks.size(0), height, width}, masks.options().dtype(at::kBool));
  if (output.numel() == 0) return output;
  TORCH_CHECK_VALUE(masks.scalar_type() == at::kFloat || masks.scalar_type() == at::kDouble,
                    "paste_masks_bool: float32 or float64, got ", masks.scalar_type());
  const Tensor m = masks.contiguous(), b = boxes.contiguous();
  bool* data = output.mutable_data_ptr<bool>();
  in_compute_type(m, [&](auto zero) {
    paste_masks_bool_cuda(paste_problem<decltype(zero)>(m, b, height, width, padding), threshold, data, device.stream());
  });
  MD_LAUNCH_CHECK();
  return output;
}

// Text is for the host, and the masks before pasting are small: they go there, not the runs back.
std::tuple<Tensor, Tensor> paste_masks_rle_on_cuda(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding,
                                                   double threshold) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, int64_t, double);
  static const auto on_cpu = c10::Dispatcher::singleton().findSchemaOrThrow("minidamage::paste_masks_rle", "").typed<Signature>();
  const auto [text, offsets] = on_cpu.call(masks.cpu(), boxes.cpu(), height, width, padding, threshold);
  return {text.to(masks.device()), offsets.to(masks.device())};
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("paste_masks", paste_masks_on_cuda);
  m.impl("paste_masks_bool", paste_masks_bool_on_cuda);
  m.impl("paste_masks_rle", paste_masks_rle_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
