"""Pascal VOC in every shape that real sets have it; bad XML, names and boxes are counted and named, never an exception in epoch 40."""
import numpy as np
import pytest
from PIL import Image

from data_sets import picture
from minidamage.data import class_counts, load_dataset, split, summary
from minidamage.data.check import check
from minidamage.data.voc import KNOWN_SETS

NEU = KNOWN_SETS["NEU-DET"]


def load(path, **kwargs):
    return load_dataset(path, quiet=True, **kwargs)


def annotation(path, objects=(), filename=None, size=(64, 48), depth=3):
    """Writes a VOC XML. objects: (name, (xmin, ymin, xmax, ymax)[, difficult]); a difficult of None leaves the element out."""
    text = ""
    for name, box, *difficult in objects:
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        flag = f"<difficult>{difficult[0]}</difficult>" if difficult and difficult[0] is not None else ""
        text += f"<object><name>{name}</name><pose>Unspecified</pose>{flag}<bndbox>{corners}</bndbox></object>"
    measures = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>{depth}</depth></size>" if size else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><folder>x</folder><filename>{filename or path.stem + '.jpg'}</filename>{measures}{text}</annotation>")
    return path


def pair(images, annotations, stem, objects, seed=0, **kwargs):
    picture(images / f"{stem}.jpg", seed=seed)
    annotation(annotations / f"{stem}.xml", objects, **kwargs)


def test_boxes_count_pixels_from_1_and_the_last_one_counts(tmp_path):
    pair(tmp_path / "images", tmp_path / "annotations", "a", [("dent", (1, 1, 64, 48)), ("scratch", (11, 6, 20, 10), 0)], depth=1)
    data = load(tmp_path)
    record, = data.parts["all"]
    assert data.layout == "voc" and data.class_names == ("dent", "scratch") and not data.problems
    np.testing.assert_array_equal(record.boxes, [[0, 0, 64, 48], [10, 5, 20, 10]])             # 10 pixels wide, 5 high
    assert record.area.tolist() == [64 * 48, 50] and record.labels.tolist() == [1, 2] and record.masks == [None, None]
    corners, = load(tmp_path, voc_boxes="corners").parts["all"]
    np.testing.assert_array_equal(corners.boxes, [[1, 1, 64, 48], [11, 6, 20, 10]])
    with pytest.raises(ValueError, match="voc_boxes: expected pixels or corners, got 'centre'"):
        load(tmp_path, voc_boxes="centre")


def test_difficult_may_be_missing_and_is_neither_target_nor_alarm(tmp_path):
    pair(tmp_path, tmp_path, "a", [("dent", (1, 1, 9, 9), None), ("dent", (11, 1, 19, 9), 0), ("dent", (21, 1, 29, 9), 1)])
    data = load(tmp_path)
    assert data.parts["all"][0].crowd.tolist() == [False, False, True]
    assert any("1 difficult objects are neither targets" in note for note in data.notes)
    counted = load(tmp_path, voc_difficult="count")
    assert not counted.parts["all"][0].crowd.any() and any("1 difficult objects count as the others do" in note for note in counted.notes)
    with pytest.raises(ValueError, match="voc_difficult: expected ignore or count, got 'both'"):
        load(tmp_path, voc_difficult="both")


def test_boxes_at_and_over_the_border(tmp_path):
    boxes = [(0, 0, 64, 48), (60, 40, 70, 60), (70, 1, 80, 9), (1.5, 2, 9, 9)]
    pair(tmp_path, tmp_path, "a", [("dent", box) for box in boxes])
    data = load(tmp_path)
    np.testing.assert_array_equal(data.parts["all"][0].boxes, [[0, 0, 64, 48], [59, 39, 64, 48], [0.5, 1, 9, 9]])
    assert [p.split("object ")[1] for p in data.problems] == [
        "1: box leaves the picture by 1.0 px; clipped", "2: box leaves the picture by 12.0 px; clipped",
        "3: box [69.0, 0.0, 80.0, 9.0] lies outside the 64x48 picture; dropped"]
    assert any("1 boxes begin at 0" in note and "corners" in note for note in data.notes)


