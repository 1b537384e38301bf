"""`--data demo`: drawn car sides with dents, scratches and broken glass, in VehiDE's own layout, from a seed and nothing else.

Each picture is a vehicle of its own (colour, doors, windows, wheel, light, point of view). The body is shaded by what it reflects:
every pixel has a tilt, the tilt looks up sky, horizon or road. A dent is a height field of compact support added to
the panel, so its highlight and shadow come out of the same reflection, and its outline is exactly where the height ends.
Nine pictures in ten are damaged; the others are the undamaged controls. Drawn at twice the size and turned, zoomed and reduced at the end,
polygons by the same matrix as pixels (transforms.py).

Read `draw_picture` first.
"""
import datetime
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minidamage.data import vehide
from minidamage.data.transforms import warp_points

CANVAS = (320, 240)                            # scene units; the finished picture shows about 256 x 192 of them
SHARP = 2                                      # drawn pixels a scene unit
UNDAMAGED_EVERY = 10                           # every tenth picture is an undamaged control
PAINTS = ((214, 217, 219), (236, 236, 232), (28, 30, 34), (92, 97, 102), (152, 157, 160), (150, 24, 28), (26, 58, 118), (38, 84, 66),
          (120, 98, 70), (196, 92, 26), (60, 110, 150), (88, 24, 44), (206, 178, 62), (46, 50, 70))


def make_demo(folder, images=240, size=256, seed=0, parts=("train", "val"), val_fraction=0.2):
    """Writes `images` drawn pictures of size x 3/4 size pixels and their annotation files under `folder`, and returns `folder`.

    A share of val_fraction goes to VehiDE's `validation/`. Every picture is drawn from (seed, its number): no vehicle repeats,
    within or across the parts. A finished set of the same images, size and seed is left as it is.
    """
    stamp = os.path.join(folder, "demo.txt")
    wanted = f"images={images} size={size} seed={seed} val_fraction={val_fraction} drawing=2\n"
    if os.path.exists(stamp) and open(stamp, encoding="utf-8").read() == wanted:
        return folder
    if images < 2 or size < 64:
        raise ValueError(f"the demo set needs at least 2 pictures of 64 pixels, got images={images}, size={size}")
    count = {"val": max(1, round(images * val_fraction))}
    count["train"] = images - count["val"]
    number = 0
    for part in ("train", "val"):
        below = os.path.join(folder, vehide.FILES[part][1], vehide.FILES[part][1])
        os.makedirs(below, exist_ok=True)
        pictures = {}
        for _ in range(count[part]):
            image, objects = draw_picture(size, [seed, number], damaged=number % UNDAMAGED_EVERY != UNDAMAGED_EVERY - 1)
            when = datetime.datetime(2024, 1, 1, 8) + datetime.timedelta(minutes=10 * number)       # a vehicle every ten minutes
            name = when.strftime("%d%m%Y_%H%M%S") + f"image{number:05d}.jpg"
            image.save(os.path.join(below, name), quality=93, subsampling=0)
            pictures[name], number = objects, number + 1
        vehide.write(folder, part, pictures)
    with open(stamp, "w", encoding="utf-8") as handle:
        handle.write(wanted)
    return folder


def draw_picture(size, seed, damaged=True):
    """(PIL picture of size x 3/4 size, [(class name, polygon [P, 2] in its pixels)]) from a seed (int or list of ints)."""
    rng = np.random.default_rng(seed)
    width, height = size, size * 3 // 4
    car = Car(rng)
    view = point_of_view(rng, width, height)
    damages = choose_damages(rng, car, view, width, height) if damaged else []
    scene = draw_scene(rng, car, [d for d in damages if d.kind == "dent"])
    for damage in damages:
        if damage.kind == "scratch":
            draw_scratch(rng, scene, damage, car)
        elif damage.kind == "broken glass":
            draw_glass(rng, scene, damage)
    picture = photograph(rng, scene, view, width, height)
    return picture, [(d.kind, warp_points(d.outline, view)) for d in damages]


