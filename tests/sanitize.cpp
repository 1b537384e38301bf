// Every CPU kernel and every CUDA kernel (emulated), under AddressSanitizer and UndefinedBehaviorSanitizer, on small and nasty
// inputs. Exits 0 when nothing was found. Values are compared elsewhere (test_<op>.py); here the machines must merely agree
// where that is cheap. Each op has one function; add the next one's below and to main().
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "deform_conv2d.h"
#include "layout.h"
#include "linear_attention.h"
#include "nms.h"
#include "paste_masks.h"
#include "roi_align.h"

using namespace minidamage;

static std::mt19937 generator(0);
static double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
static const double NAN_ = std::numeric_limits<double>::quiet_NaN(), INF = std::numeric_limits<double>::infinity();

// n boxes, xyxy: ordinary ones, and every seventh NaN, infinite, inverted, empty, huge or far outside.
template <typename T>
std::vector<T> nasty_boxes(int64_t n, double extent) {
  const double nasty[][4] = {{NAN_, 0, 5, 5}, {0, 0, INF, INF}, {-INF, -INF, INF, INF}, {9, 9, 1, 1}, {4, 4, 4, 4},
                             {-1e30, -1e30, 1e30, 1e30}, {1e6, 1e6, 1e6 + 5, 1e6 + 5}, {-50, -50, -40, -40}, {3, 3, 3.001, 3.001}};
  std::vector<T> boxes;
  for (int64_t i = 0; i < n; i++) {
    const double x = uniform(-0.2, 1) * extent, y = uniform(-0.2, 1) * extent;
    const double box[4] = {x, y, x + uniform(0, 0.4) * extent, y + uniform(0, 0.4) * extent};
    const double* chosen = i % 7 == 3 ? nasty[i / 7 % 9] : box;
    for (int k = 0; k < 4; k++) boxes.push_back(static_cast<T>(chosen[k]));
  }
  return boxes;
}

static void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "sanitize: %s\n", what);
  std::exit(1);
}

template <typename T>
void check_nms(int64_t n, double iou_threshold, int64_t max_keep, bool grouped) {
  const std::vector<T> boxes = nasty_boxes<T>(n, 300);
  std::vector<T> scores(n);
  std::vector<int64_t> idxs(n);
  std::vector<char> valid(n);
  for (int64_t i = 0; i < n; i++) {
    scores[i] = i % 11 == 5 ? static_cast<T>(NAN_) : static_cast<T>(static_cast<int>(uniform(0, 20)) / 20.0);
    idxs[i] = i % 3, valid[i] = i % 5 != 0;
  }
  const bool* usable = reinterpret_cast<const bool*>(valid.data());
  const NmsGroups groups = nms_groups_cpu(scores.data(), grouped ? idxs.data() : nullptr, usable, n);
  std::vector<uint8_t> kept(n);
  nms_cpu(boxes.data(), groups, iou_threshold, max_keep, 0, static_cast<int64_t>(groups.offsets.size()) - 1, kept.data());
  std::vector<int64_t> expected;
  for (int64_t i : groups.by_score)
    if (kept[i] && static_cast<int64_t>(expected.size()) < max_keep) expected.push_back(i);

  const int64_t m = static_cast<int64_t>(groups.by_score.size()), words = ceil_div(m, NMS_WORD);
  std::vector<T> sorted;
  std::vector<int64_t> sorted_idxs, keep(max_keep);
  for (int64_t i : groups.by_score) {
    sorted.insert(sorted.end(), &boxes[4 * i], &boxes[4 * i] + 4);
    sorted_idxs.push_back(idxs[i]);
  }
  std::vector<uint64_t> mask(std::min(m, NMS_ROWS) * words), removed(words);
  int64_t count = 0;
  nms_cuda<T>(sorted.data(), grouped ? sorted_idxs.data() : nullptr, nullptr, groups.by_score.data(), m, iou_threshold, max_keep,
              mask.data(), removed.data(), keep.data(), &count, nullptr);
  keep.resize(count);
  expect(keep == expected, "nms: CPU and CUDA kernels disagree");
}

