"""The videos of the demo data: painted shapes that leave, hide, return and change their looks.

All is computed with NumPy in float64 and rounded once, so that every machine draws the same pixels.
A layout of `Shape`s is drawn at random until its objects are seen well enough on their first frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 128  # px, height and width of every frame
MIN_AREA = 12  # px; a smaller visible rest of an object gets no annotation
# The share of an object that its first frame must show: on frame 0, and where it comes in later.
SHOWN_ON_FRAME_0, SHOWN_WHEN_LATE = 0.5, 0.3
MAX_BARS = 2  # of a video
BAR = (1.5, 0.75)  # half its length, along its way, and half its width, in its radii
MAX_DRAWS = 1000  # drawn for a video before giving up
TURN = 2 * np.pi

# What may happen to an object, and how often it is drawn. `leaves`: out of the frame and back;
# `gone`: out, not back; `hidden`: a bar that is not annotated passes in front; `late`: comes in.
EVENTS = {"leaves": 0.3, "gone": 0.1, "hidden": 0.25, "late": 0.15, None: 0.2}
ATTRIBUTES = ("absence", "late", "occlusion", "look-alike", "scale", "looks")


@dataclass(frozen=True)
class DemoSplit:
    """What one split contains."""

    seed: int
    num_videos: int
    num_frames: int
    min_objects: int
    max_objects: int
    max_speed: float  # px per frame; each shape draws its own below it, events are faster
    looks: float  # 0..1, how far light, shape and the visible side of an object change in 24 frames
    events: float  # 0..1, share of the objects that get an event of EVENTS
    twins: float  # 0..1, share of the videos in which two shapes look the same
    max_radius: float = 17.0  # px


@dataclass(eq=False)
class Shape:
    """One moving shape. In its own coordinates its radius is 1, its surface a cylinder's."""

    centre: np.ndarray  # (T, 2) px, (x, y)
    radius: np.ndarray  # (T,) px
    angle: np.ndarray  # (T,) radians, in the plane
    squash: np.ndarray  # (T,) 0..1, the width of its x axis: a turn out of the plane
    roll: np.ndarray  # (T,) radians, how far the surface has turned about the y axis
    light: np.ndarray  # (T,) factor of its colours
    waves: np.ndarray  # (K, 4): order, height, phase and its change per frame, of the outline
    colours: np.ndarray  # (4, 3): two for the front and two for the back
    pattern: np.ndarray  # (P, 4): turns around, turns along, phase, weight; of the surface
    sharpness: float
    is_bar: bool = False
    event: str | None = None  # of EVENTS

    def outline(self, theta: np.ndarray, frame_idx: int) -> np.ndarray:
        """Distance of the outline from the centre in the directions theta, about 1."""
        order, height, phase, change = self.waves.T[..., None]
        return 1 + (height * np.cos(order * theta.ravel() + phase + change * frame_idx)).sum(
            0
        ).reshape(theta.shape)

    def full_area(self, frame_idx: int) -> float:
        """px, the area where nothing hides it; not for bars."""
        circle = np.linspace(0, TURN, 64, endpoint=False)
        area = np.pi * (self.outline(circle, frame_idx) ** 2).mean()
        return float(area * self.radius[frame_idx] ** 2 * self.squash[frame_idx])

    def box(self, frame_idx: int) -> tuple[slice, slice] | None:
        """The rows and columns of a frame that it may cover; None: it is outside."""
        reach = self.radius[frame_idx] * (1.7 if self.is_bar else 1.6) + 1
        centre = self.centre[frame_idx]
        low = np.clip(np.floor(centre - reach), 0, SIZE).astype(int)
        high = np.clip(np.ceil(centre + reach) + 1, 0, SIZE).astype(int)
        if (low >= high).any():
            return None
        return slice(low[1], high[1]), slice(low[0], high[0])

    def coverage(
        self, frame_idx: int, box: tuple[slice, slice]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the pixels of a box, (h, w) each: the share it covers, 0..1, and its own x and y."""
        t = frame_idx
        dx = np.arange(box[1].start, box[1].stop) - self.centre[t, 0]
        dy = np.arange(box[0].start, box[0].stop)[:, None] - self.centre[t, 1]
        cos, sin = np.cos(self.angle[t]), np.sin(self.angle[t])
        x = (cos * dx + sin * dy) / (self.radius[t] * self.squash[t])
        y = (cos * dy - sin * dx) / self.radius[t]
        if self.is_bar:
            inside = np.minimum(BAR[0] - np.abs(x), BAR[1] - np.abs(y))
        else:
            inside = self.outline(np.arctan2(y, x), t) - np.hypot(x, y)
        return np.clip(0.5 + inside * self.radius[t] * self.squash[t], 0, 1), x, y

    def colour(self, frame_idx: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(h, w, 3) of the surface at its own coordinates: a pattern that turns with the roll."""
        longitude = np.arcsin(np.clip(x * 0.9, -1, 1)) + self.roll[frame_idx]
        around, along, phase, weight = self.pattern.T[..., None, None]
        wave = (weight * np.sin(around * longitude + along * y + phase)).sum(0)
        mix = 0.5 + 0.5 * np.tanh(self.sharpness * wave)[..., None]
        back = 0.5 - 0.5 * np.cos(longitude)[..., None]
        front = self.colours[0] + (self.colours[1] - self.colours[0]) * mix
        rear = self.colours[2] + (self.colours[3] - self.colours[2]) * mix
        return (front + (rear - front) * back) * self.light[frame_idx]


def wander(rng: np.random.Generator, num_frames: int, max_speed: float) -> np.ndarray:
    """(T, 2) smooth path around (0, 0) that never moves more than max_speed a frame."""
    omega = TURN / rng.uniform(22, 48, 2)
    speed = max_speed / np.sqrt(2) * rng.uniform(0.3, 1.0, 2)
    return speed / omega * np.sin(np.arange(num_frames)[:, None] * omega + rng.uniform(0, TURN, 2))


def swing(rng: np.random.Generator, num_frames: int, size: float) -> np.ndarray:
    """(T,) smooth change, from 0 on frame 0 to at most `size` after 10 to 20 frames, and back."""
    wave = rng.uniform(20, 40)
    return size * rng.uniform(-1, 1) * (0.5 - 0.5 * np.cos(TURN * np.arange(num_frames) / wave))


def window(num_frames: int, first: float, last: float, ramp: float) -> np.ndarray:
    """(T,) 1 from first to last, 0 further than ramp frames from them, smooth between."""
    frames = np.arange(num_frames)
    away = np.maximum(np.maximum(first - frames, frames - last), 0) / ramp
    return 0.5 + 0.5 * np.cos(np.pi * np.clip(away, 0, 1))


def sample_colours(rng: np.random.Generator, taken: Sequence[np.ndarray]) -> np.ndarray:
    """(4, 3) BGR, front and back; of four draws the one whose front is furthest from `taken`."""
    draws = rng.uniform(20, 235, (4, 4, 3))
    draws[:, 1] = draws[:, 0] + (draws[:, 1] - draws[:, 0]) * 0.6
    draws[:, 3] = draws[:, 2] + (draws[:, 3] - draws[:, 2]) * 0.6
    away = [min((np.abs(d[0] - t).sum() for t in taken), default=0.0) for d in draws]
    return draws[int(np.argmax(away))]


def sample_shape(rng: np.random.Generator, split: DemoSplit, taken: Sequence[np.ndarray]) -> Shape:
    """A shape on a free path inside the frame."""
    num_frames, looks = split.num_frames, split.looks
    frames = np.arange(num_frames)
    radius = np.exp(rng.uniform(*np.log((8.0, split.max_radius))))
    path = wander(rng, num_frames, split.max_speed)
    path -= (path.min(0) + path.max(0)) / 2
    room = np.maximum(SIZE / 2 - radius - np.abs(path).max(0), 0)
    orders = np.arange(1, 6)
    heights = rng.uniform(-1, 1, 5) * np.array([0.05, 0.22, 0.16, 0.12, 0.09])
    change = rng.uniform(-1, 1, 5) * 0.16 * looks
    waves = np.stack([orders, heights, rng.uniform(0, TURN, 5), change], 1)
    pattern = np.stack(
        [
            rng.integers(0, 4, 3),
            rng.uniform(0, 6, 3),
            rng.uniform(0, TURN, 3),
            rng.uniform(0.3, 1.0, 3),
        ],
        1,
    )
    return Shape(
        centre=path + SIZE / 2 + rng.uniform(-1, 1, 2) * room,
        radius=radius * np.exp(swing(rng, num_frames, 0.45)),
        angle=rng.uniform(0, TURN) + rng.uniform(-0.08, 0.08) * frames,
        squash=1 - np.abs(swing(rng, num_frames, 0.45 * looks)),
        roll=rng.uniform(-0.4, 0.4) + rng.uniform(-1, 1) * 0.16 * looks * frames,
        light=1 + swing(rng, num_frames, 0.4 * looks),
        waves=waves,
        colours=sample_colours(rng, taken),
        pattern=pattern,
        sharpness=rng.uniform(0.6, 3.0),
    )


def move_out(shape: Shape, first: float, last: float, ramp: float) -> None:
    """Move the shape over the nearest border, out of sight from frame `first` to `last`.

    Args:
        ramp: frames for the way out, and for the way back.
    """
    frames = np.arange(len(shape.centre))
    spell = np.flatnonzero((frames >= first) & (frames <= last))
    x, y = shape.centre[spell[len(spell) // 2]]
    side = int(np.argmin([x, SIZE - x, y, SIZE - y]))
    aside = np.array([(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])[side]
    to_border = SIZE * (side % 2) - shape.centre @ aside  # (T,) px
    # At rest it keeps close to that border, so that the way out is short.
    shape.centre += aside * max(to_border.min() - 1.1 * shape.radius.max(), 0.0)
    way = (SIZE * (side % 2) - shape.centre @ aside)[spell].max() + 1.7 * shape.radius.max()
    shape.centre += np.outer(window(len(frames), first, last, ramp), aside * way)


def hide(shape: Shape, rng: np.random.Generator, split: DemoSplit, peak: float) -> Shape:
    """A bar that passes in front of the shape around frame `peak`."""
    bar = sample_shape(rng, split, [])
    heading = rng.uniform(0, TURN)
    along = np.array([np.cos(heading), np.sin(heading)])
    at = round(peak)
    bar.radius = np.full(split.num_frames, 1.7 * shape.radius[at])  # it covers the shape whole
    speed = (BAR[0] * bar.radius[0] - shape.radius[at]) / rng.uniform(1.2, 3.0)
    bar.centre = shape.centre + (np.arange(split.num_frames) - peak)[:, None] * speed * along
    bar.angle = np.full(split.num_frames, heading)
    bar.squash = np.ones(split.num_frames)
    bar.is_bar = True
    return bar


def make_twin(shape: Shape, rng: np.random.Generator, partner: Shape) -> None:
    """Give the partner the looks of the shape, and a path that comes close to the shape's."""
    for name in ("waves", "colours", "pattern", "sharpness", "roll", "light", "squash"):
        setattr(partner, name, getattr(shape, name))
    partner.radius = shape.radius * rng.uniform(0.9, 1.1)
    peak = int(rng.integers(len(shape.centre) // 3, len(shape.centre)))
    heading = rng.uniform(0, TURN)
    gap = rng.uniform(1.6, 2.4) * shape.radius[peak]
    goal = shape.centre[peak] + gap * np.array([np.cos(heading), np.sin(heading)])
    goal = np.clip(goal, shape.radius[peak], SIZE - shape.radius[peak])
    near = window(len(shape.centre), peak - 1, peak + 1, 8.0)
    partner.centre = partner.centre + near[:, None] * (goal - partner.centre[peak])


def sample_layout(rng: np.random.Generator, split: DemoSplit) -> tuple[list[Shape], list[Shape]]:
    """The annotated objects, and all shapes from back to front."""
    objects: list[Shape] = []
    for _ in range(int(rng.integers(split.min_objects, split.max_objects + 1))):
        objects.append(sample_shape(rng, split, [shape.colours[0] for shape in objects]))
    others = [sample_shape(rng, split, []) for _ in range(int(rng.integers(0, 2)))]
    if split.events and rng.random() < split.twins:
        twins = [*objects, *others]
        make_twin(objects[0], rng, twins[int(rng.integers(1, len(twins)))])
    bars: list[Shape] = []
    last = split.num_frames - 1
    for shape in objects:
        drawn = rng.choice(len(EVENTS), p=list(EVENTS.values()))
        event = list(EVENTS)[drawn] if rng.random() < split.events else None
        if event == "leaves":
            first = rng.uniform(4, last - 6)
            move_out(shape, first, first + rng.uniform(2, 8), rng.uniform(3, 5))
        elif event == "gone":
            move_out(shape, rng.uniform(0.5, 0.85) * last, 2 * last, rng.uniform(3, 5))
        elif event == "late":
            move_out(shape, -last, rng.uniform(0.05, 0.4) * last, rng.uniform(2, 3))
        elif event == "hidden" and len(bars) < MAX_BARS:
            bars.append(hide(shape, rng, split, rng.uniform(4, last - 3)))
        shape.event = event
    order = rng.permutation(len(objects) + len(others))
    return objects, [[*objects, *others][i] for i in order] + bars


def sample_backdrop(rng: np.random.Generator, split: DemoSplit) -> np.ndarray:
    """(T, SIZE, SIZE, 3): crossing waves between two colours, under a slow pan, zoom and turn."""
    num_frames = split.num_frames
    colours = rng.uniform(20, 235, (2, 3))
    colours[1] = colours[0] + (colours[1] - colours[0]) * rng.uniform(0.2, 0.7)
    waves = np.stack([rng.uniform(-0.16, 0.16, 9), rng.uniform(-0.16, 0.16, 9)], 1)
    phases, weights = rng.uniform(0, TURN, 9), rng.uniform(0.3, 1, 9)
    pan = wander(rng, num_frames, min(2.0, split.max_speed))
    turn = rng.uniform(-0.01, 0.01) * np.arange(num_frames)
    zoom = 1 + swing(rng, num_frames, 0.15)
    sharpness = rng.uniform(0.4, 2.0)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    frames = np.empty((num_frames, SIZE, SIZE, 3))
    for t in range(num_frames):
        cos, sin = np.cos(turn[t]) * zoom[t], np.sin(turn[t]) * zoom[t]
        # A wave in turned and shifted coordinates is a wave with another vector and phase.
        vectors = waves @ np.array([[cos, -sin], [sin, cos]])
        shift = waves @ pan[t] + phases
        total = sum(
            w * np.sin(v[0] * x + v[1] * y + p)
            for w, v, p in zip(weights, vectors, shift, strict=True)
        )
        frames[t] = colours[0] + (colours[1] - colours[0]) * (
            0.5 + 0.5 * np.tanh(sharpness * total)[..., None]
        )
    return frames


def cover(
    shapes: list[Shape], objects: list[Shape], frames: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Masks (T, N, SIZE, SIZE) bool and visible shares (T, N) of the objects on some frames.

    A mask is where the object is the topmost shape that covers at least half a pixel. A share is
    the mask's area over that of the whole object, parts outside of the frame included.
    """
    number = {id(shape): n for n, shape in enumerate(objects)}
    owner = np.full((len(frames), SIZE, SIZE), -1)
    for row, t in zip(owner, frames, strict=True):
        for shape in shapes:
            if (box := shape.box(t)) is not None:
                row[box][shape.coverage(t, box)[0] >= 0.5] = number.get(id(shape), -1)
    masks = owner[:, None] == np.arange(len(objects))[:, None, None]
    full = [[shape.full_area(t) for shape in objects] for t in frames]
    return masks, masks.sum((2, 3)) / full


def is_clear(masks: np.ndarray, shares: np.ndarray) -> bool:
    """Whether each object is seen well on its first frame, and on a third of all frames or more."""
    seen = masks.sum((2, 3)) >= MIN_AREA
    first = seen.argmax(0)
    least = np.where(first == 0, SHOWN_ON_FRAME_0, SHOWN_WHEN_LATE)
    shown = shares[first, np.arange(len(first))] >= least
    return bool((shown & (seen.mean(0) >= 1 / 3)).all())


def attributes_of(
    shapes: list[Shape], objects: list[Shape], masks: np.ndarray, shares: np.ndarray
) -> list[list[str]]:
    """The names of ATTRIBUTES that hold for each object."""
    seen = masks.sum((2, 3)) >= MIN_AREA
    found = []
    for n, shape in enumerate(objects):
        first = int(seen[:, n].argmax())
        after, turned = seen[first:, n], np.abs(shape.roll - shape.roll[first])[first:]
        twins = [s for s in shapes if s is not shape and s.pattern is shape.pattern]
        holds = {
            "absence": not after.all(),
            "late": first > 0,
            "occlusion": bool(shape.event == "hidden" or _is_covered(shape, shares[first:, n])),
            "look-alike": bool(twins),
            "scale": shape.radius.max() / shape.radius.min() > 1.3,
            "looks": turned.max() > 1.5 or shape.squash.min() < 0.7,
        }
        found.append([name for name in ATTRIBUTES if holds[name]])
    return found


def _is_covered(shape: Shape, shares: np.ndarray) -> bool:
    """Whether other shapes hide half of an object that stays in the frame."""
    inside = (np.abs(shape.centre - SIZE / 2) < SIZE / 2 - shape.radius[:, None]).all(1)
    return bool((shares[inside[len(inside) - len(shares) :]] < 0.5).any())


def make_video(
    split: DemoSplit, video_index: int
) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Frames (T, SIZE, SIZE, 3) uint8 BGR, masks (T, N, SIZE, SIZE) bool, attributes by object."""
    rng = np.random.default_rng([split.seed, video_index])
    for _ in range(MAX_DRAWS):
        objects, shapes = sample_layout(rng, split)
        # Frame 0 alone tells most of the layouts that do not fit.
        at_first = [shape for shape in objects if shape.event != "late"]
        if (cover(shapes, at_first, [0])[1] < SHOWN_ON_FRAME_0).any():
            continue
        masks, shares = cover(shapes, objects, range(split.num_frames))
        if is_clear(masks, shares):
            break
    else:
        raise RuntimeError(f"video {video_index} of {split}: no layout shows all of its objects")

    frames = sample_backdrop(rng, split)
    light = 1 + swing(rng, split.num_frames, 0.25 * split.looks)
    for t, frame in enumerate(frames):
        for shape in shapes:
            if (box := shape.box(t)) is not None:
                alpha, x, y = shape.coverage(t, box)
                frame[box] += (shape.colour(t, x, y) - frame[box]) * alpha[..., None]
        frame *= light[t]
    frames += rng.integers(-6, 7, frames.shape)
    pictures = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
    return pictures, masks, attributes_of(shapes, objects, masks, shares)
