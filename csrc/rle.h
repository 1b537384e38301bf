// Masks as run lengths: the C++ twin of minidamage/mask_reference.py (read that first; the rules and names are the same).
//
// A mask is a sorted list of bounds: start, end, start, end, ... of its foreground, walking the picture column by column
// (position = x * height + y). No bound occurs twice, so equal masks have equal bounds and equal texts.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace minidamage {

using Bounds = std::vector<uint32_t>;

struct Text { const char* data; size_t length; };          // compressed counts, borrowed
struct Box { int64_t x0, y0, x1, y1; };                    // outer corners
struct Segment { int32_t column, start, end; };            // foreground of one column: start <= y < end

// ---- threads ---------------------------------------------------------------------------------------------------------------------

inline int thread_count() {
    const char* set = std::getenv("OMP_NUM_THREADS");      // the one knob people know; torch listens to it too
    int n = set ? std::atoi(set) : 0;
    if (n < 1) n = static_cast<int>(std::thread::hardware_concurrency());
    return std::max(1, std::min(n, 32));
}

// Calls work(begin, end) over chunks of [0, n); a thread takes the next chunk when it is free. The first exception is rethrown.
template <class Work>
void threaded_chunks(int64_t n, int64_t chunk, Work work) {
    int64_t chunks = (n + chunk - 1) / chunk;
    int threads = static_cast<int>(std::min<int64_t>(thread_count(), chunks));
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
    auto run = [&] {
        try {
            for (int64_t c; (c = next.fetch_add(1)) < chunks;) work(c * chunk, std::min(n, (c + 1) * chunk));
        } catch (...) {
            std::lock_guard<std::mutex> guard(error_lock);
            if (!error) error = std::current_exception();
            next = chunks;
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) {
        try { others.emplace_back(run); } catch (const std::system_error&) { break; }   // no more threads to be had: go on with these
    }
    run();
    for (auto& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

// ---- text ------------------------------------------------------------------------------------------------------------------------

inline uint32_t pixel_count(int64_t height, int64_t width) {
    const bool one_line = height > INT32_MAX || width > INT32_MAX;   // a Segment holds int32
    if (height < 0 || width < 0 || one_line || (width > 0 && height > int64_t(UINT32_MAX - 1) / width))
        throw std::invalid_argument("RLE: a picture has fewer than 2^32 pixels, and 2^31 a side, got size [" + std::to_string(height) +
                                    ", " + std::to_string(width) + "]");
    return static_cast<uint32_t>(height * width);
}

// Bounds of a compressed text; `index` is for the message only. Scratch `runs` keeps its memory between calls.
inline void parse(Text text, int64_t height, int64_t width, int64_t index, Bounds& bounds, std::vector<int64_t>& runs) {
    const unsigned char* p = reinterpret_cast<const unsigned char*>(text.data);
    const unsigned char* stop = p + text.length;
    const int64_t total = pixel_count(height, width);
    runs.clear();
    int64_t sum = 0;
    bool negative = false;
    while (p < stop) {
        int64_t value = 0;
        int shift = 0;
        unsigned group;
        do {
            if (p == stop) throw std::invalid_argument("RLE counts: the last number is cut off; the text was shortened");
            group = *p++ - 48u;
            if (group > 63 || shift > 55)
                throw std::invalid_argument("RLE counts: expected characters '0'..'o', got code " + std::to_string(p[-1]) +
                                            "; is this another encoding of the mask?");
            value |= int64_t(group & 31) << shift;
            shift += 5;
        } while (group & 32);
        if (group & 16) value -= int64_t(1) << shift;
        if (runs.size() > 2) value += runs[runs.size() - 2];
        negative |= value < 0 || value > total;
        if (negative) value = 0;                           // keeps the sums below from overflowing; refused after the loop
        runs.push_back(value);
        sum += value;
    }
    if (sum != total || negative) {
        const std::string got = negative ? "no valid number of" : std::to_string(sum);
        throw std::invalid_argument("RLE " + std::to_string(index) + ": its runs add up to " + got + " pixels, expected height * width = " +
                                    std::to_string(height) + " * " + std::to_string(width) + " = " + std::to_string(total) +
                                    "; the size or the counts belong to another picture");
    }
    bounds.clear();
    int64_t position = 0;
    for (size_t j = 0; j + 1 < runs.size(); j++) {
        position += runs[j];
        if (!bounds.empty() && bounds.back() == position) bounds.pop_back();    // an empty run between: the value does not change
        else bounds.push_back(static_cast<uint32_t>(position));
    }
    if (bounds.size() % 2) {
        if (bounds.back() == total) bounds.pop_back();
        else bounds.push_back(static_cast<uint32_t>(total));
    }
}

inline Bounds parse(Text text, int64_t height, int64_t width, int64_t index = 0) {
    Bounds bounds;
    std::vector<int64_t> runs;
    parse(text, height, width, index, bounds, runs);
    return bounds;
}

inline std::string compress(const std::vector<int64_t>& runs) {
    std::string text;
    text.reserve(runs.size() * 2);
    for (size_t i = 0; i < runs.size(); i++) {
        int64_t value = runs[i] - (i > 2 ? runs[i - 2] : 0);
        for (bool more = true; more;) {
            int group = static_cast<int>(value & 31);
            value >>= 5;
            more = value != (group & 16 ? -1 : 0);
            text.push_back(static_cast<char>(48 + group + (more ? 32 : 0)));
        }
    }
    return text;
}

inline std::string text_of(const Bounds& bounds, uint32_t total) {
    std::vector<int64_t> runs;
    runs.reserve(bounds.size() + 1);
    int64_t last = 0;
    for (uint32_t bound : bounds) {
        runs.push_back(bound - last);
        last = bound;
    }
    if (last < total || bounds.empty()) runs.push_back(total - last);
    return compress(runs);
}

// ---- dense -----------------------------------------------------------------------------------------------------------------------

// Bounds of a row-major mask [H, W] of zeros and ones. Compares each row with the one above eight pixels at a time, so the picture is
// read once in memory order; the few changes are then sorted by column. (Walking columns of a wide picture misses the cache at each pixel.)
inline Bounds bounds_of_mask(const uint8_t* mask, int64_t H, int64_t W) {
    std::vector<std::pair<uint32_t, uint32_t>> changes;    // (x, y): pixel (y, x) differs from (y - 1, x)
    std::vector<uint8_t> zeros(W, 0);
    std::vector<uint32_t> column_begin(W + 1, 0);
    for (int64_t y = 0; y < H; y++) {
        const uint8_t* row = mask + y * W;
        const uint8_t* above = y ? row - W : zeros.data();
        auto look = [&](int64_t x) {
            if (row[x] != above[x]) {
                changes.emplace_back(static_cast<uint32_t>(x), static_cast<uint32_t>(y));
                column_begin[x + 1]++;
            }
        };
        int64_t x = 0;
        for (; x + 8 <= W; x += 8) {
            uint64_t a, b;
            std::memcpy(&a, row + x, 8);
            std::memcpy(&b, above + x, 8);
            if (a != b) for (int64_t i = x; i < x + 8; i++) look(i);
        }
        for (; x < W; x++) look(x);
    }
    for (int64_t x = 0; x < W; x++) column_begin[x + 1] += column_begin[x];
    std::vector<uint32_t> rows(changes.size()), next(column_begin.begin(), column_begin.end() - 1);
    for (auto [x, y] : changes) rows[next[x]++] = y;
    Bounds bounds;
    bounds.reserve(changes.size() + 2);
    auto toggle = [&](uint32_t position) {
        if (!bounds.empty() && bounds.back() == position) bounds.pop_back();
        else bounds.push_back(position);
    };
    for (int64_t x = 0; x < W; x++) {
        for (uint32_t i = column_begin[x]; i < column_begin[x + 1]; i++) toggle(static_cast<uint32_t>(x * H + rows[i]));
        if ((column_begin[x + 1] - column_begin[x]) % 2) toggle(static_cast<uint32_t>((x + 1) * H));
    }
    return bounds;
}

template <class Visit>
void for_each_segment(const Bounds& bounds, int64_t height, Visit visit) {
    for (size_t i = 0; i + 1 < bounds.size(); i += 2) {
        int64_t start = bounds[i], end = bounds[i + 1];
        for (int64_t column = start / height; start < end; column++) {
            int64_t top = column * height, stop = std::min(end, top + height);
            visit(Segment{static_cast<int32_t>(column), static_cast<int32_t>(start - top), static_cast<int32_t>(stop - top)});
            start = stop;
        }
    }
}

inline Box box_of(const Bounds& bounds, int64_t height) {
    if (bounds.empty()) return {0, 0, 0, 0};
    Box box{bounds.front() / height, height, (bounds.back() - 1) / height + 1, 0};
    for (size_t i = 0; i < bounds.size(); i += 2) {
        int64_t x = bounds[i] / height, y0 = bounds[i] - x * height, y1 = bounds[i + 1] - x * height;
        if (y1 > height) { y0 = 0; y1 = height; }          // runs on into the next column
        box.y0 = std::min(box.y0, y0);
        box.y1 = std::max(box.y1, y1);
    }
    return box;
}

inline int64_t area_of(const Bounds& bounds) {
    int64_t area = 0;
    for (size_t i = 0; i + 1 < bounds.size(); i += 2) area += bounds[i + 1] - bounds[i];
    return area;
}

// Row-major mask [H, W] from bounds; `mask` is zero on entry. Marks where each column changes, then xors each row into the next.
inline void mask_of_bounds(const Bounds& bounds, int64_t H, int64_t W, uint8_t* mask) {
    Box box = box_of(bounds, H);
    for_each_segment(bounds, H, [&](Segment s) {
        mask[s.start * W + s.column] ^= 1;
        if (s.end < H) mask[s.end * W + s.column] ^= 1;
    });
    for (int64_t y = box.y0 + 1; y <= std::min(box.y1, H - 1); y++) {
        const uint8_t* above = mask + (y - 1) * W;
        uint8_t* row = mask + y * W;
        for (int64_t x = box.x0; x < box.x1; x++) row[x] ^= above[x];
    }
}

// ---- polygons --------------------------------------------------------------------------------------------------------------------

inline Bounds bounds_of_toggles(std::vector<uint32_t>& toggles, uint32_t total) {
    std::sort(toggles.begin(), toggles.end());
    Bounds bounds;
    for (uint32_t position : toggles) {
        if (position >= total) break;
        if (!bounds.empty() && bounds.back() == position) bounds.pop_back();
        else bounds.push_back(position);
    }
    if (bounds.size() % 2) bounds.push_back(total);
    return bounds;
}

constexpr int kUpsample = 5;                               // COCO's fine grid

// Appends the positions where the outline of a ring xy [P, 2] crosses pixel-centre columns: mask_reference.column_crossings, without
// drawing the outline. An edge is visited once for each centre that it crosses, so a far point costs nothing. Edges along x: the fine
// points around the centre. Edges along y: the step that crosses it, solved for, then corrected for rounding by testing its neighbours.
inline void column_crossings(const double* xy, int64_t P, int64_t height, int64_t width, std::vector<uint32_t>& toggles) {
    auto fine = [](double c) { return static_cast<int64_t>(kUpsample * c + 0.5); };
    auto cross = [&](int64_t column, int64_t row) {        // column = 5 x + 2
        double y = std::ceil(std::min(std::max((row + 0.5) / kUpsample - 0.5, 0.0), double(height)));
        toggles.push_back(static_cast<uint32_t>((column - 2) / kUpsample * height + static_cast<int64_t>(y)));
    };
    for (int64_t i = 0; i < P; i++) {
        int64_t n = i + 1 < P ? i + 1 : 0;
        int64_t xs = fine(xy[2 * i]), ys = fine(xy[2 * i + 1]), xe = fine(xy[2 * n]), ye = fine(xy[2 * n + 1]);
        const int64_t dx = std::abs(xe - xs), dy = std::abs(ye - ys), left = std::min(xs, xe), right = std::max(xs, xe);
        const int64_t first = left <= 2 ? 2 : (left - 2 + kUpsample - 1) / kUpsample * kUpsample + 2;
        const int64_t last = std::min(right - 1, (width - 1) * kUpsample + 2);
        if (dx >= dy) {
            if (xs > xe) { std::swap(xs, xe); std::swap(ys, ye); }
            const double slope = double(ye - ys) / double(dx);
            auto v = [&](int64_t u) { return static_cast<int64_t>(ys + slope * (u - xs) + 0.5); };
            for (int64_t u = first; u <= last; u += kUpsample) cross(u, std::min(v(u), v(u + 1)));
        } else {
            if (ys > ye) { std::swap(xs, xe); std::swap(ys, ye); }
            const double slope = double(xe - xs) / double(dy);
            auto is_past = [&](int64_t t, int64_t u) {     // after t steps the edge has crossed from u to u + 1, or back
                int64_t at = static_cast<int64_t>(xs + slope * t + 0.5);
                return slope > 0 ? at > u : at <= u;
            };
            for (int64_t u = first; u <= last; u += kUpsample) {
                int64_t t = std::min(std::max<int64_t>(static_cast<int64_t>((u + 0.5 - xs) / slope), 1), dy);
                while (t > 1 && is_past(t - 1, u)) t--;
                while (!is_past(t, u)) t++;
                cross(u, ys + t - 1);
            }
        }
    }
}

// ---- set algebra -----------------------------------------------------------------------------------------------------------------

inline Bounds merge(const Bounds& a, const Bounds& b, bool intersect) {
    Bounds out;
    out.reserve(a.size() + b.size());
    size_t i = 0, j = 0;
    bool inside = false;
    while (i < a.size() || j < b.size()) {
        uint32_t position = j >= b.size() || (i < a.size() && a[i] < b[j]) ? a[i] : b[j];
        if (i < a.size() && a[i] == position) i++;
        if (j < b.size() && b[j] == position) j++;
        bool now = intersect ? (i % 2 && j % 2) : (i % 2 || j % 2);
        if (now != inside) out.push_back(position);
        inside = now;
    }
    return out;
}

struct Shape { Bounds bounds; Box box; int64_t area; };

inline Shape shape_of(Bounds bounds, int64_t height) {
    Box box = box_of(bounds, height);
    int64_t area = area_of(bounds);
    return {std::move(bounds), box, area};
}

inline int64_t box_overlap(const Box& a, const Box& b) {
    int64_t w = std::min(a.x1, b.x1) - std::max(a.x0, b.x0), h = std::min(a.y1, b.y1) - std::max(a.y0, b.y0);
    return w > 0 && h > 0 ? w * h : 0;
}

// Pixels in both. Skips by bisection to the first run that can overlap, then walks the foreground of both, never the background.
inline int64_t intersection(const Bounds& a, const Bounds& b) {
    if (a.empty() || b.empty()) return 0;
    auto skip = [](const Bounds& bounds, uint32_t position) {                   // first run that ends after position
        size_t bound = std::upper_bound(bounds.begin(), bounds.end(), position) - bounds.begin();
        return bound & ~size_t(1);
    };
    size_t i = skip(a, b[0]), j = skip(b, a[0]);
    int64_t pixels = 0;
    while (i < a.size() && j < b.size()) {
        uint32_t start = std::max(a[i], b[j]), end_a = a[i + 1], end_b = b[j + 1], end = std::min(end_a, end_b);
        if (end > start) pixels += end - start;
        i += end_a <= end_b ? 2 : 0;
        j += end_b <= end_a ? 2 : 0;
    }
    return pixels;
}

// IoU of a detection with a truth; crowd: over the detection's own area. `at_least`: a value below may come back as 0, which lets the areas
// and the boxes alone rule out most pairs (at_least = 0 rules out nothing but disjoint boxes).
inline double mask_iou(const Shape& dt, const Shape& gt, bool crowd, double at_least = 0) {
    double most = double(std::min({box_overlap(dt.box, gt.box), dt.area, gt.area}));
    if (most <= 0) return 0;
    double smallest_union = crowd ? double(dt.area) : double(dt.area + gt.area) - most;
    if (most < at_least * 0.999999 * smallest_union) return 0;                  // a hair below: rounding never drops a true match
    int64_t both = intersection(dt.bounds, gt.bounds);
    int64_t either = crowd ? dt.area : dt.area + gt.area - both;
    return both ? double(both) / double(either) : 0;
}

inline double box_iou_xywh(const double* dt, const double* gt, bool crowd) {
    double w = std::min(dt[2] + dt[0], gt[2] + gt[0]) - std::max(dt[0], gt[0]);
    if (!(w > 0)) return 0;
    double h = std::min(dt[3] + dt[1], gt[3] + gt[1]) - std::max(dt[1], gt[1]);
    if (!(h > 0)) return 0;
    double dt_area = dt[2] * dt[3], gt_area = gt[2] * gt[3], both = w * h;      // built with -ffp-contract=off: no fused products
    double sum = dt_area + gt_area;
    return both / (crowd ? dt_area : sum - both);
}

}  // namespace minidamage
