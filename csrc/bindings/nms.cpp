// Non-maximum suppression: tensors in, launches out (see tensors.h).
#include "nms.h"

#include "tensors.h"

namespace minidamage {
namespace {

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

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("nms", nms_any_cuda);
  m.impl("nms_padded", nms_padded_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
