// Deformable convolution, v1 (Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.1) and v2 (Zhu et al., Deformable
// ConvNets v2, CVPR 2019, section 3.2): the geometry, written once for both machines. Read cpu/deform_conv2d.cpp, the plain form, next,
// then cuda/deform_conv2d.cu.
//
// A convolution whose taps look beside the grid. For output pixel p, tap k of the kernel (KH x KW of them) and offset group q, which is
// C / offset_groups neighbouring channels of the input,
//     y = p_y stride_y - pad_y + k_y dilation_y + offset[p, q, k, 0],   x alike with offset[p, q, k, 1],
//     columns[p, k, c] = mask[p, q(c), k] sum over the four pixels i around (y, x) of weight_i input[i, c],
//     output[p, o] = bias[o] + sum_k sum_c weight[o, k, c] columns[p, k, c]        over the channels c of o's group.
// Pixels outside the picture are zero, and so is a whole sample unless -1 <= y < H and -1 <= x < W (which NaN and infinity fail).
// With dots_i = sum_c grad_columns[p, k, c] input[i, c] over the channels of q, the other gradients are small:
//     grad_mask = sum_i weight_i dots_i;   grad_y = mask sum_i (d weight_i / dy) dots_i;   grad_input[i, c] += mask weight_i grad_columns.
// On a kink (y or x an integer) the derivative is the one from above, towards larger y or x.
//
// Layout: input and its gradient [N, H, W, C], output and its gradient [N, OH, OW, O], weight [O, KH, KW, C / groups] in memory
// (channels_last of the usual tensors): all products and sums run over neighbouring numbers. P = N OH OW positions, K = KH KW taps.
#pragma once

#include "common.h"

namespace minidamage {

// Everything a kernel needs to know. A is the type it computes in (double for double, else float); input and weight may be narrower.
template <typename A>
struct DeformConv2d {
  int64_t N, C, H, W;         // input
  int64_t O, KH, KW, OH, OW;  // weight and output
  int64_t stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t groups, offset_groups;
  const A* offset;  // [P, offset_groups, K, 2]: y, x in pixels
  const A* mask;    // [P, offset_groups, K], or null: ones

  MD_HD int64_t positions() const { return N * OH * OW; }
  MD_HD int64_t taps() const { return KH * KW; }
  template <typename Index = int64_t>
  MD_HD Index group_channels() const { return static_cast<Index>(C) / static_cast<Index>(groups); }
  MD_HD int64_t group_outputs() const { return O / groups; }
  template <typename Index = int64_t>
  MD_HD Index offset_channels() const { return static_cast<Index>(C) / static_cast<Index>(offset_groups); }

