// The Python face (pybind11, no torch) of run-length masks, their shapes, distances and skeletons, and COCO matching. Rules: rle.h,
// mask_shapes.h, skeleton.h, coco_match.h. masks.py, skeleton.py and metrics/coco.py call these functions and check the user's input first;
// what protects memory is checked again here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "coco_match.h"
#include "mask_shapes.h"
#include "rle.h"
#include "skeleton.h"

namespace py = pybind11;
using namespace minidamage;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

static void expect(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// Borrowed pointers into a list of bytes; the list must outlive them.
static std::vector<Text> texts_of(const py::list& counts) {
    std::vector<Text> texts;
    texts.reserve(counts.size());
    for (py::handle item : counts) {
        char* data;
        Py_ssize_t length;
        if (PyBytes_AsStringAndSize(item.ptr(), &data, &length) != 0) throw py::error_already_set();
        texts.push_back({data, static_cast<size_t>(length)});
    }
    return texts;
}

static py::list bytes_of(const std::vector<std::string>& texts) {
    py::list out(texts.size());
    for (size_t i = 0; i < texts.size(); i++) out[i] = py::bytes(texts[i]);
    return out;
}

template <class T>
static py::array_t<T> array_of(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
    auto* owned = new std::vector<T>(std::move(values));
    py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(shape, owned->data(), owner);
}

// Bounds of each text, in parallel. sizes: [N, 2].
static std::vector<Bounds> bounds_of(const std::vector<Text>& texts, const int64_t* sizes) {
    std::vector<Bounds> all(texts.size());
    threaded_chunks(static_cast<int64_t>(texts.size()), 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) all[i] = parse(texts[i], sizes[2 * i], sizes[2 * i + 1], i);
    });
    return all;
}

static const int64_t* checked_sizes(const Array<int64_t>& sizes, size_t n) {
    expect(sizes.ndim() == 2 && sizes.shape(0) == static_cast<py::ssize_t>(n) && sizes.shape(1) == 2, "sizes: expected [N, 2]");
    return sizes.data();
}

static const uint8_t* checked_stack(const Array<uint8_t>& stack) {
    expect(stack.ndim() == 3, "expected a stack [N, H, W]");
    pixel_count(stack.shape(1), stack.shape(2));
    return stack.data();
}

// ---- masks -----------------------------------------------------------------------------------------------------------------------

static py::list encode(const Array<uint8_t>& stack) {
    const uint8_t* data = checked_stack(stack);
    const int64_t N = stack.shape(0), H = stack.shape(1), W = stack.shape(2);
    std::vector<std::string> out(N);
    {
        py::gil_scoped_release release;
        threaded_chunks(N, 1, [&](int64_t i, int64_t) { out[i] = text_of(bounds_of_mask(data + i * H * W, H, W), pixel_count(H, W)); });
    }
    return bytes_of(out);
}

static py::array_t<uint8_t> decode(const py::list& counts, int64_t H, int64_t W) {
    std::vector<Text> texts = texts_of(counts);
    const int64_t N = static_cast<int64_t>(texts.size()), total = pixel_count(H, W);
    py::array_t<uint8_t> out({N, H, W});
    uint8_t* data = out.mutable_data();
    py::gil_scoped_release release;
    threaded_chunks(N, 1, [&](int64_t i, int64_t) {
        std::memset(data + i * total, 0, total);
        mask_of_bounds(parse(texts[i], H, W, i), H, W, data + i * total);
    });
    return out;
}

static py::bytes compress_runs(const std::vector<int64_t>& runs) { return py::bytes(compress(runs)); }

static py::bytes from_polygons(const std::vector<Array<double>>& rings, int64_t H, int64_t W, bool even_odd) {
    const uint32_t total = pixel_count(H, W);
    std::vector<uint32_t> toggles;
    Bounds bounds;
    for (const Array<double>& ring : rings) {
        expect(ring.ndim() == 2 && ring.shape(1) == 2, "ring: expected [P, 2]");
        const double* xy = ring.data();
        expect(std::all_of(xy, xy + ring.size(), [](double c) { return std::abs(c) <= 1e9; }), "ring: expected points within 1e9 pixels");
        column_crossings(ring.data(), ring.shape(0), H, W, toggles);
        if (even_odd) continue;                            // all rings' crossings in one list: even-odd
        Bounds one = bounds_of_toggles(toggles, total);
        bounds = bounds.empty() ? std::move(one) : merge(bounds, one, false);
        toggles.clear();
    }
    if (even_odd) bounds = bounds_of_toggles(toggles, total);
    return py::bytes(text_of(bounds, total));
}

