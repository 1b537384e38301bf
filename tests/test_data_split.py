"""One vehicle, one photograph, one part."""
import argparse

import numpy as np
import pytest
from PIL import Image

from data_sets import picture
from minidamage import training
from minidamage.data import duplicates, split
from minidamage.data.record import Dataset, Record


def record(file, objects=1, group="", image_id=0):
    return Record(file=str(file), image_id=image_id, width=64, height=48, boxes=np.tile(np.float32([1, 1, 9, 9]), (objects, 1)),
                  labels=np.ones(objects, np.int64), masks=[None] * objects, crowd=np.zeros(objects, bool), area=np.full(objects, 64.0),
                  annotation_ids=np.arange(objects), group=group)


def vehicles(count, each=3):
    return [record(f"{i:03d}_{k}.jpg", objects=int(i % 4 > 0), group=f"car {i}", image_id=i * each + k)
            for i in range(count) for k in range(each)]


def dataset_of(**parts):
    return Dataset("somewhere", "vehide", ("dent",), (1,), parts, [])


def groups_of(records):
    return {r.group for r in records}


def test_no_vehicle_in_two_parts_and_shares_kept():
    records = vehicles(40)
    parts = split.split_records(records, seed=1)
    assert sorted(r.image_id for part in parts.values() for r in part) == list(range(120))
    assert not groups_of(parts["train"]) & groups_of(parts["val"]) and not groups_of(parts["val"]) & groups_of(parts["test"])
    assert not groups_of(parts["train"]) & groups_of(parts["test"])
    assert [len(parts[n]) for n in split.NAMES] == pytest.approx([84, 18, 18], abs=3)
    for part in parts.values():                                                   # a quarter of the vehicles is undamaged, everywhere
        assert 0.1 <= np.mean([len(r.labels) == 0 for r in part]) <= 0.4


def test_the_seed_decides_and_the_order_of_the_file_does_not():
    records = vehicles(40)
    ids = lambda parts: {n: sorted(r.image_id for r in p) for n, p in parts.items()}
    one = ids(split.split_records(records, seed=1))
    assert one == ids(split.split_records(records[::-1], seed=1)) and one != ids(split.split_records(records, seed=2))


def test_protocol_of_three_parts():
    train, val, test = vehicles(20), vehicles(10), vehicles(6)
    kept = split.three_parts(dataset_of(train=train, val=val, test=test))
    assert (kept["train"], kept["val"], kept["test"]) == (train, val, test)
    halved = split.three_parts(dataset_of(train=train, val=val))
    assert halved["train"] == train and len(halved["val"]) == len(halved["test"]) == 15
    assert not groups_of(halved["val"]) & groups_of(halved["test"])
    tenth = split.three_parts(dataset_of(train=train, test=test))
    assert tenth["test"] == test and len(tenth["train"]) + len(tenth["val"]) == 60 and 3 <= len(tenth["val"]) <= 9
    pooled = split.three_parts(dataset_of(train=train, val=val), fractions=(0.7, 0.15, 0.15))
    assert sorted(r.file for p in pooled.values() for r in p) == sorted(r.file for r in train + val)
    assert {n: len(p) for n, p in split.three_parts(dataset_of(all=train)).items()}["train"] == pytest.approx(42, abs=3)
    with pytest.raises(ValueError, match=r"somewhere: expected pictures in the train part, got none \(val 30, test 18\)"):
        split.three_parts(dataset_of(val=val, test=test))
    assert len(split.three_parts(dataset_of(val=val, test=test), fractions=(0.7, 0.15, 0.15))["train"]) == pytest.approx(34, abs=3)


def test_too_few_groups_and_bad_shares_are_errors():
    with pytest.raises(ValueError, match="too few: nothing is left for"):
        split.split_records(vehicles(1))
    assert split.parse_fractions("70/15/15") == pytest.approx((0.7, 0.15, 0.15))
    for text in ("70/30", "a/b/c", "-1/1/1", "0/0/0"):
        with pytest.raises(ValueError, match="70/15/15"):
            split.parse_fractions(text)
    with pytest.raises(ValueError, match="3 shares"):
        split.split_records(vehicles(9), (0.5, 0.5))


def test_split_is_written_and_read_back():
    data = dataset_of(train=vehicles(12), val=[record("v_%d.jpg" % i, group=f"v{i}", image_id=i) for i in range(8)])
    parts = split.three_parts(data, (0.6, 0.2, 0.2), seed=5)
    again = split.from_names(data, split.names_of(parts, data.path))
    assert {n: [r.file for r in p] for n, p in again.items()} == {n: [r.file for r in p] for n, p in parts.items()}
    data.parts["train"].pop(0)
    with pytest.raises(ValueError, match="pictures of the saved split are not in somewhere"):
        split.from_names(data, split.names_of(parts, data.path))


def test_names_that_come_from_one_photograph():
    assert duplicates.original_name("x/IMG_1_jpg.rf.0a1b2c3d4e5f.jpg") == duplicates.original_name("IMG_1_jpg.rf.ffff.jpg") == "IMG_1"
    assert duplicates.original_name("Thumbnail01022020_101500image1.jpg") == "01022020_101500image1"
    files = ["A_jpg.rf.01.jpg", "B_jpg.rf.02.jpg", "A_jpg.rf.03.jpg", "C.jpg"]
    group = duplicates.group_of_each([record(f) for f in files], near=False)
    assert group[0] == group[2] and len(set(group)) == 3


