// CUDA on a CPU, for tests: the very .cu sources that nvcc compiles also compile with g++ and run here without a GPU.
//
// Blocks run one after another. The threads of a block are fibers that give way only where CUDA threads meet:
// __syncthreads and the warp collectives, which are real. A barrier that not all threads reach, or a shuffle whose lanes
// disagree, ends the launch with an exception that names the kernel, the threads and the lines. Threads run forwards and
// backwards in turn, so that a missing barrier shows. Dynamic shared memory has its exact size (AddressSanitizer sees an
// overrun) and starts as NaN in every block. Read launch(), then Engine::run_block(), then wait_for_all().
//
// Not modelled: memory shared by two blocks at the same time, streams, textures, and the speed of anything.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run in turn, so one copy serves
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace cuda_on_cpu {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10, SHARED_LIMIT = 48 << 10;

enum class State { unstarted, ready, at_barrier, at_collective, done };

struct Fiber {
  ucontext_t context;                // where its life begins
  void* left_at[5];                  // for __builtin_longjmp
  bool begun = false;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;        // AddressSanitizer's
};

struct Thread {
  dim3 index;
  State state = State::unstarted;
  Fiber* fiber = nullptr;
  const char* call = "";             // what it waits in, and the source line
  int line = 0;
  unsigned mask = 0;                 // lanes that take part in the collective
  uint64_t value = 0;                // what this thread brings to the barrier or collective
  uint64_t received[WARP];           // what each lane brought
  unsigned present = 0;              // lanes whose value was received
  uint64_t barrier_count = 0;        // threads that brought a non-zero value to the barrier
};

struct Engine {
  std::mutex mutex;
  std::string kernel, error;
  std::function<void()> body;
  dim3 grid, block, block_index;
  std::vector<Thread> threads;
  Thread* thread = nullptr;          // the one that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber scheduler;
  const void* main_stack = nullptr;  // the scheduler's, as AddressSanitizer tells it when the first fiber begins
  size_t main_bytes = 0;
  bool backwards = false;
  size_t started = 0;                // threads of this block that have begun
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes = 0;

  Thread& at(size_t i) { return threads[backwards ? threads.size() - 1 - i : i]; }

  // Leaves `from` where it stands and continues `to`.
  void change(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = to->stack ? to->stack.get() : main_stack;
    __sanitizer_start_switch_fiber(&from->fake_stack, stack, to->stack ? STACK_BYTES : main_bytes);
    jump(from, to);
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#else
    jump(from, to);
#endif
  }

  // Not by swapcontext: for the signals' mask it asks the kernel each time, and half of all emulated time went there. Not sanitized:
  // before a longjmp AddressSanitizer forgets the stack that is left, as if no frame of it were entered again.
  __attribute__((noinline, no_sanitize("address"))) static void jump(Fiber* from, Fiber* to) {
#if defined(__clang__) && !defined(__x86_64__)  // which has no __builtin_longjmp on most processors
    swapcontext(&from->context, &to->context);
#else
    from->begun = true;
    if (__builtin_setjmp(from->left_at) != 0) return;
    if (to->begun) __builtin_longjmp(to->left_at, 1);
    setcontext(&to->context);
    std::abort();  // it does not return
#endif
  }

  // A fiber's life: run a thread to its end, take the next that has not begun, else give the fiber back.
  static void fiber_main();

  Fiber* new_fiber() {
    if (idle.empty()) add_fiber();
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }

  void add_fiber() {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    idle.push_back(&fiber);
  }

  // Called by the running thread: waits until the scheduler makes it ready again.
  void wait(State state, const char* call, int line) {
    Thread* self = thread;
    self->state = state, self->call = call, self->line = line;
    change(self->fiber, &scheduler);
    thread = self;
  }

  // Called by the running thread: ends the launch. The fibers are abandoned where they stand.
  void fail(const std::string& message) {
    error = message;
    change(thread->fiber, &scheduler);
    std::abort();  // never continued
  }

  static std::string place(const dim3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  }

  void run_block() {
    for (size_t i = 0; i < threads.size(); i++) {
      const unsigned n = static_cast<unsigned>(i);
      threads[i].index = dim3(n % block.x, n / block.x % block.y, n / block.x / block.y);
      threads[i].state = State::unstarted;
      threads[i].fiber = nullptr;
    }
    started = 0;
    std::memset(shared.get(), 0xff, shared_bytes);  // every float in it is NaN
    for (;;) {
      while (started < threads.size() && error.empty()) {
        thread = &at(started++);
        thread->fiber = new_fiber();
        change(&scheduler, thread->fiber);
      }
      for (size_t i = 0; i < threads.size() && error.empty(); i++) {
        if (at(i).state != State::ready) continue;
        thread = &at(i);
        change(&scheduler, thread->fiber);
      }
      if (!error.empty()) return;
      if (started == threads.size() && !release_waiting()) break;
    }
    const bool stuck = std::any_of(threads.begin(), threads.end(), [](Thread& t) { return t.state != State::done; });
    if (stuck) error = describe_deadlock();
  }

  // Nobody can run: completes every collective and then the barrier, if all live threads have arrived. False: none could.
  bool release_waiting() {
    bool released = false;
    for (size_t first = 0; first < threads.size(); first += WARP) released |= release_warp(first);
    if (released) return true;
    const Thread* leader = nullptr;
    uint64_t count = 0;
    for (const Thread& t : threads) {
      if (t.state == State::done) continue;
      if (t.state != State::at_barrier) return false;
      if (leader && (t.line != leader->line || t.call != leader->call)) return false;  // a divergent barrier
      leader = &t;
      count += t.value != 0;
    }
    for (Thread& t : threads) {
      if (t.state == State::done) continue;
      t.barrier_count = count, t.state = State::ready;
    }
    if (leader) backwards = !backwards;  // not where all have ended: launch() turns the order for the next block
    return leader != nullptr;
  }

  bool release_warp(size_t first) {
    const int lanes = static_cast<int>(std::min<size_t>(WARP, threads.size() - first));
    bool released = false;
    for (int lane = 0; lane < lanes; lane++) {
      const Thread leader = threads[first + lane];
      if (leader.state != State::at_collective) continue;
      bool complete = true;
      unsigned present = 0;
      uint64_t values[WARP] = {};
      for (int other = 0; other < lanes; other++) {
        const Thread& t = threads[first + other];
        if (!(leader.mask >> other & 1) || t.state == State::done) continue;  // CUDA: "all non-exited threads named in mask"
        complete = complete && t.state == State::at_collective && t.mask == leader.mask && t.line == leader.line &&
                   t.call == leader.call;
        present |= 1u << other;
        values[other] = t.value;
      }
      if (!complete) continue;
      for (int other = 0; other < lanes; other++) {
        if (!(present >> other & 1)) continue;
        Thread& t = threads[first + other];
        std::copy(values, values + WARP, t.received);
        t.present = present, t.state = State::ready;
      }
      released = true;
    }
    return released;
  }

  std::string describe_deadlock() {
    std::string text = "divergent barrier or deadlock in block " + place(block_index) + ":";
    const Thread* last = nullptr;
    int shown = 0;
    for (const Thread& t : threads) {
      if (t.state == State::done || (last && last->call == t.call && last->line == t.line)) continue;
      if (shown++ == 4) { text += " ..."; break; }
      text += " thread " + place(t.index) + " waits in " + t.call + " at line " + std::to_string(t.line) + ";";
      last = &t;
    }
    return text + " the others have ended or wait elsewhere";
  }
};

inline Engine engine;

inline void Engine::fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &engine.main_stack, &engine.main_bytes);  // fibers are begun by the scheduler alone
#endif
  for (;;) {
    Fiber* self = engine.thread->fiber;
    engine.body();
    engine.thread->state = State::done;
    if (engine.started < engine.threads.size()) {
      engine.thread = &engine.at(engine.started++);
      engine.thread->fiber = self;
      continue;
    }
    engine.idle.push_back(self);
    engine.change(self, &engine.scheduler);
  }
}

