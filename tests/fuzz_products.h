// Random cases of the ops that are mostly matrix products (see sanitize_fuzz.cpp): deformable convolution, linear attention, the
// micro-kernel that both use, and the transpose in front of all.
#pragma once
#include <numeric>

#include "deform_conv2d.h"
#include "fuzz.h"
#include "layout.h"
#include "linear_attention.h"

template <typename T>
struct DeformSums {
  std::vector<T> atomic, gathered, offset, mask;  // gradients: of input, twice, offset and mask
};

// The CUDA kernels on positions [first, first + count), products by plain loops: the columns against the CPU's output, gradients into sums.
template <typename S, typename T>
void deform_tile(const DeformConv2d<T>& problem, const std::vector<T>& input, const std::vector<T>& weight, const std::vector<T>& bias,
                 const std::vector<T>& output, const std::vector<T>& grad, int64_t first, int64_t count, bool nasty, DeformSums<T>& sums) {
  const int64_t K = problem.taps(), O = problem.O, channels = problem.group_channels(), outputs = problem.group_outputs();
  const std::vector<S> picture = narrowed<S>(input);
  std::vector<S> columns(count * K * problem.C);
  std::vector<T> grad_columns(columns.size()), ours(count * O), theirs(output.begin() + first * O, output.begin() + (first + count) * O);
  deform_columns_cuda<T>(problem, storage, picture.data(), first, count, columns.data(), nullptr);
  for (int64_t p = 0; p < count; p++)
    for (int64_t o = 0; o < O; o++) {
      const int64_t g = o / outputs, row = (g * count + p) * K * channels;
      ours[p * O + o] = bias[o];
      for (int64_t i = 0; i < K * channels; i++) {
        ours[p * O + o] += to_accumulate(columns[row + i]) * weight[o * K * channels + i];
        grad_columns[row + i] += grad[(first + p) * O + o] * weight[o * K * channels + i];
      }
    }
  if (!nasty) expect_close(ours, theirs, is_half() ? 20 * tolerance(0) : 1e-3, "CPU and CUDA kernels disagree");
  const std::vector<S> slopes = narrowed<S>(grad_columns);
  T* mask = problem.mask ? sums.mask.data() : nullptr;
  deform_backward_cuda<T>(problem, storage, picture.data(), slopes.data(), first, count, sums.atomic.data(), sums.offset.data(), mask,
                          nullptr);
  std::vector<int64_t> cells(count * problem.offset_groups * K), order(cells.size()), starts(deform_cells(problem) + 1);
  deform_cells_cuda<T>(problem, first, count, cells.data(), nullptr);
  for (const int64_t cell : cells) expect(cell >= 0 && cell <= deform_cells(problem), "a sample in a cell that does not exist");
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cells[a] < cells[b]; });
  std::sort(cells.begin(), cells.end());
  for (int64_t c = 0; c <= deform_cells(problem); c++) starts[c] = std::lower_bound(cells.begin(), cells.end(), c) - cells.begin();
  deform_gather_cuda<T>(problem, storage, slopes.data(), first, count, order.data(), starts.data(), sums.gathered.data(), nullptr);
}