static void expect_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance, const char* what) {
  expect(a.size() == b.size(), what);
  for (size_t i = 0; i < a.size(); i++) expect(a[i] == b[i] || std::abs(a[i] - b[i]) <= tolerance || (a[i] != a[i] && b[i] != b[i]), what);
}

template <typename T>
std::vector<double> doubles(const std::vector<std::vector<T>>& arrays) {
  std::vector<double> all;
  for (const auto& array : arrays) all.insert(all.end(), array.begin(), array.end());
  return all;
}

// Two levels of two pictures, nasty boxes; forward and the three backwards of both machines. Every array has its exact size.
template <typename T>
void check_roi_align(int64_t C, int64_t PH, int64_t PW, int64_t sampling_ratio, bool aligned) {
  const int64_t R = 21, N = 2, height[2] = {13, 1}, width[2] = {17, 2};
  const std::vector<T> boxes = nasty_boxes<T>(R, 60);
  std::vector<T> rois, output(R * PH * PW * C), output_cuda(output.size()), grad;
  std::vector<int64_t> levels, order(R);
  for (int64_t r = 0; r < R; r++) {
    rois.push_back(static_cast<T>(r % N));
    rois.insert(rois.end(), &boxes[4 * r], &boxes[4 * r] + 4);
    levels.push_back(r % 5 == 4);
  }
  std::vector<std::vector<T>> features(2), gradients(2);
  for (size_t i = 0; i < output.size(); i++) grad.push_back(static_cast<T>(uniform(-1, 1)));
  RoiAlign<T> problem = {};
  problem.level_count = 2, problem.N = N, problem.C = C, problem.rois = rois.data(), problem.roi_levels = levels.data();
  problem.R = R, problem.PH = PH, problem.PW = PW, problem.sampling_ratio = sampling_ratio, problem.aligned = aligned;
  for (int l = 0; l < 2; l++) {
    for (int64_t i = 0; i < N * height[l] * width[l] * C; i++) features[l].push_back(static_cast<T>(uniform(-1, 1)));
    gradients[l].assign(features[l].size(), T(7));
    problem.levels[l] = {features[l].data(), height[l], width[l], l ? 1.0 / 32 : 1.0 / 4};
  }
  const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  roi_align_order(problem, order.data());
  roi_align_cpu(problem, order.data(), output.data(), 0, R / 2);
  roi_align_cpu(problem, order.data(), output.data(), R / 2, R);
  roi_align_cuda(problem, dtype, output_cuda.data(), nullptr);
  expect_close(doubles<T>({output}), doubles<T>({output_cuda}), 1e-4, "roi_align: CPU and CUDA kernels disagree");

  for (int l = 0; l < 2; l++) problem.levels[l].data = gradients[l].data();
  int64_t tiles = 0;
  RoiAlignPlan<T>* plan = roi_align_plan(problem, tiles);
  roi_align_backward_cpu(problem, *plan, grad.data(), 0, tiles);
  roi_align_free(plan);
  const std::vector<double> expected = doubles(gradients);
  roi_align_backward_deterministic_cuda(problem, dtype, grad.data(), nullptr);
  expect_close(doubles(gradients), expected, 1e-3, "roi_align: deterministic CUDA backward disagrees");
  for (auto& gradient : gradients) std::fill(gradient.begin(), gradient.end(), T(0));
  roi_align_backward_cuda(problem, dtype, grad.data(), nullptr);
  expect_close(doubles(gradients), expected, 1e-3, "roi_align: atomic CUDA backward disagrees");
}

