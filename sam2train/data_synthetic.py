"""Objects with exact masks for videos that have none: cut-outs of other pictures, moving on top.

Smooth shapes are cut from real pictures and laid over real frames, where they move, turn, change
size, pass in front of each other, leave and return. The place of each object is known to the pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
from pydantic import Field, model_validator

from sam2train.config import Section

MIN_RADIUS = 4.0  # px; a smaller outline covers too few pixels to have a shape
MAX_LAYOUTS = 20  # tried until every object shows on frame 0; the last one has no events
SHOWN_AT_FIRST = 0.4  # share of each object that frame 0 must show for a layout to be taken
SPAN = 30  # frames for one round of events, at least
CUTS = 4  # places of a picture tried for a texture that stands out
SUPERSAMPLE = 4  # outlines are filled on a grid this much finer, which gives the soft edge
# Grey values; an object closer to its surroundings than this is brightened or darkened.
STANDS_OUT = 25.0


class SyntheticConfig(Section):
    """The `dataset.synthetic` section. Lengths are shares of the frame's shorter side."""

    paste: bool = Field(
        True, description="lay cut-outs over the frames; false: only masks move, over nothing"
    )
    min_objects: int = Field(1, ge=1, description="of a clip")
    max_objects: int = Field(3, ge=1, le=254, description="of a clip")
    min_size: float = Field(0.12, gt=0, le=1, description="length across an object")
    max_size: float = Field(0.45, gt=0, le=1, description="length across an object")
    max_speed: float = Field(0.04, ge=0, description="per frame; events may be faster")
    max_turn: float = Field(5.0, ge=0, description="degrees per frame")
    max_zoom: float = Field(1.5, ge=1, description="largest ratio of an object's sizes in a video")
    prob_leave: float = Field(0.15, ge=0, le=1, description="chance of each object: out and back")
    prob_occlusion: float = Field(0.4, ge=0, le=1, description="chance that one is hidden")

    @model_validator(mode="after")
    def _ranges(self) -> SyntheticConfig:
        for name in ("objects", "size"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} is {low} and max_{name} {high}: lower the first")
        return self


@dataclass(frozen=True, eq=False)
class Layer:
    """One moving shape, an object or something that is never annotated (object_id 0)."""

    outline: np.ndarray  # (K, 2), (x, y), largest distance from the origin is 1
    centre: np.ndarray  # (T, 2) px, (x, y)
    radius: np.ndarray  # (T,) px
    angle: np.ndarray  # (T,) radians
    object_id: int = 0
    patch: np.ndarray | None = None  # (S, S, 3) uint8, its texture; None: not painted

    def full_area(self, frame_idx: int) -> float:
        """px, the area where nothing hides it."""
        return cv2.contourArea(self.outline.astype(np.float32)) * self.radius[frame_idx] ** 2


@dataclass(frozen=True, eq=False)
class Scene:
    """Shapes over the frames of one clip or video."""

    size: tuple[int, int]  # (H, W)
    layers: list[Layer]  # from the bottom to the top

    @property
    def num_objects(self) -> int:
        return sum(layer.object_id > 0 for layer in self.layers)

    def compose(self, picture: np.ndarray, frame_idx: int) -> tuple[np.ndarray, np.ndarray]:
        """A frame with the objects on it, and their masks.

        Args:
            picture: (H, W, 3) uint8; it is not changed.

        Returns:
            (H, W, 3) uint8, and (N, H, W) bool by object id from 1: where an object is the topmost
            shape that covers at least half of the pixel.
        """
        picture = picture.copy()
        owner = np.zeros(self.size, np.uint8)
        for layer, place, corner, alpha in self._covers(frame_idx):
            owner[place][alpha >= 0.5] = layer.object_id
            if layer.patch is not None:
                scale = 2 * layer.radius[frame_idx] / len(layer.patch)
                target = layer.centre[frame_idx] - corner
                drawn = view(layer.patch, scale, layer.angle[frame_idx], target, alpha.shape)
                below = picture[place].astype(np.float32)
                picture[place] = np.rint(below + (drawn - below) * alpha[..., None])
        return picture, self._split(owner)

    def masks(self, frame_idx: int) -> np.ndarray:
        """(N, H, W) bool, those of `compose`."""
        owner = np.zeros(self.size, np.uint8)
        for layer, place, _, alpha in self._covers(frame_idx):
            owner[place][alpha >= 0.5] = layer.object_id
        return self._split(owner)

    def _split(self, owner: np.ndarray) -> np.ndarray:
        return owner == np.arange(1, self.num_objects + 1, dtype=np.uint8)[:, None, None]

    def _covers(
        self, frame_idx: int
    ) -> Iterator[tuple[Layer, tuple[slice, slice], np.ndarray, np.ndarray]]:
        """Each layer in the frame: its part of the frame, that part's corner and coverage."""
        limit = np.array(self.size[::-1])
        for layer in self.layers:
            centre, radius = layer.centre[frame_idx], layer.radius[frame_idx]
            low = np.clip(np.floor(centre - radius - 1), 0, limit).astype(int)
            high = np.clip(np.ceil(centre + radius + 2), 0, limit).astype(int)
            if (low >= high).any():
                continue
            size = (int(high[1] - low[1]), int(high[0] - low[0]))
            alpha = coverage(layer.outline, radius, layer.angle[frame_idx], centre - low, size)
            yield layer, (slice(low[1], high[1]), slice(low[0], high[0])), low, alpha


