// 10,000 random cases over the kernels of every op, CPU and (every tenth) emulated CUDA, under AddressSanitizer and
// UndefinedBehaviorSanitizer: random shapes, ranges of work and values, among them NaN, infinite, huge, subnormal. Every array has its
// exact size, so that a read or write outside ends the program; the machines must agree where the numbers are ordinary. Each op has one
// function, which makes one case; add the next one's below and to main(). A failure names the op and the case's seed:
// `sanitize_fuzz <seed>` runs that case alone.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "deform_conv2d.h"
#include "focal_loss.h"
#include "layout.h"
#include "linear_attention.h"
#include "nms.h"
#include "paste_masks.h"
#include "roi_align.h"
#include "roi_pool.h"

using namespace minidamage;

static std::mt19937 generator;
static const char* op = "";
static unsigned seed = 0;

static double uniform(double low, double high) { return low + (high - low) * (generator() / 4294967296.0); }
static int64_t integer(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}
static bool chance(double probability) { return uniform(0, 1) < probability; }

static void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "sanitize_fuzz: %s, case %u: %s\n", op, seed, what);
  std::exit(1);
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::float64 : DType::float32;
}

// A number up to `size`; in a nasty array one of eight is no ordinary one.
template <typename T>
T number(double size, bool nasty) {
  const double extremes[] = {NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e30, 1e-40, 0};
  return static_cast<T>(nasty && chance(0.12) ? extremes[integer(0, 7)] : uniform(-size, size));
}

template <typename T>
std::vector<T> numbers(int64_t count, double size, bool nasty) {
  std::vector<T> result(static_cast<size_t>(count));
  for (T& x : result) x = number<T>(size, nasty);
  return result;
}

// Equal up to rounding, NaN and infinity included.
template <typename T>
void expect_close(const std::vector<T>& a, const std::vector<T>& b, double tolerance, const char* what) {
  for (size_t i = 0; i < a.size(); i++) {
    const double x = a[i], y = b[i];
    expect(x == y || (x != x && y != y) || std::abs(x - y) <= tolerance * (1 + std::abs(y)), what);
  }
}

// work(begin, end) over [0, count) in up to three ranges, the last one first.
template <typename Work>
void in_ranges(int64_t count, const Work& work) {
  int64_t a = integer(0, count), b = integer(0, count);
  if (a > b) std::swap(a, b);
  work(b, count), work(0, a), work(a, b);
}

// [R, 5]: pictures 0 .. N - 1 and boxes around a picture of `extent` pixels.
template <typename T>
std::vector<T> rois_of(int64_t R, int64_t N, double extent, bool nasty) {
  std::vector<T> rois(static_cast<size_t>(5 * R));
  for (int64_t r = 0; r < R; r++) {
    const double x = uniform(-0.3, 1) * extent, y = uniform(-0.3, 1) * extent;
    const double box[4] = {x, y, x + uniform(-0.1, 0.6) * extent, y + uniform(-0.1, 0.6) * extent};
    rois[5 * r] = static_cast<T>(integer(0, N - 1));
    for (int k = 0; k < 4; k++) {
      rois[5 * r + 1 + k] = static_cast<T>(box[k]);
      if (nasty && chance(0.1)) rois[5 * r + 1 + k] = number<T>(1e9, true);
    }
  }
  return rois;
}

