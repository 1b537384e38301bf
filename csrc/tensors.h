// What the bindings of all ops share: the files of csrc/bindings/ are the only ones that have heard of a Tensor. One file an op: it
// checks what protects memory, allocates, dispatches on dtype, launches. Schemas, fake kernels and autograd are in
// minidamage/ops/<op>.py; the bindings are the implementations alone, registered per machine:
//   CPU      always
//   CUDA     with -DMINIDAMAGE_CUDA: the kernels that nvcc compiled
//   tests    with -DMINIDAMAGE_EMULATED: the CUDA half, its .cu files compiled for the CPU (cuda_on_cpu.h), under a namespace of its own
#pragma once
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "layout.h"

#if defined(MINIDAMAGE_EMULATED)
#define MINIDAMAGE_NAMESPACE minidamage_emulated
#define MINIDAMAGE_DEVICE_KEY CPU
struct OnDevice {  // stands for the device guard and the current stream
  explicit OnDevice(const at::Tensor&) {}
  void* stream() const { return nullptr; }
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};
#define MD_LAUNCH_CHECK() ((void)0)  // a failed emulated launch throws by itself
#elif defined(MINIDAMAGE_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define MINIDAMAGE_NAMESPACE minidamage
#define MINIDAMAGE_DEVICE_KEY CUDA
// The tensor's device, and the stream that PyTorch works on there. No autocast meanwhile: dtypes were settled in Python, and a backward
// pass that runs inside autocast must not have its products rounded.
struct OnDevice {
  explicit OnDevice(const at::Tensor& tensor) : guard(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  c10::cuda::CUDAGuard guard;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};
#define MD_LAUNCH_CHECK() C10_CUDA_KERNEL_LAUNCH_CHECK()
#endif
#define MD_REGISTER(ns, key, m) TORCH_LIBRARY_IMPL(ns, key, m)  // expands the two names first

namespace minidamage {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- dtypes --------------------------------------------------------------------------------------------------------------

// float64 stays; everything else is compared in float32 (exact for float16 and bfloat16).
inline Tensor comparable(const Tensor& t) { return t.to(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous(); }

template <typename T>
const T* pointer_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; }

#if defined(MINIDAMAGE_DEVICE_KEY)
inline DType dtype_of(const Tensor& t) {  // the launchers take raw memory and believe this
  switch (t.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    case at::kHalf: return DType::float16;
    case at::kBFloat16: return DType::bfloat16;
    default: TORCH_CHECK_VALUE(false, "expected float32, float64, float16 or bfloat16, got ", t.scalar_type());
  }
}
#endif

// run(double()) for float64, run(float()) for everything else: the type that a kernel computes in.
template <typename Run>
void in_compute_type(const Tensor& t, const Run& run) {
  if (t.scalar_type() == at::kDouble) run(double());
  else run(float());
}

// A grid of x times `times` blocks by y, before it is launched: past the limits a launch would fail or, in 32 bits, do too little.
inline void check_grid(const char* op, int64_t x, int64_t times = 1, int64_t y = 1) {
  TORCH_CHECK_VALUE(x <= MOST_BLOCKS_X / std::max<int64_t>(1, times) && y <= MOST_BLOCKS_Y, op, ": expected at most ", MOST_BLOCKS_X,
                    " blocks of work by ", MOST_BLOCKS_Y, " in one launch, got ", x, " x ", times, " by ", y, "; take fewer at a time");
}

// ---- layout --------------------------------------------------------------------------------------------------------------

inline bool is_channels_last(const Tensor& t) { return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous(); }

// [N, C, H, W] of any strides to [N, H, W, C]; without a copy for channels_last.
inline Tensor to_rows(const Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); }
// and back, in the memory format asked for. What comes back is no view of t: autograd forbids in-place work, a relu_() say, on an
// op's output that is a view.
inline Tensor from_rows(const Tensor& t, bool channels_last) {
  const Tensor view = t.permute({0, 3, 1, 2});
  if (!channels_last && !view.is_contiguous()) return view.contiguous();
  return at::empty({0}, t.options()).set_(t.storage(), t.storage_offset(), view.sizes(), view.strides());
}

#if !defined(MINIDAMAGE_EMULATED)
// ---- memory and threads, CPU ---------------------------------------------------------------------------------------------

// Zeros from the system's own zeroed pages: a page that nobody writes to costs nothing, and most of a pasted mask is never written to.
inline Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options, const char* advice = "") {
  constexpr size_t alignment = 64, least = 1 << 20;
  uint64_t count = 0;
  TORCH_CHECK(!c10::safe_multiplies_u64(sizes, &count) && count < (uint64_t(1) << 47), "minidamage: no memory for an array of ", sizes);
  const size_t bytes = static_cast<size_t>(count) * options.dtype().itemsize();
  if (bytes < least) return at::zeros(sizes, options);
  void* memory = std::calloc(bytes + alignment, 1);
  TORCH_CHECK(memory, "minidamage: no memory for an array of ", sizes, ", ", bytes, " bytes", advice);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + alignment - 1) / alignment * alignment);
  return at::from_blob(aligned, sizes, [memory](void*) { std::free(memory); }, options);
}

// Memory for a result that is written once from end to end. Much of the time of such a kernel goes into the system's handing out pages
// one by one: on two cores RoIAlign's forward took 20 ms with pages of 4 KiB and 11 ms with huge ones, its backward 36 and 15.
inline Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
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
inline Tensor transposed(const Tensor& t, int64_t rows, int64_t columns, at::IntArrayRef sizes) {
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
inline Tensor to_rows_cpu(const Tensor& t) {
  const int64_t N = t.size(0), C = t.size(1), H = t.size(2), W = t.size(3);
  const bool ours = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
  if (!ours || !t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast)) return to_rows(t);
  return transposed(t, C, H * W, {N, H, W, C});
}
inline Tensor from_rows_cpu(const Tensor& t, bool channels_last) {
  const int64_t N = t.size(0), H = t.size(1), W = t.size(2), C = t.size(3);
  return channels_last ? from_rows(t, true) : transposed(t, H * W, C, {N, C, H, W});
}
#endif

}  // namespace minidamage
