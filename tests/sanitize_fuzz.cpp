// 10,000 random cases over the kernels of every op, CPU and (every tenth) emulated CUDA, there in float32, float64, float16 and bfloat16,
// under AddressSanitizer and UndefinedBehaviorSanitizer: random shapes, ranges of work and values, among them NaN, infinite, huge,
// subnormal. Every array has its exact size, so that a read or write outside ends the program; the machines must agree where the numbers
// are ordinary. Each op has one function, which makes one case; add the next one's below and to run_case(). A failure names the op and the
// case's seed: `sanitize_fuzz <seed>` runs that case alone.
#include <memory>

#include "box_coding.h"
#include "focal_loss.h"
#include "fuzz.h"
#include "fuzz_products.h"
#include "nms.h"
#include "paste_masks.h"
#include "roi_align.h"
#include "roi_pool.h"

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
  const int64_t level_count = integer(1, 3), N = integer(1, 2), C = cuda ? some_channels(0) : integer(0, 20), R = integer(0, cuda ? 4 : 9);
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
    features[l] = stored(numbers<T>(N * height * width * C, 1, nasty));
    gradients[l].assign(features[l].size(), T(7));
    problem.levels[l] = {features[l].data(), height, width, chance(0.05) ? number<double>(1, true) : 1.0 / (1 << integer(0, 5))};
  }
  std::vector<T> output(R * problem.PH * problem.PW * C);
  const std::vector<T> grad = stored(numbers<T>(output.size(), 1, nasty));
  roi_align_order(problem, order.data());
  in_ranges(R, [&](int64_t begin, int64_t end) { roi_align_cpu(problem, order.data(), output.data(), begin, end); });
  for (int64_t l = 0; l < level_count; l++) problem.levels[l].data = gradients[l].data();
  int64_t tiles = 0;
  RoiAlignPlan<T>* plan = roi_align_plan(problem, tiles);
  in_ranges(tiles, [&](int64_t begin, int64_t end) { roi_align_backward_cpu(problem, *plan, grad.data(), begin, end); });
  roi_align_free(plan);
  for (const auto& gradient : gradients)
    for (const T value : gradient) expect(nasty || std::abs(value) < 1e4, "a gradient of ordinary numbers is not finite");
  if (!cuda || C == 0) return;
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    std::vector<std::vector<S>> maps(level_count);
    std::vector<std::vector<T>> sums(level_count);
    std::vector<S> pooled(output.size());
    const std::vector<S> slope = narrowed<S>(grad);
    for (int64_t l = 0; l < level_count; l++) {
      maps[l] = narrowed<S>(features[l]), problem.levels[l].data = maps[l].data();
      sums[l].resize(gradients[l].size());
    }
    if (!output.empty()) roi_align_cuda(problem, storage, pooled.data(), nullptr);
    if (!nasty) expect_close(widened(pooled), output, tolerance(1e-3), "CPU and CUDA kernels disagree");
    roi_align_backward_deterministic_cuda(problem, storage, slope.data(), nullptr);
    for (int64_t l = 0; l < level_count && !nasty; l++)
      expect_close(widened(maps[l]), gradients[l], tolerance(1e-3), "the deterministic CUDA backward disagrees");
    if (output.empty()) return;
    for (int64_t l = 0; l < level_count; l++) problem.levels[l].data = sums[l].data();
    roi_align_backward_cuda(problem, storage, slope.data(), nullptr);
    for (int64_t l = 0; l < level_count && !nasty; l++) expect_close(sums[l], gradients[l], 1e-3, "the atomic CUDA backward disagrees");
    rois[0] = number<T>(1e9, true), levels[0] = integer(-9, 9);  // a picture that does not exist: CUDA kernels alone meet it
    roi_align_backward_cuda(problem, storage, slope.data(), nullptr);
    for (int64_t l = 0; l < level_count; l++) problem.levels[l].data = maps[l].data();
    roi_align_backward_deterministic_cuda(problem, storage, slope.data(), nullptr);
    roi_align_cuda(problem, storage, pooled.data(), nullptr);
  });
}