template <typename T>
void fuzz_nms(bool cuda) {
  const int64_t n = integer(1, cuda ? 140 : 80), max_keep = integer(0, n), groups_count = integer(1, 4);
  const bool nasty = chance(0.5), grouped = chance(0.5);
  const double threshold = chance(0.2) ? integer(-1, 1) : uniform(0, 1);
  std::vector<T> boxes(static_cast<size_t>(4 * n));
  const std::vector<T> rois = rois_of<T>(n, 1, 60, nasty);
  for (int64_t i = 0; i < n; i++) std::copy(&rois[5 * i + 1], &rois[5 * i] + 5, &boxes[4 * i]);
  const std::vector<T> scores = numbers<T>(n, 1, nasty);
  std::vector<int64_t> idxs(n);
  std::vector<char> valid(n);
  for (int64_t i = 0; i < n; i++) idxs[i] = integer(-groups_count, groups_count), valid[i] = chance(0.8);
  const NmsGroups groups = nms_groups_cpu(scores.data(), grouped ? idxs.data() : nullptr, reinterpret_cast<const bool*>(valid.data()), n);
  std::vector<uint8_t> kept(n);
  in_ranges(static_cast<int64_t>(groups.offsets.size()) - 1, [&](int64_t begin, int64_t end) {
    nms_cpu(boxes.data(), groups, threshold, max_keep, begin, end, kept.data());
  });
  std::vector<int64_t> expected;
  for (int64_t i : groups.by_score)
    if (kept[i] && static_cast<int64_t>(expected.size()) < max_keep) expected.push_back(i);
  for (int64_t i = 0; i < n; i++) expect(!kept[i] || valid[i], "kept a box that is not valid");
  if (!cuda) return;
  const int64_t m = static_cast<int64_t>(groups.by_score.size()), words = ceil_div(m, NMS_WORD);
  if (m == 0) return;
  std::vector<T> sorted(4 * m);
  std::vector<int64_t> sorted_idxs(m), keep(max_keep);
  for (int64_t k = 0; k < m; k++) {
    std::copy(&boxes[4 * groups.by_score[k]], &boxes[4 * groups.by_score[k]] + 4, &sorted[4 * k]);
    sorted_idxs[k] = idxs[groups.by_score[k]];
  }
  std::vector<uint64_t> mask(std::min(m, NMS_ROWS) * words), removed(words);
  int64_t count = 0;
  nms_cuda<T>(sorted.data(), grouped ? sorted_idxs.data() : nullptr, nullptr, groups.by_score.data(), m, threshold, max_keep, mask.data(),
              removed.data(), keep.data(), &count, nullptr);
  keep.resize(count);
  expect(keep == expected, "CPU and CUDA kernels disagree");
}

template <typename T>
void fuzz_roi_align(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t level_count = integer(1, 3), N = integer(1, 2), C = integer(0, cuda ? 5 : 20), R = integer(0, cuda ? 4 : 9);
  RoiAlign<T> problem = {};
  problem.level_count = level_count, problem.N = N, problem.C = C, problem.R = R;
  problem.PH = integer(1, 4), problem.PW = integer(1, 4), problem.sampling_ratio = integer(-1, 3), problem.aligned = chance(0.5);
  std::vector<T> rois = rois_of<T>(R, N, 40, nasty);
  std::vector<int64_t> levels(R), order(R);
  for (int64_t& level : levels) level = integer(0, level_count - 1);
  problem.rois = rois.data(), problem.roi_levels = levels.data();
  std::vector<std::vector<T>> features(level_count), gradients(level_count);
  for (int64_t l = 0; l < level_count; l++) {
    const int64_t height = integer(1, 12), width = integer(1, 40 / height);
    features[l] = numbers<T>(N * height * width * C, 1, nasty);
    gradients[l].assign(features[l].size(), T(7));
    problem.levels[l] = {features[l].data(), height, width, chance(0.05) ? number<double>(1, true) : 1.0 / (1 << integer(0, 5))};
  }
  std::vector<T> output(R * problem.PH * problem.PW * C), output_cuda(output.size());
  const std::vector<T> grad = numbers<T>(output.size(), 1, nasty);
  roi_align_order(problem, order.data());
  in_ranges(R, [&](int64_t begin, int64_t end) { roi_align_cpu(problem, order.data(), output.data(), begin, end); });
  if (cuda && !output.empty()) {
    roi_align_cuda(problem, dtype_of<T>(), output_cuda.data(), nullptr);
    if (!nasty) expect_close(output, output_cuda, 1e-3, "CPU and CUDA kernels disagree");
  }
  for (int64_t l = 0; l < level_count; l++) problem.levels[l].data = gradients[l].data();
  int64_t tiles = 0;
  RoiAlignPlan<T>* plan = roi_align_plan(problem, tiles);
  in_ranges(tiles, [&](int64_t begin, int64_t end) { roi_align_backward_cpu(problem, *plan, grad.data(), begin, end); });
  roi_align_free(plan);
  for (const auto& gradient : gradients)
    for (const T value : gradient) expect(nasty || std::abs(value) < 1e4, "a gradient of ordinary numbers is not finite");
  if (!cuda || C == 0) return;
  const std::vector<std::vector<T>> expected = gradients;
  roi_align_backward_deterministic_cuda(problem, dtype_of<T>(), grad.data(), nullptr);
  for (int64_t l = 0; l < level_count && !nasty; l++)
    expect_close(gradients[l], expected[l], 1e-3, "the deterministic CUDA backward disagrees");
  if (output.empty()) return;
  for (auto& gradient : gradients) std::fill(gradient.begin(), gradient.end(), T(0));
  roi_align_backward_cuda(problem, dtype_of<T>(), grad.data(), nullptr);
  for (int64_t l = 0; l < level_count && !nasty; l++)
    expect_close(gradients[l], expected[l], 1e-3, "the atomic CUDA backward disagrees");
  rois[0] = number<T>(1e9, true), levels[0] = integer(-9, 9);  // a picture that does not exist: CUDA kernels alone meet it
  roi_align_backward_cuda(problem, dtype_of<T>(), grad.data(), nullptr);
  roi_align_backward_deterministic_cuda(problem, dtype_of<T>(), grad.data(), nullptr);
  for (int64_t l = 0; l < level_count; l++) problem.levels[l].data = features[l].data();
  roi_align_cuda(problem, dtype_of<T>(), output_cuda.data(), nullptr);
}