template <typename T>
void fuzz_deform_conv2d(bool cuda) {
  const bool nasty = chance(0.5), masked = chance(0.5);
  const int64_t groups = integer(1, 2), offset_groups = integer(1, 2), KH = integer(1, 3), KW = integer(1, 3);
  DeformConv2d<T> problem = {};
  problem.groups = groups, problem.offset_groups = offset_groups, problem.KH = KH, problem.KW = KW;
  problem.C = groups * offset_groups * (cuda ? some_channels(1) : integer(1, 9));
  problem.N = integer(1, 2), problem.O = groups * integer(1, 9);
  problem.H = integer(1, 7), problem.W = integer(1, 7), problem.stride_y = integer(1, 2), problem.stride_x = integer(1, 2);
  problem.pad_y = integer(0, 2), problem.pad_x = integer(0, 2), problem.dilation_y = integer(1, 2), problem.dilation_x = integer(1, 2);
  problem.OH = (problem.H + 2 * problem.pad_y - problem.dilation_y * (KH - 1) - 1) / problem.stride_y + 1;
  problem.OW = (problem.W + 2 * problem.pad_x - problem.dilation_x * (KW - 1) - 1) / problem.stride_x + 1;
  const int64_t padded_H = problem.H + 2 * problem.pad_y, padded_W = problem.W + 2 * problem.pad_x;
  if (padded_H < problem.dilation_y * (KH - 1) + 1 || padded_W < problem.dilation_x * (KW - 1) + 1) return;  // no output
  const int64_t P = problem.positions(), K = problem.taps(), C = problem.C, O = problem.O, samples = P * offset_groups * K;
  const std::vector<T> input = stored(numbers<T>(problem.N * problem.H * problem.W * C, 1, nasty)), grad = numbers<T>(P * O, 1, nasty);
  const std::vector<T> weight = numbers<T>(O * K * problem.group_channels(), 1, nasty), bias = numbers<T>(O, 1, nasty);
  const std::vector<T> offset = numbers<T>(samples * 2, 3, nasty), mask = numbers<T>(samples, 1, nasty);
  problem.offset = offset.data(), problem.mask = masked ? mask.data() : nullptr;

  std::vector<T> packed(deform_packed_size(problem)), output(P * O), scratch(deform_scratch_size(problem));
  in_ranges(deform_panels(problem), [&](int64_t begin, int64_t end) { deform_pack(problem, weight.data(), packed.data(), begin, end); });
  in_ranges(deform_tiles(problem), [&](int64_t begin, int64_t end) {
    deform_conv2d_cpu(problem, input.data(), packed.data(), bias.data(), output.data(), scratch.data(), begin, end);
  });
  for (const T value : output) expect(nasty || std::abs(value) < T(1e4), "the output of ordinary numbers is not finite");
  const int64_t blocks = deform_blocks(problem);
  std::vector<T> packed_backward(deform_packed_backward_size(problem)), grad_input(input.size(), T(7)), grad_weight(weight.size());
  std::vector<T> partial(deform_parts(problem) * P * K * 3), grad_offset(samples * 2), grad_mask(samples);
  in_ranges(blocks, [&](int64_t begin, int64_t end) {
    deform_pack_backward(problem, weight.data(), packed_backward.data(), begin, end);
  });
  in_ranges(problem.N * blocks, [&](int64_t begin, int64_t end) {
    std::fill(scratch.begin(), scratch.end(), T(0));
    deform_backward_input_cpu(problem, input.data(), packed_backward.data(), grad.data(), grad_input.data(), partial.data(), scratch.data(),
                              begin, end);
  });
  in_ranges(P, [&](int64_t begin, int64_t end) {
    deform_backward_offset_cpu(problem, partial.data(), grad_offset.data(), masked ? grad_mask.data() : nullptr, begin, end);
  });
  in_ranges(K * blocks, [&](int64_t begin, int64_t end) {
    std::fill(scratch.begin(), scratch.end(), T(0));
    deform_backward_weight_cpu(problem, input.data(), grad.data(), grad_weight.data(), scratch.data(), begin, end);
  });
  if (!cuda) return;
  with_storage<T>(storage, [&](auto zero) {
    DeformSums<T> sums = {std::vector<T>(input.size()), std::vector<T>(input.size()), grad_offset, grad_mask};
    const int64_t cut = integer(0, P);
    for (const auto& [first, end] : {std::pair<int64_t, int64_t>(0, cut), std::pair<int64_t, int64_t>(cut, P)})
      if (first < end) deform_tile<decltype(zero)>(problem, input, weight, bias, output, grad, first, end - first, nasty, sums);
    if (nasty) return;
    expect_close(sums.gathered, sums.atomic, 1e-4, "the deterministic CUDA backward disagrees with the atomic one");
    if (is_half()) return;  // grad_columns were rounded
    expect_close(sums.atomic, grad_input, 1e-3, "gradients of input disagree");
    expect_close(sums.offset, grad_offset, 1e-3, "gradients of offset disagree");
    if (masked) expect_close(sums.mask, grad_mask, 1e-3, "gradients of mask disagree");
  });
}