template <typename T>
void fuzz_roi_pool(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t N = integer(1, 2), H = integer(1, 12), W = integer(1, 12), C = integer(0, cuda ? 9 : 70), R = integer(0, cuda ? 4 : 9);
  std::vector<T> rois = rois_of<T>(R, N, 20, nasty);
  const RoiPool<T> problem = {rois.data(), R, N, H, W, C, integer(1, 4), integer(1, 4), chance(0.05) ? number<T>(1, true) : T(0.5)};
  const std::vector<T> input = stored(numbers<T>(N * H * W * C, 1, nasty));
  std::vector<T> output(R * problem.PH * problem.PW * C, T(7)), grad_input(input.size()), sums(input.size());
  std::vector<int32_t> argmax(output.size()), argmax_cuda(output.size());
  const std::vector<T> grad = stored(numbers<T>(output.size(), 1, false));
  in_ranges(R, [&](int64_t begin, int64_t end) { roi_pool_cpu(problem, input.data(), output.data(), argmax.data(), begin, end); });
  for (const int32_t position : argmax) expect(position >= -1 && position < H * W, "argmax lies outside the picture");
  if (cuda && !output.empty()) with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    std::vector<S> pooled(output.size());
    roi_pool_cuda(problem, storage, narrowed<S>(input).data(), pooled.data(), argmax_cuda.data(), nullptr);
    expect_close(widened(pooled), output, 0, "CPU and CUDA kernels disagree");
    expect(argmax == argmax_cuda, "positions of the CPU and CUDA kernels disagree");
  });
  const bool broken = chance(0.1);  // positions that no forward pass wrote
  for (int32_t& position : argmax)
    if (broken && chance(0.3)) position = static_cast<int32_t>(generator());
  in_ranges(N * pool_strips(C), [&](int64_t begin, int64_t end) {
    roi_pool_backward_cpu(problem, grad.data(), argmax.data(), grad_input.data(), begin, end);
  });
  if (!cuda || output.empty()) return;
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<S> slope = narrowed<S>(grad);
    std::vector<S> rounded(input.size());
    roi_pool_backward_cuda<T>(problem, storage, slope.data(), argmax.data(), sums.data(), nullptr);
    expect_close(sums, grad_input, 1e-4, "the atomic CUDA backward disagrees");
    roi_pool_backward_deterministic_cuda(problem, storage, slope.data(), argmax.data(), rounded.data(), nullptr);
    if (!broken) expect_close(widened(rounded), grad_input, tolerance(1e-4), "the deterministic CUDA backward disagrees");
  });
}

template <typename T>
void fuzz_paste_masks(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t N = integer(0, 3), size_y = integer(1, 9), size_x = integer(1, 9), height = integer(1, 70), width = integer(1, 40);
  const std::vector<T> masks = stored(numbers<T>(N * size_y * size_x, 1, nasty));
  std::vector<int64_t> boxes(4 * N);
  for (int64_t i = 0; i < 4 * N; i++) {
    boxes[i] = integer(-20, 60);
    if (nasty && chance(0.15)) boxes[i] = chance(0.5) ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
  }
  PasteMasks<T> problem = {masks.data(), boxes.data(), N, size_y, size_x, integer(0, 2), height, width};
  const size_t count = N * height * width;
  std::vector<T> pasted(count);
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
  paste_masks_bool_cuda(problem, 0.5, inside_cuda.get(), nullptr);
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<S> cells = narrowed<S>(masks);
    std::vector<S> output(count);
    problem.masks = cells.data();
    paste_masks_cuda(problem, storage, output.data(), nullptr);
    expect_close(widened(output), stored(pasted), 0, "CPU and CUDA kernels disagree");
  });
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
  const std::vector<T> x = stored(numbers<T>(count, chance(0.2) ? 1e4 : 6, nasty)), grad = stored(numbers<T>(count, 1, false));
  std::vector<T> t = stored(numbers<T>(count, 1, nasty)), loss(count, T(7)), gradient(count, T(7));
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
  sigmoid_focal_backward_cpu(focal, x.data(), t.data(), grad.data(), T(1), gradient.data(), 0, count);
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<S> logits = narrowed<S>(x), targets = narrowed<S>(t), slope = narrowed<S>(grad);
    std::vector<S> losses(count), gradients(count), total(1);
    std::vector<double> partials(FOCAL_PARTIALS);
    sigmoid_focal_loss_cuda(focal, storage, logits.data(), targets.data(), count, Reduction::none, nullptr, losses.data(), nullptr);
    sigmoid_focal_loss_cuda(focal, storage, logits.data(), targets.data(), count, Reduction::sum, partials.data(), total.data(), nullptr);
    sigmoid_focal_backward_cuda(focal, storage, logits.data(), targets.data(), count, Reduction::none, slope.data(), gradients.data(),
                                nullptr);
    if (!nasty || !is_half()) expect_close(widened(losses), loss, tolerance(1e-5), "CPU and CUDA kernels disagree");
    if (nasty) return;
    expect_close(widened(total), stored<T>({static_cast<T>(sum)}), tolerance(1e-4), "sums disagree");
    expect_close(widened(gradients), gradient, tolerance(1e-4), "gradients of the CPU and CUDA kernels disagree");
  });
}

