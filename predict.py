"""Finds damage in your own photographs: an overlay picture and a JSON file for each; of cracks also the mask, lengths and widths.

    python predict.py photo.jpg                                the newest run's best.pt, results in predictions/
    python predict.py photos/ more/ --checkpoint runs/damagenet-demo-001/best.pt --out found/
    python predict.py photo.jpg --explain                      also the model's stages, or where its attention lies
    python predict.py photo.jpg --checkpoint runs/unet-cfd-001 --beside runs/pan-cfd-001      also one picture of what both find
    python predict.py wall.jpg --checkpoint runs/context_cracknet-cracks-001 --tile 448 --mm-per-px 0.3      a large picture of cracks

Everything in the JSON is in pixels of the photograph as it is seen (after its EXIF rotation), whatever size the model
works at. The photographs themselves are never written to.
"""
import collections
import contextlib
import dataclasses
import errno
import json
import os
import re
import sys
import tempfile
import time

import numpy as np
import torch

from minidamage import masks as mask_codec
from minidamage import skeleton
from minidamage.checkpoint import choose_device, load_checkpoint, score_thresholds
from minidamage.command_line import Parser, ended
from minidamage.data import read_image
from minidamage.data.folders import walk
from minidamage.data.mask_folders import folders_of_masks
from minidamage.data.pictures import is_picture_name
from minidamage.data.record import number_of
from minidamage.layers.segmenter import label_map_of
from minidamage.run_folder import find_checkpoint
from minidamage.tiling import check_tile, suggestion, tiled_probabilities
from minidamage.visualize.label_maps import draw_attention, draw_cracks, save_label_map
from minidamage.visualize.overlay import draw_detections, grid, save_picture
from minidamage.visualize.stages import draw_stages

FORMAT = "minidamage prediction"
NOTES = {"pixels": "of the photograph as seen, after its EXIF rotation; boxes are x1, y1, x2, y2 and polygons x, y, with (0, 0) the "
                   "outer corner of the first pixel",
         "polygons": "each has an outer ring and holes; they run along pixel edges and enclose exactly the mask's pixels",
         "rle": "the same mask as COCO run lengths (columns first, compressed)",
         "area_share": "of the photograph, not of the car: it changes with the distance the photograph was taken from"}
MAP_NOTES = {"score_thresholds": "the probability above which a pixel counts; of several classes null, and each pixel has its likeliest",
             "pixels": "of the photograph as seen, after its EXIF rotation; boxes are x1, y1, x2, y2, with (0, 0) the outer corner of the "
                       "first pixel; <name>.mask.png holds the label of every pixel",
             "pieces": "connected pixels of one class (8 neighbours), the largest first",
             "totals": "of all pieces of a class; the mean width weighs each by its length",
             "length": "steps of 1 and sqrt(2) along the skeleton, and half the width at each free end; up to 8 % too long at 22 "
                       "degrees, and up to half a width more at each blunt end",
             "thin": "whether the mean width is at most a third of the length; of other pieces length and width mean little",
             "width": "local width of the mask at each pixel of the skeleton, mean and largest; side branches shorter than the crack is "
                      "wide are left out",
             "mm": "lengths and widths times --mm-per-px, which holds for a flat surface seen straight on"}
THIN = 1 / 3                                                 # mean width of a line, as a share of its length
MOST_PIXELS = 10 ** 9                                        # no photograph that is read has as many
MANY_PIECES = 100                                            # in one photograph: most of them are specks
OTHER_FORMATS = (".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")      # of photographs
PICTURES = (".overlay.jpg", ".stages.png", ".mask.png", ".attention.png", ".beside.jpg")                # beside a photograph's .json
JPEG_SIDE = 65_500                                           # pixels that a side of an overlay may have
DEMO_NOTE = "this model was trained on the drawn demo set; what it finds in real photographs means nothing"


