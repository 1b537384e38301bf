"""`--data demo`: drawn car sides with dents, scratches and broken glass, in VehiDE's own layout, from a seed and nothing else.

Each picture is a vehicle of its own (colour, doors, windows, wheel, light, point of view). The body is shaded by what it reflects:
every pixel has a tilt, the tilt looks up sky, horizon or road. A dent is a height field of compact support added to
the panel, so its highlight and shadow come out of the same reflection, and its outline is exactly where the height ends.
Nine pictures in ten are damaged; the others are the undamaged controls. Drawn at twice the size and turned, zoomed and reduced at the end,
polygons by the same matrix as pixels.

Read `draw_picture` first; this file decides what is where, synthetic_paint.py draws it.
"""
import contextlib
import datetime
import os
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from minidamage.data import synthetic_paint as paint
from minidamage.data import vehide
from minidamage.data.synthetic_paint import CANVAS, grow, smooth_noise
from minidamage.data.transforms import warp_points

STAMP = "demo.txt"                             # says what a finished demo folder holds
DRAWING = 2                                    # counts changes of the drawing: an older set is drawn anew
UNDAMAGED_EVERY = 10                           # every tenth picture is an undamaged control
PAINTS = ((214, 217, 219), (236, 236, 232), (28, 30, 34), (92, 97, 102), (152, 157, 160), (150, 24, 28), (26, 58, 118), (38, 84, 66),
          (120, 98, 70), (196, 92, 26), (60, 110, 150), (88, 24, 44), (206, 178, 62), (46, 50, 70))


def make_demo(folder, images=240, size=256, seed=0, val_fraction=0.2):
    """Writes `images` drawn pictures of size x 3/4 size pixels and their annotation files under `folder`, and returns `folder`.

    A share of val_fraction goes to VehiDE's `validation/`. Every picture is drawn from (seed, its number): no vehicle repeats,
    within or across the parts. A finished set of the same images, size and seed is left as it is, another one is replaced; a folder
    with anything else in it is a ValueError. It is drawn beside, where the folder above has to be writable, and renamed into place,
    whole or not at all.
    """
    if images < 2 or size < 64 or not 0 < val_fraction < 1:
        raise ValueError("the demo set needs at least 2 pictures of 64 pixels and a validation share between 0 and 1, got "
                         f"images={images}, size={size}, val_fraction={val_fraction}")
    wanted = f"images={images} size={size} seed={seed} val_fraction={val_fraction} drawing={DRAWING}\n"
    if _read_stamp(folder) == wanted:
        return folder
    place = os.path.realpath(folder)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.path.basename(place)}.drawing-", dir=os.path.dirname(place)) as beside:
        _draw(os.path.join(beside, "new"), images, size, seed, val_fraction)
        _write_text(os.path.join(beside, "new", STAMP), wanted)
        _put_in_place(place, beside, wanted)
    return folder


def _draw(folder, images, size, seed, val_fraction):
    number, val_count = 0, min(images - 1, max(1, round(images * val_fraction)))
    for part, count in (("train", images - val_count), ("val", val_count)):
        below = os.path.join(folder, vehide.FILES[part][1], vehide.FILES[part][1])
        os.makedirs(below)
        pictures = {}
        for number in range(number, number + count):
            image, objects = draw_picture(size, [seed, number], damaged=number % UNDAMAGED_EVERY != UNDAMAGED_EVERY - 1)
            when = datetime.datetime(2024, 1, 1, 8) + datetime.timedelta(minutes=10 * number)       # a vehicle every ten minutes
            name = when.strftime("%d%m%Y_%H%M%S") + f"image{number:05d}.jpg"
            image.save(os.path.join(below, name), quality=93, subsampling=0)
            pictures[name] = objects
        number += 1
        vehide.write(folder, part, pictures)


def _put_in_place(place, beside, wanted):
    """Renames beside/new to its place. Of two trainings that draw at once the second to finish finds the first one's set and leaves it;
    another set makes way, but not what somebody has put beside its files."""
    new, old = os.path.join(beside, "new"), os.path.join(beside, "old")
    with contextlib.suppress(OSError):
        os.rmdir(place)                                                 # an empty one
    if _read_stamp(place) == wanted:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(place, old)
        os.rename(new, place)
    except BaseException as error:                                      # Ctrl-C between the two
        if os.path.exists(old) and not os.path.exists(place):
            os.rename(old, place)
        if not isinstance(error, OSError) or _read_stamp(place) != wanted:
            raise
    for name in set(os.listdir(old) if os.path.exists(old) else ()) - {STAMP, *(name for names in vehide.FILES.values() for name in names)}:
        os.rename(os.path.join(old, name), os.path.join(place, name))


