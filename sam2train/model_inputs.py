"""What the forward pass is given, in either layout, and its objects in groups that SAM 2 can track
together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sam2train.clips import (
    BatchedVideoDatapoint,
    Prompt,
    empty_prompt,
    is_empty,
    make_object_index,
)
from sam2train.errors import UserError


@dataclass(frozen=True)
class TrackingInput:
    """What the forward pass works on, whichever layout it came in."""

    images: torch.Tensor  # (images, 3, H, W) float32
    image_index: torch.Tensor  # (T, O) int64: image of each object on each frame
    masks: torch.Tensor | None  # (T, O, H, W) bool
    ignore: torch.Tensor | None  # (T, O, H, W) bool: pixels that no correction click may go to
    prompts: Sequence[Sequence[Prompt]]  # of each clip
    object_valid: torch.Tensor  # (B, N) bool with O true entries
    image_keys: Sequence[str] | None  # of each image, for the feature cache
    # Real frames of each clip. The padding after them is not tracked, and SAM 2's time code does
    # not count it, so that a clip gets the same masks in every batch.
    lengths: list[int]


def read_datapoint(
    batch: BatchedVideoDatapoint | Any,
    prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]] | None,
    image_size: int,
) -> TrackingInput:
    """From a batched datapoint, ours or SAM 2's own.

    Args:
        prompts: replace those of the datapoint. SAM 2's carries none: each object then gets its
            mask on frame 0.

    Raises:
        UserError: prompts that do not fit the datapoint or the model.
    """
    num_frames, num_clips = batch.img_batch.shape[:2]
    if prompts is None:
        prompts = getattr(batch, "prompts", None)
    if prompts is None:
        prompts = _mask_prompts(batch)
    clip_prompts = _check_prompts(prompts, num_clips, image_size)
    object_valid = getattr(batch, "object_valid", None)
    if object_valid is None:
        object_valid = _object_slots(batch.obj_to_frame_idx[0, :, 1], num_clips)
    _check_objects(clip_prompts, object_valid.sum(1).tolist())
    frame_valid, lengths = getattr(batch, "frame_valid", None), getattr(batch, "lengths", None)
    if lengths is None:
        lengths = [num_frames] * num_clips if frame_valid is None else frame_valid.sum(0).tolist()
    return TrackingInput(
        images=batch.flat_img_batch,
        image_index=batch.flat_obj_to_img_idx.long(),
        masks=batch.masks,
        ignore=getattr(batch, "object_ignore", None),  # SAM 2's own class has none
        image_keys=getattr(batch, "image_keys", None),
        prompts=clip_prompts,
        object_valid=object_valid,
        lengths=lengths,
    )


def read_tensors(
    images: torch.Tensor,
    masks: torch.Tensor | None,
    prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]],
    image_size: int,
) -> TrackingInput:
    """From the simplified layout.

    Args:
        images: (B, T, C, H, W).
        masks: (B, T, N, H, W) bool.

    Raises:
        UserError: layouts that do not fit each other or the model.
    """
    _check_layout(images, masks)
    num_clips, num_frames = images.shape[:2]
    clip_prompts = _check_prompts(prompts, num_clips, image_size)
    object_valid = _valid_objects(clip_prompts, masks)
    if masks is not None and masks.transpose(1, 2)[~object_valid.to(masks.device)].any():
        raise UserError(
            "SAM2Model.forward: masks show objects that no prompt names; give every object a "
            "prompt, an empty one where it is not prompted"
        )
    frame_idx, clip_idx = make_object_index(object_valid, num_frames).long().unbind(-1)
    if masks is not None:
        masks = masks.transpose(1, 2)[object_valid.to(masks.device)].transpose(0, 1)
    return TrackingInput(
        images=images.flatten(0, 1),
        image_index=clip_idx * num_frames + frame_idx,
        masks=masks,
        ignore=None,
        image_keys=None,
        prompts=clip_prompts,
        object_valid=object_valid,
        lengths=[num_frames] * num_clips,
    )


@dataclass(frozen=True)
class ObjectGroup:
    """Objects that share conditioning frames and clip length: one memory bank, one batch."""

    objects: list[int]  # n positions on the O axis
    places: list[tuple[int, int]]  # (n,): the clip of the batch, and the place in the clip
    prompts: dict[int, list[Prompt]]  # conditioning frame -> one prompt for each of the n objects
    num_frames: int  # real frames of their clips
    corrected: Sequence[int]  # frames with correction clicks


def group_objects(
    clip_prompts: Sequence[Sequence[Prompt]],
    lengths: Sequence[int],
    sample_corrected: Callable[[int, Collection[int], int], Collection[int]] | None = None,
) -> list[ObjectGroup]:
    """Groups of the objects of a batch; an object whose prompts are all empty is in no group.

    Args:
        clip_prompts: of each clip; the objects of the batch are counted in their order.
        lengths: real frames of each clip.
        sample_corrected: (clip, conditioning frames, length) -> the frames that get correction
            clicks; it is not called for objects that are prompted with a mask. Objects of one group
            have the same corrected frames.

    Raises:
        UserError: a prompt outside its clip, or two for one object on one frame.
    """
    groups: dict[tuple, list[tuple[int, tuple[int, int], dict[int, Prompt]]]] = {}
    index = 0
    for clip, (prompts, length) in enumerate(zip(clip_prompts, lengths, strict=True)):
        for place, (object_id, own) in enumerate(_prompts_by_object(prompts).items()):
            on_frame: dict[int, Prompt] = {}
            for prompt in own:
                if is_empty(prompt):
                    continue
                frame_idx = int(prompt["frame_index"])
                if not 0 <= frame_idx < length:
                    raise UserError(
                        f"object {object_id} has a prompt on frame {frame_idx} of a clip with "
                        f"{length} frames; expected 0 to {length - 1}"
                    )
                if frame_idx in on_frame:
                    raise UserError(
                        f"object {object_id} has two prompts on frame {frame_idx} of one clip; "
                        "give one, with all its points"
                    )
                on_frame[frame_idx] = prompt
            if on_frame:
                conditioning, corrected = tuple(sorted(on_frame)), ()
                has_mask = any(p["mask"] is not None for p in on_frame.values())
                if sample_corrected is not None and not has_mask:
                    corrected = tuple(sorted(sample_corrected(clip, conditioning, length)))
                key = (length, conditioning, corrected)
                groups.setdefault(key, []).append((index, (clip, place), on_frame))
            index += 1
    return [
        ObjectGroup(
            [index for index, _, _ in members],
            [place for _, place, _ in members],
            {t: [on_frame[t] for _, _, on_frame in members] for t in conditioning},
            length,
            corrected,
        )
        for (length, conditioning, corrected), members in groups.items()
    ]


def _prompts_by_object(prompts: Sequence[Prompt]) -> dict[int | str, list[Prompt]]:
    """Object id -> its prompts; objects in the order of their first prompt."""
    objects: dict[int | str, list[Prompt]] = {}
    for prompt in prompts:
        objects.setdefault(prompt["object_id"], []).append(prompt)
    return objects


def split_by_kind(prompts: Sequence[Prompt], device: torch.device):
    """Prompts that SAM 2 can take together: ((n,) rows, point inputs or None, masks or None)."""
    kinds: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        num_points = 0 if prompt["mask"] is not None else len(prompt["points"])
        kinds.setdefault(num_points, []).append(row)
    for num_points, rows in sorted(kinds.items()):
        index = torch.tensor(rows, device=device)
        if num_points == 0:
            masks = torch.stack([torch.as_tensor(prompts[row]["mask"]) for row in rows])
            yield index, None, masks[:, None].to(device) > 0  # 0 and 1, or 0 and 255, will do
        else:
            points = torch.stack([torch.as_tensor(prompts[row]["points"]) for row in rows])
            labels = torch.stack([torch.as_tensor(prompts[row]["labels"]) for row in rows])
            yield (
                index,
                {"point_coords": points.float().to(device), "point_labels": labels.to(device)},
                None,
            )


def _mask_prompts(batch: Any) -> list[list[Prompt]]:
    """A mask prompt on frame 0 for each object: SAM 2's own datapoint carries no prompts."""
    prompts: list[list[Prompt]] = [[] for _ in range(batch.num_videos)]
    for index, clip in enumerate(batch.obj_to_frame_idx[0, :, 1].tolist()):
        prompts[clip].append({**empty_prompt(index, 0), "mask": batch.masks[0, index]})
    return prompts