template <typename T>
void fuzz_roi_pool(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t N = integer(1, 2), H = integer(1, 12), W = integer(1, 12), C = integer(0, cuda ? 9 : 70), R = integer(0, cuda ? 4 : 9);
  std::vector<T> rois = rois_of<T>(R, N, 20, nasty);
  const RoiPool<T> problem = {rois.data(), R, N, H, W, C, integer(1, 4), integer(1, 4), chance(0.05) ? number<T>(1, true) : T(0.5)};
  const std::vector<T> input = numbers<T>(N * H * W * C, 1, nasty);
  std::vector<T> output(R * problem.PH * problem.PW * C, T(7)), output_cuda(output.size()), grad_input(input.size()), other(input.size());
  std::vector<int32_t> argmax(output.size()), argmax_cuda(output.size());
  const std::vector<T> grad = numbers<T>(output.size(), 1, false);
  in_ranges(R, [&](int64_t begin, int64_t end) { roi_pool_cpu(problem, input.data(), output.data(), argmax.data(), begin, end); });
  for (const int32_t position : argmax) expect(position >= -1 && position < H * W, "argmax lies outside the picture");
  if (cuda && !output.empty()) {
    roi_pool_cuda(problem, dtype_of<T>(), input.data(), output_cuda.data(), argmax_cuda.data(), nullptr);
    expect_close(output, output_cuda, 0, "CPU and CUDA kernels disagree");
    expect(argmax == argmax_cuda, "positions of the CPU and CUDA kernels disagree");
  }
  const bool broken = chance(0.1);  // positions that no forward pass wrote
  for (int32_t& position : argmax)
    if (broken && chance(0.3)) position = static_cast<int32_t>(generator());
  in_ranges(N * pool_strips(C), [&](int64_t begin, int64_t end) {
    roi_pool_backward_cpu(problem, grad.data(), argmax.data(), grad_input.data(), begin, end);
  });
  if (!cuda || output.empty()) return;
  roi_pool_backward_cuda<T>(problem, dtype_of<T>(), grad.data(), argmax.data(), other.data(), nullptr);
  expect_close(other, grad_input, 1e-4, "the atomic CUDA backward disagrees");
  roi_pool_backward_deterministic_cuda(problem, dtype_of<T>(), grad.data(), argmax.data(), other.data(), nullptr);
  if (!broken) expect_close(other, grad_input, 1e-4, "the deterministic CUDA backward disagrees");
}

