"""evaluate.py: a finder of red squares whose score is known, an untrained DamageNet end to end, two COCO files, and every mistake."""
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import minidamage
from minidamage import masks
from minidamage.checkpoint import save_checkpoint
from minidamage.data import load_dataset
from minidamage.data.synthetic import make_demo
from minidamage.evaluation import detection, selection
from minidamage.metrics import coco
from minidamage.metrics.measure import speed
from minidamage.visualize.overlay import grid

DATA = os.path.join(os.path.dirname(__file__), "data")
TRUTH, FOUND = os.path.join(DATA, "coco_gt.json"), os.path.join(DATA, "coco_dt.json")
STORED = np.load(os.path.join(DATA, "cocoeval.npz"))


def read(path):
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


# ---- two files ---------------------------------------------------------------------------------------------------------------------

def test_files_alone_give_the_stored_numbers(tmp_path, capsys):
    assert evaluate.main(["--truth", TRUTH, "--detections", FOUND, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    results = read(tmp_path / "out" / "results.json")
    for iou_type in ("bbox", "segm"):
        ours = [value for name, value in results["stats"].items() if name.startswith(iou_type)]
        np.testing.assert_allclose(ours, STORED[f"{iou_type}_stats"], rtol=0, atol=1e-9)
        assert f"{STORED[f'{iou_type}_stats'][0]:.3f}" in printed
    assert results["per_class"]["no_gt"]["bbox/AP"] is None and "no_gt is n/a" in printed


def test_files_with_one_iou_type_and_without_categories(tmp_path):
    assert evaluate.main(["--truth", TRUTH, "--detections", FOUND, "--iou-type", "segm", "--no-categories", "--out", str(tmp_path)]) == 0
    np.testing.assert_allclose(list(read(tmp_path / "results.json")["stats"].values()), STORED["segm_nocats_stats"], rtol=0, atol=1e-9)


def test_faults_of_files_end_with_2(tmp_path, capsys):
    (tmp_path / "dict.json").write_text('{"annotations": []}')
    (tmp_path / "ids.json").write_text(json.dumps([dict(read(FOUND)[0], image_id=-1)]))
    truth = read(TRUTH)
    (tmp_path / "types.json").write_text(json.dumps({**truth, "images": [*truth["images"], {"id": "seven"}]}))
    (tmp_path / "area.json").write_text(json.dumps({**truth, "annotations": [{**truth["annotations"][0], "area": "large"}]}))
    for arguments, message in ((["--truth", TRUTH], "both --truth"),
                               (["--truth", FOUND, "--detections", TRUTH], "swapped"),
                               (["--truth", str(tmp_path / "dict.json"), "--detections", FOUND], '"images"'),
                               (["--truth", str(tmp_path / "none.json"), "--detections", FOUND], "none.json: expected a COCO JSON file"),
                               (["--truth", str(tmp_path / "types.json"), "--detections", FOUND], 'ids of "images" to be of one type'),
                               (["--truth", str(tmp_path / "area.json"), "--detections", FOUND], 'area.json: expected a number of pixels'),
                               (["--truth", TRUTH, "--detections", str(tmp_path / "dict.json")], "expected a list of detections"),
                               (["--truth", TRUTH, "--detections", str(tmp_path / "ids.json")], "json: detections of pictures whose id")):
        assert evaluate.main(arguments) == 2
        assert message in capsys.readouterr().err


# ---- a finder whose score is known -------------------------------------------------------------------------------------------------

NAMES = ("dent", "scratch")


class RedFinder(torch.nn.Module):
    """Every red square of a picture is a dent of score 0.9, every green one a scratch of score 0.3."""

    task, name, iou_types = "detection", "red", ("bbox", "segm")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.eval()

    def detect(self, images, mask_form):
        assert mask_form == "rle" and images[0].dtype == torch.uint8
        return [self.find(image.numpy().astype(int)) for image in images]

    def find(self, image):
        parts = []
        for label, channel, score in ((1, 0, 0.9), (2, 1, 0.3)):
            labels, n = masks.connected_components((image[channel] > 180) & (image.sum(0) < 400))
            parts += [(masks.encode(labels == k + 1), score, label) for k in range(n)]
        rles = [rle for rle, _, _ in parts]
        return {"boxes": torch.tensor(masks.to_boxes(rles) if rles else np.zeros((0, 4)), dtype=torch.float32), "masks": rles,
                "scores": torch.tensor([s for _, s, _ in parts]), "labels": torch.tensor([k for _, _, k in parts], dtype=torch.int64)}


def draw_set(folder):
    """Four pictures in COCO form: two dents found exactly; a scratch that is drawn but has a low score; an undamaged one with a red
    reflection; an undamaged one with nothing."""
    squares = [[(20, 20, 40, 1, True), (90, 10, 30, 1, True)], [(30, 30, 50, 2, True)], [(10, 60, 20, 1, False)], []]
    os.makedirs(folder / "images")
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "scratch"}, {"id": 3, "name": "dent"}]}
    for i, objects in enumerate(squares):
        pixels = np.full((120, 160, 3), 90, np.uint8)
        content["images"].append({"id": 10 + i, "file_name": f"{i}.png", "height": 120, "width": 160})
        for x, y, side, label, is_damage in objects:
            pixels[y:y + side, x:x + side] = (230, 20, 20) if label == 1 else (20, 230, 20)
            if is_damage:
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotation = {"id": len(content["annotations"]) + 1, "image_id": 10 + i, "category_id": {1: 3, 2: 7}[label], "iscrowd": 0}
                content["annotations"].append({**annotation, "area": side * side, "bbox": [x, y, side, side], "segmentation": [outline]})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def red_run(tmp_path, monkeypatch):
    """A working folder with runs/red-001/best.pt, whose model is RedFinder, trained on the drawn set."""
    folder = draw_set(tmp_path / "squares")
    files = [f"images/{i}.png" for i in range(4)]
    checkpoint = {"model": "red", "class_names": NAMES, "thresholds": {"dent": 0.5, "scratch": 0.5}, "train": {"epoch": 3},
                  "run": {"data": str(folder)}, "split": {"train": files[:0], "val": [], "test": files}}
    os.makedirs(tmp_path / "runs" / "red-001")
    (tmp_path / "runs" / "red-001" / "best.pt").write_bytes(b"")
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, device: (RedFinder(), checkpoint))
    monkeypatch.chdir(tmp_path)
    return types.SimpleNamespace(path=tmp_path, data=folder, checkpoint=checkpoint, out=tmp_path / "runs" / "red-001" / "evaluation-test")