template <typename T>
void fuzz_attention(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t B = integer(1, 2), N = integer(0, cuda ? 6 : 20), k = integer(1, 12), H = integer(1, 2), d = integer(1, 9);
  const int64_t segments = integer(1, 3);
  const std::vector<T> query = numbers<T>(B * N * H * d, 3, nasty), keys = numbers<T>(B * k * H * d, 3, nasty);
  const std::vector<T> values = numbers<T>(B * k * H * d, 1, nasty), grad = numbers<T>(B * N * H * d, 1, nasty);
  const Attention<T> problem = {B, N, k, H, d, T(1) / std::sqrt(T(d)), query.data(), keys.data(), values.data()};
  std::vector<T> output(query.size()), lse(B * H * N), grad_query(query.size()), grad_keys(segments * keys.size()), grad_values(grad_keys);
  in_ranges(B * H * segments, [&](int64_t begin, int64_t end) { attention_cpu(problem, segments, output.data(), lse.data(), begin, end); });
  for (const T value : output) expect(nasty || std::abs(value) <= T(1.001), "a mean of values lies outside of them");
  in_ranges(B * H * segments, [&](int64_t begin, int64_t end) {
    attention_backward_cpu(problem, segments, output.data(), lse.data(), grad.data(), grad_query.data(), grad_keys.data(),
                           grad_values.data(), begin, end);
  });
  if (!cuda || N == 0) return;
  const int64_t first = integer(0, N - 1), rows = integer(1, N - first);
  const ScoreRows at = {B * H, rows, k, N, first};
  // dots[r, j] of rows of `left` [B, N, H, d] with `right` [B, k, H, d], head by head
  const auto dots = [&](const std::vector<T>& left, const std::vector<T>& right) {
    std::vector<T> result(B * H * rows * k);
    for (int64_t i = 0; i < B * H * rows * k; i++) {
      const int64_t j = i % k, n = first + i / k % rows, head = i / k / rows, b = head / H, h = head % H;
      for (int64_t c = 0; c < d; c++) result[i] += left[((b * N + n) * H + h) * d + c] * right[((b * k + j) * H + h) * d + c];
    }
    return result;
  };
  // sum_j factors[r, j] right[j], where the row stands in [B, N, H, d]; `other` elsewhere
  const auto mixed = [&](const std::vector<T>& factors, const std::vector<T>& right, std::vector<T> other) {
    for (int64_t r = 0; r < B * H * rows; r++) {
      const int64_t n = first + r % rows, head = r / rows, b = head / H, h = head % H;
      for (int64_t c = 0; c < d; c++) {
        T& sum = other[((b * N + n) * H + h) * d + c] = T(0);
        for (int64_t j = 0; j < k; j++) sum += factors[r * k + j] * right[((b * k + j) * H + h) * d + c];
      }
    }
    return other;
  };
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<T> scores = dots(query, keys), grad_P = dots(grad, values);
    std::vector<S> P(scores.size()), grad_scores(scores.size());
    std::vector<T> lse_cuda = lse, mean(lse.size());
    attention_softmax_cuda<T>(scores.data(), at, problem.scale, storage, P.data(), lse_cuda.data(), nullptr);
    attention_mean_cuda<T>(B, N, H, d, storage, narrowed<S>(output).data(), narrowed<S>(grad).data(), mean.data(), nullptr);
    if (!nasty) {
      expect_close(mixed(widened(P), values, output), output, 10 * tolerance(1e-5), "CPU and CUDA kernels disagree");
      expect_close(lse_cuda, lse, 1e-4, "log-sum-exps disagree");
    }
    attention_grad_scores_cuda<T>(scores.data(), grad_P.data(), lse_cuda.data(), mean.data(), at, problem.scale, storage, P.data(),
                                  grad_scores.data(), nullptr);
    if (nasty) return;
    expect_close(mixed(widened(grad_scores), keys, grad_query), grad_query, 30 * tolerance(1e-5), "gradients of query disagree");
  });
}

