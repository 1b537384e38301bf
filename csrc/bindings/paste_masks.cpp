// Pasting masks into pictures: tensors in, launches out (see tensors.h).
#include "paste_masks.h"

#include "tensors.h"

namespace minidamage {
namespace {

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
  TORCH_CHECK(height >= 0 && width >= 0 && padding >= 0 && padding <= PASTE_MAX_PADDING, "paste_masks: height and width must not be "
              "negative, padding must be 0 to ", PASTE_MAX_PADDING, ", got ", height, ", ", width, ", ", padding);
}

#if !defined(MINIDAMAGE_EMULATED)
constexpr const char* ADVICE = " (paste_masks_rle needs a thousandth)";  // where there is no memory

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
  Tensor output = zeros_large({masks.size(0), 1, height, width}, masks.options(), ADVICE);
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
  Tensor output = zeros_large({masks.size(0), height, width}, masks.options().dtype(at::kBool), ADVICE);
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