def test_without_arguments_the_newest_run_on_its_own_test_part(red_run, monkeypatch, capsys):
    matched, match, remarks, shown = [], coco.evaluate, {}, []
    monkeypatch.setattr(detection, "grid", lambda views, titles, **options: shown.append((titles, views)) or grid(views, titles, **options))
    for name in ("draw_truth", "draw_detections"):
        draw = getattr(detection, name)
        monkeypatch.setattr(detection, name, lambda *arguments, _draw=draw, _name=name, **options: (
            remarks.setdefault(_name, []).append(options["remarks"]), _draw(*arguments, **options))[1])
    monkeypatch.setattr(coco, "evaluate", lambda *arguments, **options: matched.append(1) or match(*arguments, **options))
    assert evaluate.main(["--device", "cpu"]) == 0
    assert len(matched) == 2                                                          # boxes once, masks once
    results, printed = read(red_run.out / "results.json"), capsys.readouterr().out
    assert results["stats"]["bbox/AP"] == results["stats"]["segm/AP"] == pytest.approx(1)          # a low score lowers no AP
    assert results["per_class"]["dent"]["segm/AP50"] == pytest.approx(1) and results["voc"]["segm"]["11-point"]["mean"] == 1
    assert results["at_thresholds"]["dent"]["TP"] == 2 and results["at_thresholds"]["dent"]["FP"] == 1
    assert results["at_thresholds"]["scratch"]["FN"] == 1 and results["at_thresholds"]["all"]["matched IoU"] == 1
    assert results["best_f1"]["scratch"] == pytest.approx({"threshold": 0.3, "F1": 1, "precision": 1, "recall": 1})
    assert results["false_alarms"] == {"pictures": 2, "with findings": 0.5, "findings": 0.5}
    tp, fp, fn = 40 * 40 + 30 * 30, 20 * 20, 50 * 50                                  # the scratch is below its threshold
    assert results["pixels"]["pixel/IoU"] == pytest.approx(tp / (tp + fp + fn))
    assert results["pixels"]["pixel/image/IoU"] == pytest.approx((1 + 0 + 0) / 3)     # the fourth picture has no quotient
    assert results["pixels_per_class"]["dent"]["pixel/precision"] == pytest.approx(tp / (tp + fp))
    assert results["ms_per_picture"] > 0 and results["peak_memory_MB"] > 0 and results["pictures"] == 4 and results["part"] == "test"
    assert results["intervals"]["segm/AP50"] == pytest.approx([1, 1]) and "95 % intervals (500" in printed
    draws = read(red_run.out / "pictures.json")["draws"]
    assert draws.keys() == {f"{kind}/{number}" for kind in ("bbox", "segm") for number in ("AP", "AP50")} | {"pixel/IoU", "pixel/mIoU"}
    assert all(len(drawn) == 500 for drawn in draws.values()) and "pixel mIoU" in printed
    assert "\nSummary: box: AP 1.000, AP50 1.000\nSummary: mask: AP 1.000, AP50 1.000\n" in printed
    assert "50.0% of the 2 pictures without damage" in printed and "report.html" in printed
    page = (red_run.out / "report.html").read_text(encoding="utf-8")
    assert "Worst predictions" in page and "data:image/" in page and "1.000" in page
    assert sorted(f for f in os.listdir(red_run.out) if f.startswith("worst")) == ["worst-01.jpg", "worst-02.jpg"]
    assert [titles for titles, _ in shown] == [["photograph", "truth", "prediction"]] * 2
    assert all((views[0] != views[k]).any() for _, views in shown for k in (1, 2) if views[0].shape == views[k].shape)
    assert sorted(remarks["draw_truth"]) == [[], ["missed"]] and sorted(remarks["draw_detections"]) == [[], ["false"]]


