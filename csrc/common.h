// What every kernel file shares: the same source compiled by nvcc for the GPU, by g++ for the CPU kernels, and by g++ with
// cuda_on_cpu.h for tests that run the .cu files without a GPU. No torch header here or in any kernel file: each compiles
// in seconds. csrc/bindings/ alone knows tensors.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MD_HD __host__ __device__ __forceinline__
#define MD_DEVICE __device__ __forceinline__
// Starts a kernel: MD_LAUNCH(nms_mask<float>, blocks, threads, shared bytes, stream, arguments...)
#define MD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Dynamic shared memory: MD_DYNAMIC_SHARED(float, partial_sums); aligned for the matrix tiles of mma.h
#define MD_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(32) unsigned char md_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(md_dynamic_shared)
#elif defined(MINIDAMAGE_EMULATED)
#include "cuda_on_cpu.h"
#define MD_HD inline
#define MD_DEVICE inline
#define MD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                   \
  (static_cast<void>(stream), ::cuda_on_cpu::launch(#kernel, ::dim3(grid), ::dim3(block), shared_bytes, \
                                                    [&] { kernel(__VA_ARGS__); }))
#define MD_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::cuda_on_cpu::dynamic_shared())
#else
#define MD_HD inline
#endif

// for (index = this thread; index < count; index += all threads): correct for any grid, 64-bit throughout.
#define MD_GRID_STRIDE(index, count) MD_GRID_STRIDE_OF(int64_t, index, count)
// The same in Index: uint32_t where fits_int32(count).
#define MD_GRID_STRIDE_OF(Index, index, count)                                                                             \
  for (Index index = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; index < static_cast<Index>(count); \
       index += static_cast<Index>(gridDim.x) * blockDim.x)

namespace minidamage {

// The element type of a tensor handed to a launcher as void*; dtype_of() of tensors.h maps to it.
enum class DType : int { float32, float64, float16, bfloat16 };

MD_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop: enough to fill any GPU, never above the grid limit.
inline unsigned blocks_for(int64_t count, int64_t threads) {
  const int64_t blocks = ceil_div(count, threads), most = 1 << 16;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// A grid's limits; check_grid() of tensors.h refuses more.
constexpr int64_t MOST_BLOCKS_X = std::numeric_limits<int32_t>::max(), MOST_BLOCKS_Y = 65535;

// Index arithmetic: nvcc 13 makes 17 instructions of a division of 32-bit integers on sm_90, and 110 of one of 64-bit integers, of which
// about 25, a branch among them, run where both numbers fit 32 bits (counted in its output). Kernels that take their index apart are
// templates on its type, and the launcher takes uint32_t where the count allows it: an index and one grid's stride more stay below 2^32.
// What that gains in time is not measured. Tests lower the limit to run the 64-bit forms on small arrays.
#if defined(MINIDAMAGE_EMULATED)
inline int64_t int32_limit = std::numeric_limits<int32_t>::max();
#else
constexpr int64_t int32_limit = std::numeric_limits<int32_t>::max();
#endif
inline bool fits_int32(int64_t count) { return count <= int32_limit; }

// N neighbouring elements, moved as one load or store: `*reinterpret_cast<const Pack<T, 4>*>(x + i)`, x + i aligned to the pack.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// float32 accumulates float32, float16 and bfloat16; float64 accumulates float64.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

MD_HD float to_accumulate(float x) { return x; }
MD_HD double to_accumulate(double x) { return x; }

template <typename T>
struct FromAccumulate;
template <>
struct FromAccumulate<float> {
  static MD_HD float convert(float x) { return x; }
};
template <>
struct FromAccumulate<double> {
  static MD_HD double convert(double x) { return x; }
};

#if defined(__CUDACC__) || defined(MINIDAMAGE_EMULATED)
MD_HD float to_accumulate(__half x) { return __half2float(x); }
MD_HD float to_accumulate(__nv_bfloat16 x) { return __bfloat162float(x); }
template <>
struct FromAccumulate<__half> {
  static MD_HD __half convert(float x) { return __float2half_rn(x); }
};
template <>
struct FromAccumulate<__nv_bfloat16> {
  static MD_HD __nv_bfloat16 convert(float x) { return __float2bfloat16_rn(x); }
};

// Over a warp, whose lanes all call these and all get the result; or over each group of `width` neighbouring lanes, a power of two.
constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
#if defined(MINIDAMAGE_EMULATED)  // there the caller's line tells one sum from another
#define MD_CALLERS_LINE __builtin_LINE()
#define MD_SHUFFLE_XOR(value, offset, line) __shfl_xor_sync(ALL_LANES, value, offset, LANES, line)
#else
#define MD_CALLERS_LINE 0
#define MD_SHUFFLE_XOR(value, offset, line) __shfl_xor_sync(ALL_LANES, value, offset)
#endif
template <typename A>
MD_DEVICE A sum_of_warp(A value, int width = LANES, int line = MD_CALLERS_LINE) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += MD_SHUFFLE_XOR(value, offset, line);
  return value;
}
template <typename A>
MD_DEVICE A largest_of_warp(A value, int width = LANES, int line = MD_CALLERS_LINE) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const A other = MD_SHUFFLE_XOR(value, offset, line);
    value = other > value ? other : value;
  }
  return value;
}

// Adds V neighbouring numbers, each atomically; address is aligned to them. sm_90 adds four float32 in one instruction.
template <int V, typename A>
MD_DEVICE void atomic_add_row(A* address, const A* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (V % 4 == 0 && sizeof(A) == 4) {
    for (int v = 0; v < V; v += 4)
      atomicAdd(reinterpret_cast<float4*>(address + v), make_float4(values[v], values[v + 1], values[v + 2], values[v + 3]));
  } else
#endif
  {
    for (int v = 0; v < V; ++v) atomicAdd(address + v, values[v]);
  }
}

// run(T()) with T the type of the arrays, dtype, where A is the type of the arithmetic (double for double alone).
template <typename A, typename Run>
void with_storage(DType dtype, const Run& run) {
  if constexpr (sizeof(A) == sizeof(double)) run(double());
  else if (dtype == DType::float16) run(__half());
  else if (dtype == DType::bfloat16) run(__nv_bfloat16());
  else run(float());
}
#endif

// The value rounded to storage type T.
template <typename T>
MD_HD T from_accumulate(accumulate_t<T> x) {
  return FromAccumulate<T>::convert(x);
}

// Products and sums that no compiler may fuse: where a result is compared with a threshold, both machines and the
// reference must round alike. (The CPU build has -ffp-contract=off.)
#if defined(__CUDA_ARCH__)
MD_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
MD_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
#else
MD_HD float mul_rn(float a, float b) { return a * b; }
MD_HD double mul_rn(double a, double b) { return a * b; }
#endif

}  // namespace minidamage
