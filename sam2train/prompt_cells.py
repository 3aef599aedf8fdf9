"""The prompts of a prompt matrix: point, box and mask, clean and moved, with 1, 3 and 5 clicks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from sam2train.clips import Prompt, boundary_distance
from sam2train.evaluate import Videos, first_views
from sam2train.memory import track_clip
from sam2train.model import SAM2Model
from sam2train.prompts import PromptGenerator, jitter_box, mask_to_box
from sam2train.transforms import normalise, resize_image
from sam2train.videos import Video

CLICKS = (1, 3, 5)
NOISE = (0.0, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Cell:
    """One kind of prompt at one strength of noise."""

    prompt: str  # point, bbox, mask
    clicks: int  # of a point prompt; 0 for the others
    # The share of the sides of the object's box by which a click or a corner is moved at most,
    # uniformly; a mask is stretched as its box is. 0 is clean.
    noise: float

    @property
    def name(self) -> str:
        return f"{self.clicks} click{'s' * (self.clicks > 1)}" if self.clicks else self.prompt


def all_cells() -> list[Cell]:
    """Row by row: clicks, box, mask; the clean one first."""
    kinds = [("point", clicks) for clicks in CLICKS] + [("bbox", 0), ("mask", 0)]
    return [Cell(prompt, clicks, noise) for prompt, clicks in kinds for noise in NOISE]


class CellPrompts:
    """Draws the prompts of one cell: a `DrawPrompts`.

    Clicks follow SAM 2's simulation of a user: the first falls on the middle of the object, each
    further one on the middle of the largest error that the model makes with those so far, positive
    where the object is missed, negative where there is none. All clicks are then given together.
    So they depend on the model. Random numbers do not: every model and strength has the same.
    """

    def __init__(self, model: SAM2Model, cell: Cell, *, bf16: bool = False):
        self.model, self.cell, self.bf16 = model, cell, bf16
        self.generator = PromptGenerator([cell.prompt], 0, include_center=True)

    def __call__(self, dataset: Videos, video: Video, rng: np.random.Generator) -> list[Prompt]:
        prompts = []
        for object_id, t, mask in first_views(dataset, video):
            # A stream for each object: the number of clicks must not move what comes after.
            own = np.random.default_rng(rng.integers(2**63))
            prompt = self.generator.generate(mask, own, object_id=object_id, frame_index=t)
            prompt = move_prompt(prompt, mask, self.cell.noise, own)
            if self.cell.clicks > 1:
                self._correct(dataset, video, prompt, mask, own)
            prompts.append(prompt)
        return prompts

    def _correct(
        self,
        dataset: Videos,
        video: Video,
        prompt: Prompt,
        mask: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        """Add clicks to a point prompt until the cell has its number or nothing is wrong."""
        box = mask_to_box(mask)
        for _ in range(self.cell.clicks - 1):
            predicted = segment_frame(self.model, dataset, video, prompt, bf16=self.bf16)
            click = next_click(mask, predicted)
            if click is None:
                return
            point = move_point(click[0], box, mask.shape, self.cell.noise, rng)
            prompt["points"] = np.concatenate([prompt["points"], point[None]])
            prompt["labels"] = np.append(prompt["labels"], np.int32(click[1]))


@torch.inference_mode()
def segment_frame(
    model: SAM2Model, dataset: Videos, video: Video, prompt: Prompt, *, bf16: bool = False
) -> np.ndarray:
    """(H, W) bool at the model's input size: its answer on the prompted frame."""
    was_training = model.training
    model.eval()
    try:
        t = prompt["frame_index"]
        frame = resize_image(dataset.read_frame(video, t), dataset.image_size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features = model.encode_images(normalise(frame[None]).to(model.device))
            # A video that ends on the prompted frame.
            (output,) = track_clip(model.sam2, lambda _: features, t + 1, {t: [prompt]})
        return (output.mask_logits[0] > 0).cpu().numpy()
    finally:
        model.train(was_training)


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


def move_prompt(prompt: Prompt, mask: np.ndarray, noise: float, rng: np.random.Generator) -> Prompt:
    """A prompt moved by `noise`, see `Cell`; `mask` (H, W) bool is the object it was drawn from."""
    if noise == 0:
        return prompt
    box = mask_to_box(mask)
    if prompt["type"] == "point":
        moved = [move_point(point, box, mask.shape, noise, rng) for point in prompt["points"]]
        return {**prompt, "points": np.stack(moved)}
    corners = jitter_box(box, mask.shape, noise, rng, most=np.inf)
    if prompt["type"] == "bbox":
        return {**prompt, "box": corners, "points": corners.reshape(2, 2)}
    return {**prompt, "mask": stretch_mask(mask, box, corners)}


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