inline void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  std::lock_guard<std::mutex> guard(engine.mutex);
  const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  const std::string name = std::string("emulated kernel ") + kernel + ": ";
  if (count == 0 || count > 1024)
    throw std::runtime_error(name + "invalid configuration: a block of " + std::to_string(count) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
    throw std::runtime_error(name + "invalid configuration: a grid of " + Engine::place(grid) + " blocks");
  if (shared_bytes > SHARED_LIMIT) throw std::runtime_error(name + "more than 48 KiB of dynamic shared memory");
  engine.kernel = kernel, engine.grid = grid, engine.block = block, engine.body = std::move(body), engine.error.clear();
  engine.threads.assign(count, Thread());
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes)) throw std::bad_alloc();
  engine.shared.reset(static_cast<unsigned char*>(shared));
  engine.shared_bytes = shared_bytes;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        engine.block_index = dim3(x, y, z);
        engine.run_block();
        engine.backwards = !engine.backwards;
        if (engine.error.empty()) continue;
        engine.fibers.clear(), engine.idle.clear();
        throw std::runtime_error(name + engine.error);
      }
}

inline unsigned char* dynamic_shared() { return engine.shared.get(); }

inline int lane() {
  const dim3 &i = engine.thread->index, &n = engine.block;
  return static_cast<int>((i.x + n.x * (i.y + n.y * i.z)) % WARP);
}

