// Small kernels for test_emulated.py: right ones whose results are known, and wrong ones that the emulator must catch.
// Stand-alone: emulator_cases <name> prints the result, or the error on a line that begins with "error:".
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "common.h"

// Sum of n floats: shuffles within a warp, shared memory between warps, one atomic a block.
__global__ void block_sum(const float* x, int n, float* total) {
  __shared__ float warp_sums[32];
  float sum = 0;
  MD_GRID_STRIDE(i, n) sum += x[i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? warp_sums[threadIdx.x] : 0;
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    if (threadIdx.x == 0) atomicAdd(total, sum);
  }
}

// Reverses a block through dynamic shared memory; `barrier` off is the bug that only one order of threads would show.
__global__ void reverse(int* x, bool barrier) {
  MD_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  x[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
}

__global__ void ballots(unsigned* out) {
  const int t = static_cast<int>(threadIdx.x);
  const unsigned odd = __ballot_sync(0xffffffffu, t & 1);
  unsigned half = 0;
  if (t < 16) half = __ballot_sync(0x0000ffffu, t < 3);  // sixteen lanes alone
  const int any = __any_sync(0xffffffffu, t == 31), all = __all_sync(0xffffffffu, t < 32);
  const int third = __shfl_sync(0xffffffffu, t * 10, 2, 8);  // within groups of eight
  const int before = __shfl_up_sync(0xffffffffu, t, 1);
  const int count = __syncthreads_count(t < 5), some = __syncthreads_or(t == 9), every = __syncthreads_and(t != 9);
  if (t == 12) out[0] = odd, out[1] = half, out[2] = any, out[3] = all, out[4] = third, out[5] = before;
  if (t == 12) out[6] = count * 100 + some * 10 + every;
  if (t == 1) out[1] = half;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 7) __syncthreads();
  else __syncthreads();
}
__global__ void missing_lane() {
  if (threadIdx.x != 5) __shfl_sync(0xffffffffu, 1, 0);
  else __syncthreads();
}
__global__ void two_sums() {  // half of the warp is in one, half in the other
  if (threadIdx.x < 16) minidamage::sum_of_warp(1);
  else minidamage::sum_of_warp(1);
}
__global__ void foreign_mask() { __ballot_sync(0x0000ffffu, 1); }
__global__ void dead_lane() {
  if (threadIdx.x == 3) return;
  __shfl_sync(0xffffffffu, 1, 3);
}
__global__ void uninitialised(float* out) {
  MD_DYNAMIC_SHARED(float, values);
  out[0] = values[threadIdx.x];
}
// A thread that leaves early does not hold up the barrier of the others.
__global__ void early_exit(int* out) {
  if (threadIdx.x > 40) return;
  atomicAdd(out, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[1] = out[0];
}

// C = A B^T of two tiles [16, 24], the last eight columns not part of them; `barrier` off: a lane reads what others have not written.
__global__ void tile_product(const __half* A, const __half* B, float* out, bool barrier) {
  namespace wmma = nvcuda::wmma;
  alignas(32) __shared__ float C[16 * 20];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
  wmma::fill_fragment(c, 1.f);
  wmma::load_matrix_sync(a, A, 24);
  wmma::load_matrix_sync(b, B, 24);
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(C, c, 20, wmma::mem_row_major);
  if (barrier) __syncwarp();
  for (int i = 0; i < 8; i++) out[8 * threadIdx.x + i] = C[threadIdx.x / 2 * 20 + threadIdx.x % 2 * 8 + i];
}
__global__ void tile_of_some_lanes(const __half* A) {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __half, nvcuda::wmma::row_major> a;
  if (threadIdx.x != 5) nvcuda::wmma::load_matrix_sync(a, A, 16);
  else __syncwarp();
}

static void tiles(bool barrier, int offset) {
  alignas(32) __half A[16 * 24 + 16], B[16 * 24];
  for (int i = 0; i < 16 * 24; i++) A[i] = __float2half_rn(i % 24 < 16 ? i % 7 : 1000), B[i] = __float2half_rn(i % 24 < 16 ? i % 5 : 1000);
  std::vector<float> out(256);
  MD_LAUNCH(tile_product, 1, 32, 0, nullptr, A + offset, B, out.data(), barrier);
  bool right = true;
  for (int i = 0; i < 256; i++) {
    int sum = 1;
    for (int c = 0; c < 16; c++) sum += (i / 16 * 24 + c) % 7 * ((i % 16 * 24 + c) % 5);
    right = right && out[i] == sum;
  }
  std::printf("%s\n", right ? "right" : "wrong");
}

static void halves() {
  double worst = 0;
  for (int bits = 0; bits < 65536; bits++) {  // every float16 survives a round trip
    const __half h{static_cast<uint16_t>(bits)};
    const float x = __half2float(h);
    if (x == x && __float2half_rn(x).bits != bits) worst = 1;
  }
  std::printf("%g", worst);
  for (float x : {65519.f, 65520.f, 1.00048828125f, 2.98e-8f, -3e-8f}) std::printf(" %x", __float2half_rn(x).bits);
  std::printf("\n");
  for (float x : {1.00390625f, 1.01171875f, 3.4e38f}) std::printf("%x ", __float2bfloat16_rn(x).bits);
  std::printf("\n");
}

static void run(const char* name) {
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  if (is("sum")) {
    std::vector<float> x(200 * 256);
    for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 7);
    float total = 0;
    MD_LAUNCH(block_sum, 200, 256, 0, nullptr, x.data(), static_cast<int>(x.size()), &total);
    std::printf("%.0f\n", total);
  } else if (is("reverse") || is("no_barrier")) {
    std::vector<int> x(100);
    for (int i = 0; i < 100; i++) x[i] = i;
    MD_LAUNCH(reverse, 1, 100, 100 * sizeof(int), nullptr, x.data(), is("reverse"));
    bool right = true;
    for (int i = 0; i < 100; i++) right = right && x[i] == 99 - i;
    std::printf("%s\n", right ? "right" : "wrong");
  } else if (is("ballots")) {
    unsigned out[7] = {};
    MD_LAUNCH(ballots, 1, 32, 0, nullptr, out);
    std::printf("%x %x %u %u %u %u %u\n", out[0], out[1], out[2], out[3], out[4], out[5], out[6]);
  } else if (is("early_exit")) {
    int out[2] = {};
    MD_LAUNCH(early_exit, 1, 64, 0, nullptr, out);
    std::printf("%d %d\n", out[0], out[1]);
  } else if (is("uninitialised")) {
    float out = 0;
    MD_LAUNCH(uninitialised, 1, 1, 4, nullptr, &out);
    std::printf("%s\n", out != out ? "nan" : "a number");
  } else if (is("divergent_barrier")) MD_LAUNCH(divergent_barrier, 1, 64, 0, nullptr);
  else if (is("missing_lane")) MD_LAUNCH(missing_lane, 1, 32, 0, nullptr);
  else if (is("two_sums")) MD_LAUNCH(two_sums, 1, 32, 0, nullptr);
  else if (is("foreign_mask")) MD_LAUNCH(foreign_mask, 1, 32, 0, nullptr);
  else if (is("dead_lane")) MD_LAUNCH(dead_lane, 1, 32, 0, nullptr);
  else if (is("too_many_threads")) MD_LAUNCH(foreign_mask, 1, 1025, 0, nullptr);
  else if (is("tile_of_some_lanes")) {
    alignas(32) __half A[256] = {};
    MD_LAUNCH(tile_of_some_lanes, 1, 32, 0, nullptr, A);
  } else if (is("tiles")) tiles(true, 0);
  else if (is("tiles_no_barrier")) tiles(false, 0);
  else if (is("tiles_off")) tiles(true, 8);
  else if (is("halves")) halves();
}

int main(int count, char** names) {
  for (int i = 1; i < count; i++) {
    try {
      run(names[i]);
    } catch (const std::exception& error) {
      std::printf("error: %s\n", error.what());
    }
  }
}
