"""The shapes that flow through the project: clips, batches of them, and predictions for a frame.

Dimension legend, used by every docstring:

    B  clips of a batch          T  frames of a clip (padding included)
    O  objects of a batch        N  objects of a clip (padded to the largest clip where B > 1)
    M  mask candidates (1 or 3)  P  points of a prompt
    C  channels                  H, W  height and width in pixels, sizes always in this order

Points are always (x, y) in pixels of the resized frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import cv2
import numpy as np

from sam2train.errors import UserError

if TYPE_CHECKING:
    import torch

# ImageNet statistics, which SAM 2 was trained with.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

# SAM 2 writes this mask logit on a whole frame where its object score is 0 or less (`NO_OBJ_SCORE`
# in its code); it carries no gradient. A frame before an object's first prompt gets the same logit,
# and an object score that says as clearly that nothing is there.
NO_OBJECT_LOGIT = -1024.0
NO_OBJECT_SCORE = -10.0


class Prompt(TypedDict):
    """What the user gives SAM 2 for one object on one conditioning frame."""

    object_id: int | str
    frame_index: int  # position in the clip
    type: str  # how it was drawn, a name of `prompts.PROMPTS`; the model does not use it
    points: np.ndarray  # (P, 2) float32
    labels: np.ndarray  # (P,) int32: 1 positive click, 0 negative, 2 / 3 top-left / bottom-right
    box: np.ndarray | None  # (4,) float32: x_min, y_min, x_max, y_max
    mask: np.ndarray | None  # (H, W) bool


def empty_prompt(object_id: int | str, frame_index: int, type: str = "") -> Prompt:
    """The prompt of an object that is not visible: all its fields, and nothing in them."""
    return Prompt(
        object_id=object_id,
        frame_index=frame_index,
        type=type,
        points=np.zeros((0, 2), np.float32),
        labels=np.zeros(0, np.int32),
        box=None,
        mask=None,
    )


def is_empty(prompt: Prompt) -> bool:
    """True for the prompt of an object that is not visible: no point, no box, no mask."""
    return len(prompt["points"]) == 0 and (prompt["mask"] is None or not prompt["mask"].any())


@dataclass(frozen=True, eq=False)
class Clip:
    """One training sample. Fields read as attributes, and by name: `clip["images"]`."""

    images: torch.Tensor  # (T, 3, H, W) float32, ImageNet-normalised; uint8: not yet
    masks: torch.Tensor  # (T, N, H, W) bool
    prompts: list[Prompt]  # at least one for each object, in the order of `object_ids`
    video_id: int | str
    frame_indices: list[int]  # (T,) positions in the video; padding repeats the last one
    object_ids: list[int | str]  # (N,)
    frame_valid: torch.Tensor  # (T,) bool, False on padding
    frame_size: tuple[int, int]  # (H, W) of the source frames
    # (T, H, W) bool: pixels without a label, which no loss counts; None where there are none
    ignore: torch.Tensor | None = None
    left_out: tuple[str, ...] = ()  # what was wrong with the clips in whose place this one is
    # (T,) of `transforms.image_keys`, for the feature cache; None where no image comes twice
    image_keys: list[str] | None = None

    def __getitem__(self, name: str) -> Any:
        names = self.__dataclass_fields__
        if name not in names:
            raise KeyError(f"a clip has no field {name!r}; it has {', '.join(names)}")
        return getattr(self, name)


@dataclass(frozen=True)
class BatchedVideoMetaData:
    """Where the objects of a batch come from, as SAM 2's class of this name has it."""

    # (T, O, 3) int64: clip of the batch, object of the clip, frame of the video
    unique_objects_identifier: torch.Tensor
    frame_orig_size: torch.Tensor  # (T, O, 2) int64: (H, W) of the source frames