// Brings `value` to the lanes of `mask` and returns when all of them have brought theirs.
inline const Thread& wait_for_all(unsigned mask, uint64_t value, const char* call, int line) {
  Thread& self = *engine.thread;
  if (!(mask >> lane() & 1)) engine.fail(std::string(call) + " at line " + std::to_string(line) + ": the calling lane is not in the mask");
  self.mask = mask, self.value = value;
  engine.wait(State::at_collective, call, line);
  return self;
}

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes a lane");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T exchange(unsigned mask, T value, int source, const char* call, int line) {
  const Thread& self = wait_for_all(mask, pack(value), call, line);
  if (!(self.present >> source & 1))
    engine.fail(std::string(call) + " at line " + std::to_string(line) + ": reads lane " + std::to_string(source) + ", which is not there");
  T result;
  std::memcpy(&result, &self.received[source], sizeof(T));
  return result;
}

inline uint64_t block_barrier(uint64_t value, const char* call, int line) {
  Thread& self = *engine.thread;
  self.value = value;
  engine.wait(State::at_barrier, call, line);
  return self.barrier_count;
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::engine.thread->index)
#define blockIdx (::cuda_on_cpu::engine.block_index)
#define blockDim (::cuda_on_cpu::engine.block)
#define gridDim (::cuda_on_cpu::engine.grid)
constexpr int warpSize = ::cuda_on_cpu::WARP;

inline void __syncthreads(int line = __builtin_LINE()) { ::cuda_on_cpu::block_barrier(0, "__syncthreads", line); }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) {
  return static_cast<int>(::cuda_on_cpu::block_barrier(p != 0, "__syncthreads_count", line));
}
inline int __syncthreads_or(int p, int line = __builtin_LINE()) {
  return ::cuda_on_cpu::block_barrier(p != 0, "__syncthreads_or", line) != 0;
}
inline int __syncthreads_and(int p, int line = __builtin_LINE()) {
  return ::cuda_on_cpu::block_barrier(p == 0, "__syncthreads_and", line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  ::cuda_on_cpu::wait_for_all(mask, 0, "__syncwarp", line);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return ::cuda_on_cpu::exchange(mask, value, ::cuda_on_cpu::lane() / width * width + (source & (width - 1)), "__shfl_sync", line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane(), source = lane ^ lanes;
  return ::cuda_on_cpu::exchange(mask, value, source < lane / width * width + width ? source : lane, "__shfl_xor_sync", line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  return ::cuda_on_cpu::exchange(mask, value, source < lane / width * width + width ? source : lane, "__shfl_down_sync", line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  return ::cuda_on_cpu::exchange(mask, value, source >= lane / width * width ? source : lane, "__shfl_up_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
  const auto& self = ::cuda_on_cpu::wait_for_all(mask, p != 0, "__ballot_sync", line);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= (self.present >> lane & 1) && self.received[lane] ? 1u << lane : 0u;
  return bits;
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, !p, line) == 0; }

// One thread runs at a time, so a plain read and write is atomic.
template <typename T>
struct same_type { using type = T; };
template <typename T>
using same_type_t = typename same_type<T>::type;
template <typename T>
T atomicAdd(T* address, same_type_t<T> value) { T old = *address; *address = old + value; return old; }
template <typename T>
T atomicSub(T* address, same_type_t<T> value) { T old = *address; *address = old - value; return old; }
template <typename T>
T atomicMax(T* address, same_type_t<T> value) { T old = *address; *address = old < value ? value : old; return old; }
template <typename T>
T atomicMin(T* address, same_type_t<T> value) { T old = *address; *address = value < old ? value : old; return old; }
template <typename T>
T atomicOr(T* address, same_type_t<T> value) { T old = *address; *address = old | value; return old; }
template <typename T>
T atomicAnd(T* address, same_type_t<T> value) { T old = *address; *address = old & value; return old; }
template <typename T>
T atomicExch(T* address, same_type_t<T> value) { T old = *address; *address = value; return old; }
template <typename T>
T atomicCAS(T* address, same_type_t<T> compare, same_type_t<T> value) {
  T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* address) { return *address; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

// float16 and bfloat16: storage only, as in the kernels; arithmetic is float32. Rounded to nearest, ties to even.
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? std::nanf("") : INFINITY)
                          : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return h.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude == 0) return {sign};
  int exponent = 0;
  std::frexp(magnitude, &exponent);                                  // magnitude in [2^(exponent-1), 2^exponent)
  exponent = exponent < -13 ? -13 : exponent;                        // subnormals share the smallest exponent
  const int scaled = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + scaled))};  // carries round up into the exponent
}
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half atomicAdd(__half* address, __half value) {
  const __half old = *address;
  *address = __float2half_rn(__half2float(old) + __half2float(value));
  return old;
}
inline __nv_bfloat16 atomicAdd(__nv_bfloat16* address, __nv_bfloat16 value) {
  const __nv_bfloat16 old = *address;
  *address = __float2bfloat16_rn(__bfloat162float(old) + __bfloat162float(value));
  return old;
}