def test_pictures_that_cannot_be_read_are_named_everywhere(red_run, monkeypatch, capsys):
    load = selection.load_dataset

    def truncated(*arguments, **options):                             # after the headers were read: the fault shows when it is decoded
        dataset = load(*arguments, **options)
        file = red_run.data / "images" / "0.png"
        file.write_bytes(file.read_bytes()[:100])
        return dataset
    monkeypatch.setattr(selection, "load_dataset", truncated)
    assert evaluate.main(["--device", "cpu"]) == 0
    results, page = read(red_run.out / "results.json"), (red_run.out / "report.html").read_text(encoding="utf-8")
    assert [os.path.basename(file) for file in results["unreadable"]] == ["0.png"] and results["at_thresholds"]["dent"]["FN"] == 2
    for text in (capsys.readouterr().out, page, results["notes"][0]):
        assert "1 of 4 pictures cannot be read" in text and "0.png" in text


def test_crowd_regions_count_nowhere(red_run):
    content = read(red_run.data / "annotations.json")
    crowd = {"id": 9, "image_id": 12, "category_id": 3, "iscrowd": 1, "area": 600, "bbox": [10, 60, 30, 20],
             "segmentation": masks.encode(np.pad(np.ones((20, 30), np.uint8), ((60, 40), (10, 120))))}
    crowd["segmentation"]["counts"] = crowd["segmentation"]["counts"].decode()
    (red_run.data / "annotations.json").write_text(json.dumps({**content, "annotations": [*content["annotations"], crowd]}))
    assert evaluate.main(["--device", "cpu"]) == 0
    results = read(red_run.out / "results.json")
    assert results["at_thresholds"]["dent"]["FP"] == 0 and results["pixels"]["pixel/precision"] == 1       # the reflection lies in it
    right = 4 * 120 * 160 - 600
    assert results["pixels"]["pixel/accuracy"] == pytest.approx((right - 50 * 50) / right)


def test_what_is_written_scores_the_same(red_run):
    assert evaluate.main(["--device", "cpu"]) == 0
    files = [str(red_run.out / "truth.json"), str(red_run.out / "detections.json")]
    assert {c["id"]: c["name"] for c in read(files[0])["categories"]} == {3: "dent", 7: "scratch"}
    assert {d["category_id"] for d in read(files[1])} == {3, 7}
    assert evaluate.main(["--truth", files[0], "--detections", files[1], "--out", str(red_run.path / "again")]) == 0
    assert read(red_run.path / "again" / "results.json")["stats"] == read(red_run.out / "results.json")["stats"]


def test_score_and_another_data_set(red_run, tmp_path, capsys):
    assert evaluate.main(["--device", "cpu", "--score", "0.2", "--worst", "0"]) == 0
    assert read(red_run.out / "results.json")["at_thresholds"]["all"]["FN"] == 0
    assert not [f for f in os.listdir(red_run.out) if f.startswith("worst")]
    other = draw_set(tmp_path / "other")
    content = read(other / "annotations.json")
    content["images"] = content["images"][1:2]                                       # the scratch alone
    content["annotations"] = [dict(content["annotations"][2], image_id=11)]
    (other / "annotations.json").write_text(json.dumps(content))
    for i in (0, 2, 3):
        os.remove(other / "images" / f"{i}.png")
    assert evaluate.main(["--device", "cpu", "--data", str(other)]) == 0
    results = read(tmp_path / "runs" / "red-001" / "evaluation-other-all" / "results.json")
    assert results["pictures"] == 1 and results["stats"]["segm/AP"] == pytest.approx(1) and results["per_class"]["dent"]["segm/AP"] is None
    assert "AP of dent is n/a" in capsys.readouterr().out