def _read_stamp(folder):
    """What the folder holds: "" for nothing, else the stamp's line. ValueError when it holds something that is not a demo set."""
    stamp = os.path.join(folder, STAMP)
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as handle:
            return handle.read()
    if os.path.exists(folder) and os.listdir(folder):
        raise ValueError(f"{folder} is not empty and holds no demo set; give an empty folder, nothing was written")
    return ""


def _write_text(path, text):
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)


def draw_picture(size, seed, damaged=True):
    """(PIL picture of size x 3/4 size, [(class name, polygon [P, 2] in its pixels)]) from a seed (int or list of ints)."""
    rng = np.random.default_rng(seed)
    width, height = size, size * 3 // 4
    car = Car(rng)
    view = point_of_view(rng, width, height)
    damages = choose_damages(rng, car, view, width, height) if damaged else []
    sharp = max(2, -(-2 * size // 256))                                 # twice the pixels of the finished picture
    scene = paint.draw_scene(rng, car, [d for d in damages if d.kind == "dent"], sharp)
    for damage in damages:
        if damage.kind == "scratch":
            paint.draw_scratch(rng, scene, damage, car)
        elif damage.kind == "broken glass":
            paint.draw_glass(rng, scene, damage)
    picture = paint.photograph(rng, scene, view, width, height)
    return picture, [(d.kind, warp_points(d.outline, view)) for d in damages]


class Car:
    """The geometry and paint of one vehicle's side, in scene units: everything that two pictures must not share."""

    def __init__(self, rng):
        W, H = CANVAS
        colour = np.array(PAINTS[rng.integers(len(PAINTS))], np.float64)
        self.paint = np.clip(colour * rng.uniform(0.8, 1.15) + rng.normal(0, 8, 3), 8, 245)
        self.roof, self.belt, self.sill = rng.uniform(14, 34), rng.uniform(84, 108), rng.uniform(186, 212)
        self.slope = rng.uniform(-7, 7)                                 # the belt line falls or rises over the width
        self.crease, self.crease2 = rng.uniform(0.16, 0.34), rng.uniform(0.62, 0.84)        # share of belt..sill
        self.fold, self.fold2 = rng.uniform(0.10, 0.28), rng.uniform(-0.16, 0.22)           # how much the tilt jumps there
        self.gap = rng.uniform(0.32, 0.68) * W                          # the edge between two doors
        self.gap2 = self.gap + rng.choice([-1, 1]) * rng.uniform(120, 150)
        self.bow = rng.uniform(-10, 10)
        side = rng.choice([0, 1])
        self.wheel = (rng.uniform(8, 40) if side == 0 else W - rng.uniform(8, 40), self.sill + rng.uniform(-2, 8), rng.uniform(50, 60))
        self.spokes, self.spoke_turn = int(rng.integers(5, 11)), rng.uniform(0, 6.28)
        self.handle_side = rng.choice([-1, 1])
        self.chrome, self.moulding, self.dark_handle = rng.random() < 0.4, rng.random() < 0.35, rng.random() < 0.3
        self.horizon, self.softness = rng.uniform(-0.12, 0.22), rng.uniform(0.04, 0.12)
        self.gloss = rng.uniform(0.22, 0.42)
        self.skyline = smooth_noise(rng, 24, 5)
        self.rake = rng.uniform(14, 40)                                 # slant of the window's far end
        self.window_end = rng.uniform(0.80, 1.15) * W if side == 0 else rng.uniform(-0.15, 0.20) * W

    def belt_at(self, x):
        return self.belt + self.slope * (np.asarray(x) / CANVAS[0] - 0.5)

    def windows(self):
        """Two panes [4, 2] with the pillar at the door's edge between them; one is cut short by the slanted end of the cabin."""
        W, _ = CANVAS
        top, pillar = self.roof + 11, 6.0
        left, right = -10.0, W + 10.0
        if self.window_end > W / 2:
            right = self.window_end
        else:
            left = self.window_end
        lean_l = self.rake if left > -10 else 0.0
        lean_r = self.rake if right < W + 10 else 0.0
        panes = [np.array([[left + lean_l, top], [self.gap - pillar - 3, top], [self.gap - pillar, self.belt_at(self.gap) - 4],
                           [left, self.belt_at(left) - 4]]),
                 np.array([[self.gap + pillar - 3, top], [right - lean_r, top], [right, self.belt_at(right) - 4],
                           [self.gap + pillar, self.belt_at(self.gap) - 4]])]
        return [p for p in panes if p[:, 0].max() - p[:, 0].min() > 40]

    def gap_line(self, x):
        y = np.linspace(self.belt, self.sill, 24)
        t = (y - self.belt) / (self.sill - self.belt)
        return np.stack([x + self.bow * np.sin(np.pi * t) * 0.5, y], axis=1)

    def handles(self):
        """Boxes [x0, y0, x1, y1] of the door handles."""
        y = self.belt + (self.crease - 0.03) * (self.sill - self.belt)
        out = []
        for x in (self.gap, self.gap2):
            x0 = x + (7 if self.handle_side > 0 else -33)
            out.append((x0, y - 4, x0 + 26, y + 3))
        return out

    def panel_mask(self, with_gaps):
        """bool [H, W]: where body damage may lie: painted sheet, away from wheel, handles and (for dents) gaps."""
        W, H = CANVAS
        mask = Image.new("L", CANVAS, 0)
        pen = ImageDraw.Draw(mask)
        pen.polygon([(0, self.belt_at(0) + 5), (W, self.belt_at(W) + 5), (W, self.sill - 6), (0, self.sill - 6)], fill=1)
        x, y, r = self.wheel
        pen.ellipse([x - r - 7, y - r - 7, x + r + 7, y + r + 7], fill=0)
        for x0, y0, x1, y1 in self.handles():
            pen.rectangle([x0 - 3, y0 - 3, x1 + 3, y1 + 4], fill=0)
        if with_gaps:
            for x in (self.gap, self.gap2):
                pen.line([tuple(p) for p in self.gap_line(x)], fill=0, width=5)
        return np.asarray(mask) > 0


class Damage:
    """One damage: its class, its outline [P, 2] in scene units, and what its painter needs."""

    def __init__(self, kind, outline, **details):
        self.kind, self.outline, self.details = kind, outline, details


def point_of_view(rng, width, height):
    """[3, 3]: scene units to pixels of the finished picture: mirrored or not, zoomed, turned a little, sheared a little."""
    zoom = rng.uniform(0.98, 1.30) * width / 256.0
    turn, shear = np.radians(rng.uniform(-4, 4)), rng.uniform(-0.06, 0.06)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    c, s = np.cos(turn), np.sin(turn)
    linear = zoom * np.array([[c, -s], [s, c]]) @ np.array([[1, 0], [shear, 1]]) @ np.diag([mirror, 1.0])
    slack = np.maximum(0, (np.array(CANVAS) - np.array([width, height]) / zoom) / 2 - 14)
    look_at = np.array(CANVAS) / 2 + rng.uniform(-1, 1, 2) * slack
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.array([width, height]) / 2 - linear @ look_at
    return matrix


def choose_damages(rng, car, view, width, height):
    """Places 1 to 3 damages that lie whole in the picture, on the right surface and clear of each other."""
    count = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    sheet, whole_sheet = car.panel_mask(True), car.panel_mask(False)
    glass = np.zeros(sheet.shape, bool)
    for pane in car.windows():
        glass |= mask_of(shrink(pane, 4))
    taken = np.zeros(sheet.shape, bool)
    damages = []
    for _ in range(200):
        if len(damages) == count:
            break
        kind = rng.choice(["dent", "scratch", "broken glass"], p=[0.40, 0.36, 0.24])
        if kind == "broken glass" and any(d.kind == kind for d in damages):
            continue
        make, surface = {"dent": (new_dent, sheet), "scratch": (new_scratch, whole_sheet), "broken glass": (new_glass, glass)}[kind]
        damage = make(rng, surface)
        if damage is None:
            continue
        covered = mask_of(damage.outline)
        seen = warp_points(damage.outline, view)
        inside = seen.min() > 3 and seen[:, 0].max() < width - 3 and seen[:, 1].max() < height - 3
        if not inside or (covered & ~surface).any() or (covered & taken).any() or not covered.any():
            continue
        damages.append(damage)
        taken |= mask_of(damage.outline, margin=4)
    return damages


def new_dent(rng, surface):
    centre = pick(rng, surface)
    if centre is None:
        return None
    long, flat, turn = rng.uniform(15, 36), rng.uniform(0.5, 0.95), rng.uniform(0, np.pi)
    wobble = [(k, rng.uniform(-1, 1) * 0.11 / k ** 0.5, rng.uniform(0, 6.28)) for k in (2, 3, 4, 5)]
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = long * (1 + sum(a * np.cos(k * angle + p) for k, a, p in wobble))
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = np.stack([radius * np.cos(angle), flat * radius * np.sin(angle)], 1) @ spin.T + centre
    return Damage("dent", outline, centre=centre, long=long, flat=flat, spin=spin, wobble=wobble, depth=rng.uniform(0.5, 1.0),
                  off=rng.uniform(-0.25, 0.25, 2), crease=rng.uniform(0.0, 0.5))


def new_scratch(rng, surface):
    start = pick(rng, surface)
    if start is None:
        return None
    scuff = rng.random() < 0.55
    length = rng.uniform(34, 80) if scuff else rng.uniform(45, 110)
    half = rng.uniform(5.5, 10.5) if scuff else rng.uniform(2.6, 4.2)
    steps = 22
    heading = rng.uniform(-0.6, 0.6) + rng.choice([0, np.pi]) + np.cumsum(rng.normal(0, 0.05, steps))
    path = start + np.cumsum(length / steps * np.stack([np.cos(heading), np.sin(heading)], 1), axis=0)
    t = np.linspace(0, 1, steps)
    profile = half * (0.35 + 0.65 * np.sin(np.pi * np.clip(t, 0.04, 0.96)) ** 0.6) * (1 + 0.22 * smooth_noise(rng, 7, steps, at=t))
    normal = np.stack([-np.sin(heading), np.cos(heading)], 1)
    outline = np.concatenate([path + normal * profile[:, None], (path - normal * profile[:, None])[::-1]])
    return Damage("scratch", outline, path=path, normal=normal, profile=profile, scuff=scuff)


def new_glass(rng, surface):
    centre = pick(rng, surface)
    if centre is None:
        return None
    spokes = int(rng.integers(13, 20))
    angle = np.sort((np.arange(spokes) + rng.uniform(-0.32, 0.32, spokes)) * 2 * np.pi / spokes)
    reach = rng.uniform(18, 38)
    radius = np.empty(spokes)
    for i, a in enumerate(angle):                                      # each spoke runs until the rubber seal stops it
        steps = centre + np.linspace(0, 1, 40)[:, None] * reach * np.array([np.cos(a), np.sin(a)])
        column, row = np.clip(steps.astype(int), 0, [CANVAS[0] - 1, CANVAS[1] - 1]).T
        blocked = np.flatnonzero(~surface[row, column])
        free = 1.0 if len(blocked) == 0 else max(0.0, (blocked[0] - 2) / 40)
        radius[i] = reach * min(free, rng.uniform(0.72, 1.0))
    if np.median(radius) < 12 or radius.min() < 5:
        return None
    outline = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return Damage("broken glass", outline, centre=centre, hole=rng.random() < 0.35)


def mask_of(points, margin=0):
    """bool [H, W] of a polygon and `margin` units around it, one pixel a scene unit."""
    mask = Image.new("L", CANVAS, 0)
    corners = [(float(x), float(y)) for x, y in points]
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    if margin:
        ImageDraw.Draw(mask).line(corners + corners[:2], fill=1, width=2 * margin, joint="curve")
    return np.asarray(mask) > 0


def pick(rng, surface):
    """A random point of a bool surface, or None."""
    inside = np.flatnonzero(surface)
    if len(inside) == 0:
        return None
    row, column = divmod(int(inside[rng.integers(len(inside))]), surface.shape[1])
    return np.array([column + 0.5, row + 0.5])


def shrink(polygon, by):
    return grow(polygon, -by)