@pytest.fixture
def copies(tmp_path):
    """Ten photographs of noise, and copies of the first: re-saved, smaller, brighter, mirrored, turned by EXIF."""
    files = [picture(tmp_path / f"p{i}.png", 160, 120, seed=i) for i in range(10)]
    original = Image.open(files[0])
    original.save(tmp_path / "resaved.jpg", quality=40)
    original.resize((80, 60)).save(tmp_path / "smaller.png")
    original.point(lambda v: min(255, v + 20)).save(tmp_path / "brighter.png")
    original.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    original.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    names = ["resaved.jpg", "smaller.png", "brighter.png", "mirrored.png", "turned.jpg"]
    return files + [tmp_path / n for n in names]


def test_near_duplicates_are_found_and_others_are_not(copies):
    pairs = list(duplicates.near_pairs(duplicates.picture_hashes(copies)))
    linked = {i for i, j, _ in pairs} | {j for _, j, _ in pairs}
    assert linked == {0, 10, 11, 12, 13, 14}
    group = duplicates.group_of_each([record(f) for f in copies])
    assert len({group[i] for i in linked}) == 1 and len(set(group)) == 10
    parts = split.split_records([record(f) for f in copies], (0.5, 0.25, 0.25))
    assert sum(any(r.file == str(copies[0]) for r in p) and any("mirrored" in r.file for r in p) for p in parts.values()) == 1


def test_copies_are_told_by_groups(copies, tmp_path):
    """Of many copies as many links as it takes to join them, not every pair; the same bytes first."""
    for k, source in enumerate((3, 3, 5)):
        (tmp_path / f"again{k}.png").write_bytes(copies[source].read_bytes())
    files = copies + [tmp_path / f"again{k}.png" for k in range(3)]
    (threes, same), (fives, also), (noise, bits) = duplicates.groups_of_copies(files)
    assert (threes, fives, noise) == ([3, 15, 16], [5, 17], [0, 10, 11, 12, 13, 14]) and same == also == -1 and 0 <= bits <= 48


def test_textures_under_one_lamp_are_no_copies(tmp_path):
    """A gradient over noise: the hash sees the gradient alone, the detail tells the pictures apart and finds the re-saved one."""
    gradient = np.broadcast_to(np.linspace(0, 120, 128), (96, 128)) + 60
    files = []
    for i in range(6):
        noise = np.random.default_rng(i).normal(0, 12, (96, 128))
        Image.fromarray(np.clip(gradient + noise, 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    Image.open(files[2]).save(tmp_path / "copy.jpg", quality=80)
    files.append(tmp_path / "copy.jpg")
    assert len(list(duplicates.near_pairs(duplicates.picture_hashes(files)))) > 10
    assert [pair[:2] for pair in duplicates.near_copies(files)] == [(2, 6)]


def test_pairs_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    hashes = [rng.random(256) < 0.5 for _ in range(60)]
    for i in range(0, 30, 3):
        hashes[i + 30] = hashes[i] ^ (rng.random(256) < 0.1)
    hashes[5] = None
    expected = []
    for i in range(60):
        for j in range(i + 1, 60):
            if hashes[i] is None or hashes[j] is None:
                continue
            mirror = ~hashes[j].reshape(16, 16)[:, ::-1].ravel()
            bits = min((hashes[i] != hashes[j]).sum(), (hashes[i] != mirror).sum())
            if bits <= 48:
                expected.append((i, j, bits))
    assert sorted(duplicates.near_pairs(hashes, 48, block=7)) == expected and len(expected) >= 10


def test_flat_and_unreadable_pictures_match_nothing(tmp_path):
    Image.new("RGB", (64, 48), (9, 9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 48), (200, 9, 9)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"x")
    assert duplicates.picture_hashes([tmp_path / n for n in ("a.png", "b.png", "c.png")]) == [None, None, None]


def test_a_set_s_own_parts_that_share_a_vehicle_are_said_and_a_split_of_ours_never_does(capsys):
    records = vehicles(40)
    own = dataset_of(train=records[:100], val=records[100:110], test=records[110:])                 # car 33 and car 36 are cut
    parts = training.split_parts(own, argparse.Namespace(split="50/25/25", split_seed=0, limit=1.0))
    assert split.shared_by(parts) == [] and "share" not in capsys.readouterr().out
    training.split_parts(own, argparse.Namespace(split=None, split_seed=0, limit=1.0))
    said = "share 2 vehicles or pictures (car 33, car 36): what is reported was in part trained on, or chosen by. --split 70/15/15"
    assert said in capsys.readouterr().out
    lists = dataset_of(train=[record("d/a.jpg"), record("d/b.jpg")], val=[record("d/c.jpg")], test=[record("d/../d/b.jpg")])
    assert split.shared_by(lists.parts) == ["b.jpg"]                                                # one picture in two lists
