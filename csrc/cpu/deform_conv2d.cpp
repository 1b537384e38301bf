// Deformable convolution on the CPU: the plain form of ../cuda/deform_conv2d.cu. Read ../deform_conv2d.h first, then ../gemm.h.
//
// The usual form writes all columns [P, K C] to memory (75 MB at 2 x 256 x 64 x 64, 3 x 3) and multiplies. Here the columns of a few
// positions and one tap are made in the cache, multiplied there and forgotten. Neighbouring channels are neighbours in memory, so a
// sample is a blend of four rows: the corners and weights are found once for all channels of an offset group.
// Forward: an owner is a tile of positions.
// Backward has two passes, so that every number has one owner and needs no atomics, copies or locks:
//   input: an owner is a picture and a block of channels. For a tile and a tap, grad_columns = grad_output weight, then one walk over the
//     samples adds to the four pixels of grad_input and takes the four dots for grad_offset and grad_mask. Those sums run over all
//     channels, so each block leaves its part (3 numbers a sample), and the parts are added afterwards, in order.
//   weight: an owner is a tap and a block of channels, a thread takes a few taps of a block; it makes their columns again, tile by tile:
//     grad_weight += grad_output^T columns.
#include "../deform_conv2d.h"

#include <algorithm>
#include <vector>

#include "../gemm.h"

namespace minidamage {
namespace {

constexpr int64_t TILE = 8 * MR;  // positions: their columns of one tap stay in the second-level cache
constexpr int64_t BLOCK = 64;     // channels of an owner in the backward pass: four rows of them, and a tile, in the first-level cache
constexpr int64_t PAD = 16;       // numbers between rows of working memory: row strides of a power of two would share few cache sets

// At most BLOCK channels [begin, end) of one group.
struct ChannelBlock {
  int64_t begin, end, group, first_part;  // parts: the pieces of the block that lie in one offset group each
};

template <typename T>
std::vector<ChannelBlock> channel_blocks(const DeformConv2d<T>& problem, int64_t* part_count = nullptr) {
  std::vector<ChannelBlock> blocks;
  const int64_t channels = problem.group_channels(), offset_channels = problem.offset_channels();
  int64_t parts = 0;
  for (int64_t g = 0; g < problem.groups; ++g)
    for (int64_t c = g * channels; c < (g + 1) * channels; c += BLOCK) {
      const int64_t end = std::min(c + BLOCK, (g + 1) * channels);
      blocks.push_back({c, end, g, parts});
      parts += (end - 1) / offset_channels - c / offset_channels + 1;
    }
  if (part_count) *part_count = parts;
  return blocks;
}

// Taps whose sums of grad_weight, [group_outputs, BLOCK] each, fit beside the tile in a second-level cache of 1 MiB; in even shares.
template <typename T>
int64_t taps_at_a_time(const DeformConv2d<T>& problem) {
  constexpr int64_t bytes = 640 << 10;
  const int64_t most = std::max<int64_t>(1, bytes / (problem.group_outputs() * BLOCK * int64_t(sizeof(T))));
  return ceil_div(problem.taps(), ceil_div(problem.taps(), most));
}

// Working memory of one thread, cut into its arrays.
template <typename T>
struct Scratch {
  T* columns;  // [TILE, columns_row]
  T* panels;   // columns of a channel block, rearranged for the product of grad_weight
  T* sums;     // [taps_at_a_time, group_outputs, BLOCK] of grad_weight
  T* zeros;    // [C]: the pixel outside the picture
  T* dump;     // [C]: and its gradient, never read
  int64_t columns_row, size;