// Whole boxes as minidamage/ops/paste_masks.py makes them, into a picture whose rows are, or are not, a multiple of 16 bytes.
template <typename T>
void check_paste_masks(int64_t size, int64_t padding, int64_t height, int64_t width) {
  const int64_t N = 18, far = int64_t(1) << 40;
  const int64_t nasty[][4] = {{-2, -2, -2, -2}, {-far, -far, far, far}, {far, 0, far, 5}, {5, 5, 2, 2}, {0, 0, 0, 0}, {-9, 3, 90, 4}};
  std::vector<T> masks;
  std::vector<int64_t> boxes;
  for (int64_t n = 0; n < N; n++) {
    const int64_t x = static_cast<int64_t>(uniform(-20, 40)), y = static_cast<int64_t>(uniform(-20, 40));
    const int64_t box[4] = {x, y, x + static_cast<int64_t>(uniform(0, 50)), y + static_cast<int64_t>(uniform(0, 50))};
    boxes.insert(boxes.end(), n % 3 ? box : nasty[n / 3], (n % 3 ? box : nasty[n / 3]) + 4);
    for (int64_t i = 0; i < size * size; i++) masks.push_back(static_cast<T>(i % 97 == 5 ? NAN_ : i % 89 == 7 ? INF : uniform(0, 1)));
  }
  const PasteMasks<T> problem = {masks.data(), boxes.data(), N, size, size, padding, height, width};
  std::vector<T> pasted(N * height * width), pasted_cuda(pasted.size(), T(7));
  const size_t count = pasted.size();
  const std::unique_ptr<bool[]> inside(new bool[count]()), inside_cuda(new bool[count]());
  const int64_t bands = N * paste_bands(height);
  paste_masks_cpu(problem, pasted.data(), 0, bands / 3);
  paste_masks_cpu(problem, pasted.data(), bands / 3, bands);
  paste_masks_bool_cpu(problem, T(0.5), inside.get(), 0, bands);
  paste_masks_cuda(problem, sizeof(T) == 8 ? DType::float64 : DType::float32, pasted_cuda.data(), nullptr);
  paste_masks_bool_cuda(problem, 0.5, inside_cuda.get(), nullptr);
  expect_close(doubles<T>({pasted}), doubles<T>({pasted_cuda}), 0, "paste_masks: CPU and CUDA kernels disagree");
  for (size_t i = 0; i < count; i++)
    expect(inside[i] == (pasted[i] > T(0.5)) && inside_cuda[i] == inside[i], "paste_masks: boolean and float forms disagree");
  int64_t characters = 0;
  const EmitCounts emit = [](void* total, int64_t, const char* text, size_t bytes) {
    *static_cast<int64_t*>(total) += static_cast<int64_t>(bytes) + text[bytes - 1] * 0;
  };
  paste_masks_rle_cpu(problem, T(0.5), emit, &characters, 0, N);
  expect(characters >= N, "paste_masks: a mask without runs");
}

static void check_transpose(int64_t N, int64_t rows, int64_t columns) {
  std::vector<float> source, target(N * rows * columns);
  for (int64_t i = 0; i < N * rows * columns; i++) source.push_back(static_cast<float>(i));
  transpose_cpu(source.data(), target.data(), rows, columns, 0, N * transpose_strips(rows));
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++)
        expect(target[(n * columns + j) * rows + i] == source[(n * rows + i) * columns + j], "transpose: a number in the wrong place");
}

template <typename T>
std::vector<T> numbers(int64_t count, double size = 1) {
  std::vector<T> result;
  for (int64_t i = 0; i < count; i++) result.push_back(static_cast<T>(uniform(-size, size)));
  return result;
}

