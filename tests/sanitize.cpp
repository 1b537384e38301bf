// Every CPU kernel and every CUDA kernel (emulated), under AddressSanitizer and UndefinedBehaviorSanitizer, on small and nasty
// inputs. Exits 0 when nothing was found. Values are compared elsewhere (test_<op>.py); here the machines must merely agree
// where that is cheap. Each op has one function; add the next one's below and to main().
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "layout.h"
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

int main() {
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
