// Box coding on a GPU. Read ../box_coding.h first, then ../cpu/box_coding.cpp, the plain form.
//
// The plain algorithm, as a chain of framework operations: unbind, sizes, centres, divisions, products, exponentials, stack: about 25
// kernels to decode (and some 40 with the backward), 20 to encode, on a few thousand boxes, where a launch costs more than the work.
// Bytes that must move: 32 read and 16 written a box in float32, 40 to 50 flops: the bound is the launch, for very many boxes the memory.
// What is done about it: one kernel each way and one backward, which computes the sizes again and keeps nothing but the inputs. A thread
// owns a box, 16 bytes (8 of a narrow type) a load where the addresses allow it; the cut at the picture's border costs no pass of its own.
// On an H200, 250,000 boxes decoded and cut: 0.057 ms, most of it the launch; torchvision 0.64 (results/speed.md).
#include "../box_coding.h"

namespace minidamage {
namespace {

constexpr int THREADS = 256;

// Whether every box of an array lies on a boundary of its own size.
template <typename T>
bool wide_loads(const T* array, int64_t outer, int64_t inner) {
  return reinterpret_cast<uintptr_t>(array) % (4 * sizeof(T)) == 0 && outer % 4 == 0 && inner % 4 == 0;
}

template <typename T>
MD_DEVICE Box<accumulate_t<T>> load_box(const T* address, bool wide) {
  Pack<T, 4> pack;
  if (wide) {
    pack = *reinterpret_cast<const Pack<T, 4>*>(address);
  } else {
    for (int c = 0; c < 4; ++c) pack.v[c] = address[c];
  }
  return {{to_accumulate(pack.v[0]), to_accumulate(pack.v[1]), to_accumulate(pack.v[2]), to_accumulate(pack.v[3])}};
}

// address: [4] of a result, which is always whole
template <typename T>
MD_DEVICE void store_box(const Box<accumulate_t<T>>& box, T* address) {
  Pack<T, 4> pack;
  for (int c = 0; c < 4; ++c) pack.v[c] = from_accumulate<T>(box.v[c]);
  *reinterpret_cast<Pack<T, 4>*>(address) = pack;
}

// a, b: boxes by `rows`; output: [rows, 4]. Thread: one box.
template <typename A, typename Index>
__global__ void encode_boxes(const BoxCoding<A> coding, const BoxRows rows, bool a_wide, bool b_wide, const A* __restrict__ a,
                             const A* __restrict__ b, A* __restrict__ output) {
  const Index inner_size = static_cast<Index>(rows.inner);
  MD_GRID_STRIDE_OF(Index, n, rows.rows) {
    const Index outer = n / inner_size, inner = n % inner_size;
    const Box<A> box = load_box(a + outer * rows.a_outer + inner * rows.a_inner, a_wide);
    const Box<A> proposal = load_box(b + outer * rows.b_outer + inner * rows.b_inner, b_wide);
    store_box<A>(encode_box(coding, box, proposal), output + static_cast<int64_t>(n) * 4);
  }
}

// a: deltas, b: boxes, by `rows`; output: [rows, 4]. Thread: one box.
template <typename T, typename Index>
__global__ void decode_boxes(const BoxCoding<accumulate_t<T>> coding, const BoxRows rows, bool a_wide, bool b_wide,
                             const T* __restrict__ a, const accumulate_t<T>* __restrict__ b, accumulate_t<T>* __restrict__ output) {
  using A = accumulate_t<T>;
  const Index inner_size = static_cast<Index>(rows.inner);
  MD_GRID_STRIDE_OF(Index, n, rows.rows) {
    const Index outer = n / inner_size, inner = n % inner_size;
    const Box<A> delta = load_box(a + outer * rows.a_outer + inner * rows.a_inner, a_wide);
    const Box<A> box = load_box(b + outer * rows.b_outer + inner * rows.b_inner, b_wide);
    store_box<A>(decode_box(coding, delta, box), output + static_cast<int64_t>(n) * 4);
  }
}

// grad: [rows, 4]; a: deltas, b: boxes, by `rows`; grad_deltas: [rows, 4]. Thread: one box.
template <typename T, typename Index>
__global__ void decode_boxes_backward(const BoxCoding<accumulate_t<T>> coding, const BoxRows rows, bool grad_wide, bool a_wide, bool b_wide,
                                      const accumulate_t<T>* __restrict__ grad, const T* __restrict__ a,
                                      const accumulate_t<T>* __restrict__ b, T* __restrict__ grad_deltas) {
  using A = accumulate_t<T>;
  const Index inner_size = static_cast<Index>(rows.inner);
  MD_GRID_STRIDE_OF(Index, n, rows.rows) {
    const Index outer = n / inner_size, inner = n % inner_size;
    const Box<A> delta = load_box(a + outer * rows.a_outer + inner * rows.a_inner, a_wide);
    const Box<A> box = load_box(b + outer * rows.b_outer + inner * rows.b_inner, b_wide);
    const Box<A> slope = load_box(grad + static_cast<int64_t>(n) * 4, grad_wide);
    store_box<T>(decode_box_backward(coding, slope, delta, box), grad_deltas + static_cast<int64_t>(n) * 4);
  }
}

}  // namespace

template <typename A>
void encode_boxes_cuda(const BoxCoding<A>& coding, const BoxRows& rows, const A* a, const A* b, A* output, void* stream) {
  const auto kernel = fits_int32(rows.rows) ? &encode_boxes<A, uint32_t> : &encode_boxes<A, int64_t>;
  MD_LAUNCH(kernel, blocks_for(rows.rows, THREADS), THREADS, 0, stream, coding, rows, wide_loads(a, rows.a_outer, rows.a_inner),
            wide_loads(b, rows.b_outer, rows.b_inner), a, b, output);
}

template <typename A>
void decode_boxes_cuda(const BoxCoding<A>& coding, const BoxRows& rows, DType dtype, const void* a, const A* b, A* output, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* deltas = static_cast<const T*>(a);
    const auto kernel = fits_int32(rows.rows) ? &decode_boxes<T, uint32_t> : &decode_boxes<T, int64_t>;
    MD_LAUNCH(kernel, blocks_for(rows.rows, THREADS), THREADS, 0, stream, coding, rows, wide_loads(deltas, rows.a_outer, rows.a_inner),
              wide_loads(b, rows.b_outer, rows.b_inner), deltas, b, output);
  });
}