  Scratch(const DeformConv2d<T>& problem, T* memory) {
    columns_row = ceil_div(problem.group_channels(), PAD) * PAD + PAD;
    const int64_t panels_begin = TILE * columns_row, sums_begin = panels_begin + panels_size<T>(TILE, BLOCK);
    const int64_t zeros_begin = sums_begin + taps_at_a_time(problem) * problem.group_outputs() * BLOCK;
    size = zeros_begin + 2 * problem.C;
    if (!memory) return;
    columns = memory, panels = memory + panels_begin, sums = memory + sums_begin, zeros = memory + zeros_begin, dump = zeros + problem.C;
  }
};

// The four rows of a sample in an array of pictures [.., W, C]; `outside` where there is no pixel.
template <typename T, typename Row>
inline void corner_rows(const DeformConv2d<T>& problem, const Sample<T>& sample, Row* picture, Row* outside, Row** rows) {
  for (int i = 0; i < 4; ++i) {
    const int64_t pixel = corner_pixel(problem, sample, i);
    rows[i] = pixel < 0 ? outside : picture + pixel * problem.C;
  }
}

// out = sum_i weight[i] row[i], count numbers.
template <typename T>
inline void blend(T* __restrict out, const T* const* row, const T* weight, int64_t count) {
  const T* __restrict r0 = row[0];
  const T* __restrict r1 = row[1];
  const T* __restrict r2 = row[2];
  const T* __restrict r3 = row[3];
  const T w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t c = 0; c < count; ++c) out[c] = (w0 * r0[c] + w1 * r1[c]) + (w2 * r2[c] + w3 * r3[c]);
}

// Walks over positions: the place of one tap (of offset group 0) at each, without a division.
template <typename T>
struct Walk {
  const DeformConv2d<T>& problem;
  GridPlace place;
  int64_t out_y, out_x;

  Walk(const DeformConv2d<T>& problem, int64_t position, int64_t k)
      : problem(problem), place(grid_place<T, int64_t>(problem, position, 0, k)), out_y(position / problem.OW % problem.OH),
        out_x(position % problem.OW) {}
  GridPlace at(int64_t q) const { return {place.n, place.y, place.x, place.index + q * problem.taps()}; }
  void next() {
    place.index += problem.offset_groups * problem.taps();
    place.x += problem.stride_x;
    if (++out_x < problem.OW) return;
    place.x -= problem.OW * problem.stride_x, out_x = 0;
    place.y += problem.stride_y;
    if (++out_y < problem.OH) return;
    place.y -= problem.OH * problem.stride_y, out_y = 0;
    ++place.n;
  }
};

// columns [count, columns_row]: tap k of the positions from `first` on, channels [begin, end).
template <typename T>
void sample_columns(const DeformConv2d<T>& problem, const T* input, int64_t first, int64_t count, int64_t k, int64_t begin, int64_t end,
                    const Scratch<T>& scratch) {
  const int64_t channels = problem.offset_channels(), first_group = begin / channels;
  Walk<T> walk(problem, first, k);
  for (int64_t t = 0; t < count; ++t, walk.next()) {
    const T* picture = input + walk.place.n * problem.H * problem.W * problem.C;
    T* row = scratch.columns + t * scratch.columns_row;
    for (int64_t c = begin, q = first_group; c < end; ++q) {
      const int64_t stop = std::min(end, (q + 1) * channels);
      Sample<T> sample;
      if (find_sample(problem, walk.at(q), sample)) {
        const T* rows[4];
        T weight[4];
        corner_rows(problem, sample, picture + c, static_cast<const T*>(scratch.zeros), rows);
        for (int i = 0; i < 4; ++i)  // outside, zero whatever the mask: Inf times zero is not
          weight[i] = rows[i] == scratch.zeros ? T(0) : sample.mask * corner_weight(sample, i);
        blend(row + (c - begin), rows, weight, stop - c);
      } else {
        std::fill(row + (c - begin), row + (stop - begin), sample.mask * T(0));
      }
      c = stop;
    }
  }
}

// For every row i: target[i] += weight[i] gradient and dots[i] = sum gradient source[i], over count numbers.
template <typename T>
inline void scatter_and_dots(const T* gradient, const T* const* source, T* const* target, const T* weight, T* dots, int64_t count) {
  vector_t<T> sum[4] = {};
  int64_t c = 0;
  for (; c + VECTOR_LANES<T> <= count; c += VECTOR_LANES<T>) {
    const vector_t<T> g = load_vector(gradient + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum[i] = multiply_add(g, load_vector(source[i] + c), sum[i]);
      store_vector(target[i] + c, multiply_add(g, broadcast(weight[i]), load_vector(target[i] + c)));
    }
  }
  for (int i = 0; i < 4; ++i) dots[i] = sum_of_vector<T>(sum[i]);
  for (; c < count; ++c) {
    for (int i = 0; i < 4; ++i) {
      dots[i] += gradient[c] * source[i][c];
      target[i][c] += weight[i] * gradient[c];
    }
  }
}

// One tap and one tile of a picture: grad_columns (in scratch.columns) of a channel block to grad_input and partial.
template <typename T>
void scatter_columns(const DeformConv2d<T>& problem, const ChannelBlock& block, const T* picture, T* grad_picture, int64_t first,
                     int64_t count, int64_t k, T* partial, const Scratch<T>& scratch) {
  const int64_t channels = problem.offset_channels(), samples = problem.positions() * problem.taps();
  const int64_t first_group = block.begin / channels;
  Walk<T> walk(problem, first, k);
  for (int64_t t = 0; t < count; ++t, walk.next()) {
    const T* gradient = scratch.columns + t * scratch.columns_row;
    for (int64_t c = block.begin, q = first_group; c < block.end; ++q) {
      const int64_t part = block.first_part + q - first_group, stop = std::min(block.end, (q + 1) * channels);
      SampleGradient<T> result = {};
      Sample<T> sample;
      if (find_sample(problem, walk.at(q), sample)) {
        const T* source[4];
        T* target[4];
        T weight[4], dots[4];
        corner_rows(problem, sample, picture + c, static_cast<const T*>(scratch.zeros), source);
        corner_rows(problem, sample, grad_picture + c, scratch.dump, target);
        for (int i = 0; i < 4; ++i) weight[i] = sample.mask * corner_weight(sample, i);
        scatter_and_dots(gradient + (c - block.begin), source, target, weight, dots, stop - c);
        result = sample_gradient(sample, dots);
      }
      T* numbers = partial + 3 * (part * samples + (first + t) * problem.taps() + k);
      numbers[0] = result.mask, numbers[1] = result.y, numbers[2] = result.x;
      c = stop;
    }
  }
}

}  // namespace