template <typename T>
void fuzz_softmax_focal(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t R = integer(1, cuda ? 20 : 40), C = chance(0.2) ? integer(1, 70) : integer(1, 9);
  const FocalLoss<T> focal = any_focal<T>();
  const std::vector<T> x = stored(numbers<T>(R * C, chance(0.2) ? 1e4 : 6, nasty)), grad = stored(numbers<T>(R, 1, false));
  std::vector<int64_t> labels(R);
  for (int64_t& label : labels) label = chance(0.2) ? -100 : integer(0, C - 1);
  std::vector<T> loss(R, T(7)), gradient(R * C, T(7));
  in_ranges(R, [&](int64_t begin, int64_t end) {
    softmax_focal_loss_cpu(focal, x.data(), labels.data(), C, -100, loss.data(), begin, end);
    softmax_focal_backward_cpu(focal, x.data(), labels.data(), C, -100, grad.data(), T(1), gradient.data(), begin, end);
  });
  for (int64_t r = 0; r < R && !nasty; r++) expect(loss[r] >= T(0) && loss[r] <= T(2e4), "the loss of ordinary numbers is not finite");
  if (!cuda) return;
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<S> logits = narrowed<S>(x), slope = narrowed<S>(grad);
    std::vector<S> losses(R), gradients(R * C);
    std::vector<double> partials(2 * FOCAL_PARTIALS);
    softmax_focal_loss_cuda(focal, storage, logits.data(), labels.data(), R, C, -100, Reduction::none, nullptr, losses.data(), nullptr);
    softmax_focal_backward_cuda(focal, storage, logits.data(), labels.data(), R, C, -100, Reduction::none, nullptr, slope.data(),
                                gradients.data(), nullptr);
    if (!nasty) {
      expect_close(widened(losses), loss, tolerance(1e-4), "CPU and CUDA kernels disagree");
      expect_close(widened(gradients), gradient, tolerance(1e-3), "gradients of the CPU and CUDA kernels disagree");
    }
    for (int64_t& label : labels) label = chance(0.2) ? static_cast<int64_t>(generator()) - (int64_t(1) << 31) : label;
    const int64_t counted = integer(0, R);
    softmax_focal_loss_cuda(focal, storage, logits.data(), labels.data(), R, C, -100, Reduction::mean, partials.data(), losses.data(),
                            nullptr);
    softmax_focal_backward_cuda(focal, storage, logits.data(), labels.data(), R, C, -100, Reduction::mean, &counted, slope.data(),
                                gradients.data(), nullptr);
  });
}

// Boxes [outer, inner, 4] with strides: one array's boxes may be shared by a row or by all rows, and lie apart.
struct BoxArray {
  int64_t outer, inner, size;

  BoxArray(int64_t outer_size, int64_t inner_size, int64_t shared) {
    const int64_t step = chance(0.5) ? 4 : integer(4, 8);
    inner = shared ? 0 : step;
    outer = shared == 2 ? 0 : shared ? step : inner_size * step + integer(0, 3);
    size = (outer_size - 1) * outer + (inner_size - 1) * inner + 4;
  }
};

