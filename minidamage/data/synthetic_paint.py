"""Paints the demo set's cars (synthetic.py decides what is where): body by reflection, windows, wheel, handles, damages, camera.

Everything is given in scene units and drawn `sharp` pixels to a unit; `photograph` turns, zooms and reduces the scene at the end.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CANVAS = (320, 240)                            # scene units; the finished picture shows about 256 x 192 of them


def draw_scene(rng, car, dents, sharp):
    """The undamaged car with dents pressed into it: RGB picture of CANVAS, `sharp` pixels a unit."""
    scene = background(rng, car, sharp)
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
    scene.paste(body, (0, 0), polygon_mask(scene, shape))
    for pane in car.windows():
        draw_window(rng, scene, car, pane)
    draw_lines(scene, car)
    draw_wheel(scene, car)
    draw_handles(scene, car)
    return scene


def background(rng, car, sharp):
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
    picture = picture.filter(ImageFilter.GaussianBlur(3)).resize((W * sharp, H * sharp), Image.Resampling.BILINEAR)
    top = int(car.sill) - 20
    road = np.full((H - top, W), rng.uniform(88, 132), np.float32) + 9 * rng.standard_normal((H - top, W), dtype=np.float32)
    rows = np.arange(top, H, dtype=np.float32)[:, None]
    road *= np.clip((rows - car.sill - 2) / 30, 0.28, 1.0)             # the shadow under the car
    grey = Image.fromarray(np.clip(road, 0, 255).astype(np.uint8)).resize((W * sharp, (H - top) * sharp), Image.Resampling.BILINEAR)
    picture.paste(Image.merge("RGB", [grey] * 3), (0, top * sharp))
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
    colour = diffuse * single(*car.paint) + grazing * (single(-12, -14, -16) + sky * single(164, 176, 190))      # road, and sky above it
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
    sharp = sharpness(scene)
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
    glass = glass.filter(ImageFilter.GaussianBlur(1)).resize((glass.width * sharp, glass.height * sharp), Image.Resampling.BILINEAR)
    stencil = Image.new("L", glass.size, 0)
    ImageDraw.Draw(stencil).polygon([tuple(p) for p in (pane - [x0, y0]) * sharp], fill=255)
    scene.paste(glass, (int(x0) * sharp, int(y0) * sharp), stencil)


def draw_lines(scene, car):
    """Gaps between the doors, with the light edge of the sheet beside them; moulding; the dark sill."""
    sharp = sharpness(scene)
    W, _ = CANVAS
    pen = ImageDraw.Draw(scene)
    light = tuple(int(min(255, v * 1.15 + 26)) for v in car.paint)
    if car.moulding:
        y = car.belt + car.crease2 * (car.sill - car.belt)
        pen.polygon([(0, (y - 3) * sharp), (W * sharp, (y - 3 + car.slope / 2) * sharp), (W * sharp, (y + 4 + car.slope / 2) * sharp),
                     (0, (y + 4) * sharp)], fill=(32, 33, 35))
        pen.line([(0, (y - 3) * sharp), (W * sharp, (y - 3 + car.slope / 2) * sharp)], fill=(84, 86, 88), width=thick(1, sharp))
    for x in (car.gap, car.gap2):
        line = car.gap_line(x) * sharp
        pen.line([tuple(p + [2.4, 0]) for p in line], fill=light, width=thick(1, sharp))
        pen.line([tuple(p) for p in line], fill=(16, 16, 18), width=thick(3, sharp))
    pen.rectangle([0, (car.sill - 5) * sharp, W * sharp, (car.sill + 3) * sharp], fill=(26, 27, 29))
    pen.line([(0, (car.sill - 5) * sharp), (W * sharp, (car.sill - 5) * sharp)], fill=(70, 72, 74), width=thick(2, sharp))


def draw_wheel(scene, car):
    sharp = sharpness(scene)
    x, y, r = car.wheel
    pen = ImageDraw.Draw(scene)
    disc = lambda radius, fill, dx=0.0, dy=0.0: pen.ellipse([(x + dx - radius) * sharp, (y + dy - radius) * sharp,
                                                              (x + dx + radius) * sharp, (y + dy + radius) * sharp], fill=fill)
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
        pen.polygon([tuple(p * sharp) for p in (hub - 1.5 * side, tip - side, tip + side, hub + 1.5 * side)], fill=(176, 179, 184))
    disc(r * 0.14, (126, 128, 132), dy=3)


def draw_handles(scene, car):
    sharp = sharpness(scene)
    pen = ImageDraw.Draw(scene)
    for x0, y0, x1, y1 in car.handles():
        box = lambda a, b, c, d: [v * sharp for v in (a, b, c, d)]
        pen.ellipse(box(x0 + 6, y0 - 1, x1 - 6, y1 + 3), fill=tuple(int(v * 0.35) for v in car.paint))
        grip = (28, 29, 31) if car.dark_handle else (198, 201, 205) if car.chrome else tuple(int(v * 0.92) for v in car.paint)
        pen.rounded_rectangle(box(x0, y0, x1, y0 + 4.5), 4, fill=grip, outline=tuple(int(v * 0.45) for v in grip))
        pen.line(box(x0 + 2, y0 + 1.2, x1 - 2, y0 + 1.2), fill=tuple(int(min(255, v + 60)) for v in grip), width=thick(1, sharp))


def draw_scratch(rng, scene, damage, car):
    """Abraded paint inside the outline: a haze, then hairlines that follow the path; light on dark paint and dark on light."""
    sharp = sharpness(scene)
    d = damage.details
    light_paint = car.paint.mean() > 150
    haze = np.array([120, 122, 124]) if light_paint else np.clip(car.paint * 0.5 + 118, 0, 255)
    tones = [(70, 70, 74), (112, 110, 108), (44, 44, 48)] if light_paint else [(236, 236, 234), (204, 206, 208), (172, 170, 168)]
    mask = polygon_mask(scene, damage.outline)
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
        pen.line([tuple(p) for p in line * sharp], fill=int(rng.uniform(130, 255)), width=thick(rng.integers(1, 4), sharp))
    if not d["scuff"]:
        pen.line([tuple(p) for p in d["path"] * sharp], fill=230, width=thick(3, sharp))
    scene.paste(colour, (0, 0), Image.fromarray(np.minimum(np.asarray(strokes), inside)))


def draw_glass(rng, scene, damage):
    """Shattered safety glass: facets between spokes and rings, cracks, a frosted or missing middle; nothing outside the outline."""
    sharp = sharpness(scene)
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
            cell = np.array([node[i, k], node[i, k + 1], node[(i + 1) % n, k + 1], node[(i + 1) % n, k]]) * sharp
            pen.polygon([tuple(p) for p in cell], fill=int(np.clip(rng.uniform(24, 150) + 60 * (1 - rings[k]), 0, 255)))
            if k and rng.random() < 0.8:
                crack.line([tuple(node[i, k] * sharp), tuple(node[(i + 1) % n, k] * sharp)], fill=int(rng.uniform(120, 220)),
                           width=thick(1, sharp))
        kink = node[i] + rng.normal(0, 0.5, node[i].shape)
        crack.line([tuple(p) for p in kink * sharp], fill=int(rng.uniform(170, 255)), width=thick(rng.integers(1, 3), sharp))
        crack.line([tuple(rim[i] * sharp), tuple(rim[(i + 1) % n] * sharp)], fill=int(rng.uniform(90, 190)), width=thick(2, sharp))
    inside = np.asarray(polygon_mask(scene, rim))
    scene.paste((178, 204, 208), (0, 0), Image.fromarray(np.minimum(np.asarray(facets), inside)))
    if damage.details["hole"]:
        hole = node[:, 1 if len(rings) < 4 else 2] * sharp
        ImageDraw.Draw(scene).polygon([tuple(p) for p in hole], fill=(12, 13, 15))
    scene.paste((238, 246, 248), (0, 0), Image.fromarray(np.minimum(np.asarray(cracks), inside)))


def photograph(rng, scene, view, width, height):
    """The scene as seen: the view's matrix, reduced to width x height, exposure, vignette, a little noise."""
    sharp = sharpness(scene)
    to_view = np.diag([2.0, 2.0, 1.0]) @ view @ np.diag([1 / sharp, 1 / sharp, 1.0])             # scene pixels -> doubled output
    inverse = np.linalg.inv(to_view)[:2].ravel().tolist()
    seen = scene.transform((2 * width, 2 * height), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR).reduce(2)
    pixels = np.asarray(seen).astype(np.float32)
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j].astype(np.float32)
    pixels *= (rng.uniform(0.86, 1.12) * (1 - rng.uniform(0.0, 0.16) * (x * x + y * y)))[..., None]
    pixels *= 1 + rng.uniform(-0.04, 0.04, 3).astype(np.float32)                                 # white balance
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 3.0))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def sharpness(scene):
    """Drawn pixels a scene unit."""
    return scene.width // CANVAS[0]


