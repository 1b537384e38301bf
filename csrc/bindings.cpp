// The only file that has heard of a Tensor: checks what protects memory, allocates, dispatches on dtype, launches.
// Schemas, fake kernels and autograd are in minidamage/ops/<op>.py; here are the implementations alone, registered per machine:
//   CPU      always
//   CUDA     with -DMINIDAMAGE_CUDA: the kernels that nvcc compiled
//   tests    with -DMINIDAMAGE_EMULATED: the CUDA half, its .cu files compiled for the CPU (cuda_on_cpu.h), under a namespace of its own
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "nms.h"

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
  const int64_t n = boxes.size(0);
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be [N, 4], got ", boxes.sizes());
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
  at::parallel_for(0, count_groups, 1, [&](int64_t begin, int64_t end) {
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
  const auto launch = [&](const auto* data) {
    nms_cuda(data, pointer_or_null<int64_t>(group), pointer_or_null<bool>(usable), order.const_data_ptr<int64_t>(), n, iou_threshold, max_keep,
             reinterpret_cast<uint64_t*>(mask.mutable_data_ptr<int64_t>()), reinterpret_cast<uint64_t*>(removed.mutable_data_ptr<int64_t>()),
             keep.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(), device.stream());
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

}  // namespace
}  // namespace minidamage
