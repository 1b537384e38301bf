// COCO's detection protocol: matching of detections with truths, and precision over recall. The C++ twin of minidamage/metrics/coco.py
// (read that first). Results equal pycocotools' COCOeval to the last digit: same order, same ties, same additions.
//
// What makes it fast: everything lies in flat arrays, sorted once by (category, image, decreasing score); masks are parsed in the thread
// that compares them and dropped again; pairs whose boxes or areas cannot reach the lowest threshold are never walked; the outcome of one
// detection at all thresholds is one machine word; precision is computed at true positives only, where alone its envelope can change.
#pragma once

#include <limits>

#include "rle.h"

namespace minidamage {

constexpr int kMaxThresholds = 32;                         // outcomes of a detection at all IoU thresholds fit one uint32

struct Objects {                                           // truths or detections, in the caller's order
    int64_t n = 0;
    const int32_t* image = nullptr;                        // [n], 0 .. images - 1, in the order of the image ids
    const int32_t* category = nullptr;                     // [n], 0 .. categories - 1
    const double* key = nullptr;                           // [n] detections: score; truths: not used
    const double* area = nullptr;                          // [n]; detections: nullptr = the mask's
    const uint8_t* crowd = nullptr;                        // [n] truths only
    const double* box = nullptr;                           // [n, 4] xywh, or nullptr: masks
    std::vector<Text> text;                                // [n] masks
    const int32_t* size = nullptr;                         // [n, 2] masks
};

struct Protocol {
    int64_t images, categories;
    std::vector<double> area_ranges, iou_thresholds, recall_thresholds;         // [A, 2], [T], [R]
    std::vector<int64_t> max_dets;                                              // [M] ascending
    int64_t A() const { return area_ranges.size() / 2; }
    int64_t T() const { return iou_thresholds.size(); }
    int64_t R() const { return recall_thresholds.size(); }
    int64_t M() const { return max_dets.size(); }
};

struct Result {
    std::vector<double> precision, recall, scores;         // [T, R, K, A, M], [T, K, A, M], [T, R, K, A, M]; -1: no truth
    std::vector<int32_t> dt_match;                         // [T, D] caller's order, first area range: index of the truth, -1 none
    std::vector<uint8_t> dt_ignore;                        // [T, D]
    std::vector<int32_t> dt_rank;                          // [D] place by score within picture and category
    std::vector<double> dt_iou;                            // [T, D] IoU with the matched truth
};

struct Group { int32_t category, image; int64_t gt_begin, gt_end, dt_begin, dt_end; };

// Indices sorted by (category, image), ties in the caller's order: two counting passes.
inline std::vector<int32_t> sort_by_group(const Objects& objects, int64_t images, int64_t categories) {
    std::vector<int32_t> by_image(objects.n), order(objects.n);
    std::vector<int64_t> next(images + 1, 0);
    for (int64_t i = 0; i < objects.n; i++) next[objects.image[i] + 1]++;
    for (int64_t v = 0; v < images; v++) next[v + 1] += next[v];
    for (int64_t i = 0; i < objects.n; i++) by_image[next[objects.image[i]]++] = static_cast<int32_t>(i);
    next.assign(categories + 1, 0);
    for (int64_t i = 0; i < objects.n; i++) next[objects.category[i] + 1]++;
    for (int64_t v = 0; v < categories; v++) next[v + 1] += next[v];
    for (int32_t i : by_image) order[next[objects.category[i]]++] = i;
    return order;
}

class Matcher {
public:
    Matcher(const Objects& gt, const Objects& dt, const Protocol& protocol, bool keep_matches)
        : gt_(gt), dt_(dt), p_(protocol), keep_matches_(keep_matches) {}