template <typename T>
void fuzz_paste_masks(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t N = integer(0, 3), size_y = integer(1, 9), size_x = integer(1, 9), height = integer(1, 70), width = integer(1, 40);
  const std::vector<T> masks = numbers<T>(N * size_y * size_x, 1, nasty);
  std::vector<int64_t> boxes(4 * N);
  for (int64_t i = 0; i < 4 * N; i++) {
    boxes[i] = integer(-20, 60);
    if (nasty && chance(0.15)) boxes[i] = chance(0.5) ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
  }
  const PasteMasks<T> problem = {masks.data(), boxes.data(), N, size_y, size_x, integer(0, 2), height, width};
  const size_t count = N * height * width;
  std::vector<T> pasted(count), pasted_cuda(count, T(7));
  const std::unique_ptr<bool[]> inside(new bool[count]()), inside_cuda(new bool[count]());
  in_ranges(N * paste_bands(height), [&](int64_t begin, int64_t end) { paste_masks_cpu(problem, pasted.data(), begin, end); });
  in_ranges(N * paste_bands(height), [&](int64_t begin, int64_t end) { paste_masks_bool_cpu(problem, T(0.5), inside.get(), begin, end); });
  for (size_t i = 0; i < count; i++) expect(inside[i] == (pasted[i] > T(0.5)), "the boolean and the float form disagree");
  int64_t characters = 0;
  const EmitCounts emit = [](void* total, int64_t, const char* text, size_t bytes) {
    *static_cast<int64_t*>(total) += static_cast<int64_t>(bytes) + text[bytes - 1] * 0;
  };
  paste_masks_rle_cpu(problem, T(0.5), emit, &characters, 0, N);
  expect(characters >= N, "a mask without runs");
  if (!cuda || count == 0) return;
  paste_masks_cuda(problem, dtype_of<T>(), pasted_cuda.data(), nullptr);
  paste_masks_bool_cuda(problem, 0.5, inside_cuda.get(), nullptr);
  expect_close(pasted, pasted_cuda, 0, "CPU and CUDA kernels disagree");
  expect(std::equal(inside.get(), inside.get() + count, inside_cuda.get()), "boolean forms of CPU and CUDA disagree");
}

template <typename T>
FocalLoss<T> any_focal() {
  const double gammas[] = {0, 2, 0.5, 1, 3.7, 50};
  return {static_cast<T>(uniform(-0.5, 1)), static_cast<T>(gammas[integer(0, 5)])};
}

template <typename T>
void fuzz_sigmoid_focal(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t count = integer(1, cuda ? 400 : 700);
  const FocalLoss<T> focal = any_focal<T>();
  const std::vector<T> x = numbers<T>(count, chance(0.2) ? 1e4 : 6, nasty), grad = numbers<T>(count, 1, false);
  std::vector<T> t = numbers<T>(count, 1, nasty), loss(count, T(7)), gradient(count, T(7)), other(count);
  for (T& target : t) target = std::abs(target);
  double sum = 0;
  in_ranges(count, [&](int64_t begin, int64_t end) {
    sigmoid_focal_loss_cpu(focal, x.data(), t.data(), loss.data(), begin, end);
    sum += sigmoid_focal_sum_cpu(focal, x.data(), t.data(), begin, end);
    sigmoid_focal_backward_cpu(focal, x.data(), t.data(), chance(0.5) ? grad.data() : nullptr, T(1), gradient.data(), begin, end);
  });
  for (int64_t i = 0; i < count && !nasty; i++)
    expect(loss[i] >= T(0) && loss[i] <= T(2e4) && std::abs(gradient[i]) < T(1e6), "the loss of ordinary numbers is not finite");
  if (!cuda) return;
  sigmoid_focal_loss_cuda(focal, dtype_of<T>(), x.data(), t.data(), count, Reduction::none, nullptr, other.data(), nullptr);
  expect_close(other, loss, 1e-5, "CPU and CUDA kernels disagree");
  std::vector<double> partials(FOCAL_PARTIALS);
  std::vector<T> total(1);
  sigmoid_focal_loss_cuda(focal, dtype_of<T>(), x.data(), t.data(), count, Reduction::sum, partials.data(), total.data(), nullptr);
  if (!nasty) expect_close(total, {static_cast<T>(sum)}, 1e-4, "sums disagree");
  sigmoid_focal_backward_cuda(focal, dtype_of<T>(), x.data(), t.data(), count, Reduction::none, grad.data(), other.data(), nullptr);
}