@dataclass(frozen=True)
class BatchedVideoDatapoint:
    """Clips stacked for the model, with the field names and axes of SAM 2's class of this name.

    Ours are `prompts`, `frame_valid`, `object_valid`, `names`, `ignore`, `image_keys` and
    `lengths`; SAM 2's training model ignores them.
    """

    img_batch: torch.Tensor  # (T, B, 3, H, W) float32; uint8: not yet normalised, `to` does it
    obj_to_frame_idx: torch.Tensor  # (T, O, 2) int32: frame, clip
    masks: torch.Tensor  # (T, O, H, W) bool
    metadata: BatchedVideoMetaData
    prompts: list[list[Prompt]]  # a list for each clip
    frame_valid: torch.Tensor  # (T, B) bool, False on padding
    object_valid: torch.Tensor  # (B, N) bool, False on the padding of `object_masks`
    names: list[str]  # of the clips, for messages
    dict_key: str = "sam2train"
    # (T, B, H, W) bool: pixels without a label; None: no clip has any
    ignore: torch.Tensor | None = None
    left_out: tuple[str, ...] = ()  # of all its clips
    # (B * T,) keys of `flat_img_batch`; None where a clip has none
    image_keys: list[str] | None = None
    # Real frames of each clip, as `frame_valid` has them: known here, no device is waited for.
    lengths: list[int] | None = None

    @property
    def num_frames(self) -> int:
        return self.img_batch.shape[0]

    @property
    def num_videos(self) -> int:
        return self.img_batch.shape[1]

    @property
    def flat_img_batch(self) -> torch.Tensor:
        """(B * T, 3, H, W) float32, clip by clip."""
        return normalise_pixels(self.img_batch.transpose(0, 1).flatten(0, 1))

    @property
    def flat_obj_to_img_idx(self) -> torch.Tensor:
        """(T, O) index into `flat_img_batch`."""
        frame_idx, clip_idx = self.obj_to_frame_idx.unbind(dim=-1)
        return clip_idx * self.num_frames + frame_idx

    @property
    def images(self) -> torch.Tensor:
        """(B, T, C, H, W) float32: the simplified layout."""
        return normalise_pixels(self.img_batch.transpose(0, 1))

    @property
    def object_masks(self) -> torch.Tensor:
        """(B, T, N, H, W) bool: the simplified layout, empty beyond the objects of a clip."""
        return scatter_objects(self.masks, self.object_valid, fill=False)

    @property
    def object_frame_valid(self) -> torch.Tensor:
        """(T, O) bool: False where an object's frame is padding."""
        return self.frame_valid[:, self.obj_to_frame_idx[0, :, 1].long()]

    @property
    def object_ignore(self) -> torch.Tensor | None:
        """(T, O, H, W) bool: for each object the pixels of its clip without a label, or None."""
        clip_of_object = self.obj_to_frame_idx[0, :, 1].long()
        return None if self.ignore is None else self.ignore[:, clip_of_object]

    def to(self, device: torch.device | str) -> BatchedVideoDatapoint:
        """The batch on a device. Frames that arrive as uint8 are normalised there, so that a
        quarter of their bytes travels. `object_valid` stays: which objects there are decides what
        is computed, and reading it from a device would wait for all that was started there."""
        import torch

        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
            and field.name != "object_valid"
        }
        moved["img_batch"] = normalise_pixels(moved["img_batch"])
        return replace(self, **moved)

    def pin_memory(self) -> BatchedVideoDatapoint:
        import torch

        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **pinned)


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) float32, ImageNet-normalised, from uint8; floats are returned as they are.

    The same to the last bit on every device: CUDA would multiply by the reciprocal of a plain
    number.
    """
    import torch

    if pixels.dtype != torch.uint8:
        return pixels
    peak, mean, std = _constants(pixels.device)
    return pixels.float().div_(peak).sub_(mean).div_(std)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    peak = torch.full((1, 1, 1), 255.0, device=device)
    return peak, *(torch.tensor(v, device=device).reshape(3, 1, 1) for v in (MEAN, STD))


@dataclass(frozen=True)
class FramePrediction:
    """One decoder pass over some objects of one frame. The loss sees every pass."""

    objects: torch.Tensor  # (n,) int64 positions on the O axis
    mask_logits: torch.Tensor  # (n, M, H, W) float32
    iou_predictions: torch.Tensor  # (n, M)
    object_score_logits: torch.Tensor  # (n, 1)


def scatter_objects(
    per_object: torch.Tensor, object_valid: torch.Tensor, fill: float | bool
) -> torch.Tensor:
    """(T, O, ...) by object of the batch -> (B, T, N, ...) by object of its clip.

    Args:
        per_object: (T, O, ...), objects ordered clip by clip.
        object_valid: (B, N) bool with O true entries.
        fill: what padding gets.
    """
    num_clips, num_objects = object_valid.shape
    shape = (num_clips, num_objects, per_object.shape[0], *per_object.shape[2:])
    padded = per_object.new_full(shape, fill)
    padded[object_valid] = per_object.transpose(0, 1)
    return padded.transpose(1, 2)


def make_object_index(object_valid: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(T, O, 2) int32 `obj_to_frame_idx`: the frame and the clip of every object on every frame."""
    import torch

    clip_idx = object_valid.nonzero()[:, 0].int()  # (O,)
    frame_idx = torch.arange(num_frames, dtype=torch.int32, device=clip_idx.device)
    return torch.stack(torch.broadcast_tensors(frame_idx[:, None], clip_idx[None]), dim=-1)


