"""What the plots are drawn on: an antialiased figure, and axes with ticks at round numbers.

Shapes are drawn three times too large and reduced; text is drawn afterwards at its final size, where the font's own hinting
keeps it sharp. Coordinates are pixels of the finished picture, (0, 0) at its upper left corner.
"""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLE = 3
INK, GREY, GRID = (34, 38, 44), (96, 102, 110), (226, 229, 233)
# Eight hues that keep apart for colour-blind readers too (after Okabe and Ito, darkened for thin lines on white).
SERIES = ((0, 101, 189), (214, 85, 0), (0, 140, 100), (176, 58, 140), (200, 150, 0), (70, 160, 220), (120, 80, 40), (90, 95, 105))


class Figure:
    """A white picture of width x height pixels; `picture()` gives uint8 [H, W, 3]."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._texts = []

    def line(self, points, colour, width=1.0, dash=None):
        """points: [(x, y), ...]. dash: (on, off) lengths in pixels or None."""
        for piece in ([points] if dash is None else _dashes(points, *dash)):
            scaled = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in piece]
            self._draw.line(scaled, fill=colour, width=max(1, round(width * SUPERSAMPLE)), joint="curve")

    def polygon(self, points, fill):
        self._draw.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=fill)

    def rectangle(self, x1, y1, x2, y2, fill=None, outline=None, width=1.0):
        x1, y1 = x1 * SUPERSAMPLE, y1 * SUPERSAMPLE
        x2, y2 = max(x2 * SUPERSAMPLE - 1, x1), max(y2 * SUPERSAMPLE - 1, y1)      # a bar or box of no height is a hairline
        self._draw.rectangle([x1, y1, x2, y2], fill=fill, outline=outline, width=max(1, round(width * SUPERSAMPLE)))

    def circle(self, x, y, radius, fill=None, outline=None, width=1.0):
        self._draw.ellipse([(x - radius) * SUPERSAMPLE, (y - radius) * SUPERSAMPLE, (x + radius) * SUPERSAMPLE,
                            (y + radius) * SUPERSAMPLE], fill=fill, outline=outline, width=max(1, round(width * SUPERSAMPLE)))

    def text(self, x, y, text, size=13, colour=INK, anchor="lm", angle=0):
        """anchor: Pillow's two letters (l m r, then t m b or a s). angle: 0, or 90 for a text that reads upwards."""
        self._texts.append((x, y, text, size, colour, anchor, angle))

    def picture(self):
        image = self._image.reduce(SUPERSAMPLE)
        draw = ImageDraw.Draw(image)
        for x, y, text, size, colour, anchor, angle in self._texts:
            if angle == 0:
                draw.text((x, y), text, font=font(size), fill=colour, anchor=anchor)
            else:
                _draw_upwards(image, x, y, text, size, colour)
        return np.asarray(image)


def font(size):
    return ImageFont.load_default(size)


def text_width(text, size):
    return font(size).getlength(text)


def _draw_upwards(image, x, y, text, size, colour):
    """A text turned by 90 degrees, its middle at (x, y)."""
    width, height = math.ceil(text_width(text, size)) + 2, sum(font(size).getmetrics())
    stencil = Image.new("L", (width, height), 0)
    ImageDraw.Draw(stencil).text((width / 2, height / 2), text, font=font(size), fill=255, anchor="mm")
    stencil = stencil.rotate(90, expand=True)
    image.paste(colour, (round(x - height / 2), round(y - width / 2)), stencil)


def _dashes(points, on, off):
    """The pieces of a polyline that a dash pattern leaves, each a list of points."""
    pieces, piece, left, drawing = [], [points[0]], on, True
    for (x1, y1), (x2, y2) in zip(points, points[1:]):
        length, done = math.hypot(x2 - x1, y2 - y1), 0.0
        while length - done > left:
            done += left
            here = (x1 + (x2 - x1) * done / length, y1 + (y2 - y1) * done / length)
            if drawing:
                pieces.append(piece + [here])
            drawing, left, piece = not drawing, off if drawing else on, [here]
        left -= length - done
        piece = piece + [(x2, y2)]
    if drawing and len(piece) > 1:
        pieces.append(piece)
    return pieces