def _object_slots(clip_of_object: torch.Tensor, num_clips: int) -> torch.Tensor:
    """(B, N) bool `object_valid` of a datapoint that does not carry it."""
    if (clip_of_object.diff() < 0).any():
        raise UserError(
            "SAM2Model.forward: obj_to_frame_idx mixes the objects of different clips; "
            "order them clip by clip, as SAM 2's collate_fn does"
        )
    counts = torch.bincount(clip_of_object.long(), minlength=num_clips)
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def _valid_objects(
    clip_prompts: Sequence[Sequence[Prompt]], masks: torch.Tensor | None
) -> torch.Tensor:
    """(B, N) bool: as many objects of a clip as its prompts name; N as wide as the masks."""
    counts = torch.tensor([len(_prompts_by_object(prompts)) for prompts in clip_prompts])
    num_objects = int(counts.max()) if masks is None else masks.shape[2]
    if int(counts.max()) > num_objects:
        raise UserError(
            f"SAM2Model.forward: prompts name {int(counts.max())} objects in a clip, masks have "
            f"{num_objects}"
        )
    return torch.arange(num_objects) < counts[:, None]


def _check_layout(images: torch.Tensor, masks: torch.Tensor | None) -> None:
    if images.ndim != 5:
        raise UserError(
            f"SAM2Model.forward: images of shape {tuple(images.shape)}; expected (B, T, C, H, W)"
        )
    if masks is not None and (masks.ndim != 5 or masks.shape[:2] != images.shape[:2]):
        raise UserError(
            f"SAM2Model.forward: masks of shape {tuple(masks.shape)} do not fit images of shape "
            f"{tuple(images.shape)}; expected (B, T, N, H, W)"
        )