// A random product of two terms with operands of random strides, a random part of its blocks at a time; every operand has its exact size.
template <typename T>
void check_product() {
  const auto size = [] { return static_cast<int64_t>(1 + std::pow(uniform(0, 1), 4) * 600); };
  const int64_t M = size(), N = std::min<int64_t>(size(), 200), C_row = N + static_cast<int64_t>(uniform(0, 3));
  std::vector<T> C((M - 1) * C_row + N, T(7)), bias = numbers<T>(N), A[2], B[2];
  Product<T> product = {M, N, C.data(), C_row, uniform(0, 1) < 0.5 ? bias.data() : nullptr, {}};
  std::vector<double> expected(M * N), ours(M * N);
  for (int64_t e = 0; e < M * N; e++) expected[e] = product.bias ? double(bias[e % N]) : 0.0;
  for (int t = 0; t < 2; t++) {
    const int64_t K = size() - 1;  // 0 too: nothing is added
    A[t] = numbers<T>(M * K), B[t] = numbers<T>(K * N);
    const bool flip_A = uniform(0, 1) < 0.5, flip_B = uniform(0, 1) < 0.5;
    product.terms.push_back({K, A[t].data(), flip_A ? 1 : K, flip_A ? M : 1, B[t].data(), flip_B ? 1 : N, flip_B ? K : 1});
    const ProductTerm<T>& term = product.terms.back();
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j++)
        for (int64_t p = 0; p < K; p++)
          expected[i * N + j] += double(term.A[i * term.A_row + p * term.A_column]) * double(term.B[p * term.B_row + j * term.B_column]);
  }
  const int64_t blocks = product_blocks(product), middle = static_cast<int64_t>(uniform(0, blocks + 1));
  product_cpu(product, middle, blocks);
  product_cpu(product, 0, middle);
  for (int64_t e = 0; e < M * N; e++) ours[e] = C[e / N * C_row + e % N];
  expect_close(ours, expected, sizeof(T) == 8 ? 1e-9 : 1e-2, "product: not the sum of its terms");
}

// The attention core of both machines, forward and backward; some rows of the queries are not finite, as queries[0] is where `nasty`.
template <typename T>
void check_attention(int64_t B, int64_t N, int64_t k, int64_t H, int64_t d, int64_t segments, bool nasty) {
  std::vector<T> query = numbers<T>(B * N * H * d, 3), keys = numbers<T>(B * k * H * d, 3), values = numbers<T>(B * k * H * d);
  const std::vector<T> grad = numbers<T>(B * N * H * d);
  if (nasty && !query.empty()) query[0] = static_cast<T>(NAN_), query.back() = static_cast<T>(INF), keys[0] = static_cast<T>(-INF);
  const T scale = T(1) / std::sqrt(T(d));
  const Attention<T> problem = {B, N, k, H, d, scale, query.data(), keys.data(), values.data()};
  const int64_t items = B * H * segments, middle = items / 3;
  std::vector<T> output(query.size()), log_sum_exp(B * H * N), grad_query(query.size()), parts[2];
  for (auto& part : parts) part.assign(segments * keys.size(), T(7));
  attention_cpu(problem, segments, output.data(), log_sum_exp.data(), middle, items);
  attention_cpu(problem, segments, output.data(), log_sum_exp.data(), 0, middle);
  for (int64_t part = 0; part < 2; part++)
    attention_backward_cpu(problem, segments, output.data(), log_sum_exp.data(), grad.data(), grad_query.data(), parts[0].data(),
                           parts[1].data(), part ? middle : 0, part ? items : middle);

  const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const int64_t rows = N / 2, first = N - rows;  // the second half of the rows, as a chunk
  const ScoreRows at = {B * H, rows, k, N, first};
  std::vector<T> scores, grad_P, P(B * H * rows * k), grad_scores(P.size()), lse(B * H * N), mean(B * H * N), expected, ours;
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t n = first; n < N; n++)
        for (int64_t j = 0; j < k; j++) {
          T score = 0, grad_of_P = 0;
          for (int64_t c = 0; c < d; c++) {
            score += query[((b * N + n) * H + h) * d + c] * keys[((b * k + j) * H + h) * d + c];
            grad_of_P += grad[((b * N + n) * H + h) * d + c] * values[((b * k + j) * H + h) * d + c];
          }
          scores.push_back(score), grad_P.push_back(grad_of_P);
        }
  attention_softmax_cuda<T>(scores.data(), at, scale, dtype, P.data(), lse.data(), nullptr);
  attention_mean_cuda<T>(B, N, H, d, dtype, output.data(), grad.data(), mean.data(), nullptr);
  attention_grad_scores_cuda<T>(scores.data(), grad_P.data(), lse.data(), mean.data(), at, scale, dtype, P.data(), grad_scores.data(),
                                nullptr);
  for (int64_t r = 0; r < B * H * rows; r++)
    for (int64_t c = 0; c < d; c++) {
      const int64_t b = r / rows / H, h = r / rows % H, n = first + r % rows;
      T result = 0, gradient = 0;
      for (int64_t j = 0; j < k; j++) {
        result += P[r * k + j] * values[((b * k + j) * H + h) * d + c];
        gradient += grad_scores[r * k + j] * keys[((b * k + j) * H + h) * d + c];
      }
      ours.push_back(output[((b * N + n) * H + h) * d + c]), expected.push_back(result);
      ours.push_back(grad_query[((b * N + n) * H + h) * d + c]), expected.push_back(gradient);
    }
  expect_close(doubles<T>({ours}), doubles<T>({expected}), 1e-3, "linear_attention: CPU and CUDA kernels disagree");
}