// Matrix fragments (mma.h): every lane holds the whole tile of 16 x 16, as float32. Loads, stores and products are collectives of the warp,
// and a store writes of each lane its own elements alone, so that a missing __syncwarp behind it shows (one before a load does not: the
// load waits). A pointer or a distance of rows that a GPU would not take, or lanes with different pointers, end the launch.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "tiles of 16 x 16 x 16");
  float x[256];  // [16, 16], row by row
};

inline float number(float x) { return x; }
inline float number(__half x) { return __half2float(x); }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
void check_tile(const T* tile, unsigned stride, const char* call, int line) {
  if (reinterpret_cast<uintptr_t>(tile) % 32 || stride * sizeof(T) % 16)
    ::cuda_on_cpu::engine.fail(std::string(call) + " at line " + std::to_string(line) + ": rows " + std::to_string(stride) +
                               " elements apart, or a tile off the 32 bytes that it must be aligned to");
}

inline void meet(const void* pointer, const char* call, int line) {
  const auto& self = ::cuda_on_cpu::wait_for_all(0xffffffffu, reinterpret_cast<uintptr_t>(pointer), call, line);
  for (int lane = 0; lane < ::cuda_on_cpu::WARP; lane++)
    if (self.received[lane] != reinterpret_cast<uintptr_t>(pointer))
      ::cuda_on_cpu::engine.fail(std::string(call) + " at line " + std::to_string(line) + ": the lanes do not mean the same tile");
}

template <typename Fragment>
void fill_fragment(Fragment& tile, float value) {
  std::fill(tile.x, tile.x + 256, value);
}
template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& tile, const T* from, unsigned stride, int line = __builtin_LINE()) {
  check_tile(from, stride, "load_matrix_sync", line);
  meet(from, "load_matrix_sync", line);
  constexpr bool by_rows = std::is_same<Layout, row_major>::value;
  for (unsigned i = 0; i < 16; i++)
    for (unsigned j = 0; j < 16; j++) tile.x[16 * i + j] = number(by_rows ? from[i * stride + j] : from[j * stride + i]);
}
inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& tile, unsigned stride, layout_t layout,
                              int line = __builtin_LINE()) {
  check_tile(to, stride, "store_matrix_sync", line);
  meet(to, "store_matrix_sync", line);
  const unsigned lane = static_cast<unsigned>(::cuda_on_cpu::lane());
  for (unsigned e = 0; e < 8; e++) {  // eight elements a lane, as on a GPU: pairs of every quarter of the tile
    const unsigned i = lane / 4 + e / 4 * 8, j = lane % 4 * 2 + e / 2 % 2 * 8 + e % 2;
    to[layout == mem_row_major ? i * stride + j : j * stride + i] = tile.x[16 * i + j];
  }
}
template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& D, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& A,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& B, const fragment<accumulator, 16, 16, 16, float>& C,
              int line = __builtin_LINE()) {
  meet(nullptr, "mma_sync", line);
  for (int i = 0; i < 16; i++) {
    float sums[16];
    std::copy(C.x + 16 * i, C.x + 16 * i + 16, sums);
    for (int c = 0; c < 16; c++)
      for (int j = 0; j < 16; j++) sums[j] += A.x[16 * i + c] * B.x[16 * c + j];
    std::copy(sums, sums + 16, D.x + 16 * i);
  }
}

}  // namespace nvcuda::wmma