def collate_fn(clips: Sequence[Clip | Mapping[str, Any]]) -> BatchedVideoDatapoint:
    """Stack clips; shorter ones are padded with invalid frames (their last image, no object).

    Args:
        clips: B clips of one image size; lengths and numbers of objects may differ. Dicts with the
            fields of a clip will do; without `frame_size`, frames count as large as the images.

    Raises:
        UserError: a dict without one of the other fields.
    """
    import torch

    clips = [clip if isinstance(clip, Clip) else _to_clip(clip) for clip in clips]
    num_frames = max(len(clip.images) for clip in clips)
    num_objects = [len(clip.object_ids) for clip in clips]
    images = [_pad_frames(clip.images, num_frames, repeat=True) for clip in clips]
    masks = [_pad_frames(clip.masks, num_frames, repeat=False) for clip in clips]
    valid = [_pad_frames(clip.frame_valid, num_frames, repeat=False) for clip in clips]
    ignore = None
    if any(clip.ignore is not None for clip in clips):
        none = torch.zeros(1, *clips[0].images.shape[2:], dtype=torch.bool)
        of_clips = [none if clip.ignore is None else clip.ignore for clip in clips]
        ignore = torch.stack([_pad_frames(o, num_frames, repeat=False) for o in of_clips], dim=1)
    image_keys = None
    if all(clip.image_keys is not None for clip in clips):
        image_keys = [
            key
            for clip in clips
            for key in [*clip.image_keys, *clip.image_keys[-1:] * (num_frames - len(clip.images))]
        ]
    object_valid = torch.arange(max(num_objects)) < torch.tensor(num_objects)[:, None]
    object_index = make_object_index(object_valid, num_frames)

    video_frames = [
        clip.frame_indices + clip.frame_indices[-1:] * (num_frames - len(clip.images))
        for clip in clips
    ]
    of_clip = object_index[0, :, 1].long()  # (O,)
    identifier = torch.stack(
        [
            of_clip.expand(num_frames, -1),
            object_valid.nonzero()[:, 1].expand(num_frames, -1),
            torch.tensor(video_frames).T[:, of_clip],
        ],
        dim=-1,
    )
    sizes = torch.tensor([clip.frame_size for clip in clips])[of_clip]
    return BatchedVideoDatapoint(
        img_batch=torch.stack(images, dim=1),
        obj_to_frame_idx=object_index,
        masks=torch.cat(masks, dim=1),
        metadata=BatchedVideoMetaData(identifier, sizes.expand(num_frames, -1, -1)),
        prompts=[list(clip.prompts) for clip in clips],
        frame_valid=torch.stack(valid, dim=1),
        object_valid=object_valid,
        names=[
            f"video {clip.video_id} frames {clip.frame_indices[0]}..{clip.frame_indices[-1]}"
            for clip in clips
        ],
        ignore=ignore,
        image_keys=image_keys,
        lengths=torch.stack(valid, dim=1).sum(0).tolist(),
    )


def _to_clip(sample: Mapping[str, Any]) -> Clip:
    names = Clip.__dataclass_fields__.keys()
    optional = {f.name for f in fields(Clip) if f.default is not MISSING} | {"frame_size"}
    if missing := [name for name in names if name not in sample and name not in optional]:
        raise UserError(
            f"collate_fn: a sample without {', '.join(missing)}; it has "
            f"{', '.join(map(str, sample)) or 'nothing'}"
        )
    known = {"frame_size": tuple(sample["images"].shape[-2:]), **sample}
    known["frame_indices"] = [int(t) for t in sample["frame_indices"]]
    return Clip(**{name: known[name] for name in names if name in known})


def _pad_frames(values: torch.Tensor, num_frames: int, *, repeat: bool) -> torch.Tensor:
    import torch

    missing = num_frames - len(values)
    if missing == 0:
        return values
    last = values[-1:] if repeat else torch.zeros_like(values[-1:])
    return torch.cat([values, last.expand(missing, *values.shape[1:])])


def boundary_distance(mask: np.ndarray) -> np.ndarray:
    """(H, W) float32: pixels to the nearest one outside the mask, the frame's surroundings
    included; 0 outside. `mask` is (H, W) bool."""
    padded = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