template <typename T>
int64_t deform_scratch_size(const DeformConv2d<T>& problem) {
  return Scratch<T>(problem, nullptr).size;
}

template <typename T>
int64_t deform_tiles(const DeformConv2d<T>& problem) {
  return ceil_div(problem.positions(), TILE);
}

template <typename T>
int64_t deform_blocks(const DeformConv2d<T>& problem) {
  return problem.groups * ceil_div(problem.group_channels(), BLOCK);
}

template <typename T>
int64_t deform_parts(const DeformConv2d<T>& problem) {
  int64_t parts;
  channel_blocks(problem, &parts);
  return parts;
}

// [groups, K], each the panels of [group_channels, group_outputs].
template <typename T>
int64_t deform_panels(const DeformConv2d<T>& problem) {
  return problem.groups * problem.taps();
}

template <typename T>
int64_t deform_packed_size(const DeformConv2d<T>& problem) {
  return deform_panels(problem) * panels_size<T>(problem.group_channels(), problem.group_outputs());
}

template <typename T>
void deform_pack(const DeformConv2d<T>& problem, const T* weight, T* packed, int64_t begin, int64_t end) {
  const int64_t channels = problem.group_channels(), outputs = problem.group_outputs(), taps = problem.taps();
  for (int64_t i = begin; i < end; ++i) {
    const Strided<T> kernel = {weight + (i / taps * outputs * taps + i % taps) * channels, 1, taps * channels};
    pack_panels(kernel, channels, outputs, packed + i * panels_size<T>(channels, outputs));
  }
}

// [blocks, K], each the panels of [group_outputs, BLOCK].
template <typename T>
int64_t deform_packed_backward_size(const DeformConv2d<T>& problem) {
  return deform_blocks(problem) * problem.taps() * panels_size<T>(problem.group_outputs(), BLOCK);
}