def main(argv=None):
    """Returns the exit code: 0, 1 where no photograph could be read or no result written, 2 for a mistake in what was asked."""
    args = parse_arguments(argv)
    try:
        check_numbers(args)
        photographs = find_photographs(args.photographs, args.out)
        device = choose_device(args.device)
        models = [load(run, device, args) for run in (args.checkpoint, *args.beside)]
        if os.path.isfile(args.out):
            raise ValueError(f"--out {args.out}: expected a folder, this is a file")
        os.makedirs(args.out, exist_ok=True)
    except BrokenPipeError:                                   # | head: `ended`
        raise
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    for each, asked, _ in models:
        introduce(each, asked, device)
    model, _, trained_side = models[0]
    segments = model.task == "segmentation"
    if args.explain and segments and not hasattr(model, "attention_maps"):
        print(f"note: --explain: {model.name} has no attention maps to show (context_cracknet has, detectors have stages)")
        args.explain = False

    found, skipped, names, advised = [], [], {}, False        # found: the class names in each photograph that was read
    for number, path in enumerate(photographs, 1):
        began, place = time.perf_counter(), f"{number}/{len(photographs)}"
        try:
            image, seen, stem = results_of(path, models, args, names)
        except Skipped as error:
            skipped.append(str(error))
            print(f"{place} skipped  {error}", file=sys.stderr)
            continue
        except OSError as error:
            print(f"predict.py: could not write to {args.out}: {error.strerror or error}; the results before this one are whole",
                  file=sys.stderr)
            return 1
        found.append(seen.classes)
        print(f"{place} {path}  {image.shape[1]}x{image.shape[0]}  {seen.words}  {time.perf_counter() - began:.2f} s  "
              f"-> {stem}.overlay.jpg", flush=True)
        advice = suggestion(*image.shape[:2], model.config.image_size, trained_side) if segments and not (args.tile or advised) else ""
        advised = advised or bool(advice)
        for remark in (*seen.remarks, *[advice] * bool(advice)):
            print(f"    {remark}")
    print_summary(found, skipped, args, segments)
    return 0 if found else 1


class Skipped(Exception):
    """A photograph that gets no results; the message says why."""


def results_of(path, models, args, names):
    """(picture, Seen, the results' names without their endings) of one photograph, written.

    models: of `load`, the first one whose results these are, the others for beside. names: as `output_stem` has it. Raises Skipped, and
    OSError where nothing more can be written.
    """
    (model, about, _), *others = models
    try:
        image = read_image(path)
    except ValueError as error:
        raise Skipped(str(error)) from None
    longest = skeleton.LONGEST_SIDE if model.task == "segmentation" else JPEG_SIDE
    if max(image.shape) > longest:
        raise Skipped(f"{path}: {image.shape[1]}x{image.shape[0]}, expected at most {longest} pixels a side; cut it into several")
    seen = (segment if model.task == "segmentation" else find_objects)(model, path, image, about, args.explain)
    if others:
        seen.pictures[".beside.jpg"] = beside_each_other(image, seen.overlay, about, others)
    stem = os.path.join(args.out, output_stem(path, args.out, names, [".json", *seen.pictures]))
    try:
        write_together(stem, seen)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise Skipped(f"{path}: the names of its results are too long for --out {args.out}; give the photograph a shorter name") from None
    return image, seen, stem


@dataclasses.dataclass
class Seen:
    """What a model sees in one photograph; nothing of it is written yet."""

    classes: list                       # the class name of each finding, or of each piece
    words: str                          # one line on them
    overlay: np.ndarray                 # uint8 [H, W, 3], of a small photograph enlarged
    content: dict                       # of the JSON
    pictures: dict                      # ending of the picture's name -> write(path)
    remarks: list                       # sentences on what the line could mislead about


def parse_arguments(argv):
    parser = Parser(description="Find damage in photographs: an overlay picture and a JSON file for each.")
    add = parser.add_argument
    add("photographs", nargs="+", metavar="PHOTO_OR_FOLDER",
        help="JPEG, PNG, BMP, TIFF or WebP files, or folders of them (searched to any depth)")
    add("--checkpoint", default="", metavar="F", help="a .pt file or a run folder (default: best.pt of the newest run under runs/)")
    add("--out", default="predictions", metavar="DIR", help="folder for the results, made when missing (default: %(default)s)")
    add("--score", type=float, metavar="S", help="lowest score of a finding, 0 to 1 (default: the checkpoint's threshold of each class, "
        "chosen on its validation part; 0.5 where it has none)")
    add("--explain", action="store_true", help="also draw the model's stages: picture, proposals, context map, boxes, raw mask, filled "
        "mask, result; of Context-CrackNet its attention maps")
    add("--beside", action="append", default=[], metavar="F", help="a further checkpoint or run folder: what it finds is drawn beside, as "
        "<name>.beside.jpg; may be repeated")
    add("--tile", type=int, default=0, metavar="SIDE", help="segmentation: cut the photograph into tiles of this many pixels a side, each "
        "looked at on its own, and blend them; best as large as the pictures of the training (default: the whole photograph, reduced to "
        "the model's size)")
    add("--overlap", type=int, metavar="PX", help="pixels that neighbouring tiles share (default: a quarter of a tile)")
    add("--min-area", type=int, default=0, metavar="PX", help="segmentation: connected pieces of fewer pixels are left out of mask, "
        "overlay and JSON (default: none)")
    add("--mm-per-px", type=float, metavar="MM", help="segmentation: millimetres a pixel of the photograph; lengths and widths are then "
        "given in millimetres too")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    return parser.parse_args(argv)