def test_a_box_from_a_pixel_to_itself_is_one_pixel_wide(tmp_path):
    pair(tmp_path, tmp_path, "a", [("dent", box) for box in ((5, 5, 5, 10), (7, 9, 12, 9), (3, 3, 3, 3), (5, 5, 4, 10), (5.5, 5, 5, 10))])
    data = load(tmp_path)
    np.testing.assert_array_equal(data.parts["all"][0].boxes, [[4, 4, 5, 10], [6, 8, 12, 9], [2, 2, 3, 3]])
    assert [p.partition(": ")[0] for p in data.problems] == ["a.jpg, object 4", "a.jpg, object 5"]             # they end before they begin
    with pytest.raises(ValueError, match="first of 6 problems: a.jpg, object 1: box .* has no size"):
        load(tmp_path, voc_boxes="corners")


def test_the_doctor_speaks_of_voc_objects_without_inventing_numbers(tmp_path):
    pair(tmp_path, tmp_path, "a", [("dent", (1, 1, 9, 9))])
    pair(tmp_path, tmp_path, "b", [("dent", (11, 6, 30, 30)), ("dent", (11, 6, 30, 30)), ("dent", (1, 1, 9, 9), 1)])
    found = check(load(tmp_path), quick=True)
    assert [f.examples for f in found if "1 object repeats" in f.text] == [("b.jpg, object at x 10, y 5",)]
    assert any(f.text.endswith("4 with a box only; 1 not judged (difficult)") for f in found)


def test_bad_objects_are_named_and_the_rest_kept(tmp_path):
    pair(tmp_path, tmp_path, "a", [("dent", (20, 1, 19, 9)), ("dent", (9, 9, 3, 12)), ("dent", (1, 1, "x", 9)), ("", (1, 1, 9, 9)),
                                   ("dent", (1, 1, 9, 9))])
    text = (tmp_path / "a.xml").read_text()
    (tmp_path / "a.xml").write_text(text.replace("</annotation>", "<object><name>dent</name></object></annotation>"))
    data = load(tmp_path)
    assert len(data.parts["all"][0].labels) == 1
    assert [p.partition(": ")[2] for p in data.problems] == [
        "box [20.0, 1.0, 19.0, 9.0] has no size: its minimum is not below its maximum; dropped",
        "box [9.0, 9.0, 3.0, 12.0] has no size: its minimum is not below its maximum; dropped",
        "box ['1', '1', 'x', '9'] is not four numbers; dropped", "no class name; dropped", "no <bndbox>; dropped"]
    assert [p.partition(":")[0] for p in data.problems] == [f"a.jpg, object {n}" for n in (1, 2, 3, 4, 6)]


def test_broken_xml_missing_pictures_and_other_sizes_cost_one_picture_each(tmp_path):
    pair(tmp_path, tmp_path, "good", [("dent", (1, 1, 9, 9))])
    pair(tmp_path, tmp_path, "cut", [("dent", (1, 1, 9, 9))], seed=1)
    (tmp_path / "cut.xml").write_text((tmp_path / "cut.xml").read_text()[:120])
    annotation(tmp_path / "lost.xml", [("dent", (1, 1, 9, 9))])
    pair(tmp_path, tmp_path, "large", [("dent", (1, 1, 9, 9))], seed=2, size=(640, 480))
    pair(tmp_path, tmp_path, "nosize", [("dent", (1, 1, 9, 9))], seed=3, size=(0, 0))
    picture(tmp_path / "loose.jpg", seed=4)
    data = load(tmp_path)
    assert [r.file.rsplit("/", 1)[1] for r in data.parts["all"]] == ["good.jpg", "nosize.jpg"]
    lines = "\n".join(data.problems)
    assert "cut.xml: not valid XML (" in lines and "lost.xml: its picture is not there; picture left out (1 objects)" in lines
    assert "large.jpg: the annotation file says 640x480, the picture is 64x48; picture left out" in lines and len(data.problems) == 3
    assert "1 pictures in" in summary(data) and "not known to be undamaged" in summary(data)


def test_the_xml_names_its_picture_not_the_filename_in_it(tmp_path):
    pair(tmp_path / "images", tmp_path / "annotations", "a", [("dent", (1, 1, 9, 9))], filename="b.jpg")
    pair(tmp_path / "images", tmp_path / "annotations", "b", [("scratch", (1, 1, 9, 9))], seed=1, filename="C:\\x\\b.jpg")
    Image.open(tmp_path / "images/b.jpg").save(tmp_path / "images/b.png")
    (tmp_path / "images/b.jpg").unlink()                                                    # re-saved in another format
    picture(tmp_path / "images/photo.jpg", seed=2)
    annotation(tmp_path / "annotations/0003.xml", [("dent", (1, 1, 9, 9))], filename="photo.jpg")
    data = load(tmp_path)
    found = {r.file.rsplit("/", 1)[1]: data.class_names[r.labels[0] - 1] for r in data.parts["all"]}
    assert found == {"a.jpg": "dent", "b.png": "scratch", "photo.jpg": "dent"} and not data.problems
    assert any(note.startswith("1 XML files name another picture") for note in data.notes)