template <typename A>
void decode_boxes_backward_cuda(const BoxCoding<A>& coding, const BoxRows& rows, DType dtype, const A* grad, const void* a, const A* b,
                                void* grad_deltas, void* stream) {
  with_storage<A>(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* deltas = static_cast<const T*>(a);
    const auto kernel = fits_int32(rows.rows) ? &decode_boxes_backward<T, uint32_t> : &decode_boxes_backward<T, int64_t>;
    MD_LAUNCH(kernel, blocks_for(rows.rows, THREADS), THREADS, 0, stream, coding, rows, wide_loads(grad, 4, 4),
              wide_loads(deltas, rows.a_outer, rows.a_inner), wide_loads(b, rows.b_outer, rows.b_inner), grad, deltas, b,
              static_cast<T*>(grad_deltas));
  });
}

#define INSTANTIATE(A)                                                                                                               \
  template void encode_boxes_cuda<A>(const BoxCoding<A>&, const BoxRows&, const A*, const A*, A*, void*);                            \
  template void decode_boxes_cuda<A>(const BoxCoding<A>&, const BoxRows&, DType, const void*, const A*, A*, void*);                  \
  template void decode_boxes_backward_cuda<A>(const BoxCoding<A>&, const BoxRows&, DType, const A*, const void*, const A*, void*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