    Result run() {
        sort_and_group();
        match_bits_.assign(p_.A() * dt_.n, 0);
        ignore_bits_.assign(p_.A() * dt_.n, 0);
        if (keep_matches_) {
            result_.dt_match.assign(p_.T() * dt_.n, -1);
            result_.dt_ignore.assign(p_.T() * dt_.n, 0);
            result_.dt_iou.assign(p_.T() * dt_.n, 0);
        }
        threaded_chunks(static_cast<int64_t>(groups_.size()), 32, [&](int64_t begin, int64_t end) {
            Scratch scratch;
            for (int64_t i = begin; i < end; i++) match_group(groups_[i], scratch);
        });
        accumulate();
        return std::move(result_);
    }

private:
    struct Candidate { int32_t gt; double iou; };          // gt: position in the group
    struct Scratch {
        std::vector<Shape> gt_shapes;
        Shape dt_shape;
        std::vector<int64_t> runs;
        std::vector<Candidate> candidates;
        std::vector<size_t> candidate_begin;
        std::vector<double> dt_area;
        std::vector<uint8_t> gt_ignored;
        std::vector<uint32_t> taken;
    };

    void sort_and_group() {
        gt_order_ = sort_by_group(gt_, p_.images, p_.categories);
        dt_order_ = sort_by_group(dt_, p_.images, p_.categories);
        result_.dt_rank.assign(dt_.n, 0);
        auto place = [](const Objects& o, int32_t i) { return std::pair<int32_t, int32_t>(o.category[i], o.image[i]); };
        for (int64_t g = 0, d = 0; g < gt_.n || d < dt_.n;) {
            auto here = d == dt_.n                                                               ? place(gt_, gt_order_[g])
                        : g < gt_.n && place(gt_, gt_order_[g]) < place(dt_, dt_order_[d]) ? place(gt_, gt_order_[g])
                                                                                              : place(dt_, dt_order_[d]);
            Group group{here.first, here.second, g, g, d, d};
            while (g < gt_.n && place(gt_, gt_order_[g]) == here) g++;
            while (d < dt_.n && place(dt_, dt_order_[d]) == here) d++;
            group.gt_end = g;
            group.dt_end = d;
            groups_.push_back(group);
            auto first = dt_order_.begin() + group.dt_begin;
            std::stable_sort(first, dt_order_.begin() + d, [&](int32_t a, int32_t b) { return dt_.key[a] > dt_.key[b]; });
            for (int64_t i = group.dt_begin; i < d; i++) result_.dt_rank[dt_order_[i]] = static_cast<int32_t>(i - group.dt_begin);
        }
    }

    // Candidates of each detection: the truths that it overlaps enough for the lowest threshold, in the truths' order.
    void find_candidates(const Group& group, int64_t dets, Scratch& s) {
        const int64_t truths = group.gt_end - group.gt_begin;
        double lowest = 1;
        for (double t : p_.iou_thresholds) lowest = std::min(lowest, std::min(t, 1 - 1e-10));
        s.candidates.clear();
        s.candidate_begin.assign(1, 0);
        s.dt_area.resize(dets);
        if (!dt_.box) {
            s.gt_shapes.resize(dets ? truths : 0);
            for (size_t g = 0; g < s.gt_shapes.size(); g++) read_shape(gt_, gt_order_[group.gt_begin + g], s, s.gt_shapes[g]);
        }
        for (int64_t d = 0; d < dets; d++) {
            const int32_t i = dt_order_[group.dt_begin + d];
            if (!dt_.box && (truths || !dt_.area)) read_shape(dt_, i, s, s.dt_shape);
            s.dt_area[d] = dt_.area ? dt_.area[i] : double(s.dt_shape.area);
            for (int64_t g = 0; g < truths; g++) {
                const int32_t j = gt_order_[group.gt_begin + g];
                double iou;
                if (dt_.box) {
                    iou = box_iou_xywh(dt_.box + 4 * int64_t(i), gt_.box + 4 * int64_t(j), gt_.crowd[j]);
                } else {
                    const int32_t* size = dt_.size + 2 * int64_t(i);
                    if (!std::equal(size, size + 2, gt_.size + 2 * int64_t(j))) size_mismatch(i, j);
                    iou = mask_iou(s.dt_shape, s.gt_shapes[g], gt_.crowd[j], lowest);
                }
                if (iou >= lowest) s.candidates.push_back({static_cast<int32_t>(g), iou});
            }
            s.candidate_begin.push_back(s.candidates.size());
        }
    }