def check_numbers(args):
    """ValueError for a number that makes no sense, whatever the model; fills in --overlap."""
    if args.mm_per_px is not None and not 0 < args.mm_per_px < float("inf"):
        raise ValueError(f"--mm-per-px: expected millimetres a pixel above 0, got {args.mm_per_px}")
    if not 0 <= args.min_area < MOST_PIXELS:
        raise ValueError(f"--min-area: expected 0 or more pixels, fewer than {MOST_PIXELS:,}, got {args.min_area}")
    if args.overlap is None:
        args.overlap = args.tile // 4
    if args.tile:
        check_tile(args.tile, args.overlap)


def check_flags(args, model):
    """ValueError for a flag that the model, or its task, has no use for."""
    if model.task != "segmentation":
        for flag in ("tile", "overlap", "mm_per_px", "min_area"):
            if getattr(args, flag):
                raise ValueError(f"--{flag.replace('_', '-')} is for segmentation models, the checkpoint holds {model.name} "
                                 f"({model.task}); leave it out")
        return
    if args.overlap and not args.tile:
        raise ValueError("--overlap: expected --tile SIDE with it, got none")


def find_photographs(paths, out):
    """The files to read, each once, in the order given (folders sorted). ValueError where there is nothing to read.

    Results of earlier runs that lie in a folder are not taken for photographs; the output folder must not be one that
    photographs are read from, so that no result can take a photograph's place.
    """
    out = os.path.realpath(out)
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"{path}: expected a photograph or a folder, there is no such file")
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        if os.path.realpath(folder) == out:
            raise ValueError(f"--out {out}: expected another folder than the one the photographs are in; for example "
                             f"--out {os.path.join(out, 'predictions')}")
        if not os.path.isdir(path):
            found.append(path)
            continue
        inside, others, closed = [], [], []
        for parent, folders, files in walk(path, onerror=closed.append):
            masks = folders_of_masks(folders)
            if masks:
                listed = ", ".join(os.path.join(parent, name) for name in masks)
                print(f"note: passed over {listed}: by the name, masks of the pictures beside")
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in masks)
            pictures = [os.path.join(parent, name) for name in sorted(files) if is_picture_name(name)]
            photographs = [path for path in pictures if not is_result(path)]
            if photographs and os.path.realpath(parent) == out:
                raise ValueError(f"--out {out}: expected a folder without photographs, got {photographs[0]} in it; move it away (of a "
                                 f"result, its .json is gone), or name another folder, for example --out {out}-2")
            inside += photographs
            others += [os.path.join(parent, name) for name in sorted(files)
                       if name.lower().endswith(OTHER_FORMATS) and not name.startswith(".")]
        say_passed_over(others, closed)
        if not inside:
            raise ValueError(f"{path}: expected a folder with photographs (.jpg, .png, .bmp, .tif, .webp), found none in it")
        found += inside
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def is_result(path):
    """Whether the JSON beside a picture says that predict.py made it."""
    return any(path.endswith(ending) and path in results_at(path.removesuffix(ending))[1] for ending in PICTURES)


def say_passed_over(others, closed):
    """Warns of photographs in formats that are not read, and of folders (the OSErrors they were met with) that cannot be listed."""
    if others:
        print(f"WARNING: passed over {number_of(len(others), 'photograph')} in formats that are not read: {first_few(others)}; convert "
              "them to JPEG", file=sys.stderr)
    if closed:
        print(f"WARNING: passed over {number_of(len(closed), 'folder')} that cannot be listed ({closed[0].strerror}): "
              f"{first_few([str(error.filename) for error in closed])}", file=sys.stderr)