// `values` rounded to T, in memory of exactly their size, aligned for tensor cores; `values` are rounded too.
template <typename T>
std::unique_ptr<T, decltype(&std::free)> aligned(std::vector<float>& values) {
  void* memory = nullptr;
  expect(!posix_memalign(&memory, 32, values.size() * sizeof(T)), "no memory");
  T* array = static_cast<T*>(memory);
  for (size_t i = 0; i < values.size(); i++) array[i] = from_accumulate<T>(values[i]), values[i] = to_accumulate(array[i]);
  return {array, &std::free};
}

// The fused core on tensor cores and the CPU's, on the same rounded numbers; and the biases of keys and values.
template <typename T>
void check_fused_attention(int64_t B, int64_t N, int64_t k, int64_t H, int64_t d, double tolerance) {
  const int64_t A = H * d, rows = B * N * A, summaries = B * k * A;
  std::vector<float> query = numbers<float>(rows), keys = numbers<float>(summaries), values = numbers<float>(summaries);
  std::vector<float> grad = numbers<float>(rows), output(rows), log_sum_exp(B * H * N), grad_query(rows), parts[2];
  const auto q = aligned<T>(query), K = aligned<T>(keys), V = aligned<T>(values), g = aligned<T>(grad);
  const Attention<float> problem = {B, N, k, H, d, 1 / std::sqrt(static_cast<float>(d)), query.data(), keys.data(), values.data()};
  for (auto& part : parts) part.resize(summaries);
  attention_cpu(problem, 1, output.data(), log_sum_exp.data(), 0, B * H);
  attention_backward_cpu(problem, 1, output.data(), log_sum_exp.data(), grad.data(), grad_query.data(), parts[0].data(), parts[1].data(), 0,
                         B * H);

  const DType dtype = std::is_same<T, __half>::value ? DType::float16 : DType::bfloat16;
  const FusedAttention fused = {B, N, k, H, d, dtype, q.get(), K.get(), V.get()};
  expect(attention_fuses(fused), "linear_attention: no fused form");
  const int64_t segments = attention_fused_segments(fused);
  std::vector<float> unset(rows, 7.f), unset_too(2 * summaries, 7.f), lse(B * H * N), mean(B * H * N), sums(2 * segments * summaries);
  const auto out = aligned<T>(unset), of_query = aligned<T>(unset), of_keys = aligned<T>(unset_too), partial = aligned<float>(sums);
  attention_fused_cuda(fused, out.get(), lse.data(), nullptr);
  attention_mean_cuda<float>(B, N, H, d, dtype, out.get(), g.get(), mean.data(), nullptr);
  attention_fused_backward_cuda(fused, lse.data(), mean.data(), g.get(), of_query.get(), partial.get(), of_keys.get(), nullptr);
  const auto floats = [](const auto& array, int64_t count) {
    std::vector<float> result;
    for (int64_t i = 0; i < count; i++) result.push_back(to_accumulate(array.get()[i]));
    return result;
  };
  expect_close(doubles<float>({floats(out, rows), lse, floats(of_query, rows), floats(of_keys, 2 * summaries)}),
               doubles<float>({output, log_sum_exp, grad_query, parts[0], parts[1]}), tolerance,
               "linear_attention: CPU and fused CUDA kernels disagree");

  std::vector<float> E = numbers<float>(N * k), bias = numbers<float>(A), before = floats(of_keys, 2 * summaries), after;
  const auto projection = aligned<T>(E), b_v = aligned<T>(bias);
  attention_add_bias_cuda(B, N, k, A, dtype, nullptr, projection.get(), nullptr, b_v.get(), of_keys.get(), nullptr);
  for (int64_t e = 0; e < 2 * summaries; e++) {
    float total = 0;
    for (int64_t n = 0; n < N && e >= summaries; n++) total += E[n * k + e / A % k];
    after.push_back(before[e] + total * bias[e % A]);
  }
  expect_close(doubles<float>({floats(of_keys, 2 * summaries)}), doubles<float>({after}), tolerance,
               "linear_attention: biases of the values");
}

