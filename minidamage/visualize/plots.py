"""Line, bar and box plots, and the two figures that a run needs: its curves, and precision against recall.

Each function returns a picture, uint8 [H, W, 3]; save one with `overlay.save_picture`. Axes and ticks are in canvas.py.

    picture = line_plot({"train": (epochs, losses), "val": (epochs, val_losses)}, title="Loss", x_label="epoch")
"""
import csv
import dataclasses
import math

import numpy as np

from minidamage.visualize.canvas import (GREY, INK, SERIES, Axes, Figure, lighter, log_ticks, nice_ticks, padded_limits,
                                         text_width)
from minidamage.visualize.overlay import save_picture

SIZE = (720, 460)                             # width, height of one plot, pixels
THICK = 3.6                                   # pixels, of the curve that chooses
TITLE, TEXT = 18, 13                          # font sizes, pixels


@dataclasses.dataclass
class Series:
    """One curve. x, y: [P]; NaN in y breaks the line. colour: (r, g, b) or None for the next of the palette."""

    name: str                                 # "" keeps it out of the legend
    x: list
    y: list
    colour: tuple | None = None
    dash: bool = False
    mark_best: str = ""                       # "max" or "min": a ring at the best point, its value in the legend
    width: float = 2.0                        # pixels; the thickest is drawn last


def line_plot(series, title="", x_label="", y_label="", log_y=False, x_limits=None, y_limits=None, zero=True, size=SIZE):
    """Curves over one x axis.

    series: list of Series, or dict name -> (x, y). log_y: values <= 0 are left out. zero: y starts at 0 where no value is
    negative. x_limits, y_limits: (low, high) or None for the data's own.
    """
    if isinstance(series, dict):
        series = [Series(name, x, y) for name, (x, y) in series.items()]
    for curve in series:
        if len(curve.x) != len(curve.y):
            raise ValueError(f"series {curve.name!r}: expected as many x as y, got {len(curve.x)} and {len(curve.y)}")
    colours = [curve.colour or series_colour(k) for k, curve in enumerate(series)]
    xs = [value for curve in series for value in curve.x]
    ys = [value for curve in series for value in curve.y]
    x_limits = x_limits or padded_limits(xs, 0.02)
    y_limits = y_limits or padded_limits(ys, 0.06, zero, log_y)
    whole = all(float(value).is_integer() for value in xs)
    figure = Figure(*size)
    keys = [(_legend_text(curve), colour, curve.dash) for curve, colour in zip(series, colours) if curve.name]
    axes = _framed(figure, title, y_label, keys, x_limits, y_limits, log_y, nice_ticks(*x_limits, 7, integers=whole), 24)
    axes.draw_grid()
    for curve, colour in sorted(zip(series, colours), key=lambda drawn: drawn[0].width):
        _draw_curve(axes, curve, colour)
    axes.draw_frame(x_label, y_label)
    _draw_best(axes, series, colours)
    return figure.picture()


def bar_plot(groups, series, title="", y_label="", errors=None, value_format="{:.2f}", y_limits=None, size=SIZE, colours=None):
    """Bars side by side in groups.

    groups: G names along the axis. series: dict name -> G values (NaN: no bar, and "n/a" in its place). errors: dict name ->
    G half-lengths (for example a standard deviation), or None. value_format: what stands on a bar; "" for nothing.
    colours: dict name -> (r, g, b) for some or all series.
    """
    errors = errors or {}
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series {name!r}: expected {len(groups)} values, one a group, got {len(values)}")
    shades = {name: (colours or {}).get(name, series_colour(k)) for k, name in enumerate(series)}
    tops = [value + sign * np.nan_to_num(np.asarray(errors.get(name, np.zeros(len(groups))), np.float64)[g])
            for name, values in series.items() for g, value in enumerate(values) for sign in (-1, 1)]
    y_limits = y_limits or padded_limits(tops + [0.0], 0.10, zero=True)
    figure = Figure(*size)
    keys = [(name, shades[name], False) for name in series] if len(series) > 1 else []
    axes = _framed(figure, title, y_label, keys, (0, len(groups)), y_limits, False, [], _tilted(groups, size[0]))
    axes.draw_grid()
    share = 0.76 / max(len(series), 1)
    for k, (name, values) in enumerate(series.items()):
        for g, value in enumerate(values):
            left, right = axes.x(g + 0.12 + k * share), axes.x(g + 0.12 + (k + 1) * share)
            _draw_bar(axes, left, right, value, errors.get(name, [0] * len(groups))[g], shades[name], value_format)
    _draw_group_names(axes, groups)
    axes.draw_frame("", y_label)
    return figure.picture()