def first_few(names, most=3):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(run, device, args):
    """(model, what is asked of it, side of the pictures it was trained on or None) of a checkpoint, or of a run's best."""
    path = find_checkpoint(run, "runs", "best.pt")
    model, checkpoint = load_checkpoint(path, device)
    check_flags(args, model)
    return model, what_is_asked(model, checkpoint, path, args), checkpoint.get("run", {}).get("picture_side")


def what_is_asked(model, checkpoint, path, args):
    """What the JSON says of the model and of how it was used. ValueError for a --score that is none."""
    segments, names = model.task == "segmentation", list(checkpoint["class_names"])
    thresholds = score_thresholds(checkpoint, args.score, model.task)
    about = {"model": checkpoint["model"], "checkpoint": path, "class_names": names,
             "score_thresholds": None if segments and len(names) > 1 else thresholds}
    about |= ({flag: getattr(args, flag) for flag in ("tile", "overlap", "min_area", "mm_per_px")} if segments
              else {"mask_threshold": getattr(model.config, "mask_threshold", None)})
    if checkpoint.get("run", {}).get("args", {}).get("data") == "demo":
        about["note"] = DEMO_NOTE
    if checkpoint.get("measured") and args.score is None:                       # at the checkpoint's own scores
        about["measured_on_validation"] = {name: {key: None if value != value else round(value, 4) for key, value in numbers.items()}
                                           for name, numbers in checkpoint["measured"].items()}
    return about


def introduce(model, about, device):
    """Says which model it is, from which score a finding counts, and how it did on its validation part."""
    thresholds = about["score_thresholds"]
    lowest = ", ".join(f"{name} {score:.2f}" for name, score in thresholds.items()) if thresholds else ""
    print(f"{about['model']} from {about['checkpoint']} on {device}; "
          + (f"lowest score of a finding: {lowest}" if thresholds else "each pixel's likeliest class"))
    if "measured_on_validation" in about:
        print(f"  on the run's validation part, which chose this checkpoint too (expect less elsewhere): "
              f"{worth(about['measured_on_validation'], model.task == 'segmentation')}")
    if "note" in about:
        print(f"  note: {about['note']}")


def find_objects(model, path, image, about, explain):
    """What a detector sees in one photograph uint8 [H, W, 3]. The overlay of a small one (up to 320 pixels) is a whole number of times
    larger; what the JSON says never is."""
    detections, below, stages = detect(model, image, about, explain)
    overlay = drawn_detections(image, detections, about)
    pictures = {".overlay.jpg": lambda place: save_picture(place, overlay)}
    if stages is not None:
        pictures[".stages.png"] = lambda place: save_picture(place, stages)
    classes = [about["class_names"][label - 1] for label in detections["labels"]]
    words = in_words(classes, detections["scores"]) if classes else f"nothing found{below}"
    return Seen(classes, words, overlay, describe(path, image, detections, about), pictures, [])


def detect(model, image, about, explain=False):
    """(detections, words on the best one left out, picture of the stages or None) for one photograph uint8 [H, W, 3].

    detections: boxes [D, 4], labels [D], scores [D] as numpy and masks as RLE dicts (absent where the model has none), those at or
    above their class's threshold, best first.
    """
    thresholds, class_names = about["score_thresholds"], about["class_names"]
    tensor = as_tensor(image).to(next(model.parameters()).device)
    with torch.inference_mode():
        result = model.detect([tensor], mask_form="rle", stages=explain)
    results, stages = result if explain else (result, [None])
    found = results[0]
    lowest = torch.tensor([thresholds[name] for name in class_names])
    scores, labels = found["scores"].float().cpu(), found["labels"].cpu()
    needed = lowest[labels - 1]
    left_out = (scores - needed).masked_fill(scores >= needed, -1)
    below = ""
    if len(left_out) and left_out.max() > -1:
        nearest = int(left_out.argmax())
        digits = 2 if f"{scores[nearest]:.2f}" != f"{needed[nearest]:.2f}" else 4
        below = f" (nearest: {class_names[labels[nearest] - 1]} {scores[nearest]:.{digits}f}, needs {needed[nearest]:.{digits}f})"
    kept = torch.nonzero(scores >= needed).flatten()
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)]
    detections = {"boxes": found["boxes"].float().cpu()[kept].numpy(), "labels": labels[kept].numpy(), "scores": scores[kept].numpy()}
    if "masks" in found:
        detections["masks"] = [found["masks"][i] for i in kept.tolist()]
    picture = draw_stages(image, stages[0], class_names, kept, getattr(model.config, "context", False)) if explain else None
    return detections, below, picture