static py::bytes merge_all(const py::list& counts, int64_t H, int64_t W, bool intersect) {
    std::vector<Text> texts = texts_of(counts);
    expect(!texts.empty(), "merge: expected at least one mask");
    Bounds bounds = parse(texts[0], H, W, 0);
    for (size_t i = 1; i < texts.size(); i++) bounds = merge(bounds, parse(texts[i], H, W, i), intersect);
    return py::bytes(text_of(bounds, pixel_count(H, W)));
}

static py::array_t<int64_t> area(const py::list& counts, const Array<int64_t>& sizes) {
    std::vector<Text> texts = texts_of(counts);
    const int64_t* size = checked_sizes(sizes, texts.size());
    std::vector<int64_t> out(texts.size());
    {
        py::gil_scoped_release release;
        std::vector<Bounds> all = bounds_of(texts, size);
        for (size_t i = 0; i < all.size(); i++) out[i] = area_of(all[i]);
    }
    const py::ssize_t n = out.size();
    return array_of(std::move(out), {n});
}

static py::array_t<double> boxes(const py::list& counts, const Array<int64_t>& sizes) {
    std::vector<Text> texts = texts_of(counts);
    const int64_t* size = checked_sizes(sizes, texts.size());
    std::vector<double> out(4 * texts.size());
    {
        py::gil_scoped_release release;
        std::vector<Bounds> all = bounds_of(texts, size);
        for (size_t i = 0; i < all.size(); i++) {
            Box box = box_of(all[i], size[2 * i]);
            out[4 * i] = double(box.x0); out[4 * i + 1] = double(box.y0); out[4 * i + 2] = double(box.x1); out[4 * i + 3] = double(box.y1);
        }
    }
    const py::ssize_t n = out.size() / 4;
    return array_of(std::move(out), {n, 4});
}

static py::array_t<double> iou(const py::list& dt, const Array<int64_t>& dt_sizes, const py::list& gt, const Array<int64_t>& gt_sizes,
                               const Array<uint8_t>& crowd) {
    std::vector<Text> dt_texts = texts_of(dt), gt_texts = texts_of(gt);
    const int64_t D = dt_texts.size(), G = gt_texts.size();
    const int64_t *dt_size = checked_sizes(dt_sizes, D), *gt_size = checked_sizes(gt_sizes, G);
    expect(crowd.ndim() == 1 && crowd.shape(0) == G, "crowd: expected [G]");
    py::array_t<double> out({D, G});
    double* ious = out.mutable_data();
    const uint8_t* is_crowd = crowd.data();
    py::gil_scoped_release release;
    std::vector<Bounds> dt_bounds = bounds_of(dt_texts, dt_size), gt_bounds = bounds_of(gt_texts, gt_size);
    std::vector<Shape> gt_shapes(G);
    for (int64_t g = 0; g < G; g++) gt_shapes[g] = shape_of(std::move(gt_bounds[g]), gt_size[2 * g]);
    threaded_chunks(D, 8, [&](int64_t begin, int64_t end) {
        for (int64_t d = begin; d < end; d++) {
            Shape shape = shape_of(std::move(dt_bounds[d]), dt_size[2 * d]);
            for (int64_t g = 0; g < G; g++) ious[d * G + g] = mask_iou(shape, gt_shapes[g], is_crowd[g]);
        }
    });
    return out;
}

// ---- shapes ----------------------------------------------------------------------------------------------------------------------

template <class Change>
static py::list change_texts(const py::list& counts, const Array<int64_t>& sizes, Change change) {
    std::vector<Text> texts = texts_of(counts);
    const int64_t* size = checked_sizes(sizes, texts.size());
    std::vector<std::string> out(texts.size());
    {
        py::gil_scoped_release release;
        threaded_chunks(static_cast<int64_t>(texts.size()), 1, [&](int64_t i, int64_t) {
            const int64_t H = size[2 * i], W = size[2 * i + 1];
            out[i] = text_of(change(parse(texts[i], H, W, i), H, W), pixel_count(H, W));
        });
    }
    return bytes_of(out);
}

// Dense masks go through their row-major runs (rows take the place of columns): both changes are symmetric in x and y.
template <class Change>
static py::array_t<uint8_t> change_dense(const Array<uint8_t>& stack, Change change) {
    const uint8_t* data = checked_stack(stack);
    const int64_t N = stack.shape(0), H = stack.shape(1), W = stack.shape(2);
    py::array_t<uint8_t> out({N, H, W});
    uint8_t* changed = out.mutable_data();
    py::gil_scoped_release release;
    threaded_chunks(N, 1, [&](int64_t i, int64_t) {
        mask_of_row_bounds(change(row_bounds(data + i * H * W, H * W), W, H), H * W, changed + i * H * W);
    });
    return out;
}

