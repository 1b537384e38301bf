"""The threshold that turns probabilities into pixels, chosen on the validation part once training is done; train.py writes it into best.pt.

A detector's: tau of DamageNet, section III.A, tuned (section IV, figure 7 H); on which part is not stated, and ours is never the test
part. A segmenter's of one class: where the pooled F1, and so the pooled IoU, is highest. With several classes the likeliest wins: nothing
to choose.
"""
from minidamage import distributed
from minidamage.layers.detector import masks_in_form
from minidamage.layers.segmenter import IGNORE
from minidamage.metrics.detection import CocoEvaluator
from minidamage.metrics.thresholds import THRESHOLDS, ThresholdSweep
from minidamage.validation import add_picture, evaluator_of

MASK_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)                           # tau, tried on the validation part
FAR = 0.2                                                             # that one picture moves the threshold: it was that picture's choice
NEARLY_ALL = 0.95                                                     # of the pixels: found everywhere is not found at all


def score_mask_thresholds(model, batches, class_names, stop):
    """{tau: DetectionResult} of the validation part, the network run once; None when a signal came.

    batches: of one picture, this process's share; what all of them found is scored in process 0, the others return {}.
    """
    evaluators = {tau: evaluator_of(model, class_names) for tau in MASK_THRESHOLDS}
    for images, targets in batches:
        if stop.requested:
            break
        size, raw = tuple(images[0].shape[-2:]), model.detect(images, mask_form="raw")[0]
        for tau, evaluator in evaluators.items():
            rles = masks_in_form(raw["masks"], raw["boxes"], size, "rle", tau, model.refine_masks)
            add_picture(evaluator, targets[0], {**raw, "masks": rles}, size)
    if distributed.any_of(stop.requested):
        return None
    gathered = distributed.gather_to_main(evaluators)
    return {tau: CocoEvaluator.joined([each[tau] for each in gathered]).evaluate() for tau in MASK_THRESHOLDS} if gathered else {}


def take_mask_threshold(checkpoint, results, default):
    """Writes the best tau, the score thresholds that go with it and what they are worth into a checkpoint dict; nothing where every AP is
    0 or NaN.

    Returns "segm/AP 0.123 at mask threshold 0.4", or "" where it stays as it was."""
    found = {tau: result.stats["segm/AP"] for tau, result in results.items() if result.stats["segm/AP"] > 0}      # NaN: no truth at all
    if not found:
        print(f"mask threshold {default}, as it was: segm/AP on the validation part is 0, or not a number, at every other as well")
        return ""
    tau = max(found, key=lambda tau: (found[tau], -abs(tau - default)))
    thresholds = results[tau].best_thresholds()
    checkpoint["config"]["mask_threshold"], checkpoint["thresholds"] = tau, thresholds
    checkpoint["measured"] = results[tau].measured(thresholds)
    checkpoint["metrics"] = {**checkpoint["metrics"], **results[tau].stats}
    tried = ", ".join(f"{tau} {result.stats['segm/AP']:.4f}" for tau, result in results.items())
    print(f"mask threshold {tau}, chosen on the validation part by segm/AP: {tried}")
    return "" if tau == default else f"segm/AP {results[tau].stats['segm/AP']:.3f} at mask threshold {tau}"


def score_pixel_thresholds(model, batches, stop):
    """The SweepResult of the validation part, at the size it is trained at; None when a signal came. batches: as above; processes other
    than 0 return the result of no picture."""
    sweep = ThresholdSweep()
    for images, targets in batches:
        if stop.requested:
            break
        probabilities, truth = model.probabilities(images, at="model")[0], targets[0]["label_map"]
        sweep.add(probabilities[0], truth, ignore=truth == IGNORE)
    if distributed.any_of(stop.requested):
        return None
    return ThresholdSweep.joined(distributed.gather_to_main(sweep) or [ThresholdSweep()]).evaluate()


def take_pixel_threshold(checkpoint, result, files=()):
    """Writes the best threshold into a checkpoint dict, as thresholds {class name: probability}; nothing where F1 is 0 or NaN. files: the
    pictures' names, to name the one that the choice hangs on.

    metrics keep what was measured at 0.5, epoch by epoch. Returns "pixel/IoU 0.594 at 0.47", or "" where nothing was written.
    """
    best = result.best()
    if not best["F1"] > 0:
        print("pixel threshold 0.5, as it was: no pixel of the validation part is found at any")
        return ""
    name = checkpoint["class_names"][0]
    checkpoint["thresholds"] = {name: best["threshold"]}
    checkpoint["measured"] = {name: {key: best[key] for key in ("precision", "recall")}}
    print(f"pixel threshold {best['threshold']}, chosen on the validation part: IoU {best['IoU']:.4f}, against "
          f"{checkpoint['metrics']['pixel/IoU']:.4f} at 0.5 (kept as thresholds in best.pt)")
    without = result.best_without()
    k = int(abs(without - best["threshold"]).argmax())
    if 1 < len(without) == len(files) and abs(without[k] - best["threshold"]) > FAR:
        print(f"WARNING: the threshold hangs on one picture: without {files[k]} it would be {without[k]:g}; look at it, and choose on more "
              "pictures if you can")
    tp, fp, fn, tn = result.counts.sum(0)[THRESHOLDS.tolist().index(best["threshold"])].tolist()
    found, true = (tp + fp) / (tp + fp + fn + tn), (tp + fn) / (tp + fp + fn + tn)
    if found > NEARLY_ALL and true < NEARLY_ALL / 2:
        print(f"WARNING: the model has not learned: at this threshold {found:.0%} of the pixels are positive, {true:.1%} are damage; train "
              "longer, or on more pictures")
    return f"pixel/IoU {best['IoU']:.3f} at {best['threshold']:g}"