class Car:
    """The geometry and paint of one vehicle's side, in scene units: everything that two pictures must not share."""

    def __init__(self, rng):
        W, H = CANVAS
        paint = np.array(PAINTS[rng.integers(len(PAINTS))], np.float64)
        self.paint = np.clip(paint * rng.uniform(0.8, 1.15) + rng.normal(0, 8, 3), 8, 245)
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

    def gap_line(self, x, count=24):
        y = np.linspace(self.belt, self.sill, count)
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


def draw_scene(rng, car, dents):
    """The undamaged car with dents pressed into it: RGB picture of CANVAS * SHARP."""
    scene = background(rng, car)
    body = Image.fromarray(shade_body(rng, car, dents)).resize(scene.size, Image.Resampling.BILINEAR)
    W, _ = CANVAS
    top, bottom = car.roof, car.sill
    shape = [(-5, top + 4), (W * 0.25, top), (W * 0.75, top), (W + 5, top + 4), (W + 5, bottom), (-5, bottom)]
    if car.window_end > W / 2 and car.window_end < W + 10:             # the cabin ends in the picture: a boot or bonnet goes on
        e = car.window_end
        shape = [(-5, top + 4), (e - car.rake - 14, top), (e - car.rake + 2, top + 3), (e + 12, car.belt_at(e) - 6),
                 (W + 5, car.belt_at(W) + 3), (W + 5, bottom), (-5, bottom)]
    elif car.window_end > -10 and car.window_end <= W / 2:
        e = car.window_end
        shape = [(-5, car.belt_at(0) + 3), (e - 12, car.belt_at(e) - 6), (e + car.rake - 2, top + 3), (e + car.rake + 14, top),
                 (W + 5, top + 4), (W + 5, bottom), (-5, bottom)]
    scene.paste(body, (0, 0), polygon_mask(shape))
    for pane in car.windows():
        draw_window(rng, scene, car, pane)
    draw_lines(scene, car)
    draw_wheel(scene, car)
    draw_handles(scene, car)
    return scene