def output_stem(path, out, names, endings):
    """The results' file name without ending: the photograph's, with a number where another photograph has that name.

    names: {stem: photograph} of this run, added to. endings: of the files to write. Results of an earlier run make way only for the same
    photograph; a file that predict.py did not write never does.
    """
    base = os.path.splitext(os.path.basename(path))[0]
    source = os.path.realpath(path)
    for number in range(1, 1_000_000):
        stem = base if number == 1 else f"{base}-{number}"
        taken = names.get(stem.lower())                       # some file systems do not tell A.json from a.json
        if taken is None and _free_for(os.path.join(out, stem), source, endings):
            names[stem.lower()] = source
            return stem
    raise ValueError(f"{out}: a million results named {base} are there already; name another --out")


def _free_for(stem, source, endings):
    there = {stem + ending for ending in endings if os.path.lexists(stem + ending)}
    photograph, files = results_at(stem)
    return there <= (files if photograph == source else set())


def results_at(stem):
    """(photograph, {path, ...}) of the results that the JSON at a stem tells of; (None, set()) where there is none of predict.py's."""
    try:
        with open(stem + ".json", encoding="utf-8") as stream:
            content = json.load(stream)
        if content["format"] == FORMAT:
            name, known = os.path.basename(stem), (".json", *PICTURES)
            listed = content.get("files", [name + ending for ending in known])                # an older version does not say
            return content["photograph"], {stem + ending for ending in known if name + ending in listed}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, set()


def write_together(stem, seen):
    """Writes all results of a photograph into a folder beside, and then gives them their places: what fails or is stopped before leaves
    an earlier run's results as they were. The JSON comes first: it says which the others are (`results_at`). What an earlier run made of
    the photograph and this one does not, goes."""
    name, (_, earlier) = os.path.basename(stem), results_at(stem)
    endings = (".json", *seen.pictures)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=os.path.dirname(stem)) as folder:
        head = {key: seen.content[key] for key in ("format", "version", "photograph")}
        write_json(os.path.join(folder, name + ".json"), {**head, "files": [name + ending for ending in endings], **seen.content})
        for ending, write in seen.pictures.items():
            write(os.path.join(folder, name + ending))
        for path in earlier - {stem + ending for ending in endings}:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        for ending in endings:
            os.replace(os.path.join(folder, name + ending), stem + ending)


def write_json(path, content):
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(json_text(content))


def drawn_detections(image, detections, about):
    return draw_detections(image, detections["boxes"], detections["labels"], detections["scores"], detections.get("masks"),
                           about["class_names"], enlarge=True)


def describe(path, image, detections, about):
    """The JSON's content: what was looked at, with what, and each finding with box, polygons, RLE and area."""
    H, W, _ = image.shape
    findings = []
    for i, (box, label, score) in enumerate(zip(detections["boxes"], detections["labels"], detections["scores"])):
        finding = {"class": about["class_names"][label - 1], "label": int(label), "score": round(float(score), 6),
                   "box": [round(float(edge), 3) for edge in box]}
        if "masks" in detections:
            rle = detections["masks"][i]
            area = int(mask_codec.area(rle))
            counts = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
            finding |= {"area": area, "area_share": area / (H * W), "polygons": polygons_of(rle),
                        "rle": {"size": [int(side) for side in rle["size"]], "counts": counts}}
        findings.append(finding)
    return {"format": FORMAT, "version": 1, "photograph": os.path.realpath(path), "width": W, "height": H, **about, "notes": NOTES,
            "detections": findings}


def polygons_of(rle):
    """[{"outer": [[x, y], ...], "holes": [[[x, y], ...], ...]}, ...]: one entry a connected piece of the mask, whole numbers."""
    return [{"outer": outer.astype(int).tolist(), "holes": [hole.astype(int).tolist() for hole in holes]}
            for outer, holes in mask_codec.to_polygons(mask_codec.decode(rle))]