def test_equal_file_names_do_not_make_it_the_run_s_own_set(red_run, tmp_path, capsys):
    shutil.copytree(red_run.data, tmp_path / "copy")
    other = draw_set(tmp_path / "other")
    Image.new("RGB", (160, 120), (90, 90, 91)).save(other / "images" / "3.png", compress_level=0)
    split = red_run.checkpoint["split"]
    red_run.checkpoint["split"] = {"train": split["test"][:2], "val": [], "test": split["test"][2:]}
    run = tmp_path / "runs" / "red-001"
    assert evaluate.main(["--device", "cpu", "--data", str(tmp_path / "copy")]) == 0
    assert read(run / "evaluation-test" / "results.json")["pictures"] == 2                                # nothing that trained
    assert evaluate.main(["--device", "cpu", "--data", str(other)]) == 0
    assert read(run / "evaluation-other-all" / "results.json")["pictures"] == 4
    printed = capsys.readouterr().out
    assert "new place" not in printed and f"{tmp_path / 'copy'} is not" not in printed
    assert f"{other} is not the set that the run was split from, but 2 pictures of it (first: images/0.png) have names that it" in printed
    shutil.copytree(red_run.data, tmp_path / "kept")
    content = read(red_run.data / "annotations.json")
    content["images"].pop()                                                        # one picture has gone: no set to score whole
    (red_run.data / "annotations.json").write_text(json.dumps(content))
    assert evaluate.main(["--device", "cpu", "--data", str(red_run.data)]) == 2
    assert "1 pictures of the saved split are not in" in capsys.readouterr().err
    shutil.rmtree(red_run.data)
    shutil.move(tmp_path / "kept", red_run.data)
    shutil.move(red_run.data, tmp_path / "moved")
    assert evaluate.main(["--device", "cpu", "--data", str(tmp_path / "moved")]) == 0
    assert "taken for the run's own set in a new place" in capsys.readouterr().out


def test_boxes_alone_where_nothing_has_an_outline(red_run):
    content = read(red_run.data / "annotations.json")
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (red_run.data / "annotations.json").write_text(json.dumps(content))
    assert evaluate.main(["--device", "cpu"]) == 0
    results = read(red_run.out / "results.json")
    assert results["stats"]["bbox/AP"] == pytest.approx(1) and "segm/AP" not in results["stats"] and results["pixels"] == {}