def background(rng, car):
    """Sky, blurred street and road behind and below the car."""
    W, H = CANVAS
    small = np.zeros((H // 2, W // 2, 3), np.float32)
    y = np.linspace(0, 1, H // 2)[:, None, None]
    sky = np.array([172, 196, 222]) * rng.uniform(0.75, 1.1)
    small[:] = sky * (1 - 0.5 * y) + np.array([205, 205, 200]) * 0.5 * y
    picture = Image.fromarray(np.clip(small, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 10)):                               # houses, hedges, other cars: out of focus anyway
        x, w, h = rng.uniform(-10, W / 2), rng.uniform(10, 40), rng.uniform(12, 42)
        tone = [(96, 116, 82), (150, 138, 124), (120, 112, 108), (186, 176, 160), (70, 78, 88)][rng.integers(5)]
        pen.rectangle([x, 62 - h, x + w, 62], fill=tuple(int(v * rng.uniform(0.8, 1.15)) for v in tone))
    picture = picture.filter(ImageFilter.GaussianBlur(3)).resize((W * SHARP, H * SHARP), Image.Resampling.BILINEAR)
    top = int(car.sill) - 20
    road = np.full((H - top, W), rng.uniform(88, 132), np.float32) + 9 * rng.standard_normal((H - top, W), dtype=np.float32)
    rows = np.arange(top, H, dtype=np.float32)[:, None]
    road *= np.clip((rows - car.sill - 2) / 30, 0.28, 1.0)             # the shadow under the car
    grey = Image.fromarray(np.clip(road, 0, 255).astype(np.uint8)).resize((W * SHARP, (H - top) * SHARP), Image.Resampling.BILINEAR)
    picture.paste(Image.merge("RGB", [grey] * 3), (0, top * SHARP))
    return picture


def shade_body(rng, car, dents):
    """uint8 [H, W, 3]: the paint by reflection. tilt > horizon looks at the sky, below it at the road."""
    W, H = CANVAS
    x, y = np.meshgrid(np.arange(W, dtype=np.float32) + np.float32(0.5), np.arange(H, dtype=np.float32) + np.float32(0.5))
    v = (y - car.belt_at(x)) / (car.sill - car.belt)
    tilt = 0.52 - 0.85 * np.clip(v, -0.2, 1.1)
    tilt += car.fold * (step(v, car.crease - 0.05, 0.05) * step(-v, -car.crease, 0.006) * 2.0 - step(v, car.crease, 0.004) * 0.9)
    tilt += car.fold2 * step(v, car.crease2, 0.005)
    tilt = np.where(v < -0.04, 0.35 + 0.5 * np.clip((car.belt - y) / (car.belt - car.roof), 0, 1), tilt)
    across = x.copy()
    for dent in dents:
        gx, gy = dent_slopes(dent, x, y)
        tilt += gy + 0.35 * gx                                         # its upper half faces the road, its lower half the sky
        across += 40 * gx
    line = (car.horizon + 0.13 * np.interp(across, np.linspace(-40, W + 40, len(car.skyline)), car.skyline)).astype(np.float32)
    sky = 1 / (1 + np.exp(-np.clip((tilt - line) / car.softness, -30, 30)))
    tilt, sky = tilt.astype(np.float32)[..., None], sky.astype(np.float32)[..., None]
    diffuse = np.clip(0.74 + 0.48 * tilt, 0.24, 1.25) * (1 - 0.45 * car.gloss)
    grazing = car.gloss * np.clip(0.75 + 0.6 * np.abs(tilt), 0, 1.3)
    patches = np.interp(x[0], np.linspace(0, W, 6), 1 + 0.10 * smooth_noise(rng, 6, 6)).astype(np.float32)[:, None]
    flakes = rng.standard_normal((H, W, 1), dtype=np.float32) * 1.6    # metallic
    dirt = np.clip((v - 0.72) / 0.28, 0, 1).astype(np.float32)[..., None] * rng.uniform(0, 0.35)
    single = lambda *rgb: np.array(rgb, np.float32)
    colour = diffuse * single(*car.paint) + grazing * (single(-12, -14, -16) + sky * single(164, 176, 190))       # road 58 56 54, sky 222 232 244
    colour = (colour * patches + flakes) * (1 - dirt) + dirt * single(128, 118, 104)
    return np.clip(colour, 0, 255).astype(np.uint8)


def dent_slopes(dent, x, y):
    """(dz/dx, dz/dy) of the dent's height z = depth (1 - r^2)^2 inside its outline, zero outside. r = 1 on the outline."""
    d = dent.details
    p = np.stack([x - d["centre"][0], y - d["centre"][1]], -1) @ d["spin"]
    u, w = p[..., 0], p[..., 1] / d["flat"]
    angle = np.arctan2(w, u)
    radius = d["long"] * (1 + sum(a * np.cos(k * angle + q) for k, a, q in d["wobble"]))
    r2 = (u * u + w * w) / radius ** 2
    inside = np.clip(1 - r2, 0, None)
    ridge = 1 + d["crease"] * np.exp(-((u * d["off"][0] + w * d["off"][1] + d["long"] * 0.1) / (0.10 * d["long"])) ** 2)
    z = -d["depth"] * inside ** 1.6 * ridge * d["long"] * d["flat"] * 0.46
    gy, gx = np.gradient(z)
    return gx, gy


def draw_window(rng, scene, car, pane):
    """Dark glass with what stands inside and what it mirrors, in a rubber seal."""
    fill_polygon(scene, grow(pane, 4.5), (196, 200, 204) if car.chrome else (20, 21, 23))
    fill_polygon(scene, grow(pane, 3.0), (18, 19, 21))
    W, H = CANVAS
    x0, y0 = np.maximum(np.floor(pane.min(0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(pane.max(0)).astype(int), CANVAS)      # the rest is drawn in the pane's own corner of the scene
    x, y = np.arange(x0, x1)[None, :] / W, np.arange(y0, y1)[:, None] / H
    slant, shift = rng.uniform(0.15, 0.6), rng.uniform(0, 1)
    wave = 0.5 + 0.5 * np.sin(9 * (x + slant * y + shift))
    bright = 34 + 52 * np.clip(1 - 2.6 * y, 0, 1) + 26 * np.clip(wave - 0.55, 0, 1)
    glass = Image.fromarray(np.clip(bright[..., None] * np.array([0.88, 1.0, 1.08]), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(glass)
    for share in rng.uniform(0.1, 0.8, 2):                             # seats with head rests, out of focus
        sx, base = share * (pane[:, 0].max() - pane[:, 0].min()) + pane[:, 0].min() - x0, car.belt - y0
        pen.rounded_rectangle([sx - 11, base - 26, sx + 12, base + 20], 5, fill=(24, 25, 28))
        pen.rounded_rectangle([sx - 6, base - 42, sx + 7, base - 29], 4, fill=(26, 27, 30))
    shine = Image.new("L", glass.size, 0)
    for _ in range(rng.integers(1, 3)):
        left, w = rng.uniform(0, x1 - x0), rng.uniform(6, 26)
        ImageDraw.Draw(shine).polygon([(left + 30, 0), (left + w + 30, 0), (left + w - 6, y1 - y0), (left - 6, y1 - y0)],
                                      fill=int(rng.uniform(24, 60)))
    glass.paste((206, 222, 238), (0, 0), shine)
    glass = glass.filter(ImageFilter.GaussianBlur(1)).resize((glass.width * SHARP, glass.height * SHARP), Image.Resampling.BILINEAR)
    stencil = Image.new("L", glass.size, 0)
    ImageDraw.Draw(stencil).polygon([tuple(p) for p in (pane - [x0, y0]) * SHARP], fill=255)
    scene.paste(glass, (int(x0) * SHARP, int(y0) * SHARP), stencil)


def draw_lines(scene, car):
    """Gaps between the doors, with the light edge of the sheet beside them; moulding; the dark sill."""
    W, _ = CANVAS
    pen = ImageDraw.Draw(scene)
    light = tuple(int(min(255, v * 1.15 + 26)) for v in car.paint)
    if car.moulding:
        y = car.belt + car.crease2 * (car.sill - car.belt)
        pen.polygon([(0, (y - 3) * SHARP), (W * SHARP, (y - 3 + car.slope / 2) * SHARP), (W * SHARP, (y + 4 + car.slope / 2) * SHARP),
                     (0, (y + 4) * SHARP)], fill=(32, 33, 35))
        pen.line([(0, (y - 3) * SHARP), (W * SHARP, (y - 3 + car.slope / 2) * SHARP)], fill=(84, 86, 88), width=1)
    for x in (car.gap, car.gap2):
        line = car.gap_line(x) * SHARP
        pen.line([tuple(p + [2.4, 0]) for p in line], fill=light, width=1)
        pen.line([tuple(p) for p in line], fill=(16, 16, 18), width=3)
    pen.rectangle([0, (car.sill - 5) * SHARP, W * SHARP, (car.sill + 3) * SHARP], fill=(26, 27, 29))
    pen.line([(0, (car.sill - 5) * SHARP), (W * SHARP, (car.sill - 5) * SHARP)], fill=(70, 72, 74), width=2)


def draw_wheel(scene, car):
    x, y, r = car.wheel
    pen = ImageDraw.Draw(scene)
    disc = lambda radius, fill, dx=0.0, dy=0.0: pen.ellipse([(x + dx - radius) * SHARP, (y + dy - radius) * SHARP,
                                                              (x + dx + radius) * SHARP, (y + dy + radius) * SHARP], fill=fill)
    edge = tuple(int(min(255, v * 1.1 + 18)) for v in car.paint)
    disc(r + 2.5, edge, dy=-0.6)
    disc(r, (10, 10, 11))
    disc(r - 6, (34, 34, 36), dy=3)
    disc(r - 7.5, (24, 24, 25), dy=3)
    disc(r * 0.62, (150, 152, 156), dy=3)
    disc(r * 0.57, (40, 41, 44), dy=3)
    for i in range(car.spokes):
        a = car.spoke_turn + 2 * np.pi * i / car.spokes
        tip = np.array([x + 0.59 * r * np.cos(a), y + 3 + 0.59 * r * np.sin(a)])
        side = 2.4 * np.array([-np.sin(a), np.cos(a)])
        hub = np.array([x, y + 3])
        pen.polygon([tuple(p * SHARP) for p in (hub - 1.5 * side, tip - side, tip + side, hub + 1.5 * side)], fill=(176, 179, 184))
    disc(r * 0.14, (126, 128, 132), dy=3)


def draw_handles(scene, car):
    pen = ImageDraw.Draw(scene)
    for x0, y0, x1, y1 in car.handles():
        box = lambda a, b, c, d: [v * SHARP for v in (a, b, c, d)]
        pen.ellipse(box(x0 + 6, y0 - 1, x1 - 6, y1 + 3), fill=tuple(int(v * 0.35) for v in car.paint))
        grip = (28, 29, 31) if car.dark_handle else (198, 201, 205) if car.chrome else tuple(int(v * 0.92) for v in car.paint)
        pen.rounded_rectangle(box(x0, y0, x1, y0 + 4.5), 4, fill=grip, outline=tuple(int(v * 0.45) for v in grip))
        pen.line(box(x0 + 2, y0 + 1.2, x1 - 2, y0 + 1.2), fill=tuple(int(min(255, v + 60)) for v in grip), width=1)


def draw_scratch(rng, scene, damage, car):
    """Abraded paint inside the outline: a haze, then hairlines that follow the path; light on dark paint and dark on light."""
    d = damage.details
    light_paint = car.paint.mean() > 150
    haze = np.array([120, 122, 124]) if light_paint else np.clip(car.paint * 0.5 + 118, 0, 255)
    tones = [(70, 70, 74), (112, 110, 108), (44, 44, 48)] if light_paint else [(236, 236, 234), (204, 206, 208), (172, 170, 168)]
    mask = polygon_mask(damage.outline)
    inside = np.asarray(mask)
    soft = np.minimum(np.asarray(mask.filter(ImageFilter.GaussianBlur(3))), inside)
    grain = np.asarray(Image.fromarray(rng.uniform(0.25, 1.0, (CANVAS[1] // 2, CANVAS[0])).astype(np.float32)).resize(scene.size))
    strength = rng.uniform(0.32, 0.5) if d["scuff"] else rng.uniform(0.5, 0.75)
    scene.paste(tuple(int(v) for v in haze), (0, 0), Image.fromarray((soft * grain * strength).astype(np.uint8)))
    strokes = Image.new("L", scene.size, 0)
    pen = ImageDraw.Draw(strokes)
    colour = tones[rng.integers(len(tones))]
    for _ in range(int(rng.integers(9, 16)) if d["scuff"] else int(rng.integers(3, 6))):
        a, b = np.sort(rng.integers(0, len(d["path"]), 2))
        if b - a < 4:
            continue
        offset = rng.uniform(-0.85, 0.85) + 0.08 * smooth_noise(rng, 5, b - a, at=np.linspace(0, 1, b - a))
        line = d["path"][a:b] + d["normal"][a:b] * (d["profile"][a:b] * np.clip(offset, -0.92, 0.92))[:, None]
        pen.line([tuple(p) for p in line * SHARP], fill=int(rng.uniform(130, 255)), width=int(rng.integers(1, 4)))
    if not d["scuff"]:
        pen.line([tuple(p) for p in d["path"] * SHARP], fill=230, width=3)
    scene.paste(colour, (0, 0), Image.fromarray(np.minimum(np.asarray(strokes), inside)))


def draw_glass(rng, scene, damage):
    """Shattered safety glass: facets between spokes and rings, cracks, a frosted or missing middle; nothing outside the outline."""
    centre, rim = damage.details["centre"], damage.outline
    rings = np.sort(np.concatenate([[0.0, 1.0], np.array([0.22, 0.45, 0.7]) + rng.uniform(-0.06, 0.06, 3)]))
    jitter = rng.uniform(-0.05, 0.05, (len(rim), len(rings)))
    jitter[:, [0, -1]] = 0
    node = centre + (rim - centre)[:, None] * (rings + jitter)[..., None]                                   # [spokes, rings, 2]
    facets, cracks = Image.new("L", scene.size, 0), Image.new("L", scene.size, 0)
    pen, crack = ImageDraw.Draw(facets), ImageDraw.Draw(cracks)
    n = len(rim)
    for i in range(n):
        for k in range(len(rings) - 1):
            cell = np.array([node[i, k], node[i, k + 1], node[(i + 1) % n, k + 1], node[(i + 1) % n, k]]) * SHARP
            pen.polygon([tuple(p) for p in cell], fill=int(np.clip(rng.uniform(24, 150) + 60 * (1 - rings[k]), 0, 255)))
            if k and rng.random() < 0.8:
                crack.line([tuple(node[i, k] * SHARP), tuple(node[(i + 1) % n, k] * SHARP)], fill=int(rng.uniform(120, 220)), width=1)
        kink = node[i] + rng.normal(0, 0.5, node[i].shape)
        crack.line([tuple(p) for p in kink * SHARP], fill=int(rng.uniform(170, 255)), width=int(rng.integers(1, 3)))
        crack.line([tuple(rim[i] * SHARP), tuple(rim[(i + 1) % n] * SHARP)], fill=int(rng.uniform(90, 190)), width=2)
    inside = np.asarray(polygon_mask(rim))
    scene.paste((178, 204, 208), (0, 0), Image.fromarray(np.minimum(np.asarray(facets), inside)))
    if damage.details["hole"]:
        hole = node[:, 1 if len(rings) < 4 else 2] * SHARP
        ImageDraw.Draw(scene).polygon([tuple(p) for p in hole], fill=(12, 13, 15))
    scene.paste((238, 246, 248), (0, 0), Image.fromarray(np.minimum(np.asarray(cracks), inside)))


def photograph(rng, scene, view, width, height):
    """The scene as seen: the view's matrix, reduced to width x height, exposure, vignette, a little noise."""
    to_view = np.diag([2.0, 2.0, 1.0]) @ view @ np.diag([1 / SHARP, 1 / SHARP, 1.0])             # scene pixels -> doubled output
    inverse = np.linalg.inv(to_view)[:2].ravel().tolist()
    seen = scene.transform((2 * width, 2 * height), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR).reduce(2)
    pixels = np.asarray(seen).astype(np.float32)
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j].astype(np.float32)
    pixels *= (rng.uniform(0.86, 1.12) * (1 - rng.uniform(0.0, 0.16) * (x * x + y * y)))[..., None]
    pixels *= 1 + rng.uniform(-0.04, 0.04, 3).astype(np.float32)                                 # white balance
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 3.0))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def fill_polygon(scene, points, colour):
    ImageDraw.Draw(scene).polygon([(float(x) * SHARP, float(y) * SHARP) for x, y in points], fill=colour)


def polygon_mask(points):
    """L picture of CANVAS * SHARP, 255 inside a polygon given in scene units."""
    mask = Image.new("L", (CANVAS[0] * SHARP, CANVAS[1] * SHARP), 0)
    ImageDraw.Draw(mask).polygon([(float(x) * SHARP, float(y) * SHARP) for x, y in points], fill=255)
    return mask


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


def grow(polygon, by):
    """Each corner of a convex polygon moved outwards along its diagonal by about `by` units in x and y."""
    centre = polygon.mean(0)
    return polygon + by * np.sign(polygon - centre)


def shrink(polygon, by):
    return grow(polygon, -by)


def step(v, at, soft):
    """0 below, 1 above, over a width of `soft`."""
    return 1 / (1 + np.exp(-np.clip((v - at) / soft, -30, 30)))


def smooth_noise(rng, knots, count, at=None):
    """`knots` random numbers in [-1, 1] interpolated: at `at` in [0, 1], or the knots themselves when at is None."""
    values = rng.uniform(-1, 1, knots)
    if at is None:
        return values
    return np.interp(at, np.linspace(0, 1, knots), values)