def json_text(value):
    """Indented JSON with every list of numbers, or of points, on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    numbers = r"\[\n[-+\d.eE,\s\[\]]*\]"                   # a line break: inside a JSON string there is none, so no name is touched
    return re.sub(numbers, lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


# ---------------------------------------------------------------------------------------------------------- pixel labels

def segment(model, path, image, about, explain):
    """What a segmenter sees in one photograph uint8 [H, W, 3]."""
    names = about["class_names"]
    label_map, probabilities = labelled(model, image, about)
    content = describe_map(path, label_map, probabilities.cpu().numpy(), about)
    overlay = draw_cracks(image, label_map, names)
    pictures = {".mask.png": lambda place: save_label_map(place, label_map, names),
                ".overlay.jpg": lambda place: save_picture(place, overlay)}
    if explain:
        with torch.inference_mode():
            maps = model.attention_maps([as_tensor(image)])[0]
        pictures[".attention.png"] = lambda place: save_picture(place, draw_attention(image, maps, label_map, names))
    classes = [piece["class"] for piece in content["pieces"]]
    return Seen(classes, map_in_words(content, probabilities), overlay, content, pictures, remarks_on(content))


def labelled(model, image, about):
    """(label map [H, W] without the pieces that --min-area leaves out, probabilities [C, H, W]) of a photograph uint8 [H, W, 3]."""
    tensor, names = as_tensor(image), about["class_names"]
    with torch.inference_mode():
        if about["tile"]:
            probabilities = tiled_probabilities(model, tensor, about["tile"], about["overlap"])
        else:
            probabilities = model.probabilities([tensor], at="native")[0]
    threshold = about["score_thresholds"][names[0]] if about["score_thresholds"] else 0.5                  # of several classes: not used
    label_map = label_map_of(probabilities, threshold).cpu().numpy()
    for label in range(1, len(names) + 1) if about["min_area"] > 1 else ():
        mask = label_map == label
        label_map[mask & ~mask_codec.remove_islands(mask, about["min_area"])] = 0
    return label_map, probabilities


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def describe_map(path, label_map, probabilities, about):
    """The JSON's content: share of each class, and for each connected piece where it is, how long, how wide and how sure."""
    H, W = label_map.shape
    pieces, totals = [], {}
    for label, name in enumerate(about["class_names"], 1):
        mask = label_map == label
        numbers, _ = mask_codec.connected_components(mask)
        channel = probabilities[0 if len(probabilities) == 1 else label]
        sums = np.bincount(numbers.ravel(), channel.ravel().astype(np.float64))           # of each piece
        found = skeleton.measure(mask)
        for piece in found:
            pieces.append({"class": name, "label": label, "box": list(piece.box), "area_share": piece.area / (H * W),
                           **measures([piece], about["mm_per_px"]), "free_ends": piece.ends, "loops": piece.loops,
                           "thin": piece.mean_width <= THIN * piece.length,
                           "mean_probability": round(float(sums[piece.label] / piece.area), 4)})
        totals[name] = {"pieces": len(found), **measures(found, about["mm_per_px"])}
    shares = {name: float((label_map == label).mean()) for label, name in enumerate(about["class_names"], 1)}
    return {"format": FORMAT, "version": 1, "photograph": os.path.realpath(path), "width": W, "height": H, **about, "notes": MAP_NOTES,
            "area_share": shares, "totals": totals, "pieces": sorted(pieces, key=lambda piece: -piece["area_px"])}


def measures(pieces, mm_per_px):
    """Area, length and widths of pieces together, in pixels and, with a scale, in millimetres. The mean width is weighted by length."""
    area, length = sum(piece.area for piece in pieces), sum(piece.length for piece in pieces)
    mean_width = sum(piece.mean_width * piece.length for piece in pieces) / length if length else 0.0
    lines = {"length": length, "mean_width": mean_width, "max_width": max((piece.max_width for piece in pieces), default=0.0)}
    found = {"area_px": area, **{f"{name}_px": round(value, 2) for name, value in lines.items()}}
    if mm_per_px is not None:
        found |= {f"{name}_mm": round(value * mm_per_px, 3) for name, value in lines.items()}
        found["area_mm2"] = round(area * mm_per_px ** 2, 3)
    return found