static py::list fill_holes_texts(const py::list& counts, const Array<int64_t>& sizes) {
    return change_texts(counts, sizes, [](const Bounds& b, int64_t H, int64_t W) { return fill_holes(b, H, W); });
}
static py::list remove_islands_texts(const py::list& counts, const Array<int64_t>& sizes, int64_t min_area) {
    return change_texts(counts, sizes, [=](const Bounds& b, int64_t H, int64_t) { return remove_islands(b, H, min_area); });
}
static py::array_t<uint8_t> fill_holes_dense(const Array<uint8_t>& stack) {
    return change_dense(stack, [](const Bounds& b, int64_t H, int64_t W) { return fill_holes(b, H, W); });
}
static py::array_t<uint8_t> remove_islands_dense(const Array<uint8_t>& stack, int64_t min_area) {
    return change_dense(stack, [=](const Bounds& b, int64_t H, int64_t) { return remove_islands(b, H, min_area); });
}

static py::tuple components(const Array<uint8_t>& mask, int connectivity) {
    expect(mask.ndim() == 2 && (connectivity == 4 || connectivity == 8), "components: expected a mask [H, W] and connectivity 4 or 8");
    pixel_count(mask.shape(0), mask.shape(1));
    py::array_t<int32_t> labels({mask.shape(0), mask.shape(1)});
    int32_t* data = labels.mutable_data();
    std::fill(data, data + labels.size(), 0);
    return py::make_tuple(labels, label_components(mask.data(), mask.shape(0), mask.shape(1), connectivity, data));
}

static py::list trace(const Array<uint8_t>& mask) {
    expect(mask.ndim() == 2, "trace: expected a mask [H, W]");
    pixel_count(mask.shape(0), mask.shape(1));
    py::list out;
    for (Ring& ring : trace_rings(mask.data(), mask.shape(0), mask.shape(1))) {
        const py::ssize_t points = ring.xy.size() / 2;
        out.append(py::make_tuple(array_of(std::move(ring.xy), {points, 2}), ring.label, ring.is_hole));
    }
    return out;
}

// ---- distances and skeletons -------------------------------------------------------------------------------------------------------

static const uint8_t* checked_mask(const Array<uint8_t>& mask) {
    expect(mask.ndim() == 2, "expected a mask [H, W]");
    pixel_count(mask.shape(0), mask.shape(1));
    check_sides(mask.shape(0), mask.shape(1));
    return mask.data();
}

static py::array_t<int32_t> squared_distances(const Array<uint8_t>& mask) {
    const uint8_t* data = checked_mask(mask);
    const int64_t H = mask.shape(0), W = mask.shape(1);
    py::array_t<int32_t> out({H, W});
    int32_t* squared = out.mutable_data();
    py::gil_scoped_release release;
    nearest_sites(data, H, W, [=](int64_t y, int64_t x, int64_t row, int64_t column) {
        const int64_t distance = (y - row) * (y - row) + (x - column) * (x - column);
        squared[y * W + x] = row < 0 ? INT32_MAX : static_cast<int32_t>(std::min<int64_t>(distance, INT32_MAX));
    });
    return out;
}

static py::array_t<int32_t> nearest_pixels(const Array<uint8_t>& mask) {
    const uint8_t* data = checked_mask(mask);
    const int64_t H = mask.shape(0), W = mask.shape(1);
    expect(H * W <= INT32_MAX, "nearest_pixels: too many pixels to number");
    py::array_t<int32_t> out({H, W});
    int32_t* nearest = out.mutable_data();
    py::gil_scoped_release release;
    nearest_sites(data, H, W, [=](int64_t y, int64_t x, int64_t row, int64_t column) {
        nearest[y * W + x] = row < 0 ? -1 : static_cast<int32_t>(row * W + column);
    });
    return out;
}

static py::array_t<uint8_t> thinned(const Array<uint8_t>& mask) {
    const uint8_t* data = checked_mask(mask);
    const int64_t H = mask.shape(0), W = mask.shape(1);
    py::array_t<uint8_t> out({H, W});
    uint8_t* pixels = out.mutable_data();
    py::gil_scoped_release release;
    for (int64_t i = 0; i < H * W; i++) pixels[i] = data[i] != 0;
    thin(pixels, H, W);
    return out;
}

// ---- COCO matching ---------------------------------------------------------------------------------------------------------------

// The arrays of one side of the comparison, kept alive beside the plain pointers that the matcher reads.
struct Side {
    Array<int32_t> image, category, size;
    Array<double> key, area, box;
    Array<uint8_t> crowd;
    py::list counts;
    Objects objects;

