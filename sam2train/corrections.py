"""Correction clicks: a simulated user clicks where the prediction is wrong while a clip is tracked.

As SAM 2 is trained (`SAM2Train` in facebookresearch/sam2): frames are drawn to be corrected, the
conditioning frames always among them; on each, several clicks follow one another, every one of them
drawn from what the decoder got wrong after the one before; the decoder sees all clicks so far and
its own last logits as a mask prompt. The loss counts every pass. Objects prompted with their mask
are not corrected.

What is drawn for an object follows from the seed, the clip's number in the run, the object's place
in it, the frame and the click: it is the same in whatever batch the clip comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field

from sam2train.clips import boundary_distance
from sam2train.config import Section
from sam2train.losses import mask_iou

if TYPE_CHECKING:
    import torch

# Keeps these random numbers apart from those of the clips.
_STREAM = 3


class DecoderPass(NamedTuple):
    """What one run of SAM 2's mask decoder gives for n objects, in the order of its
    `_forward_sam_heads`; M is 3 where it offers a choice of masks, else 1."""

    low_res_candidates: torch.Tensor  # (n, M, H / 4, W / 4) logits
    candidates: torch.Tensor  # (n, M, H, W) logits
    iou_predictions: torch.Tensor  # (n, M)
    low_res_logits: torch.Tensor  # (n, 1, H / 4, W / 4) of the candidate of highest predicted IoU
    mask_logits: torch.Tensor  # (n, 1, H, W) of the same
    obj_ptr: torch.Tensor  # (n, C) object pointer of the same
    object_score_logits: torch.Tensor  # (n, 1)


class InteractionConfig(Section):
    """The `interaction:` section: correction clicks in training, with SAM 2's names."""

    num_correction_pt_per_frame: int = Field(
        0, ge=0, description="clicks that correct a frame, one after the other; 0 corrects nothing"
    )
    num_frames_to_correct: int = Field(
        1, ge=1, description="frames of a clip that are corrected, the conditioning ones included"
    )
    rand_frames_to_correct: bool = Field(
        True, description="draw how many, from the number of conditioning frames up"
    )
    prob_to_sample_from_gt: float = Field(
        0.0, ge=0, le=1, description="chance of a click on the object, right or wrong there"
    )
    add_all_frames_to_correct_as_cond: bool = Field(
        True, description="a corrected frame becomes a conditioning frame"
    )
    point_sampling: Literal["uniform", "center"] = Field(
        "uniform", description="center: the middle of the largest error, as SAM 2 evaluates"
    )

    @property
    def enabled(self) -> bool:
        return self.num_correction_pt_per_frame > 0