def box_plot(samples, title="", y_label="", y_limits=None, size=SIZE, colours=None):
    """Box: quartiles and median; whiskers: the furthest values within 1.5 box lengths; rings: those beyond; diamond: mean.

    samples: dict name -> values, NaN left out. Quartiles interpolate linearly between the sorted values.
    """
    names = list(samples)
    kept = {name: np.asarray(v, np.float64)[np.isfinite(np.asarray(v, np.float64))] for name, v in samples.items()}
    y_limits = y_limits or padded_limits(np.concatenate([v for v in kept.values()] or [[]]), 0.06)
    figure = Figure(*size)
    axes = _framed(figure, title, y_label, [], (0, max(len(names), 1)), y_limits, False, [], _tilted(names, size[0]))
    axes.draw_grid()
    for g, name in enumerate(names):
        if len(kept[name]):
            colour = (colours or {}).get(name, series_colour(g))
            _draw_box(axes, g + 0.5, kept[name], colour)
    _draw_group_names(axes, names)
    axes.draw_frame("", y_label)
    return figure.picture()


def precision_recall_plot(curves, title="Precision and recall", colours=None, size=SIZE):
    """Precision over recall. curves: dict name -> (recall [P], precision [P]); the area under each curve joins its name.

    The area is the mean precision over evenly spaced recalls, so for COCO's 101 points it is COCO's AP. Of a class without objects (COCO's
    -1) it is n/a.
    """
    series = []
    for name, (recall, precision) in curves.items():
        precision = np.asarray(precision, np.float64)
        area = f"{precision.mean():.3f}" if len(precision) and (precision >= 0).all() else "n/a"
        reached = np.flatnonzero(precision > 0)               # COCO writes 0 past the last recall that was reached
        end = reached[-1] + 1 if len(reached) else 0
        series.append(Series(f"{name}: area {area}", list(recall)[:end], list(precision)[:end], (colours or {}).get(name)))
    return line_plot(series, title, "recall", "precision", x_limits=(0.0, 1.0), y_limits=(0.0, 1.03), size=size)


# ---------------------------------------------------------------------------------------------- a run's curves

def curves_from_csv(csv_path, png_path, title="", select_by=""):
    """Draws a run's metrics.csv (one row an epoch) to a PNG: loss, validation metrics, loss terms, learning rate; returns its path.

    DamageNet, Fig. 4 shows loss and accuracy over epochs; the metrics here are the ones in the file. Epochs whose cell is empty
    are passed over. select_by: the metric that chooses best.pt, drawn last and thicker, so that no equal curve hides it.
    Raises ValueError where the file has no epoch column or no row.
    """
    columns = read_metrics(csv_path)
    epochs = columns["epoch"]
    plots = []

    def curve(column, name, colour, **style):                 # an epoch without validation leaves its cells empty
        known = [(x, y) for x, y in zip(epochs, columns.get(column, [])) if math.isfinite(y)]
        return Series(name, [x for x, _ in known], [y for _, y in known], colour, **style)

    chosen_by_loss = select_by == "loss"
    losses = [curve(f"{part}/loss", part, SERIES[k], width=THICK if chosen_by_loss and part == "val" else 2.0)
              for k, part in enumerate(("train", "val")) if f"{part}/loss" in columns]
    if losses:
        plots.append(line_plot(losses, "Loss" + " (thick: chooses best.pt)" * chosen_by_loss, "epoch", "sum of the loss terms"))
    metrics = [name.removeprefix("val/") for name in columns if name.startswith("val/") and not _is_loss(name)]
    known = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50", "pixel/IoU", "pixel/mIoU", "pixel/precision", "pixel/recall",
             "any-damage/Dice", "any-damage/accuracy")
    shown = [name for name in known if name in metrics] or metrics[:6]
    shown += [select_by] * (select_by in metrics and select_by not in shown)
    if shown:
        curves = [curve(f"val/{name}", name, SERIES[k % len(SERIES)], mark_best="max", width=THICK if name == select_by else 2.0)
                  for k, name in enumerate(shown)]
        trained = [curve(f"train/{name}", "", SERIES[k % len(SERIES)], dash=True)
                   for k, name in enumerate(shown) if f"train/{name}" in columns]
        notes = ["dashed: train"] * bool(trained) + ["thick: chooses best.pt"] * (select_by in shown)
        plots.append(line_plot(curves + trained, "Validation" + f" ({'; '.join(notes)})" * bool(notes), "epoch", "metric"))
    terms = [name.removeprefix("train/") for name in columns if name.startswith("train/loss_")]
    if terms:
        curves = [curve(f"train/{term}", term.removeprefix("loss_"), SERIES[k % len(SERIES)]) for k, term in enumerate(terms)]
        dashed = [curve(f"val/{term}", "", SERIES[k % len(SERIES)], dash=True)
                  for k, term in enumerate(terms) if f"val/{term}" in columns]
        plots.append(line_plot(curves + dashed, "Loss terms" + " (dashed: val)" * bool(dashed), "epoch", "loss, logarithmic", log_y=True))
    if "lr" in columns:
        plots.append(line_plot([curve("lr", "", SERIES[7])], "Learning rate", "epoch", "learning rate"))
    return save_picture(png_path, beside(plots, 2, title))