// Forward and backward of both machines; the products that a GPU leaves to the framework are loops here. One nasty offset in nine.
template <typename T>
void check_deform_conv2d(DeformConv2d<T> problem, bool masked) {
  problem.OH = (problem.H + 2 * problem.pad_y - problem.dilation_y * (problem.KH - 1) - 1) / problem.stride_y + 1;
  problem.OW = (problem.W + 2 * problem.pad_x - problem.dilation_x * (problem.KW - 1) - 1) / problem.stride_x + 1;
  const int64_t P = problem.positions(), K = problem.taps(), C = problem.C, O = problem.O, samples = P * problem.offset_groups * K;
  const int64_t channels = problem.group_channels(), outputs = problem.group_outputs(), blocks = deform_blocks(problem);
  const double nasty[] = {NAN_, INF, -INF, 1e30, -3e9, -1};
  const auto numbers = [](int64_t count) {
    std::vector<T> array(count);
    for (T& x : array) x = static_cast<T>(uniform(-1, 1));
    return array;
  };
  const std::vector<T> input = numbers(problem.N * problem.H * problem.W * C), weight = numbers(O * K * channels), grad = numbers(P * O);
  const std::vector<T> bias(O), mask = numbers(samples);
  std::vector<T> offset = numbers(2 * samples);
  for (size_t i = 0; i < offset.size(); i++) offset[i] = i % 9 == 4 ? static_cast<T>(nasty[i / 9 % 6]) : 3 * offset[i];
  problem.offset = offset.data(), problem.mask = masked ? mask.data() : nullptr;

  std::vector<T> packed(deform_packed_size(problem)), packed_backward(deform_packed_backward_size(problem)), output(P * O, T(7));
  std::vector<T> scratch(deform_scratch_size(problem)), partial(deform_parts(problem) * P * K * 3), grad_input(input.size(), T(7));
  std::vector<T> grad_offset(2 * samples), grad_mask(samples), grad_weight(weight.size(), T(7));
  deform_pack(problem, weight.data(), packed.data(), 0, deform_panels(problem));
  deform_pack_backward(problem, weight.data(), packed_backward.data(), 0, blocks);
  deform_conv2d_cpu(problem, input.data(), packed.data(), bias.data(), output.data(), scratch.data(), 0, deform_tiles(problem));
  deform_backward_input_cpu(problem, input.data(), packed_backward.data(), grad.data(), grad_input.data(), partial.data(), scratch.data(),
                            0, problem.N * blocks);
  deform_backward_offset_cpu(problem, partial.data(), grad_offset.data(), grad_mask.data(), 0, P);
  deform_backward_weight_cpu(problem, input.data(), grad.data(), grad_weight.data(), scratch.data(), 0, K * blocks);

  const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  std::vector<T> columns(P * K * C), grad_columns(columns.size()), output_cuda(P * O), grad_weight_cuda(weight.size());
  deform_columns_cuda<T>(problem, dtype, input.data(), 0, P, columns.data(), nullptr);
  for (int64_t p = 0; p < P; p++)
    for (int64_t o = 0; o < O; o++)
      for (int64_t kc = 0; kc < K * channels; kc++) {
        const int64_t column = (o / outputs * P + p) * K * channels + kc;
        output_cuda[p * O + o] += weight[o * K * channels + kc] * columns[column];
        grad_columns[column] += weight[o * K * channels + kc] * grad[p * O + o];
        grad_weight_cuda[o * K * channels + kc] += columns[column] * grad[p * O + o];
      }
  expect_close(doubles<T>({output, grad_weight}), doubles<T>({output_cuda, grad_weight_cuda}), 1e-3, "deform_conv2d: machines disagree");
  const std::vector<double> expected = doubles<T>({grad_input, grad_offset, grad_mask});
  std::vector<int64_t> cells(samples), order(samples), starts(deform_cells(problem) + 1);
  deform_cells_cuda<T>(problem, 0, P, cells.data(), nullptr);
  for (int64_t i = 0; i < samples; i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cells[a] < cells[b]; });
  for (size_t c = 0; c < starts.size(); c++)
    for (const int64_t cell : cells) starts[c] += cell < static_cast<int64_t>(c);
  for (bool deterministic : {false, true}) {
    std::fill(grad_input.begin(), grad_input.end(), T(0));
    deform_backward_cuda<T>(problem, dtype, input.data(), grad_columns.data(), 0, P, deterministic ? nullptr : grad_input.data(),
                            grad_offset.data(), grad_mask.data(), nullptr);
    if (deterministic)
      deform_gather_cuda<T>(problem, dtype, grad_columns.data(), 0, P, order.data(), starts.data(), grad_input.data(), nullptr);
    expect_close(doubles<T>({grad_input, grad_offset, grad_mask}), expected, 1e-3, "deform_conv2d: gradients of the machines disagree");
  }
}