def test_vocs_own_layout_and_lists(tmp_path):
    for i in range(5):
        everything = [(name, (1, 1, 9, 9)) for name in KNOWN_SETS["Pascal VOC"]]
        pair(tmp_path / "JPEGImages", tmp_path / "Annotations", f"{i:06d}", everything, seed=i)
    lists = {"train": "000000\n000001\n", "trainval": "000000\n000001\n000002\n", "val": "000002 1\n", "test": "000003\n000009\n",
             "aeroplane_train": "000004 -1\n"}
    for name, content in lists.items():
        file = tmp_path / "ImageSets/Main" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    data = load(tmp_path)
    assert {part: [r.file[-10:-4] for r in records] for part, records in data.parts.items()} == {
        "train": ["000000", "000001"], "val": ["000002"], "test": ["000003"]}
    assert data.class_names == KNOWN_SETS["Pascal VOC"] and len(data.class_names) == 20
    assert any("000009: listed in test.txt, but it has no XML" in p for p in data.problems)
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    (tmp_path / "ImageSets/Main/val.txt").unlink()
    data = load(tmp_path)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 3, "test": 1}


def test_lists_of_names_with_spaces(tmp_path):
    for seed, stem in enumerate(("photo", "photo (1)", "photo (2)")):
        pair(tmp_path / "JPEGImages", tmp_path / "Annotations", stem, [("dent", (1, 1, 9, 9))], seed=seed)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("photo\nphoto (1)\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("photo (2)  1\nphoto (2)\n")
    data = load(tmp_path)
    assert {part: [r.file.split("/")[-1] for r in records] for part, records in data.parts.items()} == {
        "train": ["photo.jpg", "photo (1).jpg"], "test": ["photo (2).jpg"]}


def test_parts_by_folder_with_the_same_names_in_both(tmp_path):
    for seed, part in enumerate(("train", "validation")):
        for stem, name in (("1", "dent"), ("2", "scratch")):
            pair(tmp_path / part / "images" / name, tmp_path / part / "annotations", stem, [(name, (1, 1, 9, 9))], seed=seed)
    data = load(tmp_path)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 2, "val": 2} and not data.problems
    for part, folder in (("train", "/train/"), ("val", "/validation/")):
        assert all(folder in r.file for r in data.parts[part])


def neu_set(root, counts, names=NEU):
    """counts: {(image folder, XML folder): pictures}; every picture has one object of each name."""
    seed = 0
    for (images, annotations), count in counts.items():
        for _ in range(count):
            seed += 1
            pair(root / images, root / annotations, f"p_{seed}", [(name, (1 + i, 1, 9 + i, 9)) for i, name in enumerate(names)], seed=seed)
    return root


def test_neu_det_is_pooled_and_split_as_its_papers_do(tmp_path):
    data = load(neu_set(tmp_path, {("IMAGES", "ANNOTATIONS"): 38, ("Validation_Images", "Validation_Annotations"): 2}))
    assert data.class_names == NEU and {part: len(records) for part, records in data.parts.items()} == {"all": 40}
    assert any("38 + 2 pictures pooled" in n for n in data.notes) and not any("taken as train" in n for n in data.notes)
    parts = split.three_parts(data)
    assert {name: len(records) for name, records in parts.items()} == {"train": 29, "val": 3, "test": 8}
    names = split.names_of(parts, data.path)
    assert split.names_of(split.three_parts(load(tmp_path)), data.path) == names                # one seed, one split, written down
    assert split.names_of(split.from_names(data, names), data.path) == names
    assert split.names_of(split.three_parts(data, seed=1), data.path) != names
    assert {n: len(r) for n, r in split.three_parts(data, (0.5, 0.25, 0.25)).items()} == {"train": 20, "val": 10, "test": 10}