def thick(width, sharp):
    """A line's width in drawn pixels, from its width at two pixels a unit."""
    return max(1, round(int(width) * sharp / 2))


def fill_polygon(scene, points, colour):
    sharp = sharpness(scene)
    ImageDraw.Draw(scene).polygon([(float(x) * sharp, float(y) * sharp) for x, y in points], fill=colour)


def polygon_mask(scene, points):
    """L picture of the scene's size, 255 inside a polygon given in scene units."""
    sharp = sharpness(scene)
    mask = Image.new("L", scene.size, 0)
    ImageDraw.Draw(mask).polygon([(float(x) * sharp, float(y) * sharp) for x, y in points], fill=255)
    return mask


def grow(polygon, by):
    """Each corner of a convex polygon moved outwards along its diagonal by about `by` units in x and y."""
    centre = polygon.mean(0)
    return polygon + by * np.sign(polygon - centre)


def step(v, at, soft):
    """0 below, 1 above, over a width of `soft`."""
    return 1 / (1 + np.exp(-np.clip((v - at) / soft, -30, 30)))


def smooth_noise(rng, knots, count, at=None):
    """`knots` random numbers in [-1, 1] interpolated: at `at` in [0, 1], or the knots themselves when at is None."""
    values = rng.uniform(-1, 1, knots)
    if at is None:
        return values
    return np.interp(at, np.linspace(0, 1, knots), values)
