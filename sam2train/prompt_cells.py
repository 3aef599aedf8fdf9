"""The prompts of a prompt matrix: each type, clean and moved, with 1, 3 and 5 clicks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sam2train.clips import Prompt, boundary_distance
from sam2train.data_source import Video
from sam2train.evaluate import ClipDataset, first_views
from sam2train.memory import track_clip
from sam2train.model import SAM2Model
from sam2train.prompts import PROMPTS, PromptGenerator, mask_to_box, move_point, type_of
from sam2train.transforms import normalise, resize_image

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

    def __call__(
        self, dataset: ClipDataset, video: Video, rng: np.random.Generator
    ) -> list[Prompt]:
        prompts = []
        for object_id, t, mask in first_views(dataset, video):
            # A stream for each object: the number of clicks must not move what comes after.
            own = np.random.default_rng(rng.integers(2**63))
            prompt = self.generator.generate(mask, own, object_id=object_id, frame_index=t)
            if self.cell.noise:
                prompt = type_of(prompt).move(prompt, mask, self.cell.noise, own)
            if self.cell.clicks > 1:
                self._correct(dataset, video, prompt, mask, own)
            prompts.append(prompt)
        return prompts

    def _correct(
        self,
        dataset: ClipDataset,
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
    model: SAM2Model, dataset: ClipDataset, video: Video, prompt: Prompt, *, bf16: bool = False
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