def map_in_words(content, probabilities):
    """One line on a photograph: pieces, their length together, the largest width."""
    pieces = content["pieces"]
    if not pieces:
        highest = float(probabilities[0].max() if len(probabilities) == 1 else probabilities[1:].max())
        large = f" of {content['min_area']} px or more (--min-area)" if content["min_area"] > 1 else ""
        return f"nothing{large} found (highest probability {highest:.2f})"
    unit = "mm" if content["mm_per_px"] else "px"
    length = sum(total[f"length_{unit}"] for total in content["totals"].values())
    width = max(total[f"max_width_{unit}"] for total in content["totals"].values())
    return (f"{len(pieces)} piece{'s' * (len(pieces) != 1)}, {length:,.0f} {unit} long together, at most {width:.1f} {unit} wide, "
            f"{sum(content['area_share'].values()):.2%} of the picture")


def remarks_on(content):
    """Sentences on what the line on the photograph could mislead about: a widest piece that is no line but a patch; many specks."""
    pieces, remarks = content["pieces"], []
    thick = [piece for piece in pieces if not piece["thin"]]
    if thick and max(piece["max_width_px"] for piece in thick) == max(piece["max_width_px"] for piece in pieces):
        which = "1 piece is" if len(thick) == 1 else f"{len(thick)} pieces are"
        remarks.append(f"{which} not thin, the widest too (mean width above a third of the length): of those length and width mean little")
    if len(pieces) > MANY_PIECES:
        remarks.append(f"{len(pieces)} pieces: --min-area 50 leaves out those of fewer than 50 pixels")
    return remarks


# ---------------------------------------------------------------------------------------------------------- models beside each other

def beside_each_other(image, overlay, about, others):
    """write(path) of one picture: the photograph, the first model's overlay and what each of the others finds (Context-CrackNet's Fig. 5;
    with DamageNet's ablations its Fig. 7)."""
    views = [image, overlay]
    for model, asked, _ in others:
        views.append(draw_cracks(image, labelled(model, image, asked)[0], asked["class_names"]) if model.task == "segmentation"
                     else drawn_detections(image, detect(model, image, asked)[0], asked))
    titles = ["photograph", *titles_of([about, *(asked for _, asked, _ in others)])]
    return lambda place: save_picture(place, grid(views, titles, columns=min(len(views), 4)))


def titles_of(models):
    """["unet, unet-cfd-001", ...]: each model and its run, by as much of its path as tells the runs apart."""
    paths = [os.path.abspath(about["checkpoint"]) for about in models]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [f"{about['model']}, {os.path.relpath(path, shared).removesuffix(os.sep + 'best.pt')}" for about, path in zip(models, paths)]


# ---------------------------------------------------------------------------------------------------------- words

def worth(measured, segments, most=8):
    """"dent 61% found, 45% of its findings right, ..." of the JSON's measured_on_validation."""
    share = lambda value: "n/a" if value is None else f"{value:.0%}"                   # None: no truth of the class, or no finding
    found, right = ("of its pixels found", "of what it marks right") if segments else ("found", "of its findings right")
    listed = [f"{name} {share(numbers['recall'])} {found}, {share(numbers['precision'])} {right}" for name, numbers in measured.items()]
    return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more classes" if len(listed) > most else "")


def in_words(classes, scores, most=6):
    listed = [f"{name} {score:.2f}" for name, score in zip(classes, scores)]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def print_summary(found, skipped, args, segments):
    """found: the class names of the findings in each photograph. skipped: what was wrong with each of the others."""
    counts = collections.Counter(name for classes in found for name in classes)
    damaged, explained = sum(map(bool, found)), "attention" if segments else "stages"
    print(f"\n{len(found)} photograph{'s' * (len(found) != 1)}: {damaged} with findings, {len(found) - damaged} without"
          + f" (findings: {', '.join(f'{name} {number}' for name, number in counts.most_common())})" * bool(counts))
    if skipped:
        print(f"{len(skipped)} could not be read or written, see above")
    if found:
        print(f"overlays: {os.path.join(args.out, '*.overlay.jpg')}   data: {os.path.join(args.out, '*.json')}"
              + f"   masks: {os.path.join(args.out, '*.mask.png')}" * segments
              + f"   {explained}: {os.path.join(args.out, f'*.{explained}.png')}" * args.explain
              + f"   beside each other: {os.path.join(args.out, '*.beside.jpg')}" * bool(args.beside))


if __name__ == "__main__":
    try:
        sys.exit(ended(main))
    except KeyboardInterrupt:
        print("\npredict.py: stopped; the results so far are whole", file=sys.stderr)
        sys.exit(130)
