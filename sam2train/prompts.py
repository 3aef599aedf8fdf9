"""Prompts drawn from ground-truth masks: points, bounding boxes, masks."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from sam2train.clips import Prompt, boundary_distance
from sam2train.errors import UserError

PROMPT_TYPES = ("point", "bbox", "mask")


class PromptGenerator:
    """Draws one prompt of a random type from the mask of one object on one frame.

    Args:
        prompt_types: types to draw from, uniformly; all three by default, and where None is given.
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
        prompt_types: Sequence[str] | None = PROMPT_TYPES,
        num_of_pos_points: int | tuple[int, int] = 1,
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        box_jitter: float = 0.0,
        weights: Sequence[float] | None = None,
    ):
        if isinstance(prompt_types, str):
            raise UserError(
                f"prompt_types: {prompt_types!r} is a text; expected a list, [{prompt_types!r}]"
            )
        self.prompt_types = list(PROMPT_TYPES if prompt_types is None else prompt_types)
        unknown = [name for name in self.prompt_types if name not in PROMPT_TYPES]
        if unknown or not self.prompt_types:
            raise UserError(
                f"prompt_types: {self.prompt_types!r} must be one or more of "
                f"{', '.join(PROMPT_TYPES)}"
            )
        if weights is not None and (len(weights) != len(self.prompt_types) or min(weights) <= 0):
            raise UserError(
                f"prompt_weights: {list(weights)} for prompt_types {self.prompt_types}; "
                "expected a number above 0 for each of them"
            )
        self.weights = weights
        self.num_of_pos_points = _as_range(num_of_pos_points)
        self.include_center = include_center
        self.num_of_neg_points = num_of_neg_points
        self.box_jitter = box_jitter
        low, high = self.num_of_pos_points
        num_of_neg_points = _whole("num_of_neg_points", num_of_neg_points)
        if not 0 <= low <= high or num_of_neg_points < 0:
            raise UserError(
                f"points: {low} to {high} positive and {num_of_neg_points} negative ones asked "
                "for; expected 0 <= lowest <= highest, and no number below 0"
            )
        if not 0 <= box_jitter <= 0.5:
            raise UserError(
                f"box_jitter: {box_jitter}; expected 0 to 0.5, beyond which corners change places"
            )
        if "point" in self.prompt_types and low == 0 and not include_center:
            raise UserError(
                "num_of_pos_points: 0 with include_center false leaves a point prompt without a "
                "positive point; ask for at least 1, or take `point` out of prompt_types"
            )

    def generate(
        self,
        mask: np.ndarray,
        rng: np.random.Generator,
        *,
        object_id: int | str = 1,
        frame_index: int = 0,
        among: Sequence[str] = PROMPT_TYPES,
    ) -> Prompt:
        """One prompt for one object.

        Args:
            mask: (H, W) bool, or numbers of which those above 0 are the object; an empty one gives
                a prompt without points, box and mask.
            rng: draws the type and the points.
            among: types to draw from where they are some of the generator's own.
        """
        mask = np.asarray(mask) > 0  # 0 and 1, or 0 and 255, will do
        if mask.ndim != 2:
            raise UserError(f"a mask of shape {mask.shape}; expected that of one object, (H, W)")
        kind = self._draw_type(among, rng)
        prompt = Prompt(
            object_id=object_id,
            frame_index=frame_index,
            type=kind,
            points=np.zeros((0, 2), np.float32),
            labels=np.zeros(0, np.int32),
            box=None,
            mask=None,
        )
        if not mask.any():
            return prompt
        if kind == "point":
            prompt["points"], prompt["labels"] = self._sample_points(mask, rng)
        elif kind == "bbox":
            prompt["box"] = jitter_box(mask_to_box(mask), mask.shape, self.box_jitter, rng)
            prompt["points"] = prompt["box"].reshape(2, 2)
            prompt["labels"] = np.array([2, 3], np.int32)
        else:
            prompt["mask"] = mask
        return prompt

    def _draw_type(self, among: Sequence[str], rng: np.random.Generator) -> str:
        places = [place for place, name in enumerate(self.prompt_types) if name in among]
        if self.weights is None:
            return self.prompt_types[places[rng.integers(len(places))]]
        weights = np.array([self.weights[place] for place in places])
        return self.prompt_types[places[rng.choice(len(places), p=weights / weights.sum())]]

    def _sample_points(
        self, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.num_of_pos_points
        positive = sample_points(mask, int(rng.integers(low, high + 1)), rng)
        if self.include_center:
            positive = np.concatenate([mask_center(mask)[None], positive])
        negative = sample_points(~mask, self.num_of_neg_points, rng)
        labels = np.repeat(np.array([1, 0], np.int32), [len(positive), len(negative)])
        return np.concatenate([positive, negative]), labels


def _as_range(clicks: int | Sequence[int]) -> tuple[int, int]:
    """(low, high) from a number or a range; whole numbers of NumPy will do."""
    ends = list(clicks) if np.ndim(clicks) == 1 else [clicks, clicks]
    if isinstance(clicks, str) or len(ends) != 2:
        raise UserError(
            f"num_of_pos_points: {clicks!r}; expected a whole number or a range of two, (1, 3)"
        )
    low, high = (_whole("num_of_pos_points", end) for end in ends)
    return low, high


def _whole(name: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise UserError(f"{name}: {number!r}; expected a whole number") from None


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