def read_metrics(csv_path):
    """dict column -> list of float (NaN for an empty or non-numeric cell), a later row of an epoch replacing an earlier."""
    with open(csv_path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{csv_path}: expected a CSV file with an 'epoch' column and at least one row, got "
                         f"{'no rows' if not rows else 'columns ' + ', '.join(map(str, rows[0]))}; train.py writes one")
    rows = sorted({_number(row["epoch"]): row for row in rows}.items(), key=lambda item: item[0])
    return {name: [_number(row.get(name)) for _, row in rows] for name in rows[0][1] if name}


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _is_loss(name):
    return name.rsplit("/", 1)[-1].startswith("loss")


def beside(pictures, columns=2, title=""):
    """Plots of one size in rows on white, under one title. Returns uint8 [H, W, 3]."""
    if not pictures:
        raise ValueError("expected at least one plot, got none")
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    columns, head = min(columns, len(pictures)), 40 if title else 0
    sheet = np.full((head + height * math.ceil(len(pictures) / columns), width * columns, 3), 255, np.uint8)
    if title:
        strip = Figure(width * columns, head)
        strip.text(24, head / 2 + 4, title, TITLE + 2, INK, "lm")
        sheet[:head] = strip.picture()
    for k, picture in enumerate(pictures):
        y, x = head + height * (k // columns), width * (k % columns)
        sheet[y:y + picture.shape[0], x:x + picture.shape[1]] = picture
    return sheet


# ---------------------------------------------------------------------------------------------- parts of a plot

def series_colour(k):
    """(r, g, b) of the k-th series: the palette, then its hues lighter, so that sixteen stay apart."""
    return lighter(SERIES[k % len(SERIES)], 0.5 * (k // len(SERIES) % 2))


def _framed(figure, title, y_label, keys, x_limits, y_limits, log_y, x_ticks, extra_bottom=0):
    """Title, then the legend in rows (above the data: it never covers any), then axes in the room that is left."""
    y_ticks = log_ticks(*y_limits) if log_y else nice_ticks(*y_limits)
    left = 14 + (16 if y_label else 0) + max((text_width(text, TEXT) for _, text in y_ticks), default=20) + 12
    top = 16
    if title:
        figure.text(left, top + 6, title, TITLE, INK, "lm")
        top += 26
    top = _draw_legend(figure, keys, left, top) + 12
    rectangle = (left, top, figure.width - 24, figure.height - 34 - extra_bottom)
    return Axes(figure, rectangle, x_limits, y_limits, x_ticks, y_ticks, log_y)


def _draw_legend(figure, keys, left, top):
    x, y = left, top + 10
    for name, colour, dash in keys:
        width = 30 + text_width(name, TEXT) + 18
        if x + width > figure.width - 10 and x > left:
            x, y = left, y + 20
        figure.line([(x, y), (x + 22, y)], colour, 2.4, (5, 3) if dash else None)
        figure.text(x + 29, y, name, TEXT, INK, "lm")
        x += width
    return y + 10 if keys else top


def _draw_curve(axes, curve, colour):
    """The line, broken where a value is missing; a dot where a value stands alone, dots at all where there are few."""
    runs, run = [], []
    for x, y in zip(curve.x, curve.y):
        if math.isfinite(y) and math.isfinite(x) and (y > 0 or not axes.log_y):
            run.append((axes.x(x), axes.y(y)))
        elif run:
            runs.append(run)
            run = []
    runs += [run] if run else []
    few = sum(map(len, runs)) <= 15
    for points in runs:
        if len(points) > 1:
            axes.figure.line(points, colour, curve.width, (6, 4) if curve.dash else None)
        if few or len(points) == 1:
            for x, y in points:
                axes.figure.circle(x, y, 2.0 + curve.width / 2, fill="white" if curve.dash else colour, outline=colour, width=1.3)


def _best(curve):
    """Index of the best finite value, None where there is none or none is wanted."""
    values = np.asarray(curve.y, np.float64)
    if not curve.mark_best or not np.isfinite(values).any():
        return None
    return int(np.nanargmax(values) if curve.mark_best == "max" else np.nanargmin(values))


def _legend_text(curve):
    best = _best(curve)
    return curve.name if best is None else f"{curve.name} {curve.y[best]:.3f} at {curve.x[best]:g}"


def _draw_best(axes, series, colours):
    for curve, colour in zip(series, colours):
        best = _best(curve)
        if best is not None:
            axes.figure.circle(axes.x(curve.x[best]), axes.y(curve.y[best]), 6, outline=colour, width=1.6)


def _draw_bar(axes, left, right, value, error, colour, value_format):
    figure, base = axes.figure, axes.y(min(max(0.0, axes.y_limits[0]), axes.y_limits[1]))
    middle, size = (left + right) / 2, 12
    if not math.isfinite(value):
        figure.text(middle, base - 8, "n/a", size, GREY, "mm")
        return
    y = axes.y(min(max(value, axes.y_limits[0]), axes.y_limits[1]))
    figure.rectangle(left + 1, min(y, base), right - 1, max(y, base), fill=colour)
    end = y
    if error and math.isfinite(error):
        high, low = axes.y(value + error), axes.y(value - error)
        figure.line([(middle, high), (middle, low)], INK, 1.4)
        for cap in (high, low):
            figure.line([(middle - 4, cap), (middle + 4, cap)], INK, 1.4)
        end = high if value >= 0 else low
    text = value_format.format(value) if value_format else ""
    if text and text_width(text, size) <= (right - left) + 10:
        figure.text(middle, end - 4 if value >= 0 else end + 4, text, size, INK, "mb" if value >= 0 else "mt")


def _draw_box(axes, centre, values, colour):
    low, median, high = np.percentile(values, (25, 50, 75))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    half = min((axes.x(1) - axes.x(0)) * 0.28, 44)
    x, figure = axes.x(centre), axes.figure
    for end, edge in ((inside.min(), low), (inside.max(), high)):
        figure.line([(x, axes.y(end)), (x, axes.y(edge))], colour, 1.6)
        figure.line([(x - half / 2, axes.y(end)), (x + half / 2, axes.y(end))], colour, 1.6)
    figure.rectangle(x - half, axes.y(high), x + half, axes.y(low), fill=lighter(colour, 0.7), outline=colour, width=1.6)
    figure.line([(x - half, axes.y(median)), (x + half, axes.y(median))], colour, 2.6)
    for value in values[(values < low - reach) | (values > high + reach)]:
        figure.circle(x, axes.y(value), 3.2, outline=colour, width=1.3)
    mean = axes.y(values.mean())
    figure.polygon([(x, mean - 5), (x + 5, mean), (x, mean + 5), (x - 5, mean)], INK)


def _tilted(names, width):
    """Extra room below the axis for group names that do not fit side by side and are drawn upwards: pixels."""
    room = (width - 100) / max(len(names), 1) - 8
    widest = max((max(text_width(line, TEXT) for line in str(name).split("\n")) for name in names), default=0)
    return 0 if widest <= room else min(widest, 180) - 24


def _draw_group_names(axes, names):
    bottom = axes.rectangle[3]
    upright = _tilted(names, axes.figure.width) > 0
    for g, name in enumerate(names):
        x = axes.x(g + 0.5)
        if not upright:
            axes.figure.text(x, bottom + 8, str(name), TEXT, INK, "ma")
            continue
        text = str(name)
        while text_width(text, TEXT) > 180:
            text = text[:-2] + "…"
        axes.figure.text(x, bottom + 8 + text_width(text, TEXT) / 2, text, TEXT, INK, "mm", angle=90)
