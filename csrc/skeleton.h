// Exact Euclidean distances in a mask, and thinning to lines one pixel wide: the C++ twin of the references in minidamage/skeleton.py.
// Sources: A. Meijster et al., A general algorithm for computing distance transforms in linear time, 2000; Z. Guo, R. Hall, Parallel
// thinning with two-subiteration algorithms, CACM 1989.
#pragma once

#include <array>

#include "rle.h"

namespace minidamage {

constexpr int64_t kLongestSide = 2 * (32767 + 2);          // a picture's, with a border, on the grid of half pixels (local_widths)

inline void check_sides(int64_t H, int64_t W) {
    if (H > kLongestSide || W > kLongestSide)
        throw std::invalid_argument("distances: expected a picture of at most 65538 pixels a side, got [" + std::to_string(H) + ", " +
                                    std::to_string(W) + "]");
}

// For each pixel of mask [H, W] the nearest pixel that is set: calls found(row, column, site row, site column), or found(row, column,
// -1, -1) where none is set. Rows run in parallel. Exact integers: columns first, then each row's lower envelope of parabolas.
template <class Found>
void nearest_sites(const uint8_t* mask, int64_t H, int64_t W, Found found) {
    check_sides(H, W);
    if (H * W == 0) return;
    std::vector<int32_t> site(H * W, -1);                  // row of the nearest set pixel in the same column
    for (int64_t y = 0; y < H; y++)
        for (int64_t x = 0; x < W; x++)
            site[y * W + x] = mask[y * W + x] ? static_cast<int32_t>(y) : y ? site[(y - 1) * W + x] : -1;
    for (int64_t y = H - 2; y >= 0; y--)
        for (int64_t x = 0; x < W; x++) {
            const int32_t below = site[(y + 1) * W + x];
            int32_t& here = site[y * W + x];
            if (below >= 0 && (here < 0 || below - y < y - here)) here = below;
        }
    threaded_chunks(H, 16, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> column(W), start(W), height(W);               // the envelope's parabolas, left to right
        for (int64_t y = begin; y < end; y++) {
            const int32_t* row = site.data() + y * W;
            int64_t n = 0;
            for (int64_t x = 0; x < W; x++) {
                if (row[x] < 0) continue;
                const int64_t g = (y - row[x]) * (y - row[x]);
                int64_t from = 0;                          // first column where this parabola is strictly below the last one
                while (n) {
                    const int64_t last = column[n - 1], above = x * x - last * last + g - height[n - 1], twice = 2 * (x - last);
                    from = (above < 0 ? -((-above + twice - 1) / twice) : above / twice) + 1;
                    if (from > start[n - 1]) break;
                    n--;
                }
                if (n && from >= W) continue;
                column[n] = x; height[n] = g; start[n] = n ? from : 0;
                n++;
            }
            for (int64_t x = 0, k = 0; x < W; x++) {
                while (k + 1 < n && start[k + 1] <= x) k++;
                if (n) found(y, x, int64_t(row[column[k]]), column[k]);
                else found(y, x, int64_t(-1), int64_t(-1));
            }
        }
    });
}

// Whether Guo and Hall's sub-iteration 0 or 1 deletes a pixel, for the 256 states of its neighbours (bit k: p2 = north, then clockwise).
inline std::array<std::array<bool, 256>, 2> guo_hall_table() {
    std::array<std::array<bool, 256>, 2> table{};
    for (int state = 0; state < 256; state++) {
        bool p[10];
        for (int k = 0; k < 8; k++) p[k + 2] = state >> k & 1;
        const int branches = (!p[2] && (p[3] || p[4])) + (!p[4] && (p[5] || p[6])) + (!p[6] && (p[7] || p[8])) + (!p[8] && (p[9] || p[2]));
        const int n1 = (p[9] || p[2]) + (p[3] || p[4]) + (p[5] || p[6]) + (p[7] || p[8]);
        const int n2 = (p[2] || p[3]) + (p[4] || p[5]) + (p[6] || p[7]) + (p[8] || p[9]);
        const int n = std::min(n1, n2);
        const bool thin = branches == 1 && n >= 2 && n <= 3;
        table[0][state] = thin && !((p[6] || p[7] || !p[9]) && p[8]);
        table[1][state] = thin && !((p[2] || p[3] || !p[5]) && p[4]);
    }
    return table;
}

// Thins mask [H, W] (0 or 1) in place. Only pixels whose neighbourhood changed within the last two sub-iterations are looked at again: the
// others would be kept again by both rules, so the result is that of whole sweeps.
inline void thin(uint8_t* mask, int64_t H, int64_t W) {
    static const auto table = guo_hall_table();
    const int64_t stride = W + 2;
    std::vector<uint8_t> pixels((H + 2) * stride, 0), due((H + 2) * stride, 0);
    std::vector<int64_t> waiting, deleted, next;
    for (int64_t y = 0; y < H; y++)
        for (int64_t x = 0; x < W; x++)
            if (mask[y * W + x]) {
                const int64_t at = (y + 1) * stride + x + 1;
                pixels[at] = 1; due[at] = 2;
                waiting.push_back(at);
            }
    const int64_t around[8] = {-stride, -stride + 1, 1, stride + 1, stride, stride - 1, -1, -stride - 1};
    for (int rule = 0; !waiting.empty(); rule ^= 1) {
        deleted.clear();
        for (int64_t at : waiting) {
            int state = 0;
            for (int k = 0; k < 8; k++) state |= pixels[at + around[k]] << k;
            if (table[rule][state]) deleted.push_back(at);
            due[at]--;
        }
        next.clear();
        for (int64_t at : deleted) pixels[at] = due[at] = 0;
        for (int64_t at : waiting) if (due[at]) next.push_back(at);
        for (int64_t at : deleted)
            for (int64_t step : around)
                if (pixels[at + step]) {
                    if (!due[at + step]) next.push_back(at + step);
                    due[at + step] = 2;
                }
        waiting.swap(next);
    }
    for (int64_t y = 0; y < H; y++) std::copy_n(pixels.data() + (y + 1) * stride + 1, W, mask + y * W);
}

}  // namespace minidamage
