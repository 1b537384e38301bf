// Non-maximum suppression on a GPU. Read ../nms.h first. Another algorithm than cpu/nms.cpp: greedy order is serial and a GPU is wide.
//
// The plain algorithm: test all n (n - 1) / 2 pairs, one bit each, copy the n n / 8 bytes of bits to the host, and walk them there in order
// of score. A test is 12 flops and a division on 32 bytes that a block of threads shares: 20,000 boxes are 2e8 tests, some 3 Gflop, and
// 50 MB of bits to write, to copy over the bus and to wait for.
// What is done about it: nms_reduce walks the bits on the device, so the host neither copies the mask nor waits. NMS_ROWS rows at a time
// keep the mask small (10 MB for 20,000 boxes), and later rows that are already removed are not tested at all.
// On an H200, 20,000 boxes at IoU 0.5: 2.5 ms, torchvision 7.5 (results/speed.md). The gain of each step alone is not measured.
#include "../nms.h"

namespace minidamage {
namespace {

constexpr int REDUCE_THREADS = 1024;  // at most; without the bound below nvcc takes 72 (sm_90) or 96 registers, and so many cannot start

// boxes: [n, 4], idxs: [n] or null, removed: [words], mask: [rows, words], row 0 of which is box `first`.
// Block (column word, row word), 64 threads: a thread owns one box of the row word and writes which of the 64 boxes of
// the column word it suppresses (bits of boxes that come after it only).
template <typename T>
__global__ void nms_mask(const T* __restrict__ boxes, const int64_t* __restrict__ idxs, int64_t n, T iou_threshold, int64_t first,
                         int64_t words, const uint64_t* __restrict__ removed, const int64_t* __restrict__ count, int64_t max_keep,
                         uint64_t* __restrict__ mask) {
  __shared__ T column_boxes[NMS_WORD][5];
  __shared__ int64_t column_idxs[NMS_WORD];
  const int64_t row_word = first / NMS_WORD + blockIdx.y, column_word = first / NMS_WORD + blockIdx.x;
  if (column_word < row_word || *count >= max_keep) return;  // the same for the whole block
  const int64_t column = column_word * NMS_WORD + threadIdx.x, row = row_word * NMS_WORD + threadIdx.x;
  if (column < n) {
    const T* box = boxes + 4 * column;
    for (int k = 0; k < 4; k++) column_boxes[threadIdx.x][k] = box[k];
    column_boxes[threadIdx.x][4] = box_area(box[0], box[1], box[2], box[3]);
    column_idxs[threadIdx.x] = idxs ? idxs[column] : 0;
  }
  __syncthreads();
  if (row >= n) return;
  uint64_t bits = 0;
  if (!(removed[row_word] >> threadIdx.x & 1)) {
    const T x1 = boxes[4 * row], y1 = boxes[4 * row + 1], x2 = boxes[4 * row + 2], y2 = boxes[4 * row + 3];
    const T area = box_area(x1, y1, x2, y2);
    const int64_t idx = idxs ? idxs[row] : 0;
    const int64_t left = n - column_word * NMS_WORD;
    const int end = static_cast<int>(left < NMS_WORD ? left : NMS_WORD);
    for (int k = row_word == column_word ? static_cast<int>(threadIdx.x) + 1 : 0; k < end; k++) {
      const T* box = column_boxes[k];
      if (column_idxs[k] == idx && overlaps(x1, y1, x2, y2, area, box[0], box[1], box[2], box[3], box[4], iou_threshold))
        bits |= uint64_t(1) << k;
    }
  }
  mask[(row - first) * words + column_word] = bits;
}

// mask: [rows, words] of boxes first ... first + rows - 1; removed: [words], order: [n], keep: [max_keep], count: [1].
// One block. For each word of rows, thread 0 decides its 64 boxes one after the other (their mutual bits are one column);
// then 64 threads write the kept indices, and every thread owns some words of `removed` and adds what the kept ones suppress.
__global__ void __launch_bounds__(REDUCE_THREADS, 1)
    nms_reduce(const uint64_t* __restrict__ mask, const int64_t* __restrict__ order, int64_t n, int64_t first, int64_t rows, int64_t words,
               int64_t max_keep, uint64_t* __restrict__ removed, int64_t* __restrict__ keep, int64_t* __restrict__ count) {
  __shared__ uint64_t mutual[NMS_WORD];
  __shared__ uint64_t word_kept;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t kept_count = *count;  // every thread counts along
  for (int64_t row = first; row < first + rows && kept_count < max_keep; row += NMS_WORD) {
    const int64_t word = row / NMS_WORD, left = n - row;
    const uint64_t* word_mask = mask + (row - first) * words;
    const int members = static_cast<int>(left < NMS_WORD ? left : NMS_WORD);
    if (thread < members) mutual[thread] = word_mask[thread * words + word];
    __syncthreads();
    if (thread == 0) {
      uint64_t gone = removed[word], kept = 0;
      for (int k = 0; k < members; k++) {
        if (gone >> k & 1) continue;
        kept |= uint64_t(1) << k;
        gone |= mutual[k];
      }
      word_kept = kept;
    }
    __syncthreads();
    const uint64_t kept = word_kept;
    if (thread < members && (kept >> thread & 1)) {
      const int64_t place = kept_count + __popcll(kept & ((uint64_t(1) << thread) - 1));
      if (place < max_keep) keep[place] = order[row + thread];
    }
    kept_count += __popcll(kept);
    for (int64_t column = word + 1 + thread; column < words; column += blockDim.x) {
      uint64_t suppressed = 0;
#pragma unroll 16
      for (int k = 0; k < NMS_WORD; k++) suppressed |= (kept >> k & 1) ? word_mask[k * words + column] : 0;  // loads in flight together
      removed[column] |= suppressed;
    }
    __syncthreads();
  }
  if (thread == 0) *count = kept_count < max_keep ? kept_count : max_keep;
}

// removed: [words]: bits of boxes that are not valid, or lie past n. A thread owns one word.
__global__ void nms_start(const bool* __restrict__ valid, int64_t n, int64_t words, uint64_t* __restrict__ removed) {
  MD_GRID_STRIDE(word, words) {
    uint64_t bits = 0;
    for (int k = 0; k < NMS_WORD; k++) {
      const int64_t i = word * NMS_WORD + k;
      if (i >= n || (valid && !valid[i])) bits |= uint64_t(1) << k;
    }
    removed[word] = bits;
  }
}

}  // namespace

template <typename T>
void nms_cuda(const T* boxes, const int64_t* idxs, const bool* valid, const int64_t* order, int64_t n, double iou_threshold,
              int64_t max_keep, uint64_t* mask, uint64_t* removed, int64_t* keep, int64_t* count, void* stream) {
  const int64_t words = ceil_div(n, NMS_WORD);
  const T threshold = round_down<T>(iou_threshold);
  MD_LAUNCH(nms_start, blocks_for(words, 64), 64, 0, stream, valid, n, words, removed);
  for (int64_t first = 0; first < n; first += NMS_ROWS) {
    const int64_t rows = n - first < NMS_ROWS ? n - first : NMS_ROWS;
    const dim3 grid(static_cast<unsigned>(words - first / NMS_WORD), static_cast<unsigned>(ceil_div(rows, NMS_WORD)));
    MD_LAUNCH(nms_mask<T>, grid, NMS_WORD, 0, stream, boxes, idxs, n, threshold, first, words, removed, count, max_keep, mask);
    const int64_t columns = words - first / NMS_WORD;
    const unsigned threads = columns > 512 ? REDUCE_THREADS : columns > 128 ? 512 : 128;
    MD_LAUNCH(nms_reduce, 1, threads, 0, stream, mask, order, n, first, rows, words, max_keep, removed, keep, count);
  }
}

template void nms_cuda(const float*, const int64_t*, const bool*, const int64_t*, int64_t, double, int64_t, uint64_t*, uint64_t*, int64_t*,
                       int64_t*, void*);
template void nms_cuda(const double*, const int64_t*, const bool*, const int64_t*, int64_t, double, int64_t, uint64_t*, uint64_t*,
                       int64_t*, int64_t*, void*);

}  // namespace minidamage
