"""From a video to one of its clips: the random stream, the frames, and the finished sample."""

from __future__ import annotations

import numpy as np
import torch

from sam2train.clips import Clip
from sam2train.prompts import PromptGenerator
from sam2train.transforms import AugmentConfig, augment, normalise
from sam2train.videos import Video


def locate_clip(
    index: int | tuple[int, int], num_clips: int, seed: int
) -> tuple[int, np.random.Generator]:
    """The place that `dataset[i]` or `dataset[epoch, i]` means, and the stream of that clip.

    Raises:
        IndexError: beyond the end, which also ends a loop over the data set.
    """
    epoch, index = index if isinstance(index, tuple) else (0, index)
    if not -num_clips <= index < num_clips:
        raise IndexError(f"clip {index} of {num_clips}")
    index %= num_clips
    return index, np.random.default_rng([seed, epoch, index])


def draw_frames(
    video: Video, clip_length: int, max_stride: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Frames of one clip: (T',) ascending positions, and the T - T' that are missing.

    The first frame shows an object wherever the video allows it: what is seen first is prompted
    there, and the whole clip is left for tracking. Without annotations, any frame will do.

    Args:
        clip_length: T.
        max_stride: largest step; lowered where the video is too short for it.
    """
    num_frames = len(video.frames)
    taken = min(clip_length, num_frames)
    fits = (num_frames - 1) // max(taken - 1, 1)
    stride = int(rng.integers(1, max(min(max_stride, fits), 1) + 1))
    starts = np.arange(num_frames - stride * (taken - 1))
    shows = [bool(video.visible(t)) for t in range(num_frames)]
    if not any(shows):
        shows = [True] * num_frames
    good = [start for start in starts if shows[start]]
    if not good:  # the objects of this video appear late
        good = [start for start in starts if any(shows[start + stride * t] for t in range(taken))]
    if not good:  # or between the frames of this stride
        stride, good = 1, [min(shows.index(True), num_frames - taken)]
    start = int(good[rng.integers(len(good))])
    return [start + stride * t for t in range(taken)], clip_length - taken


def finish_clip(
    video: Video,
    indices: list[int],
    images: np.ndarray,
    masks: np.ndarray,
    object_ids: list[int | str],
    num_padding: int,
    generator: PromptGenerator,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Clip:
    """A clip from its frames and masks: augmented, prompted, padded.

    Args:
        indices: positions of the frames in the video, ascending.
        images: (T', H, W, 3) uint8 at the clip's size.
        masks: (T', N, H, W) bool; an object without a pixel left is dropped.
        num_padding: T - T'.
    """
    # Backwards, too, the clip should begin with something to prompt.
    if rng.random() < config.reverse and masks[-1].any():
        indices = indices[::-1]
        images, masks = np.ascontiguousarray(images[::-1]), np.ascontiguousarray(masks[::-1])
    augmented = augment(images, masks, config, rng)
    if augmented[1].any():  # else a crop or turn lost every object: the clip stays as it is
        images, masks = augmented

    # One of several objects may have left the picture with the augmentation.
    kept = np.flatnonzero(masks.any(axis=(0, 2, 3)))
    object_ids, masks = [object_ids[place] for place in kept], masks[:, kept]
    prompts = []
    for place, object_id in enumerate(object_ids):
        first = int(masks[:, place].any(axis=(1, 2)).argmax())
        prompts.append(
            generator.generate(masks[first, place], rng, object_id=object_id, frame_index=first)
        )
    if num_padding:
        images = np.concatenate([images, np.repeat(images[-1:], num_padding, axis=0)])
        masks = np.concatenate([masks, np.zeros((num_padding, *masks.shape[1:]), bool)])
        indices = [*indices, *[indices[-1]] * num_padding]
    return Clip(
        images=normalise(images),
        masks=torch.from_numpy(np.ascontiguousarray(masks)),
        prompts=prompts,
        video_id=video.video_id,
        frame_indices=[int(t) for t in indices],
        object_ids=object_ids,
        frame_valid=torch.arange(len(indices)) < len(indices) - num_padding,
        frame_size=video.size,
    )
