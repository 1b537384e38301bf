"""results/: every run is a command that train.py understands, and the tables say what the kept numbers say."""
import argparse
import importlib
import json
import re
import shlex
import sys

import pytest
import torch
from oracle import DATA

import evaluate
import minidamage
import train
from minidamage import training
from minidamage.evaluation import complexity
from minidamage.models import danet

RESULTS = DATA.parents[1] / "results"


@pytest.fixture(scope="module")
def results():
    """The modules of results/, which import each other as scripts do."""
    sys.path.insert(0, str(RESULTS))
    try:
        yield {name: importlib.import_module(name) for name in ("runs", "tables", "reproduce", "peers")}
    finally:
        sys.path.remove(str(RESULTS))


@pytest.fixture
def peers(results, monkeypatch):
    """The peers' names are known, as in results/peers.py; to build one of them needs its package."""
    for name, entry in results["peers"].PEERS.items():
        monkeypatch.setitem(minidamage.MODELS, name, entry)


def settled(command):
    """(the arguments of a command of train.py, its model's config, its recipe)"""
    args = argparse.Namespace(**{**training.DEFAULTS, **train.parse_arguments(shlex.split(command.format(data="data")))})
    return args, *training.settle(args)


def test_every_run_is_a_command_of_train_py(results, peers):
    names, built = [run.name for run in results["runs"].RUNS], set()
    assert len(set(names)) == len(names)
    for run in [run for run in results["runs"].RUNS if "-seed" not in run.name]:
        args, config, recipe = settled(run.train)
        if run.peer:                                          # of our model's name, built with it below
            assert args.model in results["peers"].PEERS, run.name
            continue
        if (args.model, config) not in built:
            built.add((args.model, config))
            with torch.device("meta"):                        # no memory: raises for a config that cannot be built
                minidamage.build_model(args.model, num_classes=3, **vars(config))
        assert recipe.epochs >= 1 and run.table in results["runs"].TABLES, run.name


def test_a_peer_repeats_a_run_of_ours_in_everything_but_the_model(results, peers):
    runs = results["runs"]
    pairs = [(run.train, twin.of(run).train) for twin in runs.TWINS for run in runs.RUNS if twin.of(run)]
    pairs += [(f"{runs.NEU_FULL} --set phase=2 --set fpn_upsample=nearest", runs.STEEL_TWIN)]
    assert len(pairs) == 1 + sum(bool(run.peer) for run in runs.RUNS) > 15
    for ours, theirs in pairs:
        (args, config, recipe), (peer_args, peer_config, peer_recipe) = settled(ours), settled(theirs)
        config = danet.settled(config) if args.model == "danet" else config
        assert vars(peer_config).items() <= vars(config).items(), theirs
        assert peer_recipe == recipe, theirs
        for flag in ("data", "seed", "split", "split_seed", "limit", "pretrained", "anchors"):
            assert getattr(peer_args, flag) == getattr(args, flag), theirs


def test_a_row_says_that_it_is_a_peers(results):
    text = results["tables"].table_text("cracks-full-cfd")
    assert "| segmentation_models_pytorch's U-Net, trained by the same script |" in text
    assert "| `cracks-full-cfd-smp-unet{,-seed1,-seed2}` |" in text and "`python results/reproduce.py --run RUN`" in text
    assert results["reproduce"].typed(results["runs"].Run("a", "a", "", {}, "cpu", peer="torchvision"), "train") == [
        "results/peers.py", "train"]


def test_printed_rows_fit_their_columns(results):
    for name, table in results["runs"].TABLES.items():
        assert all(len(row) <= len(table.columns) for row in table.printed.values()), name


def test_look_up_goes_through_keys_with_slashes_and_the_threshold_in_use(results):
    look_up = results["tables"].look_up
    numbers = {"per_class": {"rolled-in/scale": {"bbox/AP50": 0.5}}, "in_use": "at 0.3",
               "sizes": {"native": {"points": {"at 0.3": {"stats": {"pixel/IoU": 0.25}}}}}}
    assert look_up(numbers, "per_class/rolled-in/scale/bbox/AP50") == 0.5
    assert look_up(numbers, "sizes/model/points/{in_use}/stats/pixel/IoU") == 0.25
    assert look_up(numbers, "sizes/native/points/at 0.5/stats/pixel/IoU") is None