def _check_prompts(
    prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]], num_clips: int, image_size: int
) -> Sequence[Sequence[Prompt]]:
    """One list for each clip, also where B is 1 and the prompts came flat."""
    flat = all(isinstance(prompt, Mapping) for prompt in prompts)
    clip_prompts = [prompts] if flat and num_clips == 1 else prompts
    if (flat and num_clips > 1) or len(clip_prompts) != num_clips:
        raise UserError(
            f"SAM2Model.forward: {'one flat list' if flat else len(clip_prompts)} of prompts for "
            f"{num_clips} clips; expected a list of prompts for each clip"
        )
    return [[_check_prompt(prompt, image_size) for prompt in clip] for clip in clip_prompts]


def _check_prompt(given: Mapping[str, Any], image_size: int) -> Prompt:
    """The prompt with all its fields; the corners of a box stand before its clicks."""
    if missing := [name for name in ("object_id", "frame_index") if given.get(name) is None]:
        raise UserError(
            f"SAM2Model.forward: a prompt without {' and '.join(missing)}; it has "
            f"{', '.join(given) or 'nothing'}"
        )
    told = {name: value for name, value in given.items() if value is not None}
    prompt = {**empty_prompt(given["object_id"], given["frame_index"]), **told}
    who, mask, box = f"object {prompt['object_id']}", prompt["mask"], prompt["box"]
    if isinstance(mask, list | tuple):
        prompt["mask"] = mask = np.asarray(mask)
    if mask is not None and tuple(mask.shape) != (image_size, image_size):
        raise UserError(
            f"{who}: a mask prompt of {tuple(mask.shape)} pixels does not fit a model built for "
            f"{image_size}; resize it with the frames"
        )
    if len(prompt["points"]) != len(prompt["labels"]):
        raise UserError(
            f"{who}: {len(prompt['points'])} points with {len(prompt['labels'])} labels; expected "
            "a label for each point"
        )
    if box is not None:
        box = np.asarray(torch.as_tensor(box).cpu(), np.float32)
        if box.size != 4:
            raise UserError(f"{who}: a box of {box.size} numbers; expected x0, y0, x1, y1")
    labels = np.asarray(torch.as_tensor(prompt["labels"]).cpu())
    if box is not None and not np.isin(labels, (2, 3)).any():
        clicks = np.asarray(torch.as_tensor(prompt["points"]).cpu(), np.float32)
        prompt["points"] = np.concatenate([box.reshape(2, 2), clicks.reshape(-1, 2)])
        prompt["labels"] = np.concatenate([[2, 3], labels]).astype(np.int32)
    return prompt


def _check_objects(clip_prompts: Sequence[Sequence[Prompt]], counts: Sequence[int]) -> None:
    for clip, (prompts, count) in enumerate(zip(clip_prompts, counts, strict=True)):
        named = len(_prompts_by_object(prompts))
        if named != count:
            raise UserError(
                f"SAM2Model.forward: prompts name {named} objects in clip {clip}, the datapoint "
                f"has {count}; give every object a prompt, an empty one where it is not prompted"
            )
