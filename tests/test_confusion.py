"""The confusion matrix by hand: every object once, every finding once, the diagonal COCO's."""
import numpy as np
import pytest

from minidamage import masks
from minidamage.metrics.confusion import confusion_matrix, confusion_table
from minidamage.metrics.detection import CocoEvaluator
from minidamage.visualize.matrix import matrix_plot

A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]
NAMES = ("dent", "scratch")


@pytest.fixture(params=["numpy", "native"])
def body(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(masks, "native_module", lambda: None)
    elif masks.native_module() is None:
        pytest.skip("no compiler, or MINIDAMAGE_KERNELS=off: no C++ to compare")
    return request.param


def evaluate(pictures):
    """pictures: [(truths [(box, label[, crowd])], detections [(box, label, score)])]."""
    evaluator = CocoEvaluator(NAMES, ("bbox",))
    for i, (truths, detections) in enumerate(pictures):
        evaluator.add_truth(i, np.array([t[0] for t in truths]).reshape(-1, 4), [t[1] for t in truths],
                            crowd=[bool(t[2:]) for t in truths], height=60, width=60)
        boxes, labels, scores = ([d[column] for d in detections] for column in range(3))
        evaluator.add_detections(i, np.array(boxes).reshape(-1, 4), scores, labels)
    return evaluator.evaluate()


def matrix_of(pictures, threshold=0.5):
    return confusion_matrix(evaluate(pictures).scored["bbox"], np.full(2, threshold)).tolist()


@pytest.mark.parametrize("truths, detections, want", [
    ([(A, 1)], [(A, 1, 0.9)], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),                              # found
    ([(A, 1)], [(A, 2, 0.9)], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]),                              # taken for another
    ([(A, 1)], [], [[0, 0, 1], [0, 0, 0], [0, 0, 0]]),                                          # missed
    ([], [(A, 2, 0.9)], [[0, 0, 0], [0, 0, 0], [0, 1, 0]]),                                     # false alarm
    ([(A, 1)], [(A, 1, 0.4)], [[0, 0, 1], [0, 0, 0], [0, 0, 0]]),                              # below the threshold
    ([(A, 1)], [(A, 1, 0.9), (A, 1, 0.8)], [[1, 0, 0], [0, 0, 0], [1, 0, 0]]),                 # found twice: the second is false
    ([(A, 1)], [(A, 2, 0.9), (A, 1, 0.8)], [[1, 0, 0], [0, 0, 0], [0, 1, 0]]),                 # the right class wins, whatever the score
    ([(A, 1), (B, 2)], [(A, 2, 0.9), (B, 1, 0.9)], [[0, 1, 0], [1, 0, 0], [0, 0, 0]]),         # exchanged
    ([(A, 1)], [([0, 0, 10, 21], 2, 0.9)], [[0, 0, 1], [0, 0, 0], [0, 1, 0]]),                 # IoU 10 / 21: too little
    ([(A, 1, True)], [(A, 1, 0.9)], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),                        # a crowd is neither
])
def test_by_hand(body, truths, detections, want):
    assert matrix_of([(truths, detections)]) == want


def test_leftovers_pair_by_overlap_within_their_picture(body):
    pictures = [([(A, 1), ([0, 0, 10, 12], 1)], [([0, 0, 10, 12], 2, 0.9)]), ([(C, 2)], [(A, 1, 0.9)])]
    result = evaluate(pictures)
    assert confusion_matrix(result.scored["bbox"], np.full(2, 0.5)).tolist() == [[0, 1, 1], [0, 0, 1], [1, 0, 0]]


def test_sums_are_the_objects_the_findings_and_the_true_ones(body):
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(30):
        truths = [(box, int(label)) for box, label in zip(_boxes(rng, 4), rng.integers(1, 3, 4))]
        detections = [(box, int(label), score) for box, label, score in zip(_boxes(rng, 6), rng.integers(1, 3, 6), rng.random(6))]
        detections += [([v + 1 for v in box], label, rng.random()) for box, label in truths[:2]]
        pictures.append((truths, detections))
    result = evaluate(pictures)
    thresholds = {"dent": 0.3, "scratch": 0.6}
    matrix = confusion_matrix(result.scored["bbox"], np.array([0.3, 0.6]))
    found = result.at_thresholds(thresholds)
    for k, name in enumerate(NAMES):
        assert matrix[k, k] == found[name]["TP"] > 0
        assert matrix[k].sum() == found[name]["TP"] + found[name]["FN"]
        assert matrix[:, k].sum() == found[name]["TP"] + found[name]["FP"]
    assert matrix[2, 2] == 0


def _boxes(rng, count):
    corner = rng.integers(0, 40, (count, 2))
    return [[x, y, x + w, y + h] for (x, y), (w, h) in zip(corner.tolist(), rng.integers(5, 20, (count, 2)).tolist())]


def test_table_and_picture():
    matrix = np.array([[5, 1, 2], [0, 7, 1], [3, 0, 0]])
    caption, columns, rows = confusion_table(matrix, NAMES)
    assert columns == ["", "dent", "scratch", "missed", "all"]
    assert rows == [["dent", 5, 1, 2, 8], ["scratch", 0, 7, 1, 8], ["false alarm", 3, 0, None, 3], ["all", 8, 8, 3, 19]]
    picture = matrix_plot(np.where(np.arange(9).reshape(3, 3) == 8, -1, matrix), [*NAMES, "false alarm"], [*NAMES, "missed"], "Confusion")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    blue = (picture[..., 2].astype(int) - picture[..., 0]) > 60                      # the diagonal's colour
    assert blue.mean() > 0.02


def test_a_long_title_over_few_classes_is_whole():
    picture = matrix_plot(np.array([[1, 0], [0, -1]]), ["dent", "false alarm"], ["dent", "missed"],
                          "Confusion at the thresholds in use, IoU 0.5")
    title = picture[10:35] < 128                                             # the title's line: dark letters, then an empty margin
    assert title.any() and not title[:, -12:].any()