template <typename T>
void deform_pack_backward(const DeformConv2d<T>& problem, const T* weight, T* packed, int64_t begin, int64_t end) {
  const std::vector<ChannelBlock> blocks = channel_blocks(problem);
  const int64_t channels = problem.group_channels(), outputs = problem.group_outputs(), taps = problem.taps();
  for (int64_t i = begin * taps; i < end * taps; ++i) {
    const ChannelBlock& block = blocks[i / taps];
    const T* first = weight + (block.group * outputs * taps + i % taps) * channels + (block.begin - block.group * channels);
    pack_panels(Strided<T>{first, taps * channels, 1}, outputs, block.end - block.begin, packed + i * panels_size<T>(outputs, BLOCK));
  }
}

template <typename T>
void deform_conv2d_cpu(const DeformConv2d<T>& problem, const T* input, const T* packed, const T* bias, T* output, T* memory,
                       int64_t begin, int64_t end) {
  const Scratch<T> scratch(problem, memory);
  const int64_t channels = problem.group_channels(), outputs = problem.group_outputs(), taps = problem.taps();
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * TILE, count = std::min(TILE, problem.positions() - first);
    for (int64_t g = 0; g < problem.groups; ++g) {
      for (int64_t k = 0; k < taps; ++k) {
        sample_columns(problem, input, first, count, k, g * channels, (g + 1) * channels, scratch);
        gemm_panels(count, outputs, channels, Strided<T>{scratch.columns, scratch.columns_row, 1},
                    packed + (g * taps + k) * panels_size<T>(channels, outputs), channels * NR<T>, output + first * problem.O + g * outputs,
                    problem.O, k > 0, bias && k == 0 ? bias + g * outputs : nullptr);
      }
    }
  }
}

template <typename T>
void deform_backward_input_cpu(const DeformConv2d<T>& problem, const T* input, const T* packed, const T* grad_output, T* grad_input,
                               T* partial, T* memory, int64_t begin, int64_t end) {
  const Scratch<T> scratch(problem, memory);
  const std::vector<ChannelBlock> blocks = channel_blocks(problem);
  const int64_t block_count = static_cast<int64_t>(blocks.size()), outputs = problem.group_outputs(), taps = problem.taps();
  const int64_t pixels = problem.H * problem.W, picture_positions = problem.OH * problem.OW;
  for (int64_t owner = begin; owner < end; ++owner) {
    const int64_t n = owner / block_count, b = owner % block_count;
    const ChannelBlock& block = blocks[b];
    const T* picture = input + n * pixels * problem.C;
    T* grad_picture = grad_input + n * pixels * problem.C;
    for (int64_t i = 0; i < pixels; ++i)
      std::fill(grad_picture + i * problem.C + block.begin, grad_picture + i * problem.C + block.end, T(0));
    for (int64_t p = 0; p < picture_positions; p += TILE) {
      const int64_t first = n * picture_positions + p, count = std::min(TILE, picture_positions - p);
      for (int64_t k = 0; k < taps; ++k) {
        gemm_panels(count, block.end - block.begin, outputs,
                    Strided<T>{grad_output + first * problem.O + block.group * outputs, problem.O, 1},
                    packed + (b * taps + k) * panels_size<T>(outputs, BLOCK), outputs * NR<T>, scratch.columns, scratch.columns_row, false);
        scatter_columns(problem, block, picture, grad_picture, first, count, k, partial, scratch);
      }
    }
  }
}