def sample_num_objects(
    config: SyntheticConfig, max_objects: int | None, rng: np.random.Generator
) -> int:
    """N, within the config's range and at most `max_objects`."""
    drawn = int(rng.integers(config.min_objects, config.max_objects + 1))
    return drawn if max_objects is None else min(drawn, max_objects)


def sample_scene(
    background: np.ndarray,
    num_frames: int,
    num_objects: int,
    config: SyntheticConfig,
    sample_picture: Callable[[np.random.Generator], np.ndarray],
    rng: np.random.Generator,
) -> Scene:
    """Objects for `num_frames` frames. At least one of them shows on frame 0, nearly always all.

    Args:
        background: (H, W, 3) uint8, frame 0: objects get its size and stand out from it.
        sample_picture: another picture, (H, W, 3) uint8 of any size, to cut an object from.
    """
    size = background.shape[:2]
    for attempt in range(1, MAX_LAYOUTS + 1):
        # Without events nothing hides the topmost object, so it shows on frame 0.
        with_events = attempt < MAX_LAYOUTS
        scene = Scene(size, _sample_layers(size, num_frames, num_objects, config, with_events, rng))
        areas = scene.masks(0).sum(axis=(1, 2))
        full = {layer.object_id: layer.full_area(0) for layer in scene.layers}
        if all(areas[o - 1] >= SHOWN_AT_FIRST * full[o] for o in full if o):
            break
    if not config.paste:
        return Scene(size, [layer for layer in scene.layers if layer.object_id])
    dressed = [
        replace(layer, patch=cut_out(sample_picture(rng), layer, background, rng))
        for layer in scene.layers
    ]
    return Scene(size, dressed)


