// Components, holes, islands and outlines of run-length masks: the C++ twin of the second half of minidamage/mask_reference.py.
#pragma once

#include "rle.h"

namespace minidamage {

// Component of each segment, 0..n-1 in order of first appearance: union-find over segments that touch in neighbouring columns.
inline int32_t label_segments(const std::vector<Segment>& segments, int connectivity, std::vector<int32_t>& labels) {
    const int32_t n = static_cast<int32_t>(segments.size()), reach = connectivity == 8 ? 1 : 0;
    labels.resize(n);
    for (int32_t i = 0; i < n; i++) labels[i] = i;         // parents of the forest first, labels in the end
    auto root = [&](int32_t i) {
        while (labels[i] != i) i = labels[i] = labels[labels[i]];
        return i;
    };
    int32_t left = 0;                                      // first segment of the column before that may still touch
    for (int32_t i = 0; i < n; i++) {
        const Segment s = segments[i];
        while (left < i && (segments[left].column < s.column - 1 ||
                            (segments[left].column == s.column - 1 && segments[left].end + reach <= s.start))) left++;
        for (int32_t j = left; j < i && segments[j].column == s.column - 1 && segments[j].start < s.end + reach; j++) {
            int32_t a = root(i), b = root(j);
            labels[std::max(a, b)] = std::min(a, b);
        }
    }
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++) labels[i] = labels[i] == i ? count++ : labels[labels[i]];     // a parent comes first: it is done
    return count;
}

inline std::vector<Segment> segments_of(const Bounds& bounds, int64_t height) {
    std::vector<Segment> segments;
    segments.reserve(bounds.size() / 2 + 16);
    for_each_segment(bounds, height, [&](Segment s) { segments.push_back(s); });
    return segments;
}

inline Bounds complement(const Bounds& bounds, uint32_t total) {
    Bounds out(bounds.begin(), bounds.end());
    if (!out.empty() && out.front() == 0) out.erase(out.begin()); else out.insert(out.begin(), 0);
    if (!out.empty() && out.back() == total) out.pop_back(); else out.push_back(total);
    return out;
}

// Bounds of the segments whose component is kept.
inline Bounds bounds_of_segments(const std::vector<Segment>& segments, const std::vector<int32_t>& labels, const std::vector<uint8_t>& keep,
                                 int64_t height) {
    Bounds bounds;
    for (size_t i = 0; i < segments.size(); i++) {
        if (!keep[labels[i]]) continue;
        uint32_t base = static_cast<uint32_t>(segments[i].column * height);
        if (!bounds.empty() && bounds.back() == base + segments[i].start) bounds.pop_back();
        else bounds.push_back(base + segments[i].start);
        bounds.push_back(base + segments[i].end);
    }
    return bounds;
}

inline Bounds fill_holes(const Bounds& bounds, int64_t height, int64_t width) {
    uint32_t total = pixel_count(height, width);
    if (bounds.size() < 4) return bounds;                  // one run of foreground encloses nothing
    std::vector<Segment> segments = segments_of(complement(bounds, total), height);
    std::vector<int32_t> labels;
    int32_t count = label_segments(segments, 4, labels);
    std::vector<uint8_t> open(count, 0);
    for (size_t i = 0; i < segments.size(); i++) {
        const Segment s = segments[i];
        if (s.column == 0 || s.column == width - 1 || s.start == 0 || s.end == height) open[labels[i]] = 1;
    }
    if (std::find(open.begin(), open.end(), 0) == open.end()) return bounds;
    return complement(bounds_of_segments(segments, labels, open, height), total);
}

inline Bounds remove_islands(const Bounds& bounds, int64_t height, int64_t min_area) {
    std::vector<Segment> segments = segments_of(bounds, height);
    std::vector<int32_t> labels;
    int32_t count = label_segments(segments, 8, labels);
    std::vector<int64_t> areas(count, 0);
    for (size_t i = 0; i < segments.size(); i++) areas[labels[i]] += segments[i].end - segments[i].start;
    std::vector<uint8_t> keep(count);
    for (int32_t c = 0; c < count; c++) keep[c] = areas[c] >= min_area;
    return bounds_of_segments(segments, labels, keep, height);
}