template <typename T>
void deform_backward_offset_cpu(const DeformConv2d<T>& problem, const T* partial, T* grad_offset, T* grad_mask, int64_t begin,
                                int64_t end) {
  const int64_t channels = problem.offset_channels(), taps = problem.taps(), samples = problem.positions() * taps;
  const int64_t groups = problem.offset_groups;
  for (int64_t i = begin * groups * taps; i < end * groups * taps; ++i) {  // every number of these positions
    grad_offset[2 * i] = grad_offset[2 * i + 1] = T(0);
    if (grad_mask) grad_mask[i] = T(0);
  }
  for (const ChannelBlock& block : channel_blocks(problem)) {
    const int64_t first_group = block.begin / channels, last_group = (block.end - 1) / channels;
    for (int64_t q = first_group; q <= last_group; ++q) {
      const T* part = partial + 3 * (block.first_part + q - first_group) * samples;
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = 0; k < taps; ++k) {
          const T* numbers = part + 3 * (p * taps + k);
          const int64_t i = (p * groups + q) * taps + k;
          if (grad_mask) grad_mask[i] += numbers[0];
          grad_offset[2 * i] += numbers[1];
          grad_offset[2 * i + 1] += numbers[2];
        }
    }
  }
}

template <typename T>
void deform_backward_weight_cpu(const DeformConv2d<T>& problem, const T* input, const T* grad_output, T* grad_weight, T* memory,
                                int64_t begin, int64_t end) {
  const Scratch<T> scratch(problem, memory);
  const std::vector<ChannelBlock> blocks = channel_blocks(problem);
  const int64_t outputs = problem.group_outputs(), taps = problem.taps();
  const int64_t channels = problem.group_channels(), positions = problem.positions();
  for (int64_t owner = begin; owner < end;) {  // taps of one block together: they share the tile and most of the pixels
    const int64_t first_tap = owner % taps, last_tap = std::min({taps, first_tap + taps_at_a_time(problem), first_tap + end - owner});
    const ChannelBlock& block = blocks[owner / taps];
    const int64_t width = block.end - block.begin, size = outputs * BLOCK;
    for (int64_t first = 0; first < positions; first += TILE) {
      const int64_t count = std::min(TILE, positions - first);
      for (int64_t k = first_tap; k < last_tap; ++k) {
        sample_columns(problem, input, first, count, k, block.begin, block.end, scratch);
        pack_panels(Strided<T>{scratch.columns, scratch.columns_row, 1}, count, width, scratch.panels);
        gemm_panels(outputs, width, count, Strided<T>{grad_output + first * problem.O + block.group * outputs, 1, problem.O},
                    scratch.panels, count * NR<T>, scratch.sums + (k - first_tap) * size, BLOCK, first > 0);
      }
    }
    for (int64_t k = first_tap; k < last_tap; ++k) {
      T* target = grad_weight + (block.group * outputs * taps + k) * channels + (block.begin - block.group * channels);
      for (int64_t o = 0; o < outputs; ++o)
        std::copy_n(scratch.sums + (k - first_tap) * size + o * BLOCK, width, target + o * taps * channels);
    }
    owner += last_tap - first_tap;
  }
}

#define INSTANTIATE(T)                                                                                                               \
  template int64_t deform_scratch_size<T>(const DeformConv2d<T>&);                                                                   \
  template int64_t deform_tiles<T>(const DeformConv2d<T>&);                                                                          \
  template int64_t deform_blocks<T>(const DeformConv2d<T>&);                                                                         \
  template int64_t deform_parts<T>(const DeformConv2d<T>&);                                                                          \
  template int64_t deform_panels<T>(const DeformConv2d<T>&);                                                                         \
  template int64_t deform_packed_size<T>(const DeformConv2d<T>&);                                                                    \
  template void deform_pack<T>(const DeformConv2d<T>&, const T*, T*, int64_t, int64_t);                                              \
  template int64_t deform_packed_backward_size<T>(const DeformConv2d<T>&);                                                           \
  template void deform_pack_backward<T>(const DeformConv2d<T>&, const T*, T*, int64_t, int64_t);                                     \
  template void deform_conv2d_cpu<T>(const DeformConv2d<T>&, const T*, const T*, const T*, T*, T*, int64_t, int64_t);                \
  template void deform_backward_input_cpu<T>(const DeformConv2d<T>&, const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t);    \
  template void deform_backward_offset_cpu<T>(const DeformConv2d<T>&, const T*, T*, T*, int64_t, int64_t);                           \
  template void deform_backward_weight_cpu<T>(const DeformConv2d<T>&, const T*, const T*, T*, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