// A matrix as it lies in memory: row after row or column after column, with a gap between them.
template <typename T>
struct Matrix {
  int64_t row, column;
  std::vector<T> data;
  Matrix(int64_t rows, int64_t columns, bool nasty) {
    const int64_t gap = chance(0.05) ? integer(400, 700) : integer(0, 3);
    const bool by_column = chance(0.5);
    row = by_column ? 1 : columns + gap, column = by_column ? rows + gap : 1;
    data = numbers<T>(rows && columns ? (rows - 1) * row + (columns - 1) * column + 1 : 0, 1, nasty);
  }
};

// The micro-kernels of cpu/gemm.cpp, through the products of linear attention.
template <typename T>
void fuzz_product(bool) {
  const bool nasty = chance(0.3), biased = chance(0.5);
  const int64_t M = integer(1, 40), N = integer(1, chance(0.1) ? 300 : 70), C_row = N + integer(0, 3), terms = integer(1, 2);
  std::vector<T> C((M - 1) * C_row + N, T(7)), expected = C;
  const std::vector<T> bias = numbers<T>(N, 1, nasty);
  std::vector<double> sums(M * N);
  for (int64_t i = 0; i < M * N; i++) sums[i] = biased ? static_cast<double>(bias[i % N]) : 0;
  Product<T> product = {M, N, C.data(), C_row, biased ? bias.data() : nullptr, {}};
  std::vector<Matrix<T>> operands;
  operands.reserve(2 * terms);
  for (int64_t t = 0; t < terms; t++) {
    const int64_t K = chance(0.05) ? integer(250, 600) : integer(chance(0.1) ? 0 : 1, 40);
    const Matrix<T>& A = operands.emplace_back(M, K, nasty);
    const Matrix<T>& B = operands.emplace_back(K, N, nasty);
    product.terms.push_back({K, A.data.data(), A.row, A.column, B.data.data(), B.row, B.column});
    for (int64_t i = 0; i < M; i++)
      for (int64_t p = 0; p < K; p++)
        for (int64_t j = 0; j < N; j++)
          sums[i * N + j] += static_cast<double>(A.data[i * A.row + p * A.column]) * B.data[p * B.row + j * B.column];
  }
  for (int64_t i = 0; i < M * N; i++) expected[i / N * C_row + i % N] = static_cast<T>(sums[i]);
  in_ranges(product_blocks(product), [&](int64_t begin, int64_t end) { product_cpu(product, begin, end); });
  if (!nasty) expect_close(C, expected, 1e-4, "the product disagrees with a plain triple loop, or reaches beside its matrix");
}

template <typename>
void fuzz_transpose(bool) {
  const int64_t N = integer(0, 3), rows = integer(1, 70), columns = integer(1, 70);
  const std::vector<float> source = numbers<float>(N * rows * columns, 1, false);
  std::vector<float> target(source.size());
  in_ranges(N * transpose_strips(rows), [&](int64_t begin, int64_t end) {
    transpose_cpu(source.data(), target.data(), rows, columns, begin, end);
  });
  for (size_t i = 0; i < source.size(); i++) {
    const int64_t n = i / (rows * columns), row = i / columns % rows, column = i % columns;
    expect(target[(n * columns + column) * rows + row] == source[i], "a number in the wrong place");
  }
}
