// Every CPU kernel and every CUDA kernel (emulated), under AddressSanitizer and UndefinedBehaviorSanitizer, on small and nasty
// inputs. Exits 0 when nothing was found. Values are compared elsewhere (test_<op>.py); here the machines must merely agree
// where that is cheap. Each op has one function; add the next one's below and to main().
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "nms.h"

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
  nms_cuda<T>(sorted.data(), grouped ? sorted_idxs.data() : nullptr, nullptr, groups.by_score.data(), m, iou_threshold, max_keep, mask.data(),
              removed.data(), keep.data(), &count, nullptr);
  keep.resize(count);
  expect(keep == expected, "nms: CPU and CUDA kernels disagree");
}

int main() {
  for (int64_t n : {1, 2, 63, 65, 200})
    for (double threshold : {0.0, 0.5, -1.0})
      for (bool grouped : {false, true}) {
        check_nms<float>(n, threshold, n, grouped);
        check_nms<double>(n, threshold, n / 2, grouped);
      }
  check_nms<float>(5200, 0.3, 900, true);  // more rows than the mask holds at a time
  std::puts("clean");
}