template <typename T>
void fuzz_softmax_focal(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t R = integer(1, cuda ? 20 : 40), C = chance(0.2) ? integer(1, 70) : integer(1, 9);
  const FocalLoss<T> focal = any_focal<T>();
  const std::vector<T> x = numbers<T>(R * C, chance(0.2) ? 1e4 : 6, nasty), grad = numbers<T>(R, 1, false);
  std::vector<int64_t> labels(R);
  for (int64_t& label : labels) label = chance(0.2) ? -100 : integer(0, C - 1);
  std::vector<T> loss(R, T(7)), gradient(R * C, T(7)), other(R), other_gradient(R * C);
  in_ranges(R, [&](int64_t begin, int64_t end) {
    softmax_focal_loss_cpu(focal, x.data(), labels.data(), C, -100, loss.data(), begin, end);
    softmax_focal_backward_cpu(focal, x.data(), labels.data(), C, -100, grad.data(), T(1), gradient.data(), begin, end);
  });
  for (int64_t r = 0; r < R && !nasty; r++) expect(loss[r] >= T(0) && loss[r] <= T(2e4), "the loss of ordinary numbers is not finite");
  if (!cuda) return;
  softmax_focal_loss_cuda(focal, dtype_of<T>(), x.data(), labels.data(), R, C, -100, Reduction::none, nullptr, other.data(), nullptr);
  softmax_focal_backward_cuda(focal, dtype_of<T>(), x.data(), labels.data(), R, C, -100, Reduction::none, nullptr, grad.data(),
                              other_gradient.data(), nullptr);
  if (!nasty) {
    expect_close(other, loss, 1e-4, "CPU and CUDA kernels disagree");
    expect_close(other_gradient, gradient, 1e-3, "gradients of the CPU and CUDA kernels disagree");
  }
  for (int64_t& label : labels) label = chance(0.2) ? static_cast<int64_t>(generator()) - (int64_t(1) << 31) : label;
  std::vector<double> partials(2 * FOCAL_PARTIALS);
  const int64_t counted = integer(0, R);
  softmax_focal_loss_cuda(focal, dtype_of<T>(), x.data(), labels.data(), R, C, -100, Reduction::mean, partials.data(), other.data(),
                          nullptr);
  softmax_focal_backward_cuda(focal, dtype_of<T>(), x.data(), labels.data(), R, C, -100, Reduction::mean, &counted, grad.data(),
                              other_gradient.data(), nullptr);
}