def test_neu_det_with_a_large_second_part_reports_on_it(tmp_path):
    data = load(neu_set(tmp_path, {("train/images", "train/annotations"): 16, ("validation/images", "validation/annotations"): 4}))
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 16, "test": 4}
    assert {name: len(records) for name, records in split.three_parts(data).items()} == {"train": 14, "val": 2, "test": 4}


def test_a_foreign_name_in_a_known_set_is_an_error_that_names_it(tmp_path):
    neu_set(tmp_path, {("images", "annotations"): 20})
    annotation(tmp_path / "annotations/p_7.xml", [("Crazing", (1, 1, 9, 9)), ("rolled in scale", (1, 1, 9, 9)), ("crazng", (1, 1, 9, 9))])
    with pytest.raises(ValueError, match=r"unknown NEU-DET class: 'crazng' \(1 objects, first in p_7.xml; did you mean 'crazing'\?\)"):
        load(tmp_path)
    annotation(tmp_path / "annotations/p_7.xml", [("Crazing", (1, 1, 9, 9)), ("rolled in scale", (1, 1, 9, 9))])
    assert class_counts(load(tmp_path).parts["all"], 6).tolist() == [20, 19, 19, 19, 20, 19]    # other spellings of a known name are it
    own = neu_set(tmp_path / "own", {("images", "annotations"): 4}, names=(*NEU, "oil_spot"))     # a class of one's own is no typing error
    assert load(own).class_names == tuple(sorted((*NEU, "oil_spot")))
    assert any("those of NEU-DET, but 'oil_spot' are not" in note for note in load(own).notes)
    with pytest.raises(ValueError, match="has objects of 'oil_spot', which the model does not know"):
        load(own, class_names=NEU)


def test_one_picture_with_two_xml_files(tmp_path):
    pair(tmp_path, tmp_path, "a", [("dent", (1, 1, 9, 9))])
    annotation(tmp_path / "b.xml", [("dent", (1, 1, 9, 9))], filename="a.jpg")
    data = load(tmp_path)
    assert len(data.parts["all"]) == 1 and data.problems == ["b.xml: its picture, a.jpg, is also that of a.xml; this XML left out"]


def test_pictures_of_another_set_beside_the_folder_are_not_taken(tmp_path):
    pair(tmp_path / "mine", tmp_path / "mine", "a", [("dent", (1, 1, 9, 9))])
    annotation(tmp_path / "mine/b.xml", [("dent", (1, 1, 9, 9))])
    for other in ("other_pictures", "another"):
        picture(tmp_path / other / "b.jpg", seed=1)
    picture(tmp_path / "b.jpg", seed=1)
    data = load(tmp_path / "mine")
    assert data.problems == ["b.xml: its picture is not there; picture left out (1 objects)"] and len(data.parts["all"]) == 1


def test_the_annotation_folder_itself_finds_the_pictures_beside_it_and_says_so(tmp_path):
    pair(tmp_path / "JPEGImages", tmp_path / "Annotations", "a", [("dent", (1, 1, 9, 9))])
    annotation(tmp_path / "Annotations/b.xml", [("dent", (1, 1, 9, 9))])
    picture(tmp_path / "another/b.jpg", seed=1)
    data = load(tmp_path / "Annotations")
    assert [r.file for r in data.parts["all"]] == [str(tmp_path / "JPEGImages/a.jpg")]
    assert any(note.startswith("1 pictures were found outside the folder") for note in data.notes)
    assert not any("outside" in note for note in load(tmp_path).notes)


def test_neu_det_itself(real_data):
    data = load(real_data / "neu_det")
    records = data.parts["all"]
    labels = np.concatenate([r.labels for r in records])
    counts = dict(zip(data.class_names, np.bincount(labels, minlength=7)[1:].tolist()))
    assert len(records) == 1800 and not data.problems and len(labels) == 4189
    assert counts == {"crazing": 689, "inclusion": 1011, "patches": 881, "pitted_surface": 432, "rolled-in_scale": 628, "scratches": 548}
    parts = split.three_parts(data)
    assert {name: len(records) for name, records in parts.items()} == {"train": 1296, "val": 144, "test": 360}
    part_of = {r.file.rsplit("/", 1)[1]: name for name, records in parts.items() for r in records}
    assert part_of["patches_101.jpg"] == part_of["patches_105.jpg"]
    for records in parts.values():                                                               # no class is missing anywhere
        assert class_counts(records, 6).min() >= 20