def test_a_row_puts_its_seeds_together(results, tmp_path, monkeypatch):
    runs, tables = results["runs"], results["tables"]
    hardware = {"gpu": None, "cpu": "some processor", "threads": 2}
    for seed, value in ((0, 0.2), (1, 0.4)):
        folder = tmp_path / runs.seeded("steel-full-phase5", seed)
        folder.mkdir()
        summary = {"run": {"seed": seed, "commits": ["0123456789+changes"], "hardware": hardware, "versions": {"torch": "2"}},
                   "rows": {runs.PHASES[5]: {"pictures": 360, "part": "test", "stats": {"bbox/AP50": value},
                                            "intervals": {"bbox/AP50": [value - 0.1, value + 0.1]}}}}
        (folder / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    text = tables.table_text("steel-full")
    assert "| 5 DANet (+ focal loss), paper |  | 51.42 | 79.49 | 92.43 | 81.04 | 68.22 | 96.93 | 78.27 |  |  |  |  |" in text
    assert "| 5 DANet (+ focal loss) | 0, 1 | - | - | - | - | - | - | 30.00 (20.00 to 40.00) | - | - |  |" in text
    assert "360 test pictures; some processor, 2 threads; torch 2; commit 0123456 with uncommitted changes." in text
    assert "| 1 Faster R-CNN |  | not run |" in text


def test_a_gpus_rows_stand_by_dtype_and_apart_from_the_cpus(results, tmp_path, monkeypatch):
    tables = results["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    name, peer = tables.SHOWN[0], {"torchvision": {"ms": 1.0, "ratio": 2.0, "ratio_min": 1.5, "ratio_max": 3.0}}
    model = tables.SHOWN_GPU[-1]
    for dtype, ms in (("float32", 0.5), ("bfloat16", 0.25)):
        rows = [{"name": name, "ours": ms, **peer}, {"name": f"{model}, {dtype}", "ours": 10 * ms, "peak_MB_ours": 7.0}]
        (tmp_path / f"benchmark-gpu-ops-{dtype}.json").write_text(json.dumps({"hardware": {"device": "cuda"}, "rows": rows}))
    assert tables.gpu_summary().splitlines()[2:] == [
        f"| {name} | 0.5 | torchvision **2.00** (1.50 to 3.00) |  | 0.25 | torchvision **2.00** (1.50 to 3.00) |  |",
        f"| {model} | 5 |  | 7 | 2.5 |  | 7 |"]
    assert len(tables.speed_summary().splitlines()) == 2                                  # no row of a CPU yet, and none of the GPU's


def test_the_first_row_is_tested_against_each_other_one(results, tmp_path, monkeypatch):
    tables = results["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    hardware, stats = {"gpu": None, "cpu": "some processor", "threads": 2}, dict.fromkeys(
        [f"pixel/{name}" for name in ("IoU", "Dice", "F1", "precision", "recall", "accuracy", "two-class IoU", "two-class Dice")], 0.0)
    counts = {"context_cracknet": [[9, 1, 0, 5], [8, 1, 1, 5]], "unet": [[5, 1, 4, 5], [4, 1, 5, 5]], "fpn": [[9, 0, 1, 5], [7, 2, 1, 5]]}

    def keep(model, seed, iou, of_pictures):
        row, folder = tables.CRACK_NAMES[model], tmp_path / results["runs"].seeded(f"cracks-full-cfd-{model.replace('_', '-')}", seed)
        folder.mkdir()
        numbers = {"pictures": 2, "part": "test", "task": "segmentation", "model": model, "seed": seed, "data": "cfd", "in_use": "at 0.3",
                   "trained_by": {},
                   "sizes": {"model": {"pixels": "448x448", "points": {"at 0.3": {"stats": {**stats, "pixel/IoU": iou}}}}}}
        run = {"seed": seed, "commits": ["0123456"], "hardware": hardware, "versions": {"torch": "2"}}
        (folder / "summary.json").write_text(json.dumps({"run": run, "rows": {row: numbers}}))
        pictures = {"files": ["a.png", "b.png"], "counts": {"model": {"at 0.3": of_pictures}}}
        (folder / "pictures.json").write_text(json.dumps({row: pictures} if of_pictures else {}))
    keep("context_cracknet", 0, 0.85, counts["context_cracknet"])
    assert "minus" not in tables.table_text("cracks-full-cfd")                                    # nothing beside it yet
    for seed in (0, 1):
        keep("unet", seed, 0.45, counts["unet"])
    keep("fpn", 0, 0.8, counts["fpn"])
    keep("pan", 0, 0.8, None)                                                                     # kept before pictures.json was
    tested = tables.table_text("cracks-full-cfd").partition("| Context-CrackNet minus |")[2].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in tested[2:]] == ["| FPN", "| U-Net"]                  # two tests, whatever else is in the table
    # in every draw of the two pictures U-Net is behind (IoU 5 / 10 and 4 / 10 against 9 / 10 and 8 / 10): p 2 / 2001, twice that by Holm
    assert tested[3].startswith("| U-Net | +0.400 | +0.400 to +0.400 | 0.0010 | 0.0020 |")
    assert tested[2].startswith("| FPN | +0.050 | ") and float(tested[2].split(" | ")[3]) > 0.4


def test_a_detector_is_tested_by_its_draws_on_the_same_pictures_alone(results, tmp_path, monkeypatch):
    """Not against pictures with damage covered, nor where a seed of a row came without its draws; in a metric that later seeds alone were
    drawn in, of those."""
    tables = results["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    hardware, names = {"gpu": None, "cpu": "some processor", "threads": 2}, {"damagenet": "DamageNet", "no-dilation": "no dilation"}

    def keep(model, seed, ap, draws, **more):
        folder, row = tmp_path / results["runs"].seeded(f"cars-full-{model}", seed), names.get(model, "no FPN")
        folder.mkdir(exist_ok=True)
        numbers = {"pictures": 2, "part": "test", "task": "detection", "model": "damagenet", "seed": seed, "data": "cars", "occlusion": 0,
                   "trained_by": {"lr": 0.1}, "stats": {"segm/AP": ap}, "intervals": {"segm/AP": [ap - 0.1, ap + 0.1]}}
        numbers["stats"] |= {metric: drawn[0] for metric, drawn in more.items()}
        rows = {row: numbers, f"{row}, a tenth occluded": {**numbers, "occlusion": 0.1}}
        run = {"seed": seed, "commits": ["0123456"], "hardware": hardware, "versions": {"torch": "2"}}
        (folder / "summary.json").write_text(json.dumps({"run": run, "rows": rows}))
        pictures = {"files": ["a.jpg", "b.jpg"], "draws": {"segm/AP": draws, **more}}
        (folder / "pictures.json").write_text(json.dumps(dict.fromkeys(rows, pictures) if draws else {}))
    for seed, draws in ((0, [0.4, 0.5]), (1, [0.6, 0.5])):
        keep("damagenet", seed, 0.5, draws)
    keep("no-dilation", 0, 0.3, [0.3, 0.3])
    keep("no-fpn", 0, 0.4, [0.1, 0.2])
    keep("no-fpn", 1, 0.4, None)
    text = tables.table_text("cars-full")
    assert text.count(" minus |") == 1 and "what another seed would change is not in them" in text
    tested = text.partition("| DamageNet minus |")[2].split("\n\n")[0].splitlines()[2:]
    assert tested == ["| no dilation | +0.200 | +0.200 to +0.200 | 0.6667 | 0.6667 |"]            # 2 / 3: in neither of two draws below 0
    assert "| no FPN | 0, 1 | - | - | 0.400 (0.400 to 0.400) |" in text
    keep("damagenet", 1, 0.5, [0.6, 0.5], **{"pixel/mIoU": [0.3, 0.4]})
    keep("no-dilation", 1, 0.3, [0.3, 0.3], **{"pixel/mIoU": [0.2, 0.2]})
    tested = tables.table_text("cars-full").partition("| DamageNet minus (seed 1) | mIoU over classes |")[2].split("\n\n")[0]
    assert tested.splitlines()[2:] == ["| no dilation | +0.100 | +0.102 to +0.198 | 0.6667 | 0.6667 |"]


def test_how_far_training_came_stands_in_a_table(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results["tables"], "HERE", tmp_path)
    (tmp_path / "steel-phase1").mkdir()
    (tmp_path / "steel-phase1" / "summary.json").write_text(json.dumps({"run": {"recipe": {"select_by": "bbox/AP50"}}}))
    rows = ["epoch,train/loss,val/loss,val/bbox/AP50", "1,3,2.5,0.1", "2,2,2,0.2", "3,1.5,1.75,0.45", "4,1.25,1.5,0.4"]
    (tmp_path / "steel-phase1" / "metrics.csv").write_text("\n".join(rows))
    rows = [line for line in results["tables"].learning_text().splitlines() if line.startswith("| `")]
    assert rows == ["| `steel-phase1` | 4 | 1.250 | 1.500 | validation bbox/AP50 | 0.200 | 0.400 | 0.450 |"]


def test_a_row_that_a_finished_run_was_not_scored_for_is_not_run(results, tmp_path, monkeypatch):
    tables, columns = results["tables"], results["runs"].CAR_COLUMNS
    hardware = {"gpu": None, "cpu": "some processor", "threads": 2}
    summary = {"run": {"seed": 0, "commits": ["0123456"], "hardware": hardware, "versions": {"torch": "2"}},
               "rows": {"DamageNet": {"pictures": 105, "stats": {"segm/AP": 0.2}, "intervals": {"segm/AP": [0.1, 0.3]}}}}
    (tmp_path / "cars-damagenet").mkdir()
    (tmp_path / "cars-damagenet" / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    lines = tables.table_text("cars").splitlines()
    ours = next(line for line in lines if line.startswith("| DamageNet |"))
    assert ours.startswith("| DamageNet | 0 | - | - | 0.200 |") and ours.endswith("| 0.100 to 0.300 | `cars-damagenet` |")
    for row in ("DamageNet, a tenth occluded", "DamageNet, a quarter occluded"):
        assert f"| {row} |  | not run{' | ' * len(columns)}`cars-damagenet` |" in lines


def test_the_flags_of_every_row_are_evaluate_py_s(results):
    for run in results["runs"].RUNS:
        for row, flags in run.rows.items():
            evaluate.check_numbers(evaluate.parse_arguments(shlex.split(flags.format(run="runs/x"))))
    rows = {row: flags for run in results["runs"].RUNS if run.table == "cars" for row, flags in run.rows.items()}
    assert [row for row, flags in rows.items() if evaluate.parse_arguments(shlex.split(flags)).occlude == 0.1] \
        == ["DamageNet, a tenth occluded", "Mask R-CNN, a tenth occluded"]


def test_the_budget_goes_on_with_what_was_begun_then_with_first_seeds(results, tmp_path, monkeypatch):
    runs, reproduce = results["runs"], results["reproduce"]
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    of = lambda name, table: runs.Run(name, table, "", {"row": ""}, "gpu")
    listed = [of("a-seed1", "a"), of("a", "a"), of("b", "b"), of("b2", "b"), of("c-begun-seed2", "c")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text("{}")
    begun = tmp_path / "work" / "c-begun-seed2" / "danet-neu_det-001"
    begun.mkdir(parents=True)
    (begun / "last.pt").touch()
    (begun / "metrics.csv").write_text("epoch\n1\n")
    (begun / "config.json").write_text(json.dumps({"run": {"recipe": {"epochs": 4}}}))
    assert [run.name for run in reproduce.missing_most(listed)] == ["c-begun-seed2", "a", "b2", "a-seed1"]
    monkeypatch.setenv("MINIDAMAGE_DATA", str(tmp_path))
    assert reproduce.lacks(runs.Run("v", "v", "--model danet --data {data}/VOC2007", {}, "gpu")) == str(tmp_path / "VOC2007")
    assert reproduce.lacks(runs.Run("p", "p", "", {}, "cpu", peer="no_such_package")) == "the package no_such_package"
    (tmp_path / "body_int8.pth").touch()
    unpack = f"{tmp_path / 'body.pth'} (in {tmp_path}: python unpack.py body.pth)"
    assert reproduce.lacks(runs.Run("w", "w", "--data {data} --pretrained {data}/body.pth", {}, "cpu")) == unpack
    assert not reproduce.lacks(runs.Run("d", "d", "", {}, "cpu")) and not reproduce.lacks(runs.Run("d", "d", "--data {data}", {}, "cpu"))
    assert reproduce.share_done(listed[-1]) == 0.25 and reproduce.is_done(listed[2])


def test_what_models_cost_stands_beside_the_papers(results, tmp_path, monkeypatch):
    tables = results["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert tables.complexity_text() == "not run: `python evaluate.py --complexity --out results/complexity`"
    cost = lambda parameters, count, ms: {"parameters": int(parameters), "multiply-adds": count, "multiply-adds, output rule": 2 * count,
                                          "ms": ms, "peak MB": None}
    content = {"command": "python evaluate.py --complexity", "picture": "1 x 3 x 448 x 448, float32", "commit": "0123456789",
               "detector picture": "1 x 3 x 1024 x 1024, float32", "versions": {"torch": "2"},
               "hardware": {"gpu": None, "cpu": "some processor", "threads": 2}, "paper": complexity.PAPER,
               "paper context ms": complexity.PAPER_CONTEXT_MS,
               "models": {"unet": cost(32.52e6, 10e9, 150.0), "custom_unet": cost(1e6, 1e9, 9.0)},
               "detectors": {"damagenet, context_groups=1": cost(53e6, 400e9, 16000.0), "maskrcnn_resnet50_fpn": cost(44e6, 195e9, 3500.0)},
               "context": {"context_groups=1": cost(9_437_200, 205e9, 2400.0)}}
    (tmp_path / "complexity").mkdir()
    (tmp_path / "complexity" / "complexity.json").write_text(json.dumps(content))
    lines = tables.complexity_text().splitlines()
    assert "| U-Net | 32.52 | 32.52 | 20.00 | 40.00 | 65.60 | 150.0 | 7.67 |  |" in lines
    assert "| CustomUNet | 1.00 |  | 2.00 | 4.00 |  | 9.0 |  |  |" in lines
    assert "| damagenet, context_groups=1 | 53.00 | 400.0 | 205.0 | 16000.0 | 12500.0 |  |" in lines
    assert "| maskrcnn_resnet50_fpn | 44.00 | 195.0 |  | 3500.0 |  |  |" in lines
    assert "| the context blocks alone, context_groups=1 | 9.44 | 205.0 |  | 2400.0 |  |  |" in lines
    assert "12 ms a picture more" in "".join(lines) and lines[-1].endswith("some processor, 2 threads, torch 2, commit 0123456.")
    for header, row in zip(lines, lines[1:]):
        assert not (header.startswith("|") and row.startswith("|")) or header.count("|") == row.count("|")


def test_tables_are_written_between_the_readme_s_marks(results, tmp_path, monkeypatch):
    tables = results["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- table: complexity -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "results" / "README.md").write_text("<!-- table: index -->\n<!-- end -->\n")
    tables.write_tables()
    said = "not run: `python evaluate.py --complexity --out results/complexity`\n"
    assert (tmp_path / "README.md").read_text() == f"before\n<!-- table: complexity -->\n{said}<!-- end -->\nafter\n"
    assert (tmp_path / "results" / "complexity.md").read_text() == f"# What models cost\n\n{said}"
    index = (tmp_path / "results" / "README.md").read_text()
    assert "| [steel](steel.md) | DANet on NEU-DET, reduced | DANet, Table 3 | 0 of 2 |" in index
    assert "| [voc-full](voc-full.md) | DANet on Pascal VOC 2007 | DANet, section IV.D | 0 of 2, wait for a GPU and for the data |" in index
    for page, names in ((RESULTS.parent / "README.md", ("glance", "speed-glance")), (RESULTS / "README.md", ("index", "cars", "complexity"))):
        assert all(f"<!-- table: {name} -->\n|" in page.read_text() for name in names)


def test_what_is_kept_names_no_folder_of_the_machine_that_made_it(results, tmp_path):
    reproduce, tree = results["reproduce"], tmp_path / "elsewhere"
    made = {"commands": [f"python {tree}/train.py --data /d/cfd --out {tree}/runs/reproduce/NAME"], "args": {"out": f"{tree}/runs"}, "seed": 0}
    kept = {"commands": ["python train.py --data $MINIDAMAGE_DATA/cfd --out runs/reproduce/NAME"], "args": {"out": "runs"}, "seed": 0}
    assert reproduce.without_paths(made, "/d", tree) == kept
    for path in RESULTS.glob("*/summary.json"):
        assert not re.search(r'"(python |[^"]*")?/(root|home|tmp)/', path.read_text()), path