template <typename T>
void fuzz_deform_conv2d(bool cuda) {
  const bool nasty = chance(0.5), masked = chance(0.5);
  const int64_t groups = integer(1, 2), offset_groups = integer(1, 2), KH = integer(1, 3), KW = integer(1, 3);
  DeformConv2d<T> problem = {};
  problem.groups = groups, problem.offset_groups = offset_groups, problem.KH = KH, problem.KW = KW;
  problem.N = integer(1, 2), problem.C = groups * offset_groups * integer(1, cuda ? 3 : 9), problem.O = groups * integer(1, 9);
  problem.H = integer(1, 7), problem.W = integer(1, 7), problem.stride_y = integer(1, 2), problem.stride_x = integer(1, 2);
  problem.pad_y = integer(0, 2), problem.pad_x = integer(0, 2), problem.dilation_y = integer(1, 2), problem.dilation_x = integer(1, 2);
  problem.OH = (problem.H + 2 * problem.pad_y - problem.dilation_y * (KH - 1) - 1) / problem.stride_y + 1;
  problem.OW = (problem.W + 2 * problem.pad_x - problem.dilation_x * (KW - 1) - 1) / problem.stride_x + 1;
  const int64_t padded_H = problem.H + 2 * problem.pad_y, padded_W = problem.W + 2 * problem.pad_x;
  if (padded_H < problem.dilation_y * (KH - 1) + 1 || padded_W < problem.dilation_x * (KW - 1) + 1) return;  // no output
  const int64_t P = problem.positions(), K = problem.taps(), C = problem.C, O = problem.O, samples = P * offset_groups * K;
  const std::vector<T> input = numbers<T>(problem.N * problem.H * problem.W * C, 1, nasty), grad = numbers<T>(P * O, 1, nasty);
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
  const int64_t first = integer(0, P - 1), count = integer(1, P - first);
  std::vector<T> columns(count * K * C);
  deform_columns_cuda<T>(problem, dtype_of<T>(), input.data(), first, count, columns.data(), nullptr);
  const std::vector<T> grad_columns = numbers<T>(columns.size(), 1, nasty);
  std::vector<int64_t> cells(count * offset_groups * K);
  deform_backward_cuda<T>(problem, dtype_of<T>(), input.data(), grad_columns.data(), first, count, grad_input.data(), grad_offset.data(),
                          masked ? grad_mask.data() : nullptr, nullptr);
  deform_cells_cuda<T>(problem, first, count, cells.data(), nullptr);
  for (const int64_t cell : cells) expect(cell >= 0 && cell <= deform_cells(problem), "a sample in a cell that does not exist");
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
  const std::vector<T> scores = numbers<T>(B * H * rows * k, 9, nasty);
  std::vector<T> P(scores.size()), grad_scores(scores.size()), mean(B * H * N);
  attention_softmax_cuda<T>(scores.data(), at, problem.scale, dtype_of<T>(), P.data(), lse.data(), nullptr);
  for (const T value : P) expect(nasty || (value >= T(0) && value <= T(1.001)), "a probability outside 0..1");
  attention_mean_cuda<T>(B, N, H, d, dtype_of<T>(), output.data(), grad.data(), mean.data(), nullptr);
  attention_grad_scores_cuda<T>(scores.data(), scores.data(), lse.data(), mean.data(), at, problem.scale, dtype_of<T>(), P.data(),
                                grad_scores.data(), nullptr);
}

static void fuzz_transpose() {
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

// Case `number` of the 10,000: the op, the type and the machine follow from it.
static void run_case(unsigned number) {
  seed = number;
  generator.seed(number);
  const bool cuda = number / 9 % 10 == 0, wide = number / 90 % 4 == 0;
  int32_limit = number / 360 % 2 ? 0 : std::numeric_limits<int32_t>::max();  // both index types
#define MD_CASE(i, function)                                     \
  case i:                                                        \
    op = #function;                                              \
    return wide ? function<double>(cuda) : function<float>(cuda)
  switch (number % 9) {
    MD_CASE(0, fuzz_nms);
    MD_CASE(1, fuzz_roi_align);
    MD_CASE(2, fuzz_roi_pool);
    MD_CASE(3, fuzz_paste_masks);
    MD_CASE(4, fuzz_sigmoid_focal);
    MD_CASE(5, fuzz_softmax_focal);
    MD_CASE(6, fuzz_deform_conv2d);
    MD_CASE(7, fuzz_attention);
    default: op = "fuzz_transpose"; return fuzz_transpose();
  }
#undef MD_CASE
}

int main(int argc, char** argv) {
  constexpr unsigned CASES = 10000;
  if (argc > 1) {
    run_case(static_cast<unsigned>(std::atoi(argv[1])));
  } else {
    for (unsigned number = 0; number < CASES; number++) run_case(number);
  }
  std::puts("clean");
}