@pytest.mark.parametrize("arguments, change, message", [
    (["--part", "val"], {}, "--part val: .* has test \\(4\\)"),
    (["--data", "nowhere"], {}, "nowhere: no such file"),
    (["--score", "7"], {}, "from 0 to 1"),
    (["--device", "tpu9"], {}, "--device tpu9"),
    (["--draws", "-3"], {}, "--draws: expected 0 .no intervals. or more draws, got -3"),
    (["--worst", "-1"], {}, "--worst: expected 0 or more pictures, got -1"),
    ([], {"run": {"data": "gone"}}, "gone: the data set that .* was trained on is not there any more"),
    ([], {"run": {}}, "name the data set with --data"),
    ([], {"class_names": ("dent",)}, "has objects of 'scratch', which the model does not know"),
    ([], {"split": {"test": ["images/9.png"]}}, "1 pictures of the saved split"),
    (["--checkpoint", "runs/none.pt"], {}, "runs/none.pt"),
    (["--iou-type", "bbox"], {}, "--iou-type: one model has no use for it; leave it out"),
    (["--truth", TRUTH, "--detections", FOUND, "--checkpoint", "best.pt"], {}, "--checkpoint: --truth with --detections has no use for it"),
    (["--test-epochs", "runs/red-001", "--part", "test"], {}, "--part: --test-epochs has no use for it"),
    (["--compare", "a", "b", "--voc-difficult", "count"], {}, "--voc-difficult: --compare has no use for it"),
])
def test_mistakes_end_with_2(red_run, arguments, change, message, capsys):
    import re
    red_run.checkpoint.update(change)
    alone = {"--device", "--truth", "--compare"} & set(arguments)
    assert evaluate.main(arguments if alone else ["--device", "cpu", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_names_the_file_and_leaves_the_older_one(red_run, capsys):
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    before = read(red_run.out / "detections.json")
    os.symlink("/dev/full", red_run.out / "detections.json.partial")
    capsys.readouterr()
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 1
    printed = capsys.readouterr().err
    assert "could not write the results into" in printed and "No space left" in printed
    assert read(red_run.out / "detections.json") == before


def test_a_failure_to_read_is_not_called_one_to_write(red_run, monkeypatch, capsys):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", "annotations.json")
    monkeypatch.setattr(selection, "load_dataset", refused)
    assert evaluate.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().err == "evaluate.py: [Errno 13] Permission denied: 'annotations.json'\n"


def test_speed_and_its_inverse_agree():
    found = speed([9.0, 0.1, 0.2, 0.1, 4.0, 0.2, 0.2])                                # the first one warms up; median 0.2
    assert found == pytest.approx({"ms per picture": 200, "pictures per second": 5})


def test_no_run_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2
    assert "train one first" in capsys.readouterr().err


# ---- a real model ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def damagenet_run(tmp_path_factory):
    """An untrained DamageNet at a small size, and four drawn pictures."""
    folder = tmp_path_factory.mktemp("damagenet")
    data = make_demo(str(folder / "demo"), images=4, size=96)
    names = load_dataset(data, quiet=True).class_names
    torch.manual_seed(0)
    fields = {**minidamage.MODELS["damagenet"][3]["config"], "box_detections_per_img": 6, "min_size": 96, "max_size": 128}
    model = minidamage.build_model("damagenet", num_classes=len(names) + 1, **fields)
    os.makedirs(folder / "runs" / "damagenet-demo-001")
    path = folder / "runs" / "damagenet-demo-001" / "best.pt"
    save_checkpoint(path, {"model": "damagenet", "config": vars(model.config), "num_classes": len(names) + 1, "class_names": names,
                           "category_ids": tuple(range(1, len(names) + 1)), "thresholds": {}, "weights": model.state_dict(), "train": {},
                           "run": {"data": str(data)}, "split": {}, "metrics": {}})
    return path, data


def test_damagenet_end_to_end(damagenet_run):
    path, data = damagenet_run
    assert evaluate.main(["--checkpoint", str(path.parent), "--part", "all", "--device", "cpu", "--score", "0"]) == 0
    folder = path.parent / "evaluation-demo-all"
    results = read(folder / "results.json")
    assert len(results["stats"]) == 24 and results["pictures"] == 4 and len(read(folder / "detections.json")) == 24
    truth = read(folder / "truth.json")
    assert len(truth["annotations"]) == sum(len(r.labels) for part in load_dataset(data, quiet=True).parts.values() for r in part) > 0
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    assert all(d["segmentation"]["size"] == sizes[d["image_id"]] for d in read(folder / "detections.json"))


def test_the_finish_of_masks_can_be_changed_and_nothing_else(damagenet_run, tmp_path, capsys):
    path, _ = damagenet_run
    common = ["--checkpoint", str(path), "--part", "all", "--device", "cpu", "--score", "0"]
    area = {}
    for tau in ("0.3", "0.7"):
        assert evaluate.main([*common, "--out", str(tmp_path / tau), "--set", f"mask_threshold={tau}", "--set", "fill_holes=false"]) == 0
        area[tau] = sum(masks.area([d["segmentation"]]).item() for d in read(tmp_path / tau / "detections.json"))
    assert area["0.3"] > area["0.7"]
    assert evaluate.main([*common, "--set", "mask_threshold=0.7"]) == 0
    plain, changed = (path.parent / f"evaluation-demo-all{more}" for more in ("", "-mask_threshold=0.7"))
    assert evaluate.main(common) == 0 and "mask_threshold=0.7" in read(changed / "results.json")["set"]
    capsys.readouterr()
    assert evaluate.main(["--compare", str(plain), str(changed)]) == 0
    assert "damagenet mask_threshold=0.7" in capsys.readouterr().out
    assert evaluate.main([*common, "--set", "context=false"]) == 2
    assert "island_share" in capsys.readouterr().err
    assert evaluate.main([*common, "--set", "mask_threshold=7"]) == 2
    assert "mask_threshold: expected from 0 to 1, got 7.0" in capsys.readouterr().err


def test_results_do_not_go_among_the_data_sets_files(damagenet_run, capsys):
    path, data = damagenet_run
    before = sorted(os.listdir(data))
    for out in (data, os.path.join(data, "image")):
        assert evaluate.main(["--checkpoint", str(path), "--part", "all", "--device", "cpu", "--out", out]) == 2
        assert "expected a folder outside of the data set" in capsys.readouterr().err
    assert sorted(os.listdir(data)) == before