    void read_shape(const Objects& objects, int32_t i, Scratch& s, Shape& shape) {
        const int64_t height = objects.size[2 * int64_t(i)];
        parse(objects.text[i], height, objects.size[2 * int64_t(i) + 1], i, shape.bounds, s.runs);
        shape.box = box_of(shape.bounds, height);
        shape.area = area_of(shape.bounds);
    }

    [[noreturn]] void size_mismatch(int32_t i, int32_t j) {
        auto text = [](const int32_t* size) { return "[" + std::to_string(size[0]) + ", " + std::to_string(size[1]) + "]"; };
        throw std::invalid_argument("detection " + std::to_string(i) + " has a mask of size " + text(dt_.size + 2 * int64_t(i)) +
                                    ", its picture's truth " + std::to_string(j) + " one of " + text(gt_.size + 2 * int64_t(j)) +
                                    " (height, width); write masks in the pixels of the original picture");
    }

    void match_group(const Group& group, Scratch& s) {
        const int64_t dets = std::min(group.dt_end - group.dt_begin, p_.max_dets.back()), truths = group.gt_end - group.gt_begin;
        if (dets == 0) return;
        find_candidates(group, dets, s);
        s.gt_ignored.resize(truths);
        for (int64_t a = 0; a < p_.A(); a++) {
            const double low = p_.area_ranges[2 * a], high = p_.area_ranges[2 * a + 1];
            for (int64_t g = 0; g < truths; g++) {
                const int32_t j = gt_order_[group.gt_begin + g];
                s.gt_ignored[g] = gt_.crowd[j] || gt_.area[j] < low || gt_.area[j] > high;
            }
            s.taken.assign(truths, 0);
            for (int64_t d = 0; d < dets; d++) match_detection(group, a, d, s.dt_area[d] < low || s.dt_area[d] > high, s);
        }
    }

    // Sets the detection's outcome at each threshold. A free truth that counts is preferred over an ignored one whatever the IoU;
    // among equals the later truth wins (COCO's rule: a better *or equal* IoU replaces).
    void match_detection(const Group& group, int64_t a, int64_t d, bool out_of_range, Scratch& s) {
        uint32_t matched = 0, ignored = 0;
        const size_t begin = s.candidate_begin[d], end = s.candidate_begin[d + 1];
        const int64_t place = group.dt_begin + d;
        for (int64_t t = 0; begin != end && t < p_.T(); t++) {
            const uint32_t bit = 1u << t;
            double best_iou = std::min(p_.iou_thresholds[t], 1 - 1e-10);
            int32_t best = -1;
            for (int pass = 0; pass < 2 && best < 0; pass++)
                for (size_t c = begin; c < end; c++) {
                    const Candidate& candidate = s.candidates[c];
                    if (s.gt_ignored[candidate.gt] != pass || candidate.iou < best_iou) continue;
                    if ((s.taken[candidate.gt] & bit) && !gt_.crowd[gt_order_[group.gt_begin + candidate.gt]]) continue;
                    best_iou = candidate.iou;
                    best = candidate.gt;
                }
            if (best < 0) continue;
            matched |= bit;
            if (s.gt_ignored[best]) ignored |= bit;
            s.taken[best] |= bit;
            if (keep_matches_ && a == 0) {
                const int64_t out = t * dt_.n + dt_order_[place];
                result_.dt_match[out] = gt_order_[group.gt_begin + best];
                result_.dt_iou[out] = best_iou;
            }
        }
        if (out_of_range) ignored |= ~matched;
        match_bits_[a * dt_.n + place] = matched;
        ignore_bits_[a * dt_.n + place] = ignored;
        if (keep_matches_ && a == 0)
            for (int64_t t = 0; t < p_.T(); t++) result_.dt_ignore[t * dt_.n + dt_order_[place]] = ignored >> t & 1;
    }