// Bounds in row-major order of a row-major mask (rows take the place of columns): where a byte differs from the one before.
inline Bounds row_bounds(const uint8_t* mask, int64_t n) {
    Bounds bounds;
    uint8_t last = 0;
    for (int64_t i = 0; i < n;) {
        if (i + 8 <= n) {
            uint64_t word;
            std::memcpy(&word, mask + i, 8);
            if (word == (last ? 0x0101010101010101ull : 0ull)) { i += 8; continue; }
        }
        for (int64_t stop = std::min(n, i + 8); i < stop; i++)
            if (mask[i] != last) { bounds.push_back(static_cast<uint32_t>(i)); last = mask[i]; }
    }
    if (last) bounds.push_back(static_cast<uint32_t>(n));
    return bounds;
}

inline void mask_of_row_bounds(const Bounds& bounds, int64_t n, uint8_t* mask) {
    std::memset(mask, 0, n);
    for (size_t i = 0; i < bounds.size(); i += 2) std::memset(mask + bounds[i], 1, bounds[i + 1] - bounds[i]);
}

// labels [H, W], zero on entry: 1..n in raster order.
inline int32_t label_components(const uint8_t* mask, int64_t H, int64_t W, int connectivity, int32_t* labels) {
    std::vector<Segment> segments = segments_of(row_bounds(mask, H * W), W);
    std::vector<int32_t> of_segment;
    int32_t count = label_segments(segments, connectivity, of_segment);
    for (size_t i = 0; i < segments.size(); i++) {
        int32_t* row = labels + segments[i].column * W;
        std::fill(row + segments[i].start, row + segments[i].end, of_segment[i] + 1);
    }
    return count;
}

struct Ring { std::vector<double> xy; int32_t label; bool is_hole; };

// Boundaries of the mask along pixel edges, foreground on the right; at a corner shared by two pixels the walk turns left (8-connected).
inline std::vector<Ring> trace_rings(const uint8_t* mask, int64_t H, int64_t W) {
    std::vector<int32_t> labels(H * W, 0);
    label_components(mask, H, W, 8, labels.data());
    const int64_t V = W + 1;                               // vertices in a row
    std::vector<uint8_t> edges((H + 1) * V, 0), walked((H + 1) * V, 0);         // bit h: an edge leaves this vertex with heading h
    auto pixel = [&](int64_t y, int64_t x) { return y >= 0 && y < H && x >= 0 && x < W && mask[y * W + x]; };
    for (int64_t y = 0; y <= H; y++)
        for (int64_t x = 0; x <= W; x++) {
            bool nw = pixel(y - 1, x - 1), ne = pixel(y - 1, x), sw = pixel(y, x - 1), se = pixel(y, x);
            edges[y * V + x] = (se && !ne) | (sw && !se) << 1 | (nw && !sw) << 2 | (ne && !nw) << 3;       // east, south, west, north
        }
    const int64_t step_x[4] = {1, 0, -1, 0}, step_y[4] = {0, 1, 0, -1};
    std::vector<Ring> rings;
    for (int64_t vertex = 0; vertex < (H + 1) * V; vertex++)
        for (int first = 0; first < 4; first++) {
            if (!(edges[vertex] >> first & 1) || (walked[vertex] >> first & 1)) continue;
            int64_t x = vertex % V, y = vertex / V;
            Ring ring;
            ring.label = labels[(y - (first >= 2)) * W + x - (first == 1 || first == 2)];
            double doubled_area = 0;
            for (int heading = first; !(walked[y * V + x] >> heading & 1);) {
                walked[y * V + x] |= 1 << heading;
                int64_t last_x = x, last_y = y;
                x += step_x[heading];
                y += step_y[heading];
                doubled_area += double(last_x * y - x * last_y);
                int onward = (heading + 3) & 3;            // left, else straight on, else right
                while (!(edges[y * V + x] >> onward & 1)) onward = (onward + 1) & 3;
                if (onward != heading) { ring.xy.push_back(double(x)); ring.xy.push_back(double(y)); }
                heading = onward;
            }
            ring.is_hole = doubled_area < 0;
            rings.push_back(std::move(ring));
        }
    return rings;
}

}  // namespace minidamage
