"""Prompts drawn from ground-truth masks: points, bounding boxes, masks.

A prompt type is one class here and one line in `PROMPTS`; no other module uses its name. What the
decoder gets is what the class puts into the fields of a `Prompt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import cv2
import numpy as np
from pydantic import AfterValidator, Field, model_validator

from sam2train.clips import Prompt, boundary_distance, empty_prompt
from sam2train.config import Section, build, one_of
from sam2train.errors import UserError

# Where nothing else is said. A new type is no part of it, so that experiments stay what they were.
DEFAULT_TYPES = ("point", "bbox", "mask")


TypeName = Annotated[str, AfterValidator(lambda name: one_of(name, PROMPTS))]
Weight = Annotated[float, Field(gt=0)]
Clicks = Annotated[int, Field(ge=0)]
# More would let the corners of a box change places.
BoxJitter = Annotated[float, Field(ge=0, le=0.5)]


class PromptConfig(Section):
    """What prompts are like; `PromptGenerator` says what each key means."""

    prompt_types: tuple[TypeName, ...] = Field(DEFAULT_TYPES, min_length=1)
    prompt_weights: tuple[Weight, ...] | None = None
    num_of_pos_points: Clicks | tuple[Clicks, Clicks] = 1
    include_center: bool = False
    num_of_neg_points: Clicks = 0
    box_jitter: BoxJitter = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> PromptConfig:
        check_prompts(self, self.prompt_types, self.prompt_weights)
        return self


def check_prompts(
    config: PromptConfig | Any, types: Sequence[str], weights: Sequence[float] | None = None
) -> None:
    """Raise ValueError where settings do not fit each other, or leave a type without its points.

    Args:
        config: has the fields of `PromptConfig`.
    """
    low, high = click_range(config.num_of_pos_points)
    if low > high:
        raise ValueError(f"num_of_pos_points is {[low, high]}; expected [lowest, highest]")
    if weights is not None and len(weights) != len(types):
        raise ValueError(
            f"prompt_weights has {len(weights)} numbers for {len(types)} prompt_types; expected "
            "one for each"
        )
    for name in types:
        PROMPTS[name].check(config)


def click_range(clicks: int | Sequence[int]) -> tuple[int, int]:
    """(low, high) of a number of clicks or of their range, both ends included."""
    low, high = (clicks, clicks) if isinstance(clicks, int) else clicks
    return low, high


class Canvas(Protocol):
    """What prompts are painted on, in the colour of their object; see `overlays.PromptCanvas`."""

    def paint_mask(self, mask: np.ndarray) -> None: ...

    def paint_box(self, box: np.ndarray) -> None: ...

    def paint_click(self, point: np.ndarray, positive: bool) -> None: ...


class PromptType:
    """One type of prompt: how it is drawn from a mask, checked, moved and painted.

    The decoder gets `points` with `labels`, or else `mask`: whatever `sample` fills.
    """

    gives_mask = False  # whether `sample` fills `mask`; SAM 2 takes clicks or a mask of an object
    is_clicked = False  # whether a user makes it click by click, so that further ones correct it

    def check(self, config: PromptConfig) -> None:
        """Raise ValueError where settings leave nothing to draw."""

    def sample(
        self, mask: np.ndarray, config: PromptConfig, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The fields of a `Prompt` that the type fills, for an object.

        Args:
            mask: (H, W) bool, not empty.
        """
        raise NotImplementedError

    def move(
        self, prompt: Prompt, mask: np.ndarray, noise: float, rng: np.random.Generator
    ) -> Prompt:
        """The prompt moved by up to `noise` of the sides of the object's box, uniformly.

        Args:
            mask: (H, W) bool, the object.
        """
        box = mask_to_box(mask)
        moved = [move_point(point, box, mask.shape, noise, rng) for point in prompt["points"]]
        return {**prompt, "points": np.stack(moved)}

    def paint(self, prompt: Prompt, canvas: Canvas) -> None:
        """Paint what the decoder gets."""
        if prompt["mask"] is not None:
            canvas.paint_mask(prompt["mask"])
        if prompt["box"] is not None:
            canvas.paint_box(prompt["box"])
        for point, label in zip(prompt["points"], prompt["labels"], strict=True):
            if label in (0, 1):  # 2 and 3 are the corners of the box
                canvas.paint_click(point, label == 1)


