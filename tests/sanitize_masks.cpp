// Random masks, polygons and detections through csrc/rle.h, mask_shapes.h, skeleton.h and coco_match.h, built with ASan and UBSan by
// test_sanitizers.py. Results are checked against the plainest definition; the sanitizers look for what a wrong index would touch.
#include <cstdio>
#include <random>

#include "coco_match.h"
#include "mask_shapes.h"
#include "skeleton.h"

using namespace minidamage;

static void check(bool condition, const char* what) {
    if (!condition) {
        std::printf("failed: %s\n", what);
        std::exit(1);
    }
}

static std::mt19937 generator(0);
static int64_t number(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % (high - low + 1)); }

static std::vector<uint8_t> random_mask(int64_t H, int64_t W, int64_t density) {
    std::vector<uint8_t> mask(H * W);
    for (auto& pixel : mask) pixel = number(0, 9) < density;
    return mask;
}

static void masks_of_any_size() {
    for (int round = 0; round < 300; round++) {
        const int64_t H = number(0, 23), W = number(0, 23), density = number(0, 10);
        std::vector<uint8_t> mask = random_mask(H, W, density), again(H * W, 0);
        Bounds bounds = bounds_of_mask(mask.data(), H, W);
        std::string text = text_of(bounds, pixel_count(H, W));
        check(parse({text.data(), text.size()}, H, W) == bounds, "text");
        mask_of_bounds(bounds, H, W, again.data());
        check(again == mask, "decode");
        int64_t pixels = 0;
        for (uint8_t pixel : mask) pixels += pixel;
        check(area_of(bounds) == pixels, "area");
        std::vector<int32_t> labels(H * W, 0);
        const int32_t n = label_components(mask.data(), H, W, round % 2 ? 4 : 8, labels.data());
        for (int32_t label : labels) check(label >= 0 && label <= n, "labels");
        check(area_of(fill_holes(bounds, H, W)) >= pixels && area_of(remove_islands(bounds, H, 3)) <= pixels, "holes and islands");
        Bounds other = bounds_of_mask(random_mask(H, W, 5).data(), H, W);
        check(area_of(merge(bounds, other, true)) == intersection(bounds, other), "intersection");
        std::vector<uint32_t> toggles;
        for (Ring& ring : trace_rings(mask.data(), H, W)) column_crossings(ring.xy.data(), ring.xy.size() / 2, H, W, toggles);
        check(bounds_of_toggles(toggles, pixel_count(H, W)) == bounds, "outlines");
    }
}

static void distances_and_skeletons() {
    for (int round = 0; round < 300; round++) {
        const int64_t H = number(0, 30), W = number(0, 30);
        std::vector<uint8_t> mask = random_mask(H, W, number(0, 10)), line = mask;
        std::vector<int64_t> nearest(H * W, -2);
        nearest_sites(mask.data(), H, W, [&](int64_t y, int64_t x, int64_t row, int64_t column) {
            nearest[y * W + x] = row < 0 ? INT64_MAX : (y - row) * (y - row) + (x - column) * (x - column);
            check(row < 0 || mask[row * W + column], "a site is a set pixel");
        });
        for (int64_t at = 0; at < H * W; at++) {
            int64_t smallest = INT64_MAX;
            for (int64_t other = 0; other < H * W; other++)
                if (mask[other]) {
                    const int64_t dy = at / W - other / W, dx = at % W - other % W;
                    smallest = std::min(smallest, dy * dy + dx * dx);
                }
            check(nearest[at] == smallest, "the nearest of all");
        }
        thin(line.data(), H, W);
        std::vector<int32_t> labels(H * W, 0);
        const int32_t pieces = label_components(mask.data(), H, W, 8, labels.data());
        std::fill(labels.begin(), labels.end(), 0);
        check(label_components(line.data(), H, W, 8, labels.data()) == pieces, "thinning keeps every piece");
        for (int64_t at = 0; at < H * W; at++) check(line[at] <= mask[at], "thinning adds nothing");
    }
}

static void polygons_far_outside() {
    for (int round = 0; round < 300; round++) {
        const int64_t H = number(0, 40), W = number(0, 40), reach = round % 5 ? 60 : 3000;
        std::vector<double> xy(2 * number(0, 7));
        for (double& c : xy) c = number(-4 * reach, 4 * reach) / 4.0;
        std::vector<uint32_t> toggles;
        column_crossings(xy.data(), xy.size() / 2, H, W, toggles);
        Bounds bounds = bounds_of_toggles(toggles, pixel_count(H, W));
        check(area_of(bounds) <= H * W && bounds.size() % 2 == 0, "polygon");
    }
}

static void broken_texts() {
    int refused = 0;
    for (int round = 0; round < 2000; round++) {
        std::string text(number(0, 12), '0');
        for (char& c : text) c = static_cast<char>(number(round % 3 ? 48 : 0, round % 3 ? 111 : 255));
        try {
            parse({text.data(), text.size()}, number(0, 9), number(0, 9));
        } catch (const std::invalid_argument&) {
            refused++;
        }
    }
    check(refused > 1000, "broken texts are refused");
}

static void matching(bool with_masks) {
    for (int round = 0; round < 60; round++) {
        const int64_t images = number(1, 4), categories = number(1, 3), side = 20;
        std::vector<int32_t> image[2], category[2], size[2];
        std::vector<double> box[2], score, area[2];
        std::vector<uint8_t> crowd;
        std::vector<std::string> texts[2];
        for (int s = 0; s < 2; s++)
            for (int64_t i = number(0, s ? 300 : 30); i > 0; i--) {
                image[s].push_back(static_cast<int32_t>(number(0, images - 1)));
                category[s].push_back(static_cast<int32_t>(number(0, categories - 1)));
                for (int k = 0; k < 4; k++) box[s].push_back(double(number(0, 12)));
                area[s].push_back(double(number(0, 3000)));
                size[s].push_back(side);
                size[s].push_back(side);
                texts[s].push_back(text_of(bounds_of_mask(random_mask(side, side, number(0, 10)).data(), side, side), side * side));
                if (s) score.push_back(number(0, 9) / 10.0); else crowd.push_back(number(0, 5) == 0);
            }
        Objects objects[2];
        for (int s = 0; s < 2; s++) {
            objects[s].n = static_cast<int64_t>(image[s].size());
            objects[s].image = image[s].data();
            objects[s].category = category[s].data();
            objects[s].area = s && with_masks ? nullptr : area[s].data();
            objects[s].box = with_masks ? nullptr : box[s].data();
            objects[s].size = size[s].data();
            for (const std::string& text : texts[s]) objects[s].text.push_back({text.data(), text.size()});
        }
        objects[0].crowd = crowd.data();
        objects[1].key = score.data();
        Protocol protocol{images, categories, {0, 1e10, 0, 1024}, {0.5, 0.75, 0.95}, {0, 0.5, 1}, {1, 10, 100}};
        Result result = Matcher(objects[0], objects[1], protocol, true).run();
        for (double value : result.precision) check(value >= -1 && value <= 1, "precision");
        for (int32_t match : result.dt_match) check(match >= -1 && match < objects[0].n, "match");
    }
}

int main() {
    masks_of_any_size();
    distances_and_skeletons();
    polygons_far_outside();
    broken_texts();
    matching(false);
    matching(true);
    std::puts("ok");
    return 0;
}
