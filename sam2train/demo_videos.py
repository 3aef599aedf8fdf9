"""The videos of the demo data: textured shapes whose paths a memory of past frames helps to follow.

A video starts as a layout of `DemoLayer`s. Layouts are drawn at random until one has the wanted
events, judged first by its paths (`paths_fit`), then by its pixels (`events_show`). Only that one
is painted.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from sam2train.data_synthetic import coverage, outline, sway, view

SIZE = 128  # px, height and width of every frame
MIN_AREA = 12  # px; a smaller visible rest of an object gets no annotation
PATCH = 64  # px, side of an object's texture; its radius is half of that
MAX_ATTEMPTS = 2000  # layouts tried for a video before giving up

# One entry per video index, in turn. The object an event happens to has track_id 1, its partner (in
# `crossing` and `lookalike`) track_id 2; `late` happens to the last object.
EVENTS = (
    ("occlusion",),  # an un-annotated bar or blob crosses in front for 2 to 6 frames
    ("leaves",),  # out of the frame for 2 to 8 frames, then back
    ("lookalike",),  # two annotated objects of the same look pass close by each other
    ("crossing",),  # another annotated object crosses in front
    ("lookalike_unannotated",),  # the same look, but only one of the two is annotated
    ("occlusion", "lookalike"),  # hidden while the look-alike is near
)
LATE_EVERY = 10  # every tenth video has an object that is not there on frame 0


@dataclass(frozen=True)
class DemoSplit:
    """What one split contains. Speeds are upper limits; each object draws its own below them."""

    seed: int
    num_videos: int
    num_frames: int
    min_objects: int
    max_objects: int
    max_speed: float  # px per frame
    max_spin: float  # radians per frame
    max_zoom: float  # largest ratio of an object's radii within a video
    still_every: int  # every so many videos are almost still; 0: none
    events: bool  # follow EVENTS; without, objects stay whole, apart and in the frame
    vanish_every: int = 0  # an object of every so many videos is gone from some frame on; 0: none
    only: str | None = None  # the event of each video, in place of EVENTS


@dataclass(eq=False)
class DemoLayer:
    """One moving shape: an object (track_id > 0) or something never annotated (track_id 0)."""

    outline: np.ndarray  # (K, 2) float, (x, y), largest distance from the origin is 1
    centre: np.ndarray  # (T, 2) px, (x, y)
    radius: np.ndarray  # (T,) px
    angle: np.ndarray  # (T,) radians
    track_id: int = 0
    double_of: "DemoLayer | None" = None  # has that layer's texture

    def alpha(self, frame_idx: int) -> np.ndarray:
        """(SIZE, SIZE) float32 coverage of each pixel, 0..1."""
        t = frame_idx
        return coverage(self.outline, self.radius[t], self.angle[t], self.centre[t], (SIZE, SIZE))

    def full_area(self) -> np.ndarray:
        """(T,) px, the area if nothing hid it."""
        return cv2.contourArea(self.outline.astype(np.float32)) * self.radius**2


def noise(rng: np.random.Generator, size: int, cells: int, octaves: int) -> np.ndarray:
    """(size, size) float32 smooth noise, 0..1; each octave has twice the cells, half the weight."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((cells << octave, cells << octave), np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) / (1 << octave)
    return cv2.normalize(total, None, 0.0, 1.0, cv2.NORM_MINMAX)


