"""From a video to one of its clips: which frames, which objects, with which prompts."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sam2train.clips import Clip, Prompt, normalise_pixels
from sam2train.data_index import fingerprint
from sam2train.data_masks import MaskCache
from sam2train.data_source import ClipPixels, Video, VideoSource, in_time
from sam2train.errors import UserError
from sam2train.prompts import PromptGenerator, types_like
from sam2train.transforms import (
    AugmentConfig,
    augment,
    channels_first,
    image_keys,
    resize_mask,
    stack_frames,
)


@dataclass(frozen=True)
class ClipSettings:
    """How the clips of a data set are drawn, the same for every data format."""

    image_size: tuple[int, int]  # (H, W), frames are stretched to it
    video_clip_length: int  # T; a video with fewer frames is padded with invalid ones
    prompts: PromptGenerator
    max_objects: int | None  # of a clip, drawn at random; None takes all
    max_frame_stride: int  # largest step between neighbouring frames, in labelled ones
    max_conditioning_frames: int  # a clip has 1 to this many
    augment: AugmentConfig
    seed: int


def clip_settings(
    image_size: tuple[int, int] = (512, 512),
    video_clip_length: int = 5,
    prompt_types: Sequence[str] | None = None,
    num_of_pos_points: int | tuple[int, int] = 1,
    include_center: bool = False,
    num_of_neg_points: int = 0,
    *,
    box_jitter: float = 0.0,
    prompt_weights: Sequence[float] | None = None,
    max_objects: int | None = None,
    max_frame_stride: int = 1,
    max_conditioning_frames: int = 1,
    augment: AugmentConfig | None = None,
    seed: int = 0,
) -> ClipSettings:
    """The settings of clips, from the arguments that the constructors of all data sets share.

    Args:
        prompt_types, num_of_pos_points, include_center, num_of_neg_points, box_jitter,
            prompt_weights: see `PromptGenerator`.
        augment: None changes nothing.
        The others: see `ClipSettings`.

    Raises:
        UserError: a number out of its range.
    """
    counts = {
        "video_clip_length": (video_clip_length, 1),
        "max_objects": (1 if max_objects is None else max_objects, 1),
        "max_frame_stride": (max_frame_stride, 1),
        "max_conditioning_frames": (max_conditioning_frames, 1),
        "seed": (seed, 0),
    }
    for name, (number, least) in counts.items():
        if not isinstance(number, numbers.Integral) or number < least:
            raise UserError(f"{name}: {number!r}; expected a whole number of at least {least}")
    sides = tuple(image_size) if isinstance(image_size, Sequence | np.ndarray) else ()
    if len(sides) != 2 or not all(isinstance(s, numbers.Integral) and s > 0 for s in sides):
        raise UserError(f"image_size: {image_size!r}; expected (height, width) in pixels")
    points = (num_of_pos_points, include_center, num_of_neg_points)
    return ClipSettings(
        sides,
        video_clip_length,
        PromptGenerator(prompt_types, *points, box_jitter=box_jitter, weights=prompt_weights),
        max_objects,
        max_frame_stride,
        max_conditioning_frames,
        augment or AugmentConfig(),
        seed,
    )


class ClipDataset:
    """Clips of indexed videos: `dataset[i]` is a random clip of video i.

    Another epoch, by `set_epoch` or as `dataset[epoch, i]`, gives another clip of the same video.
    A clip depends on the seed, the epoch and i alone, whatever the process that loads it. Clips
    have labelled frames only; `videos` has all frames, for evaluation.

    Args:
        source: reads the videos, whatever format they have.
        settings: what the clips are like.
        mask_cache_mb: bound of the cache of decoded masks, for all processes together.

    Raises:
        UserError: no video has a mask.
    """

    def __init__(self, source: VideoSource, settings: ClipSettings, mask_cache_mb: int = 256):
        self.source, self.settings = source, settings
        self.videos, self.warnings = source.videos, source.warnings
        self.image_size, self.prompts = settings.image_size, settings.prompts
        self.epoch = 0
        ignoring = {video.video_id for video in self.videos if source.has_ignored(video)}
        size = mask_cache_mb * 2**20
        self.cache = MaskCache(size, self.videos, self.image_size, ignoring)
        trainable = [video for video in self.videos if source.is_trainable(video)]
        # Videos with how many clips of them an epoch has.
        self._groups = [
            (videos, max(1, round(weight * len(videos))))
            for videos, weight in source.weighted(trainable)
        ]
        if not trainable:
            raise UserError(f"{source.path}: no annotation has a mask; {source.mask_hint}")

    def __len__(self) -> int:
        return sum(num_clips for _, num_clips in self._groups)

    def video_of(self, epoch: int, place: int) -> Video:
        """The video of a clip. Where an epoch has fewer clips than videos, the next one goes on
        with the others."""
        for videos, num_clips in self._groups:
            if place < num_clips:
                return videos[(epoch * num_clips + place) % len(videos)]
            place -= num_clips
        raise IndexError(place)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this data from other data; see `fingerprint`."""
        return fingerprint(self.source)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of `dataset[i]`, 0 before; for loaders without `ClipSampler`."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> Clip:
        clip = self.load_clip(index)
        return replace(clip, images=normalise_pixels(clip.images))

    def load_clip(self, index: int | tuple[int, int]) -> Clip:
        """`dataset[index]` with images as uint8, a quarter of the bytes; a batch of such clips is
        normalised by its `to`."""
        place, rng = locate_clip(index, len(self), self.settings.seed, self.epoch)
        epoch = index[0] if isinstance(index, tuple) else self.epoch
        video, settings = self.video_of(epoch, place), self.settings
        indices, num_padding = sample_frames(
            video, settings.video_clip_length, settings.max_frame_stride, rng
        )
        size, most = self.image_size, settings.max_objects
        pixels = self.source.sample_clip(video, indices, size, most, rng)
        if pixels is None:
            objects = sample_objects(video, indices, most, rng)
            images = [self.read_frame(video, t, size) for t in indices]
            masks = [[self.read_mask(video, t, o, size) for o in objects] for t in indices]
            ignore = stack_ignored([self.read_ignore(video, t, size) for t in indices], size)
            pixels = ClipPixels(stack_frames(images), np.stack(masks), objects, ignore)
        return finish_clip(video, indices, pixels, num_padding, settings, rng)

    @in_time
    def read_frame(
        self, video: Video, frame_idx: int, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """(H, W, 3) uint8 at `size`, or the video's own where none is given."""
        if size is None:
            return self.source.read_frame(video, frame_idx)
        return self.source.read_small_frame(video, frame_idx, size)

    @in_time
    def read_mask(
        self,
        video: Video,
        frame_idx: int,
        object_id: int | str,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """(H, W) bool of one object, empty where it does not show; at `size`, or the video's own
        where none is given."""
        size = video.size if size is None else tuple(size)
        if not self.source.has_mask(video, frame_idx, object_id):
            return np.zeros(size, bool)
        mask = self.cache.get(video, frame_idx, object_id, size)
        if mask is None:
            place = video, frame_idx, object_id
            if size == video.size:
                decoded = self.source.read_masks(*place)
            else:
                decoded = self.source.read_small_masks(*place, size)
            for other_id, other in decoded.items():
                self.cache.put(video, frame_idx, other_id, other)
            mask = decoded[object_id]
        return mask

    @in_time
    def read_ignore(
        self, video: Video, frame_idx: int, size: tuple[int, int] | None = None
    ) -> np.ndarray | None:
        """(H, W) bool: pixels that belong to no object and that nobody decided on, at `size` or the
        video's own; None where there are none."""
        if video.frames[frame_idx].ignored is None:
            return None
        size = video.size if size is None else tuple(size)
        kept = self.cache.get(video, frame_idx, None, size)
        if kept is None:
            found = self.source.read_ignore(video, frame_idx)
            kept = np.zeros(size, bool) if found is None else resize_mask(found, size)
            for object_id in video.visible(frame_idx):  # what an object covers has been decided
                kept = kept & ~self.read_mask(video, frame_idx, object_id, size)
            self.cache.put(video, frame_idx, None, kept)
        return kept if kept.any() else None


def stack_ignored(ignored: Sequence[np.ndarray | None], size: tuple[int, int]) -> np.ndarray | None:
    """(T, H, W) bool from the (H, W) of each frame; None where no frame has a pixel to ignore."""
    if all(of_frame is None for of_frame in ignored):
        return None
    return np.stack([np.zeros(size, bool) if one is None else one for one in ignored])


def locate_clip(
    index: int | tuple[int, int], num_clips: int, seed: int, epoch: int = 0
) -> tuple[int, np.random.Generator]:
    """The video that `dataset[i]` or `dataset[epoch, i]` means, and random numbers for its clip.

    Args:
        epoch: taken where the index has none.

    Raises:
        IndexError: beyond the end, which also ends a loop over the data set.
    """
    epoch, index = index if isinstance(index, tuple) else (epoch, index)
    if not -num_clips <= index < num_clips:
        raise IndexError(f"clip {index} of {num_clips}")
    index %= num_clips
    return index, np.random.default_rng([seed, epoch, index])


def sample_frames(
    video: Video, clip_length: int, max_stride: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Frames of one clip: (T',) ascending positions of labelled ones, and the T - T' missing.

    The first frame shows an object where the video allows it: objects are prompted on the first
    frame that shows them, so the rest of the clip is left for tracking. Without annotations, a clip
    may start on any frame.

    Args:
        clip_length: T.
        max_stride: largest step, in labelled frames; lowered where the video is too short for it.
    """
    places = video.labelled
    num_frames = len(places)
    taken = min(clip_length, num_frames)
    fits = (num_frames - 1) // max(taken - 1, 1)
    stride = int(rng.integers(1, max(min(max_stride, fits), 1) + 1))
    starts = np.arange(num_frames - stride * (taken - 1))
    shows = [bool(video.visible(t)) for t in places]
    if not any(shows):
        shows = [True] * num_frames
    good = [start for start in starts if shows[start]]
    if not good:  # the objects of this video appear late
        good = [start for start in starts if any(shows[start + stride * t] for t in range(taken))]
    if not good:  # or between the frames of this stride
        stride, good = 1, [min(shows.index(True), num_frames - taken)]
    start = int(good[rng.integers(len(good))])
    return [places[start + stride * t] for t in range(taken)], clip_length - taken


def sample_objects(
    video: Video, indices: Sequence[int], max_objects: int | None, rng: np.random.Generator
) -> list[int | str]:
    """The objects of a clip: all that show on its frames, or `max_objects` of them at random.

    An object that shows on the last frame only leaves nothing to track, so the others come first.
    """
    shown = [o for o in video.object_ids if any(o in video.visible(t) for t in indices)]
    if max_objects is None or len(shown) <= max_objects:
        return shown
    early = {o for o in shown if any(o in video.visible(t) for t in indices[:-1])}
    order = rng.choice(len(shown), len(shown), replace=False)
    chosen = sorted(order, key=lambda place: shown[place] not in early)[:max_objects]
    return [shown[place] for place in sorted(chosen)]


def sample_prompts(
    masks: np.ndarray,
    object_ids: Sequence[int | str],
    settings: ClipSettings,
    rng: np.random.Generator,
) -> list[Prompt]:
    """Prompts of the objects of a clip on its conditioning frames.

    As in SAM 2's training, an object is prompted on the first frame that shows it. With
    `max_conditioning_frames` above 1, further conditioning frames are drawn for the whole clip. On
    these, each object that is visible and was prompted earlier gets another prompt: a mask if its
    first prompt was a mask, else points or a box.

    Args:
        masks: (T', N, H, W) bool; every object shows somewhere.
    """
    more: list[int] = []
    if settings.max_conditioning_frames > 1:
        num_more = int(rng.integers(settings.max_conditioning_frames))
        later = np.arange(1, len(masks))
        more = sorted(rng.choice(later, min(num_more, len(later)), replace=False).tolist())
    prompts = []
    for place, object_id in enumerate(object_ids):
        shows = masks[:, place].any(axis=(1, 2))  # (T',)
        first = int(shows.argmax())
        among: list[str] | None = None
        for t in [first, *(t for t in more if t > first and shows[t])]:
            prompt = settings.prompts.generate(
                masks[t, place], rng, object_id=object_id, frame_index=t, among=among
            )
            among = types_like(prompt["type"])
            prompts.append(prompt)
    return prompts


def finish_clip(
    video: Video,
    indices: list[int],
    pixels: ClipPixels,
    num_padding: int,
    settings: ClipSettings,
    rng: np.random.Generator,
) -> Clip:
    """A clip from its frames and masks, augmented, prompted and padded; images are uint8.

    Args:
        indices: positions of the frames in the video, ascending.
        pixels: at the clip's size; an object without a pixel left is dropped.
        num_padding: T - T'.
    """
    import torch

    images, masks, object_ids, ignore = pixels
    # A clip is played backwards only if its last frame has something to prompt.
    if rng.random() < settings.augment.reverse and masks[-1].any():
        indices = indices[::-1]
        images, masks = np.ascontiguousarray(images[::-1]), np.ascontiguousarray(masks[::-1])
        ignore = None if ignore is None else np.ascontiguousarray(ignore[::-1])
    layers = masks if ignore is None else np.concatenate([masks, ignore[:, None]], axis=1)
    num_objects = masks.shape[1]
    augmented = augment(images, layers, settings.augment, *view_rngs(video, indices, settings, rng))
    if augmented[1][:, :num_objects].any():  # a crop or turn that loses every object is not applied
        images, layers = augmented
    masks = layers[:, :num_objects]
    ignore = None if ignore is None else layers[:, num_objects]

    # The augmentation may have moved some of the objects out of the picture.
    kept = np.flatnonzero(masks.any(axis=(0, 2, 3)))
    object_ids, masks = [object_ids[place] for place in kept], masks[:, kept]
    prompts = sample_prompts(masks, object_ids, settings, rng)
    if num_padding:
        images = np.concatenate([images, np.repeat(images[-1:], num_padding, axis=0)])
        masks = np.concatenate([masks, np.zeros((num_padding, *masks.shape[1:]), bool)])
        if ignore is not None:
            ignore = np.concatenate([ignore, np.zeros((num_padding, *ignore.shape[1:]), bool)])
        indices = [*indices, *[indices[-1]] * num_padding]
    return Clip(
        images=channels_first(images),
        image_keys=image_keys(images) if settings.augment.repeats_images else None,
        masks=torch.from_numpy(np.ascontiguousarray(masks)),
        prompts=prompts,
        video_id=video.video_id,
        frame_indices=[int(t) for t in indices],
        object_ids=object_ids,
        frame_valid=torch.arange(len(indices)) < len(indices) - num_padding,
        frame_size=video.size,
        ignore=None if ignore is None else torch.from_numpy(np.ascontiguousarray(ignore)),
    )


def view_rngs(
    video: Video, indices: Sequence[int], settings: ClipSettings, rng: np.random.Generator
) -> tuple[np.random.Generator, list[np.random.Generator] | None]:
    """Random numbers for `augment`: of the clip, or of one of the video's `num_views` versions,
    which are the same in every clip, and for each frame of that version."""
    num_views = settings.augment.num_views
    if num_views is None:
        return rng, None
    name = int.from_bytes(hashlib.sha256(repr(video.video_id).encode()).digest()[:8], "big")
    seeds = [settings.seed, name, int(rng.integers(num_views))]
    of_frames = [np.random.default_rng([*seeds, int(t)]) for t in indices]
    return np.random.default_rng(seeds), of_frames