class SimulatedUser:
    """The simulated user of a run: its settings, its random numbers, how much its clicks helped.

    Args:
        seed: of the clips.
        num_clips: clips of the run before the next batch; a resumed run goes on from there.
    """

    def __init__(self, config: InteractionConfig, seed: int, num_clips: int = 0):
        self.config = config
        self.seed = seed
        self.num_clips = num_clips
        self._ious: list[torch.Tensor] = []  # each (2, n): before and after the clicks of a frame

    def _rng(self, clip: int, *where: int) -> np.random.Generator:
        """A stream of its own for each clip of the batch, and for each place in it."""
        entropy = [self.seed, self.num_clips + clip]
        return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(_STREAM, *where)))

    def sample_frames(self, clip: int, conditioning: Collection[int], num_frames: int) -> set[int]:
        """The frames to correct: the conditioning ones, and some that are tracked after the first.

        Args:
            clip: of the batch.
            num_frames: of the clip, without padding.
        """
        config, rng = self.config, self._rng(clip)
        wanted = config.num_frames_to_correct
        if config.rand_frames_to_correct and wanted > len(conditioning):
            wanted = int(rng.integers(len(conditioning), wanted, endpoint=True))
        others = [t for t in range(min(conditioning), num_frames) if t not in conditioning]
        num_more = min(max(wanted - len(conditioning), 0), len(others))
        more = rng.choice(others, num_more, replace=False).tolist() if num_more else []
        return {*conditioning, *more}

    def correct(
        self,
        frame_idx: int,
        objects: Sequence[tuple[int, int]],
        truth: torch.Tensor,
        ignore: torch.Tensor | None = None,
    ) -> Correction:
        """What is corrected on one frame of n objects.

        Args:
            objects: clip of the batch and place in the clip of each.
            truth: (n, H, W) bool.
            ignore: (n, H, W) bool, pixels where nothing is wrong whatever is predicted.
        """
        import torch

        draws, ignores = (
            torch.from_numpy(drawn).to(truth.device)
            for drawn in self._sample_clicks(frame_idx, objects)
        )
        return Correction(self, truth, draws, ignores, ignore)

    def _sample_clicks(
        self, frame_idx: int, objects: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Correction.draws` and `.ignores`. Of a clip, all objects ignore the prediction or none,
        as in SAM 2."""
        shape = len(objects), self.config.num_correction_pt_per_frame
        draws, ignores = np.empty(shape), np.empty(shape, bool)
        for clip in {clip for clip, _ in objects}:
            rows = [row for row, (owner, _) in enumerate(objects) if owner == clip]
            places = [objects[row][1] for row in rows]
            for click in range(shape[1]):
                rng = self._rng(clip, frame_idx, click)
                ignores[rows, click] = rng.random() < self.config.prob_to_sample_from_gt
                draws[rows, click] = rng.random(max(places) + 1)[places]
        return draws, ignores

    def next_click(
        self,
        truth: torch.Tensor,
        predicted: torch.Tensor,
        draws: torch.Tensor,
        ignores: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One more click for each of n objects: points (n, 1, 2) float32, labels (n, 1) int32.

        Args:
            truth, predicted: (n, H, W) bool.
            draws, ignores: (n,), of `Correction`.
        """
        predicted = predicted & ~ignores[:, None, None]
        if self.config.point_sampling == "center":
            return center_clicks(truth, predicted)
        return uniform_clicks(truth, predicted, draws)

    def take_sums(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Since the last call: (3,) float32, the sums over the visible objects of their IoU before
        and after the clicks, and their number; and how many times something was corrected."""
        import torch

        ious = torch.cat([torch.zeros(2, 0, device=device), *self._ious], dim=1)
        num_corrected = len(self._ious)
        self._ious.clear()
        return torch.cat([ious.nansum(1), (~ious[:1].isnan()).sum(1)]), num_corrected

    @staticmethod
    def scalars(sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean IoU of the visible objects before and after the clicks, 0 where none was visible,
        from the sums of `take_sums`."""
        before, after = sums[:2] / sums[2].clamp(min=1)
        return {"interaction/iou_before": before, "interaction/iou_after": after}

    def keep_ious(
        self,
        truth: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> None:
        """(n, H, W) each: bool, logits of the first and the last pass over a frame, and bool, the
        pixels that count; None counts all."""
        import torch

        ious = torch.stack([mask_iou(m.detach(), truth, kept) for m in (before, after)])
        self._ious.append(ious.where(truth.flatten(1).any(1), torch.nan))


@dataclass(frozen=True)
class Correction:
    """What is corrected on one frame."""

    user: SimulatedUser
    truth: torch.Tensor  # (n, H, W) bool
    draws: torch.Tensor  # (n, clicks) float64 in [0, 1): which pixel
    ignores: torch.Tensor  # (n, clicks) bool: whether the click ignores the prediction
    void: torch.Tensor | None = None  # (n, H, W) bool: pixels without a label

    def select(self, rows: torch.Tensor) -> Correction:
        """The part of some of the n objects."""
        void = None if self.void is None else self.void[rows]
        return Correction(self.user, self.truth[rows], self.draws[rows], self.ignores[rows], void)

    @property
    def becomes_conditioning(self) -> bool:
        return self.user.config.add_all_frames_to_correct_as_cond

    def run(
        self,
        points: dict[str, torch.Tensor] | None,
        first: DecoderPass,
        decode: Callable[[dict[str, torch.Tensor], torch.Tensor], DecoderPass],
    ) -> tuple[dict[str, torch.Tensor], list[DecoderPass]]:
        """Decode once more after each of the correction clicks.

        Args:
            points: the prompt that the frame began with, None on a tracked frame.
            first: the pass with that prompt.
            decode: (points, mask prompt at low resolution) -> the next pass.

        Returns:
            All points at the end, and all passes, the first one included.
        """
        passes = [first]
        for click in range(self.draws.shape[1]):
            predicted = passes[-1].mask_logits[:, 0] > 0
            if self.void is not None:  # no object covers these: nothing is wrong there
                predicted = predicted & ~self.void
            drawn = self.draws[:, click], self.ignores[:, click]
            points = add_clicks(points, *self.user.next_click(self.truth, predicted, *drawn))
            passes.append(decode(points, passes[-1].low_res_logits))
        before, after = first.mask_logits[:, 0], passes[-1].mask_logits[:, 0]
        kept = None if self.void is None else ~self.void
        self.user.keep_ious(self.truth, before, after, kept)
        return points, passes


def add_clicks(
    points: dict[str, torch.Tensor] | None, new: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """SAM 2's point inputs, with more points (n, P, 2) and labels (n, P) at their end."""
    import torch

    if points is None:
        return {"point_coords": new, "point_labels": labels}
    return {
        "point_coords": torch.cat([points["point_coords"], new], dim=1),
        "point_labels": torch.cat([points["point_labels"], labels], dim=1),
    }


def uniform_clicks(
    truth: torch.Tensor, predicted: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A click of each object on a wrong pixel, all of them equally likely.

    Points (n, 1, 2), labels (n, 1), positive on the object. Where nothing is wrong the click is a
    negative one on the background, as in SAM 2's `sample_random_points_from_errors`.

    Args:
        truth, predicted: (n, H, W) bool.
        draws: (n,) float64 in [0, 1), on the same device: no device waits for another, and the
            same draws give the same clicks on every device.
    """
    import torch

    # SAM 2 clicks "not the object" on an object that fills the frame: "the object" is meant here.
    choices = (truth ^ predicted, ~truth, truth)
    region = _first_with_a_pixel([choice.flatten(1) for choice in choices])
    count = region.cumsum(1)  # (n, H * W): pixels of the region up to here
    rank = (draws * count[:, -1]).long()
    pixel = torch.searchsorted(count, rank[:, None] + 1)  # (n, 1)
    return _as_clicks(pixel, truth)


def center_clicks(
    truth: torch.Tensor, predicted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A click of each object on the pixel deepest inside an error; else as `uniform_clicks`.

    As SAM 2's `sample_one_point_from_error_center`: missed pixels and wrong ones are separate
    regions, of two as deep the wrong ones count.
    """
    import torch

    pixels = []
    for own, other in zip(truth.cpu().numpy(), predicted.cpu().numpy(), strict=True):
        missed, wrong = boundary_distance(own & ~other), boundary_distance(other & ~own)
        depth = missed if missed.max() > wrong.max() else wrong
        if not depth.any():
            depth = boundary_distance(own if own.all() else ~own)
        pixels.append(int(depth.argmax()))
    return _as_clicks(torch.tensor(pixels, device=truth.device)[:, None], truth)


def _first_with_a_pixel(regions: list[torch.Tensor]) -> torch.Tensor:
    """(n, pixels) bool: for each object the first of the regions that is not empty."""
    import torch

    *others, result = regions
    for region in reversed(others):
        result = torch.where(region.any(1, keepdim=True), region, result)
    return result


def _as_clicks(pixel: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1) index into the pixels of `truth` (n, H, W) -> points (n, 1, 2), labels (n, 1)."""
    import torch

    width = truth.shape[-1]
    labels = truth.flatten(1).gather(1, pixel).to(torch.int32)
    return torch.stack([pixel % width, pixel // width], dim=-1).float(), labels