def texture(rng: np.random.Generator, size: int, colours: np.ndarray, repeats: float) -> np.ndarray:
    """(size, size, 3) float32: a warped pattern between two colours, roughened by fine noise.

    Args:
        colours: (2, 3), 0..255.
        repeats: about how many times the pattern repeats across the picture.
    """
    grid = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    turn, phase = rng.uniform(0, 2 * np.pi, 2)
    warp = (noise(rng, size, 3, 2) - 0.5) * rng.uniform(0.0, 0.5)
    u = np.float32(np.cos(turn)) * grid + np.float32(np.sin(turn)) * grid[:, None] + warp
    v = np.float32(np.cos(turn)) * grid[:, None] - np.float32(np.sin(turn)) * grid + warp
    u, v = (x * np.float32(2 * np.pi * repeats) + np.float32(phase) for x in (u, v))
    kind = rng.integers(5)
    if kind == 0:
        pattern = np.sin(u)
    elif kind == 1:
        pattern = np.sin(u) * np.sin(v) * 1.5
    elif kind == 2:
        pattern = np.sin(np.hypot(u, v))
    elif kind == 3:
        pattern = u / np.float32(np.pi * repeats)
    else:
        pattern = noise(rng, size, int(2 + repeats), 3) * 4 - 2
    mix = 0.5 + 0.5 * np.tanh(pattern * np.float32(rng.uniform(0.7, 4.0)))
    rough = (noise(rng, size, size // 8, 2) - 0.5) * np.float32(rng.uniform(10, 50))
    low, high = colours.astype(np.float32)
    return np.clip(low + (high - low) * mix[..., None] + rough[..., None], 0, 255)


def two_colours(rng: np.random.Generator, taken: list[np.ndarray], spread: float) -> np.ndarray:
    """(2, 3) colours, 0..255: of five draws the furthest from taken. spread 0: both are equal."""
    draws = rng.uniform(15, 240, (5, 2, 3))
    draws[:, 1] = draws[:, 0] + (draws[:, 1] - draws[:, 0]) * spread
    away = [
        min((np.linalg.norm(draw.mean(0) - other.mean(0)) for other in taken), default=0.0)
        for draw in draws
    ]
    return draws[int(np.argmax(away))]


def sample_layer(rng: np.random.Generator, split: DemoSplit, calm: float) -> DemoLayer:
    """A shape on a free path inside the frame. `calm` scales its motion; 1: as the split says."""
    # Videos with events have longer ways to go, so their shapes are smaller.
    radius = SIZE * np.exp(rng.uniform(*np.log((0.09, 0.2) if split.events else (0.1, 0.33))))
    path = sway(rng, split.num_frames, split.max_speed * calm)
    margin = min(0.8 * radius, SIZE / 2)
    middle = rng.uniform(margin, SIZE - margin, 2)
    away = np.arange(split.num_frames) - (split.num_frames - 1) / 2  # frames from the middle
    zoom = split.max_zoom ** (calm * rng.uniform(-1, 1) / split.num_frames)  # per frame
    return DemoLayer(
        outline=outline(rng),
        centre=path - (path.min(0) + path.max(0)) / 2 + middle,
        radius=radius * zoom**away,
        angle=rng.uniform(0, 6.3) + split.max_spin * calm * rng.uniform(-1, 1) * away,
    )


def over_border(
    layer: DemoLayer, aside: np.ndarray, inside: float, swing: np.ndarray, reach: float
) -> None:
    """Move the layer to a border and out over it: furthest where `swing` is 0, home at -1 and 1.

    Args:
        aside: unit vector to the border.
        inside, reach: distance from home to the border and length of the way out, both in radii.
    """
    layer.centre = layer.centre[:1] + 0.2 * (layer.centre - layer.centre[0])  # its own sway on top
    home = SIZE / 2 + aside * (SIZE / 2 - inside * layer.radius[0])
    layer.centre += (home - layer.centre[0]) * np.abs(aside)
    layer.centre += np.outer((1 + np.cos(np.pi * swing)) / 2 * reach * layer.radius[0], aside)


def stage(
    rng: np.random.Generator,
    split: DemoSplit,
    num_objects: int,
    events: tuple[str, ...],
    calm: float,
) -> list[DemoLayer]:
    """Layers from back to front, moved so that the events should take place; `events_show` checks
    whether they do."""
    objects = [sample_layer(rng, split, calm) for _ in range(num_objects)]
    for track_id, layer in enumerate(objects, start=1):
        layer.track_id = track_id
    if not events:
        return objects
    layers, subject, partner = list(objects), *objects[:2]
    frames = np.arange(split.num_frames)
    peak = int(rng.integers(split.num_frames // 3, 2 * split.num_frames // 3 + 1))
    aside = np.array([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)])[rng.integers(4)]
    if "lookalike_unannotated" in events:
        partner = sample_layer(rng, split, calm)
        layers.append(partner)
    if "lookalike" in events or "lookalike_unannotated" in events:
        partner.double_of = subject
        partner.radius = subject.radius * rng.uniform(0.9, 1.1)
        partner.outline = subject.outline * (1.0, rng.uniform(0.85, 1.0))
        gap = rng.uniform(0.6, 1.0) * (subject.radius[peak] + partner.radius[peak])
        partner.centre += subject.centre[peak] + gap * aside - partner.centre[peak]
    if "crossing" in events:
        partner.centre += subject.centre[peak] - partner.centre[peak] + rng.uniform(-4, 4, 2)
    if "leaves" in events:  # from just inside one border out over it and back, in 16 to 22 frames
        swing = np.clip((frames - peak) / rng.uniform(8, 11), -1, 1)
        over_border(subject, aside, rng.uniform(0.9, 1.3), swing, rng.uniform(2.0, 2.8))
    if "late" in events:  # the second half of the same, from outside to further in
        swing = np.clip(frames / rng.uniform(10, 16), 0, 1)
        over_border(objects[-1], aside, rng.uniform(1.0, 1.8), swing, rng.uniform(2.4, 3.2))
    layers = [layers[i] for i in rng.permutation(len(layers))]
    if "occlusion" in events:
        occluder = sample_layer(rng, split, calm)
        across = aside[::-1] * rng.uniform(6, 12)
        occluder.centre = subject.centre[peak] + np.outer(frames - peak, across)
        occluder.radius = np.full(split.num_frames, rng.uniform(1.1, 1.7) * subject.radius[peak])
        if "lookalike" not in events and rng.random() < 0.6:  # a bar in place of a blob
            half = rng.uniform(0.4, 0.6)
            occluder.outline = np.array([(-half, -1), (half, -1), (half, 1), (-half, 1)])
            occluder.radius *= 1.6
            occluder.angle = np.full(split.num_frames, np.arctan2(across[1], across[0]))
        layers.append(occluder)
    return layers


def numbered(layers: list[DemoLayer]) -> list[DemoLayer]:
    """The annotated objects in the order of their track ids."""
    return sorted((layer for layer in layers if layer.track_id), key=lambda layer: layer.track_id)


def paths_fit(layers: list[DemoLayer], split: DemoSplit, events: tuple[str, ...]) -> bool:
    """Whether the paths of a layout allow its events: a cheap test, before that of the pixels."""
    if not events:  # shapes overlap by a tenth of their radii at most
        return all(
            (np.linalg.norm(a.centre - b.centre, axis=1) > 0.9 * (a.radius + b.radius)).all()
            for i, a in enumerate(layers)
            for b in layers[:i]
        )
    objects = numbered(layers)
    moving_out = {"leaves": [1], "late": [len(objects)]}
    outside = [track_id for event in events for track_id in moving_out.get(event, [])]
    for layer in layers:
        is_shown = layer.track_id or layer.double_of
        if is_shown and np.linalg.norm(np.diff(layer.centre, axis=0), axis=1).max() > 7.0:
            return False
        leeway = np.minimum(layer.centre, SIZE - layer.centre).min()  # to the nearest border
        if is_shown and layer.track_id not in outside and leeway < 2:
            return False
    pairs = [(layer, layer.double_of) for layer in layers if layer.double_of]
    pairs += [(objects[0], objects[1])] if "crossing" in events else []
    # A pair that meets later is well apart on frame 0, or the first prompt would be ambiguous.
    return all(
        np.linalg.norm(a.centre[0] - b.centre[0]) > 1.2 * (a.radius[0] + b.radius[0])
        for a, b in pairs
    )


def one_spell(flags: np.ndarray, shortest: int, longest: int) -> bool:
    """Whether (T,) flags are on in one such run, off on 2 frames before and 3 after it."""
    on = np.flatnonzero(flags)
    return bool(
        shortest <= len(on) <= longest
        and on[-1] - on[0] == len(on) - 1
        and on[0] >= 2
        and on[-1] < len(flags) - 3
    )


def events_show(layers: list[DemoLayer], areas: np.ndarray, events: tuple[str, ...]) -> bool:
    """Whether the listed events take place, and no others. areas: (T, N) visible px of objects."""
    seen = areas / np.stack([layer.full_area() for layer in numbered(layers)], axis=1)
    if not events:
        return bool(seen.min() > 0.85)
    absent = areas < MIN_AREA
    steady = np.ones(areas.shape[1], bool)  # objects that are never gone
    if "late" in events:
        first = int(absent[:, -1].sum())
        if not (2 <= first <= 12 and absent[:first, -1].all()):
            return False
        steady[-1] = False
    if "leaves" in events and not one_spell(absent[:, 0], 2, 8):
        return False
    if "occlusion" in events and not one_spell(seen[:, 0] < 0.35, 2, 6):
        return False
    if "crossing" in events and not one_spell(seen[:, 0] < 0.5, 2, 8):
        return False
    is_there = seen[0, : -1 if "late" in events else None] > 0.6
    if {"leaves", "occlusion", "crossing"} & set(events):
        steady[0] = False
        if seen[-3:, 0].max() < 0.6:
            return False
    often = (seen[:, steady] > 0.5).mean(0)
    return bool(is_there.all() and not absent[:, steady].any() and (often > 0.75).all())


def backdrop(
    rng: np.random.Generator, split: DemoSplit, calm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Background frames (T, SIZE, SIZE, 3) float32 and its (2, 3) colours.

    A larger picture under a slow pan, zoom and turn; the shapes painted on it are never annotated.
    """
    size = SIZE * 7 // 4
    colours = two_colours(rng, [], rng.uniform(0.2, 0.6))
    ground = texture(rng, size, colours, rng.uniform(1.5, 7))
    for _ in range(rng.integers(1, 6)):
        points = outline(rng) * rng.uniform(0.06, 0.2) * SIZE + rng.uniform(0, size, 2)
        cover = np.zeros((size, size), np.float32)
        cv2.fillPoly(cover, [np.round(points * 16).astype(np.int32)], 1.0, shift=4)
        cover = cv2.GaussianBlur(cover, (3, 3), 0)[..., None]
        patch = texture(rng, PATCH, two_colours(rng, [colours], rng.uniform(0.2, 0.6)), 6.0)
        ground += (cv2.resize(patch, (size, size)) - ground) * cover
    pan = SIZE / 2 + sway(rng, split.num_frames, min(2.5, split.max_speed) * calm)
    frames = np.arange(split.num_frames)
    angle = rng.uniform(0, 6.3) + rng.uniform(-0.012, 0.012) * calm * frames
    zoom = 1.0 + rng.uniform(-0.008, 0.008) * calm * frames
    return np.stack(
        [view(ground, zoom[t], angle[t], pan[t], (SIZE, SIZE)) for t in frames]
    ), colours


def make_video(
    split: DemoSplit, video_index: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Frames (T, SIZE, SIZE, 3) uint8 BGR, masks (T, N, SIZE, SIZE) bool, names of the events.

    A mask is exactly where the object is the topmost layer that covers at least half a pixel.
    """
    rng = np.random.default_rng([split.seed, video_index])
    events = EVENTS[video_index % len(EVENTS)] if split.events else ()
    if split.only is not None:
        events = (split.only,)
    elif split.events and video_index % LATE_EVERY == LATE_EVERY - 1:
        events = (*events, "late")
    calm = 0.1 if split.still_every and video_index % split.still_every == 0 else 1.0
    num_objects = int(rng.integers(split.min_objects, split.max_objects + 1))
    if "late" in events:
        num_objects = split.max_objects  # two for the other event and one to be late
    frames = range(split.num_frames)
    for _ in range(MAX_ATTEMPTS):
        layers = stage(rng, split, num_objects, events, calm)
        if not paths_fit(layers, split, events):
            continue
        alphas = np.array([[layer.alpha(t) for layer in layers] for t in frames])  # (T, L, H, W)
        visible = alphas >= 0.5
        for i in reversed(range(1, len(layers))):
            visible[:, :i] &= alphas[:, i : i + 1] < 0.5
        masks = visible[:, [layers.index(layer) for layer in numbered(layers)]]
        if events_show(layers, masks.sum((2, 3)), events):
            break
    else:
        raise RuntimeError(f"video {video_index} of {split}: no layout with {events} was found")

    if split.vanish_every and video_index % split.vanish_every == 0:
        gone, since = rng.integers(len(layers)), rng.integers(1, split.num_frames)
        alphas[since:, gone] = 0
        masks[since:, layers[gone].track_id - 1] = False
    pictures, colours = backdrop(rng, split, calm)
    taken, textures = [colours], {}
    for layer in layers:
        if layer.double_of:
            continue
        taken.append(two_colours(rng, taken, rng.uniform(0.2, 0.7)))
        textures[id(layer)] = texture(rng, PATCH, taken[-1], rng.uniform(0.7, 3.5))
    for t in frames:
        for i, layer in enumerate(layers):
            own = textures[id(layer.double_of or layer)]
            patch = view(
                own, 2 * layer.radius[t] / PATCH, layer.angle[t], layer.centre[t], (SIZE, SIZE)
            )
            pictures[t] += (patch - pictures[t]) * alphas[t, i, ..., None]
    light = 1 + rng.uniform(0, 0.12) * np.sin(np.arange(split.num_frames) / 5 + rng.uniform(0, 6.3))
    pictures *= light.astype(np.float32)[:, None, None, None]
    pictures += rng.standard_normal(pictures.shape, np.float32) * np.float32(rng.uniform(1, 4))
    return np.clip(np.round(pictures), 0, 255).astype(np.uint8), masks, events