int main() {
  for (bool masked : {false, true}) {  // N, C, H, W, O, KH, KW, (OH, OW), stride, padding, dilation, groups, offset groups
    check_deform_conv2d<float>({2, 12, 6, 7, 10, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, nullptr, nullptr}, masked);
    check_deform_conv2d<float>({1, 70, 9, 13, 5, 2, 3, 0, 0, 2, 1, 0, 2, 1, 2, 1, 2, nullptr, nullptr}, masked);
    check_deform_conv2d<double>({2, 3, 1, 5, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, nullptr, nullptr}, masked);
    check_deform_conv2d<double>({1, 8, 5, 4, 8, 3, 2, 0, 0, 1, 2, 2, 1, 1, 1, 8, 4, nullptr, nullptr}, masked);
  }
  for (int i = 0; i < 40; i++) i % 4 ? check_product<float>() : check_product<double>();
  for (int i = 0; i < 60; i++) {
    const auto size = [](double most) { return static_cast<int64_t>(1 + std::pow(uniform(0, 1), 3) * most); };
    const int64_t N = size(150) - 1;
    if (i % 4) check_attention<float>(size(2), N, size(80), size(3), size(40), size(4), i % 5 == 0);
    else check_attention<double>(size(2), N, size(80), size(3), size(40), size(4), i % 5 == 0);
  }
  check_attention<float>(1, 9, 600, 1, 3, 1, false);  // more keys than a lane's registers hold
  check_fused_attention<__half>(2, 57, 48, 2, 16, 0.01);
  check_fused_attention<__half>(1, 16, 512, 1, 32, 0.01);
  check_fused_attention<__nv_bfloat16>(1, 150, 16, 1, 64, 0.1);
  check_transpose(2, 33, 70);
  check_transpose(3, 64, 1);
  check_transpose(1, 5, 32);
  for (int64_t sampling_ratio : {0, 2})
    for (bool aligned : {false, true}) {
      check_roi_align<float>(4, 3, 5, sampling_ratio, aligned);
      check_roi_align<double>(7, 2, 2, sampling_ratio, aligned);
    }
  check_roi_align<float>(1, 1, 1, 1, false);
  check_paste_masks<float>(28, 1, 33, 64);
  check_paste_masks<float>(14, 0, 70, 41);
  check_paste_masks<double>(1, 2, 1, 90);
  for (int64_t n : {1, 2, 63, 65, 200})
    for (double threshold : {0.0, 0.5, -1.0})
      for (bool grouped : {false, true}) {
        check_nms<float>(n, threshold, n, grouped);
        check_nms<double>(n, threshold, n / 2, grouped);
      }
  check_nms<float>(5200, 0.3, 900, true);  // more rows than the mask holds at a time
  std::puts("clean");
}