def _sample_layers(
    size: tuple[int, int],
    num_frames: int,
    num_objects: int,
    config: SyntheticConfig,
    with_events: bool,
    rng: np.random.Generator,
) -> list[Layer]:
    side = min(size)
    frames = np.arange(num_frames)
    layers: list[Layer] = []
    for object_id in rng.permutation(num_objects) + 1:
        # Sizes are drawn by ratio: as many between 10 and 20 px as between 20 and 40.
        middle = side / 2 * np.exp(rng.uniform(*np.log((config.min_size, config.max_size))))
        swing = np.sin(2 * np.pi * frames / rng.uniform(22, 48) + rng.uniform(0, 6.3))
        radius = middle * config.max_zoom ** (rng.uniform(0, 0.5) * swing)
        radius = np.maximum(radius, MIN_RADIUS)
        paths = [_sample_path(radius, size, config.max_speed * side, rng) for _ in range(5)]
        layers.append(
            Layer(
                outline(rng),
                max(paths, key=lambda path: _clearance(path[0], radius[0], layers)),
                radius,
                rng.uniform(0, 6.3) + np.radians(config.max_turn) * rng.uniform(-1, 1) * frames,
                int(object_id),
            )
        )
    if not with_events:
        return layers

    # A long video has several events, a short clip one of each kind at most.
    spans = np.linspace(0, num_frames, max(num_frames // SPAN, 1) + 1)
    for first, last in pairwise(spans.tolist()):
        # Half the length of an event in frames: it ends within a short clip, and in a long video
        # there are frames without it.
        width = float(np.clip(0.45 * (last - first), 2, 12))
        _add_events(layers, num_objects, size, (first + width, last - 1), width, config, rng)
    return layers


def _add_events(
    layers: list[Layer],
    num_objects: int,
    size: tuple[int, int],
    peaks: tuple[float, float],
    width: float,
    config: SyntheticConfig,
    rng: np.random.Generator,
) -> None:
    """Make some of the objects, the first of the layers, leave the frame or be hidden.

    Args:
        peaks: first and last frame for the middle of an event.
        width: frames from the middle of an event to its ends.
    """

    def sample_peak() -> float:
        return float(rng.uniform(peaks[0], max(peaks)))

    leaving = rng.random(num_objects) < config.prob_leave
    if rng.random() < config.prob_occlusion:
        below, above = np.sort(rng.integers(num_objects, size=2))
        if layers[above].radius[0] > layers[below].radius[0]:  # false where both are one object
            layers[above] = _pass_in_front(layers[above], layers[below], sample_peak(), width)
        else:
            layers.append(_sample_occluder(layers[below], sample_peak(), width, rng))
        leaving[[below, above]] = False
    for place in np.flatnonzero(leaving):
        layers[place] = _leave(layers[place], size, sample_peak(), width)


def _sample_path(
    radius: np.ndarray, size: tuple[int, int], max_speed: float, rng: np.random.Generator
) -> np.ndarray:
    """(T, 2) px: smooth, and always well inside the frame."""
    path = sway(rng, len(radius), max_speed)
    path -= (path.min(axis=0) + path.max(axis=0)) / 2
    middle = np.array(size[::-1]) / 2
    room = np.maximum(middle - 0.8 * radius.max(), 0)
    path *= min(1.0, (room / np.maximum(path.max(axis=0), 1e-6)).min())
    return path + middle + rng.uniform(-1, 1, 2) * (room - path.max(axis=0))


def _clearance(place: np.ndarray, radius: float, layers: list[Layer]) -> float:
    """px between a disc and the nearest of the layers, on frame 0."""
    gaps = (np.linalg.norm(place - other.centre[0]) - radius - other.radius[0] for other in layers)
    return min(gaps, default=0.0)


def hump(num_frames: int, peak: float, width: float) -> np.ndarray:
    """(T,) 0..1: a smooth hill, 1 around the peak and 0 beyond `width` frames from it."""
    away = np.clip(np.abs(np.arange(num_frames) - peak) / width, 0, 1)
    return np.minimum(1.6 * (0.5 + 0.5 * np.cos(np.pi * away)), 1.0)


def _leave(layer: Layer, size: tuple[int, int], peak: float, width: float) -> Layer:
    """The layer, moved over the nearest border until none of it shows, and back."""
    at = min(round(peak), len(layer.centre) - 1)
    x, y = layer.centre[at]
    gaps = {(-1, 0): x, (1, 0): size[1] - x, (0, -1): y, (0, 1): size[0] - y}
    aside = min(gaps, key=gaps.__getitem__)
    way = (gaps[aside] + 1.15 * layer.radius.max()) * np.array(aside)
    return replace(layer, centre=layer.centre + hump(len(layer.centre), peak, width)[:, None] * way)


def _pass_in_front(partner: Layer, subject: Layer, peak: float, width: float) -> Layer:
    """The partner, moved to where the subject is at the peak, and back."""
    at = min(round(peak), len(subject.centre) - 1)
    way = subject.centre[at] - partner.centre[at]
    rise = hump(len(subject.centre), peak, width)[:, None]
    return replace(partner, centre=partner.centre + rise * way)


def _sample_occluder(subject: Layer, peak: float, width: float, rng: np.random.Generator) -> Layer:
    """A shape that is not annotated, on a straight line across the subject."""
    frames = np.arange(len(subject.centre))
    at = min(round(peak), len(frames) - 1)
    heading = rng.uniform(0, 2 * np.pi)
    radius = subject.radius[at] * rng.uniform(1.1, 1.6)
    speed = (subject.radius[at] + radius) / (0.6 * width)
    step = speed * np.array([np.cos(heading), np.sin(heading)])
    outlines = [outline(rng).astype(np.float32) for _ in range(3)]
    return Layer(
        max(outlines, key=cv2.contourArea),  # a thin one would hide little
        subject.centre[at] + (frames - peak)[:, None] * step,
        np.full(len(frames), radius),
        rng.uniform(0, 6.3) + rng.uniform(-0.05, 0.05) * frames,
    )


def cut_out(
    picture: np.ndarray, layer: Layer, background: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(S, S, 3) uint8: a square of a picture, the one of a few that stands out most.

    Its tones are changed a little. It is brightened or darkened where it would not stand out.
    """
    diameter = int(np.ceil(2 * layer.radius.max()))
    height, width = background.shape[:2]
    x, y = np.clip(layer.centre[0], 0, (width - 1, height - 1)).astype(int)
    reach = int(layer.radius[0]) + 1
    around = background[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]
    around_tone = _tone(around.astype(np.float32))

    # The cut-out has about the scale that it has in its own picture.
    wanted = diameter * min(picture.shape[:2]) / min(height, width)
    gain, offset = rng.uniform(0.85, 1.15, 3), rng.uniform(-20, 20)
    best, best_distance = None, -1.0
    for _ in range(CUTS):
        side = int(np.clip(wanted * rng.uniform(0.8, 1.6), 1, min(picture.shape[:2])))
        top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
        cut = picture[top : top + side, left : left + side].astype(np.float32)
        cut = np.clip(cut * gain + offset, 0, 255)
        distance = float(np.linalg.norm(_tone(cut) - around_tone))
        if distance > best_distance:
            best, best_distance = cut, distance
    if best_distance < STANDS_OUT:
        best = best + (50 if around_tone[:3].mean() < 128 else -50)
    shrinks = len(best) > diameter
    best = cv2.resize(
        best.astype(np.float32),
        (diameter, diameter),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    return np.clip(np.rint(best), 0, 255).astype(np.uint8)


def _tone(pixels: np.ndarray) -> np.ndarray:
    """(6,): mean and spread of each colour."""
    return np.concatenate([pixels.mean(axis=(0, 1)), pixels.std(axis=(0, 1))])


# Outlines, smooth paths, soft-edged fills and turned pictures


def outline(rng: np.random.Generator) -> np.ndarray:
    """(K, 2) closed outline about the origin, largest distance 1: one of six shape families."""
    theta = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(theta)
    family = rng.integers(6)
    if family == 0:  # a blob
        for order in range(2, 6):
            radius += rng.uniform(0.0, 0.5 / order) * np.cos(order * theta + rng.uniform(0, 6.3))
    elif family == 1:  # a star
        arms, depth = rng.integers(3, 7), rng.uniform(0.15, 0.4)
        radius += depth * np.cos(arms * theta)
    elif family == 2:  # a polygon; the running mean rounds its corners
        sides = rng.integers(3, 7)
        radius = 1 / np.cos(theta % (2 * np.pi / sides) - np.pi / sides)
        radius = (radius + np.roll(radius, 1) + np.roll(radius, -1)) / 3
    elif family == 3:  # a bean: a disc with one deep dent
        radius -= rng.uniform(0.35, 0.7) * np.exp(-(((theta - np.pi) / 0.6) ** 2))
    if family == 4:  # a thick arc, from a C to a horseshoe
        gap, inner = rng.uniform(0.5, 1.3), rng.uniform(0.4, 0.6)
        arc = np.linspace(gap, 2 * np.pi - gap, 36)
        theta, radius = np.r_[arc, arc[::-1]], np.r_[np.ones(36), np.full(36, inner)]
    points = radius[:, None] * np.stack([np.cos(theta), np.sin(theta)], 1)
    points[:, 1] *= rng.uniform(0.55, 1.0) if family in (2, 5) else rng.uniform(0.85, 1.0)
    points -= points.mean(0)
    return points / np.linalg.norm(points, axis=1).max()


def sway(rng: np.random.Generator, num_frames: int, max_speed: float) -> np.ndarray:
    """(T, 2) smooth path around (0, 0) that never moves more than max_speed a frame."""
    heading = rng.uniform(0, 2 * np.pi)
    speed = max_speed * rng.uniform(0.4, 1.0) * np.array([np.cos(heading), np.sin(heading)])
    omega = 2 * np.pi / rng.uniform(22, 48, 2)  # one swing takes 22 to 48 frames
    return speed / omega * np.sin(np.arange(num_frames)[:, None] * omega + rng.uniform(0, 6.3, 2))


def coverage(
    points: np.ndarray, radius: float, angle: float, centre: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(H, W) float32: the share of each pixel, 0..1, that a scaled and turned outline covers.

    Args:
        points: (K, 2) outline about the origin, (x, y).
        radius: px, what a distance of 1 becomes.
        angle: radians, from x towards y.
        centre: (2,) px, (x, y), where the origin comes to lie.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]]) * radius
    points = (points + centre) * SUPERSAMPLE
    fine = np.zeros((size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), np.uint8)
    cv2.fillPoly(fine, [np.round(points).astype(np.int32)], 255)
    return cv2.resize(fine, size[::-1], interpolation=cv2.INTER_AREA) / np.float32(255)


def view(
    picture: np.ndarray, scale: float, angle: float, target: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(H, W, 3): the square picture scaled, turned, its middle put at target, (x, y) px."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])
    matrix[:, 2] = target - matrix[:, :2] @ np.full(2, len(picture) / 2)
    return cv2.warpAffine(picture, matrix, size[::-1], borderMode=cv2.BORDER_REFLECT_101)