    Side(const py::dict& fields, int64_t images, int64_t categories, bool is_truth) {
        auto take = [&](const char* name, auto& array, int64_t columns) {
            if (!fields.contains(name) || fields[name].is_none()) return decltype(array.data())(nullptr);
            array = py::cast<std::decay_t<decltype(array)>>(fields[name]);
            expect(array.size() == objects.n * columns, "evaluate: arrays of different lengths");
            return array.data();
        };
        objects.n = static_cast<int64_t>(py::len(fields["image"]));
        objects.image = take("image", image, 1);
        objects.category = take("category", category, 1);
        objects.key = take("score", key, 1);
        objects.area = take("area", area, 1);
        objects.crowd = take("crowd", crowd, 1);
        objects.box = take("box", box, 4);
        objects.size = take("size", size, 2);
        if (!objects.box) {
            counts = py::cast<py::list>(fields["counts"]);
            objects.text = texts_of(counts);
            const bool one_each = static_cast<int64_t>(objects.text.size()) == objects.n && (objects.size || objects.n == 0);
            expect(one_each, "evaluate: one mask for each object");
        }
        const bool measured = objects.area || !(is_truth || objects.box);        // the area of a mask can be counted
        expect(objects.n == 0 || (measured && (is_truth ? objects.crowd != nullptr : objects.key != nullptr)), "evaluate: an array is missing");
        expect(objects.n < INT32_MAX, "evaluate: too many objects");
        for (int64_t i = 0; i < objects.n; i++)
            expect(objects.image[i] >= 0 && objects.image[i] < images && objects.category[i] >= 0 && objects.category[i] < categories,
                   "evaluate: image or category index out of range");
    }
};

static py::dict evaluate(const py::dict& truths, const py::dict& detections, int64_t images, int64_t categories,
                         const std::vector<double>& area_ranges, const std::vector<double>& iou_thresholds,
                         const std::vector<double>& recall_thresholds, const std::vector<int64_t>& max_dets, bool keep_matches) {
    Side gt(truths, images, categories, true), dt(detections, images, categories, false);
    const bool same_form = (gt.objects.box != nullptr) == (dt.objects.box != nullptr);
    expect(same_form || !gt.objects.n || !dt.objects.n, "evaluate: boxes on both sides or masks on both");
    expect(iou_thresholds.size() <= kMaxThresholds && !iou_thresholds.empty(), "evaluate: expected 1 to 32 IoU thresholds");
    expect(!max_dets.empty() && std::is_sorted(max_dets.begin(), max_dets.end()), "evaluate: max_dets in ascending order");
    Protocol protocol{images, categories, area_ranges, iou_thresholds, recall_thresholds, max_dets};
    Result result;
    {
        py::gil_scoped_release release;
        result = Matcher(gt.objects, dt.objects, protocol, keep_matches).run();
    }
    const py::ssize_t T = protocol.T(), R = protocol.R(), K = categories, A = protocol.A(), M = protocol.M(), D = dt.objects.n;
    py::dict out;
    out["precision"] = array_of(std::move(result.precision), {T, R, K, A, M});
    out["recall"] = array_of(std::move(result.recall), {T, K, A, M});
    out["scores"] = array_of(std::move(result.scores), {T, R, K, A, M});
    out["dt_rank"] = array_of(std::move(result.dt_rank), {D});
    if (keep_matches) {
        out["dt_match"] = array_of(std::move(result.dt_match), {T, D});
        out["dt_ignore"] = array_of(std::move(result.dt_ignore), {T, D});
        out["dt_iou"] = array_of(std::move(result.dt_iou), {T, D});
    }
    return out;
}

PYBIND11_MODULE(evaluation, m) {
    m.doc() = "Run-length masks, their shapes and skeletons, and COCO matching: the C++ behind minidamage.masks and minidamage.metrics.";
    m.def("encode", &encode);
    m.def("decode", &decode);
    m.def("compress", &compress_runs);
    m.def("from_polygons", &from_polygons);
    m.def("merge", &merge_all);
    m.def("area", &area);
    m.def("boxes", &boxes);
    m.def("iou", &iou);
    m.def("fill_holes", &fill_holes_texts);
    m.def("remove_islands", &remove_islands_texts);
    m.def("fill_holes_dense", &fill_holes_dense);
    m.def("remove_islands_dense", &remove_islands_dense);
    m.def("components", &components);
    m.def("trace", &trace);
    m.def("squared_distances", &squared_distances);
    m.def("nearest_pixels", &nearest_pixels);
    m.def("thin", &thinned);
    m.def("evaluate", &evaluate);
}