class PointPrompt(PromptType):
    """Clicks: positive ones on the object, its centre first where asked for, then negative ones."""

    is_clicked = True

    def check(self, config: PromptConfig) -> None:
        if click_range(config.num_of_pos_points)[0] == 0 and not config.include_center:
            raise ValueError(
                "num_of_pos_points: 0 with include_center false leaves a point prompt without a "
                "positive point; ask for at least 1, or take `point` out of prompt_types"
            )

    def sample(
        self, mask: np.ndarray, config: PromptConfig, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        low, high = click_range(config.num_of_pos_points)
        positive = sample_points(mask, int(rng.integers(low, high + 1)), rng)
        if config.include_center:
            positive = np.concatenate([mask_center(mask)[None], positive])
        negative = sample_points(~mask, config.num_of_neg_points, rng)
        labels = np.repeat(np.array([1, 0], np.int32), [len(positive), len(negative)])
        return {"points": np.concatenate([positive, negative]), "labels": labels}


class BoxPrompt(PromptType):
    """The bounding box; the decoder gets it as two points with labels of their own."""

    def sample(
        self, mask: np.ndarray, config: PromptConfig, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        return box_fields(jitter_box(mask_to_box(mask), mask.shape, config.box_jitter, rng))

    def move(
        self, prompt: Prompt, mask: np.ndarray, noise: float, rng: np.random.Generator
    ) -> Prompt:
        box = jitter_box(mask_to_box(mask), mask.shape, noise, rng, most=np.inf)
        return {**prompt, **box_fields(box)}


class MaskPrompt(PromptType):
    """The mask itself; moved, it is stretched as its box is."""

    gives_mask = True

    def sample(
        self, mask: np.ndarray, config: PromptConfig, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        return {"mask": mask}

    def move(
        self, prompt: Prompt, mask: np.ndarray, noise: float, rng: np.random.Generator
    ) -> Prompt:
        box = mask_to_box(mask)
        corners = jitter_box(box, mask.shape, noise, rng, most=np.inf)
        return {**prompt, "mask": stretch_mask(mask, box, corners)}


PROMPTS: dict[str, PromptType] = {
    "point": PointPrompt(),
    "bbox": BoxPrompt(),
    "mask": MaskPrompt(),
}


def type_of(prompt: Prompt) -> PromptType:
    """The type of a prompt; one without a known name is what its fields say."""
    return PROMPTS.get(prompt.get("type", ""), PromptType())


def types_like(name: str) -> list[str]:
    """The types that an object can be prompted with after this one: clicks do not follow a mask,
    nor a mask clicks."""
    gives_mask = PROMPTS[name].gives_mask
    return [other for other, kind in PROMPTS.items() if kind.gives_mask == gives_mask]


class PromptGenerator:
    """Draws one prompt of a random type from the mask of one object on one frame.

    Args:
        prompt_types: names of `PROMPTS` to draw from; point, bbox and mask by default, and where
            None is given.
        num_of_pos_points: positive clicks of a point prompt, or a range (low, high), both included.
        include_center: add the centre of the mask as the first positive click.
        num_of_neg_points: negative clicks of a point prompt, anywhere outside the mask.
        box_jitter: noise of a box corner as a share of the box side, 0 to 0.5; see `jitter_box`.
        weights: how often each of the types is drawn, in any unit; None draws all alike.

    Raises:
        UserError: an unknown type, numbers out of range, or point prompts without any point.
    """

    def __init__(
        self,
        prompt_types: Sequence[str] | None = DEFAULT_TYPES,
        num_of_pos_points: int | tuple[int, int] = 1,
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        box_jitter: float = 0.0,
        weights: Sequence[float] | None = None,
    ):
        given = {
            "prompt_types": DEFAULT_TYPES if prompt_types is None else prompt_types,
            "prompt_weights": weights,
            "num_of_pos_points": num_of_pos_points,
            "include_center": include_center,
            "num_of_neg_points": num_of_neg_points,
            "box_jitter": box_jitter,
        }
        raw = {name: _without_numpy(value) for name, value in given.items()}
        self.config = build(PromptConfig, raw, "PromptGenerator")
        self.prompt_types = list(self.config.prompt_types)
        self.num_of_pos_points = click_range(self.config.num_of_pos_points)
        self.include_center = self.config.include_center
        self.num_of_neg_points = self.config.num_of_neg_points

    def generate(
        self,
        mask: np.ndarray,
        rng: np.random.Generator,
        *,
        object_id: int | str = 1,
        frame_index: int = 0,
        among: Sequence[str] | None = None,
    ) -> Prompt:
        """One prompt for one object.

        Args:
            mask: (H, W) bool, or numbers of which those above 0 are the object; an empty one gives
                a prompt without points, box and mask.
            rng: draws the type and the points.
            among: types to draw from where they are some of the generator's own; None: all of them.
        """
        mask = np.asarray(mask) > 0  # 0 and 1, or 0 and 255, will do
        if mask.ndim != 2:
            raise UserError(f"a mask of shape {mask.shape}; expected that of one object, (H, W)")
        name = self._sample_type(among, rng)
        prompt = empty_prompt(object_id, frame_index, name)
        if mask.any():
            prompt.update(PROMPTS[name].sample(mask, self.config, rng))
        return prompt

    def _sample_type(self, among: Sequence[str] | None, rng: np.random.Generator) -> str:
        types, weights = self.prompt_types, self.config.prompt_weights
        places = [k for k, name in enumerate(types) if among is None or name in among]
        if weights is None:
            return types[places[rng.integers(len(places))]]
        own = np.array([weights[place] for place in places])
        return types[places[rng.choice(len(places), p=own / own.sum())]]


def _without_numpy(value: Any) -> Any:
    """The value, or list of values, as Python's own numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_without_numpy(item) for item in value]
    return value


def box_fields(box: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of a `Prompt` with a box (4,): SAM 2 takes its corners as points labelled 2, 3."""
    return {"box": box, "points": box.reshape(2, 2), "labels": np.array([2, 3], np.int32)}


def sample_points(region: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """(P, 2) float32 pixels of a region, uniform with replacement; none for an empty region.

    Args:
        region: (H, W) bool.
    """
    inside = np.flatnonzero(region)
    if len(inside) == 0 or num_points == 0:
        return np.zeros((0, 2), np.float32)
    y, x = np.divmod(inside[rng.integers(len(inside), size=num_points)], region.shape[1])
    return np.stack([x, y], axis=1).astype(np.float32)


def mask_center(mask: np.ndarray) -> np.ndarray:
    """(2,) float32: the pixel farthest from the boundary, so inside a U shape or one of two parts.

    The frame's border counts as boundary, as in SAM 2's click simulation.

    Args:
        mask: (H, W) bool, not empty.
    """
    y, x = np.unravel_index(np.argmax(boundary_distance(mask)), mask.shape)
    return np.array([x, y], np.float32)


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """(4,) float32: x_min, y_min, x_max, y_max, the outermost pixels themselves, as SAM 2 counts.

    Args:
        mask: (H, W) bool, not empty.
    """
    x = np.flatnonzero(mask.any(axis=0))
    y = np.flatnonzero(mask.any(axis=1))
    return np.array([x[0], y[0], x[-1], y[-1]], np.float32)


def jitter_box(
    box: np.ndarray,
    size: tuple[int, int],
    jitter: float,
    rng: np.random.Generator,
    most: float = 20.0,
) -> np.ndarray:
    """(4,) float32: each corner moved by up to `jitter` of the box side, `most` pixels at most.

    Corners stay inside the frame. From SAM 2's `sample_box_points`, which uses a jitter of 0.1.

    Args:
        box: (4,) x_min, y_min, x_max, y_max.
        size: (H, W) of the frame.
    """
    if jitter == 0:
        return box
    width, height = box[2] - box[0], box[3] - box[1]
    reach = np.minimum(np.array([width, height, width, height]) * jitter, most)
    moved = box + rng.uniform(-1, 1, size=4) * reach
    limit = np.array([size[1], size[0], size[1], size[0]]) - 1
    return np.clip(moved, 0, limit).astype(np.float32)


def move_point(
    point: np.ndarray,
    box: np.ndarray,
    size: tuple[int, int],
    noise: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(2,) float32 (x, y): moved by up to `noise` of the box's sides, inside the frame."""
    reach = noise * (box[2:] - box[:2])
    limit = np.array([size[1], size[0]]) - 1
    return np.clip(point + rng.uniform(-1, 1, size=2) * reach, 0, limit).astype(np.float32)


def stretch_mask(mask: np.ndarray, box: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(H, W) bool: the mask moved and stretched so that its box becomes `target`; never empty."""
    # Boxes name their outermost pixels: a box of one pixel has the side 1.
    scale = (target[2:] - target[:2] + 1) / (box[2:] - box[:2] + 1)
    shift = (target[:2] - 0.5) - scale * (box[:2] - 0.5)
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]], np.float64)
    moved = cv2.warpAffine(
        mask.astype(np.uint8), matrix, (mask.shape[1], mask.shape[0]), flags=cv2.INTER_NEAREST
    ).astype(bool)
    return moved if moved.any() else mask


def next_click(mask: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, int] | None:
    """(2,) float32 (x, y) and label: the pixel deepest inside an error; None if there is none.

    1 where the object is missed, 0 where the prediction has something else, as SAM 2's
    `sample_one_point_from_error_center` decides. Masks are (H, W) bool.
    """
    if np.array_equal(mask, predicted):
        return None
    missed, wrong = boundary_distance(mask & ~predicted), boundary_distance(predicted & ~mask)
    label = int(missed.max() > wrong.max())
    y, x = np.unravel_index(np.argmax(missed if label else wrong), mask.shape)
    return np.array([x, y], np.float32), label


# The kinds of prompts that a model is scored with

CLICKS = (1, 3, 5)
NOISE = (0.0, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Cell:
    """One kind of prompt at one strength of noise."""

    prompt: str  # a name of `PROMPTS`
    clicks: int  # of a prompt that is clicked; 0 for the others
    # The share of the sides of the object's box by which a click or a corner is moved at most,
    # uniformly; a mask is stretched as its box is. 0 is clean.
    noise: float

    @property
    def name(self) -> str:
        return f"{self.clicks} click{'s' * (self.clicks > 1)}" if self.clicks else self.prompt


def all_cells() -> list[Cell]:
    """Row by row, a prompt type with so many clicks each; the clean one first."""
    return [
        Cell(name, clicks, noise)
        for name, kind in PROMPTS.items()
        for clicks in (CLICKS if kind.is_clicked else (0,))
        for noise in NOISE
    ]