  // The pictures [begin, begin + count) alone: their positions, samples and pixels are counted from picture `begin`.
  DeformConv2d pictures(int64_t begin, int64_t count) const {
    DeformConv2d part = *this;
    const int64_t skipped = begin * OH * OW * offset_groups * taps();
    part.N = count, part.offset += 2 * skipped;
    if (mask) part.mask += skipped;
    return part;
  }
};

// Where one tap looks: between the rows y and y + 1 and the columns x and x + 1, of which one may lie outside the picture.
template <typename A>
struct Sample {
  int64_t y, x;   // -1 .. H - 1, -1 .. W - 1
  A below, right;  // weights of row y + 1 and column x + 1; 1 - below and 1 - right those of y and x
  A mask;
};

// Where a tap stands without its offset, in picture n, and which number its sample has in mask (and half of it in offset).
struct GridPlace {
  int64_t n, y, x, index;
};
// Index: the type of the divisions, which holds the number of samples.
template <typename A, typename Index>
MD_HD GridPlace grid_place(const DeformConv2d<A>& problem, Index position, Index q, Index k) {
  const Index OW = static_cast<Index>(problem.OW), OH = static_cast<Index>(problem.OH), KW = static_cast<Index>(problem.KW);
  const Index row = position / OW, n = row / OH, tap_y = k / KW;
  const int64_t out_y = row - n * OH, out_x = position - row * OW, tap_x = k - tap_y * KW;
  return {static_cast<int64_t>(n), out_y * problem.stride_y - problem.pad_y + tap_y * problem.dilation_y,
          out_x * problem.stride_x - problem.pad_x + tap_x * problem.dilation_x,
          (position * problem.offset_groups + q) * problem.taps() + k};
}

// The sample there; false (and only the mask is set) if it is outside.
template <typename A>
MD_HD bool find_sample(const DeformConv2d<A>& problem, const GridPlace& place, Sample<A>& sample) {
  const A y = A(place.y) + problem.offset[2 * place.index], x = A(place.x) + problem.offset[2 * place.index + 1];
  sample.mask = problem.mask ? problem.mask[place.index] : A(1);
  if (!(y >= A(-1) && y < A(problem.H) && x >= A(-1) && x < A(problem.W))) return false;
  const A floor_y = A(floor(y)), floor_x = A(floor(x));
  sample.y = static_cast<int64_t>(floor_y), sample.x = static_cast<int64_t>(floor_x);
  sample.below = y - floor_y, sample.right = x - floor_x;
  return true;
}

// Corner i of a sample: 0 above left, 1 above right, 2 below left, 3 below right. Its pixel y W + x; -1 outside the picture.
template <typename A>
MD_HD int64_t corner_pixel(const DeformConv2d<A>& problem, const Sample<A>& sample, int i) {
  const int64_t y = sample.y + i / 2, x = sample.x + i % 2;
  return y >= 0 && y < problem.H && x >= 0 && x < problem.W ? y * problem.W + x : -1;
}

template <typename A>
MD_HD A corner_weight(const Sample<A>& sample, int i) {
  return (i / 2 ? sample.below : A(1) - sample.below) * (i % 2 ? sample.right : A(1) - sample.right);
}

// From dots[i], gradient and corner i multiplied over channels: the gradients of mask, y and x.
template <typename A>
struct SampleGradient {
  A mask, y, x;
};
template <typename A>
MD_HD SampleGradient<A> sample_gradient(const Sample<A>& sample, const A* dots) {
  const A above = A(1) - sample.below, left = A(1) - sample.right;
  SampleGradient<A> gradient;
  gradient.mask = above * (left * dots[0] + sample.right * dots[1]) + sample.below * (left * dots[2] + sample.right * dots[3]);
  gradient.y = sample.mask * (left * (dots[2] - dots[0]) + sample.right * (dots[3] - dots[1]));
  gradient.x = sample.mask * (above * (dots[1] - dots[0]) + sample.below * (dots[3] - dots[2]));
  return gradient;
}

// ---- CPU, cpu/deform_conv2d.cpp; T is float or double, the dtype of all arrays -------------------------------------------------
//
// Each takes the working memory of one thread: deform_scratch_size() numbers, zeroed once. Every number of a result is summed by one
// owner in an order that depends on the shapes alone: equal bytes on any number of threads.
template <typename T>
int64_t deform_scratch_size(const DeformConv2d<T>& problem);
template <typename T>
int64_t deform_tiles(const DeformConv2d<T>& problem);   // of output positions
template <typename T>
int64_t deform_blocks(const DeformConv2d<T>& problem);  // of input channels
template <typename T>
int64_t deform_parts(const DeformConv2d<T>& problem);   // of channel blocks, cut where the offset group changes

// The weight [O, K, C / groups] rearranged for the forward products, pieces [begin, end) of deform_panels(); and for those of the
// backward pass, channel blocks [begin, end).
template <typename T>
int64_t deform_panels(const DeformConv2d<T>& problem);
template <typename T>
int64_t deform_packed_size(const DeformConv2d<T>& problem);
template <typename T>
void deform_pack(const DeformConv2d<T>& problem, const T* weight, T* packed, int64_t begin, int64_t end);
template <typename T>
int64_t deform_packed_backward_size(const DeformConv2d<T>& problem);
template <typename T>
void deform_pack_backward(const DeformConv2d<T>& problem, const T* weight, T* packed, int64_t begin, int64_t end);

// output [P, O], tiles [begin, end). bias [O] or null.
template <typename T>
void deform_conv2d_cpu(const DeformConv2d<T>& problem, const T* input, const T* packed, const T* bias, T* output, T* scratch,
                       int64_t begin, int64_t end);
// grad_input [N, H, W, C], wholly overwritten, and partial [deform_parts(), P, K, 3] (the SampleGradient of each part), by the owners
// [begin, end) of N deform_blocks(): an owner has one picture and one block of channels.
template <typename T>
void deform_backward_input_cpu(const DeformConv2d<T>& problem, const T* input, const T* packed, const T* grad_output, T* grad_input,
                               T* partial, T* scratch, int64_t begin, int64_t end);
// grad_offset [P, offset_groups, K, 2] and, unless null, grad_mask [P, offset_groups, K] from partial, positions [begin, end).
template <typename T>
void deform_backward_offset_cpu(const DeformConv2d<T>& problem, const T* partial, T* grad_offset, T* grad_mask, int64_t begin,
                                int64_t end);
// grad_weight [O, K, C / groups], by the owners [begin, end) of deform_blocks() K: an owner has one block of channels and
// one tap. Neighbours share what they read: a few at a time are quicker than one.
template <typename T>
void deform_backward_weight_cpu(const DeformConv2d<T>& problem, const T* input, const T* grad_output, T* grad_weight, T* scratch,
                                int64_t begin, int64_t end);

// ---- CUDA, cuda/deform_conv2d.cu; dtype is that of input, columns and grad_columns ------------------------------------------------
//
// columns [groups, count, K, C / groups] for the positions [first, first + count): the matrix that the framework multiplies.
template <typename A>
void deform_columns_cuda(const DeformConv2d<A>& problem, DType dtype, const void* input, int64_t first, int64_t count, void* columns,
                         void* stream);
// From grad_columns of the same form: grad_offset [P, offset_groups, K, 2] and, unless null, grad_mask [P, offset_groups, K], at these
// positions; each number is summed by one warp. Adds to grad_input [N, H, W, C] of A unless null: atomic, the order of summation varies.
template <typename A>
void deform_backward_cuda(const DeformConv2d<A>& problem, DType dtype, const void* input, const void* grad_columns, int64_t first,
                          int64_t count, A* grad_input, A* grad_offset, A* grad_mask, void* stream);

// The same sum into grad_input in a fixed order. A sample lies in a cell, the square between four pixels, (H + 1)(W + 1) of them a
// picture, the first above and left of pixel 0. cells [count, offset_groups, K]: the cell of each sample, numbered through pictures and
// offset groups; deform_cells() for a sample outside. Sorted by cell (stable, `order` [count offset_groups K] says which sample), with
// cell c at [starts[c], starts[c + 1]), each pixel gathers from its four cells.
template <typename A>
MD_HD int64_t deform_cells(const DeformConv2d<A>& problem) {
  return problem.N * problem.offset_groups * (problem.H + 1) * (problem.W + 1);
}
template <typename A>
void deform_cells_cuda(const DeformConv2d<A>& problem, int64_t first, int64_t count, int64_t* cells, void* stream);
template <typename A>
void deform_gather_cuda(const DeformConv2d<A>& problem, DType dtype, const void* grad_columns, int64_t first, int64_t count,
                        const int64_t* order, const int64_t* starts, A* grad_input, void* stream);

}  // namespace minidamage