    // Precision over recall of one category: its detections of all pictures by decreasing score, ties in picture order.
    void accumulate() {
        const int64_t T = p_.T(), R = p_.R(), K = p_.categories, A = p_.A(), M = p_.M();
        result_.precision.assign(T * R * K * A * M, -1);
        result_.scores.assign(T * R * K * A * M, -1);
        result_.recall.assign(T * K * A * M, -1);
        std::vector<int64_t> gt_begin(K + 1, 0), dt_begin(K + 1, 0);
        for (int64_t i = 0; i < gt_.n; i++) gt_begin[gt_.category[i] + 1]++;
        for (int64_t i = 0; i < dt_.n; i++) dt_begin[dt_.category[i] + 1]++;
        for (int64_t k = 0; k < K; k++) { gt_begin[k + 1] += gt_begin[k]; dt_begin[k + 1] += dt_begin[k]; }
        by_score_.resize(dt_.n);
        threaded_chunks(K, 1, [&](int64_t k, int64_t) {
            for (int64_t i = dt_begin[k]; i < dt_begin[k + 1]; i++) by_score_[i] = static_cast<int32_t>(i);
            std::stable_sort(by_score_.begin() + dt_begin[k], by_score_.begin() + dt_begin[k + 1],
                             [&](int32_t a, int32_t b) { return dt_.key[dt_order_[a]] > dt_.key[dt_order_[b]]; });
        });
        threaded_chunks(K * A * M, 1, [&](int64_t index, int64_t) {
            const int64_t k = index / (A * M), a = index / M % A, m = index % M;
            int64_t positives = 0;
            for (int64_t i = gt_begin[k]; i < gt_begin[k + 1]; i++) {
                const int32_t j = gt_order_[i];
                positives += !(gt_.crowd[j] || gt_.area[j] < p_.area_ranges[2 * a] || gt_.area[j] > p_.area_ranges[2 * a + 1]);
            }
            if (positives) curve(k, a, m, dt_begin[k], dt_begin[k + 1], positives);
        });
    }

    void curve(int64_t k, int64_t a, int64_t m, int64_t begin, int64_t end, int64_t positives) {
        const int64_t T = p_.T(), R = p_.R(), K = p_.categories, A = p_.A(), M = p_.M();
        std::vector<int32_t> kept;                         // places of the detections that count at this limit, by decreasing score
        kept.reserve(end - begin);
        for (int64_t i = begin; i < end; i++)
            if (result_.dt_rank[dt_order_[by_score_[i]]] < p_.max_dets[m]) kept.push_back(by_score_[i]);
        std::vector<int32_t> at;                           // true positives: place, and precision there
        std::vector<double> precision;
        for (int64_t t = 0; t < T; t++) {
            at.clear();
            precision.clear();
            int64_t tp = 0, fp = 0;
            for (int32_t place : kept) {
                if (ignore_bits_[a * dt_.n + place] >> t & 1) continue;
                if (match_bits_[a * dt_.n + place] >> t & 1) {
                    tp++;
                    at.push_back(place);
                    precision.push_back(double(tp) / (double(fp + tp) + std::numeric_limits<double>::epsilon()));
                } else {
                    fp++;
                }
            }
            for (int64_t i = tp - 1; i > 0; i--) precision[i - 1] = std::max(precision[i - 1], precision[i]);
            result_.recall[((t * K + k) * A + a) * M + m] = double(tp) / double(positives);
            for (int64_t r = 0, i = 0; r < R; r++) {       // i: true positives before the first place whose recall reaches the threshold
                while (i < tp && double(i) / double(positives) < p_.recall_thresholds[r]) i++;
                const int64_t out = (((t * R + r) * K + k) * A + a) * M + m;
                const bool reached = double(i) / double(positives) >= p_.recall_thresholds[r] && !kept.empty();
                if (!reached) { result_.precision[out] = result_.scores[out] = 0; continue; }
                // Recall 0 is reached at the very first detection, whatever it is; from there on the best precision is that from the first
                // true positive on.
                result_.precision[out] = tp == 0 ? 0 : precision[i ? i - 1 : 0];
                result_.scores[out] = dt_.key[dt_order_[i ? at[i - 1] : kept[0]]];
            }
        }
    }

    const Objects& gt_;
    const Objects& dt_;
    const Protocol& p_;
    const bool keep_matches_;
    std::vector<int32_t> gt_order_, dt_order_, by_score_;
    std::vector<Group> groups_;
    std::vector<uint32_t> match_bits_, ignore_bits_;       // [A, D] in sorted order; bit t: matched / ignored at IoU threshold t
    Result result_;
};

}  // namespace minidamage