def lighter(colour, share):
    """The colour mixed with white; share 1 is white."""
    return tuple(round(part + (255 - part) * share) for part in colour)


# ---------------------------------------------------------------------------------------------- axes

class Axes:
    """Maps data to pixels inside a rectangle of the figure and draws frame, grid, ticks and labels.

    x_ticks, y_ticks: [(value, text), ...]. The limits are (low, high); with log_y they are positive.
    """

    def __init__(self, figure, rectangle, x_limits, y_limits, x_ticks, y_ticks, log_y=False):
        self.figure, self.rectangle = figure, rectangle
        self.x_limits, self.y_limits, self.log_y = x_limits, y_limits, log_y
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value):
        left, _, right, _ = self.rectangle
        low, high = self.x_limits
        return left + (right - left) * (value - low) / (high - low)

    def y(self, value):
        _, top, _, bottom = self.rectangle
        low, high = self.y_limits
        if self.log_y:
            value, low, high = math.log(max(value, 1e-300)), math.log(low), math.log(high)
        return bottom - (bottom - top) * (value - low) / (high - low)

    def draw_grid(self, vertical=True):
        left, top, right, bottom = self.rectangle
        for value, text in self.y_ticks:
            y = self.y(value)
            self.figure.line([(left, y), (right, y)], GRID)
            self.figure.text(left - 8, y, text, 13, GREY, "rm")
        for value, text in self.x_ticks:
            x = self.x(value)
            if vertical:
                self.figure.line([(x, top), (x, bottom)], GRID)
            self.figure.text(x, bottom + 8, text, 13, GREY, "mt")

    def draw_frame(self, x_label="", y_label=""):
        """After the data, so that nothing paints over the two axes."""
        left, top, right, bottom = self.rectangle
        self.figure.line([(left, top), (left, bottom), (right, bottom)], GREY, 1.2)
        if x_label:
            self.figure.text((left + right) / 2, bottom + 30, x_label, 14, INK, "mt")
        if y_label:
            self.figure.text(14, (top + bottom) / 2, y_label, 14, INK, "mm", angle=90)


def nice_ticks(low, high, count=6, integers=False):
    """Round values in [low, high], about `count` of them, 1, 2, 2.5 or 5 times a power of ten apart; with their texts."""
    if not high > low:
        return [(low, f"{low:g}")]
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if integers:
        step = max(1.0, round(step)) if step >= 1 else 1.0
    first = math.ceil(low / step - 1e-9)
    values = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    decimals = next(d for d in range(16) if abs(round(step, d) - step) < 1e-9 * step or d == 15)
    if max(abs(low), abs(high)) >= 1e6 or decimals > 4:
        return [(value, f"{value:.3g}") for value in values]
    return [(value, f"{value + 0.0:,.{decimals}f}") for value in values]


def log_ticks(low, high):
    """Powers of ten in [low, high]; 2 and 5 between them where there are fewer than three decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) >= 3 else (1, 2, 5) if math.log10(high / low) > 0.6 else (1, 1.5, 2, 3, 4, 5, 7)
    values = [factor * 10.0 ** power for power in decades for factor in factors]
    return [(value, f"{value:g}") for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def padded_limits(values, share=0.05, zero=False, log=False):
    """(low, high) round the finite values with a margin; never of width zero. zero: the axis starts at 0 when all are >= 0."""
    values = np.asarray(list(values), dtype=np.float64)
    values = values[np.isfinite(values) & (values > 0 if log else True)]
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        margin = max((high / low) ** share, 1.15)
        return low / margin, high * margin
    margin = (high - low) * share or abs(high) * 0.1 or 0.5
    return (0.0 if zero and low >= 0 else low - margin), high + margin