template <typename T>
void fuzz_box_coding(bool cuda) {
  const bool nasty = chance(0.5);
  const int64_t outer = integer(1, 30), inner = chance(0.5) ? integer(1, 9) : integer(1, cuda ? 60 : 200), count = outer * inner;
  const BoxArray of_a(outer, inner, 0), of_b(outer, inner, integer(0, 2));
  const BoxRows rows = {count, inner, of_a.outer, of_a.inner, of_b.outer, of_b.inner};
  BoxCoding<T> coding = {{T(10), T(10), T(5), T(5)}, T(4.135), chance(0.5), T(integer(0, 50)), T(integer(0, 50))};
  const std::vector<T> deltas = stored(numbers<T>(of_a.size, 6, nasty)), grad = numbers<T>(4 * count, 1, false);
  std::vector<T> boxes = numbers<T>(of_b.size, 40, nasty), moved(4 * count, T(7)), slope(4 * count, T(7)), codes(4 * count, T(7));
  in_ranges(count, [&](int64_t begin, int64_t end) {
    decode_boxes_cpu(coding, rows, deltas.data(), boxes.data(), moved.data(), begin, end);
    decode_boxes_backward_cpu(coding, rows, grad.data(), deltas.data(), boxes.data(), slope.data(), begin, end);
    encode_boxes_cpu(coding, rows, deltas.data(), boxes.data(), codes.data(), begin, end);
  });
  for (int64_t i = 0; i < 4 * count && coding.bounded; i++)
    expect(!(moved[i] < T(0)) && !(moved[i] > (i % 2 ? coding.height : coding.width)), "a box outside the picture");
  if (!cuda) return;
  std::vector<T> codes_cuda(4 * count), moved_cuda(4 * count);
  encode_boxes_cuda(coding, rows, deltas.data(), boxes.data(), codes_cuda.data(), nullptr);
  expect_close(codes_cuda, codes, nasty ? 1e-4 : 1e-5, "codes of the CPU and CUDA kernels disagree");
  with_storage<T>(storage, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<S> narrow = narrowed<S>(deltas);
    std::vector<S> slope_cuda(4 * count);
    decode_boxes_cuda(coding, rows, storage, narrow.data(), boxes.data(), moved_cuda.data(), nullptr);
    decode_boxes_backward_cuda(coding, rows, storage, grad.data(), narrow.data(), boxes.data(), slope_cuda.data(), nullptr);
    expect_close(moved_cuda, moved, 1e-5, "CPU and CUDA kernels disagree");
    if (!nasty) expect_close(widened(slope_cuda), slope, tolerance(1e-5), "gradients of the CPU and CUDA kernels disagree");
  });
}

// Case `number` of the 10,000: the op, the types and the machine follow from it.
static void run_case(unsigned number) {
  seed = number;
  generator.seed(number);
  const unsigned round = number / 9;
  const bool cuda = round % 10 == 0, product = number % 9 == 8, wide = (product ? round : round / 10) % 4 == 0;
  const DType storages[] = {DType::float32, DType::float16, DType::float32, DType::bfloat16};
  storage = wide ? DType::float64 : storages[round / 80 % 4];
  int32_limit = round / 40 % 2 ? 0 : std::numeric_limits<int32_t>::max();  // both index types
#define MD_CASE(i, function)                                     \
  case i:                                                        \
    op = #function;                                              \
    return wide ? function<double>(cuda) : function<float>(cuda)
  switch (product && round % 12 == 0 ? 9 : number % 9 == 5 && round % 3 == 0 ? 10 : number % 9) {
    MD_CASE(0, fuzz_nms);
    MD_CASE(1, fuzz_roi_align);
    MD_CASE(2, fuzz_roi_pool);
    MD_CASE(3, fuzz_paste_masks);
    MD_CASE(4, fuzz_sigmoid_focal);
    MD_CASE(5, fuzz_softmax_focal);
    MD_CASE(6, fuzz_deform_conv2d);
    MD_CASE(7, fuzz_attention);
    MD_CASE(8, fuzz_product);
    MD_CASE(9, fuzz_transpose);
    MD_CASE(10, fuzz_box_coding);
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
