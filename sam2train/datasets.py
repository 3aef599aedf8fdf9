"""Videos on disk -> clips: `COCODataset` reads annotations, `VideoDataset` makes up objects."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from sam2train.clips import Clip
from sam2train.coco import read_coco_videos
from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.images import decode_segmentation, read_image
from sam2train.prompts import PromptGenerator
from sam2train.sampling import draw_frames, finish_clip, locate_clip
from sam2train.synthetic import Scene, SyntheticConfig, draw_num_objects, draw_scene
from sam2train.transforms import AugmentConfig, resize_image, resize_mask
from sam2train.videos import Video, read_video_folders

# Keeps the random numbers of whole synthetic videos apart from those of everything else.
_WHOLE_VIDEO_STREAM = (2,)


class DatasetConfig(Section):
    """The `dataset:` section of an experiment."""

    dataset_type: Literal["coco", "video"] = Field(
        "coco",
        description="coco: masks from a COCO JSON; video: folders of frames, made-up objects",
    )
    data_path: str = Field(description="training data: the COCO JSON file, or the folder of videos")
    val_path: str | None = Field(None, description="videos that choose the best checkpoint")
    test_path: str | None = Field(None, description="videos that a result is reported on")
    image_root: str | None = Field(None, description="coco: what image paths are relative to")
    image_size: tuple[int, int] = Field((512, 512), description="(H, W) of the model's input")
    video_clip_length: int = Field(5, ge=1, description="T, frames of a clip")
    max_frame_stride: int = Field(1, ge=1, description="largest step between frames of a clip")
    max_objects: int | None = Field(None, ge=1, description="objects of a clip; null takes all")
    batch_size: int = Field(1, ge=1)
    num_workers: int = Field(0, ge=0, description="processes that load data; 0 loads in line")
    shuffle: bool = True
    prompt_types: tuple[Literal["point", "bbox", "mask"], ...] = ("point", "bbox", "mask")
    num_of_pos_points: int | None = Field(1, ge=0, description="of a point prompt; video: (n, n)")
    number_of_points: tuple[int, int] | None = Field(
        None, description="video: a range in place of `num_of_pos_points`; (1, 3) without either"
    )
    include_center: bool = Field(False, alias="include_center_point")
    num_of_neg_points: int = Field(0, ge=0)
    box_jitter: float = Field(0.0, ge=0, le=0.5, description="noise of boxes, share of their side")
    mask_cache_mb: int = Field(256, ge=0, description="decoded masks kept in memory, per process")
    synthetic: SyntheticConfig = Field(
        default_factory=SyntheticConfig, description="video: the made-up objects"
    )

    @model_validator(mode="before")
    @classmethod
    def _points_of_video(cls, raw: Any) -> Any:
        """For `video`, either spelling becomes `number_of_points`, and the other one null."""
        if not isinstance(raw, Mapping) or raw.get("dataset_type") != "video":
            return raw
        raw = dict(raw)
        number = raw.setdefault("num_of_pos_points", None)
        if raw.get("number_of_points") is None:
            is_number = isinstance(number, int) and not isinstance(number, bool)
            raw["number_of_points"] = (number, number) if is_number else (1, 3)
            raw["num_of_pos_points"] = None if is_number else number
        return raw

    @model_validator(mode="after")
    def _of_one_type(self) -> DatasetConfig:
        if self.dataset_type == "video":
            if self.num_of_pos_points is not None:
                raise ValueError(
                    f"number_of_points is {list(self.number_of_points)} and num_of_pos_points "
                    f"{self.num_of_pos_points}; keep one"
                )
            low, high = self.number_of_points
            if not 0 <= low <= high:
                raise ValueError(
                    f"number_of_points is [{low}, {high}]; expected the lowest and the highest "
                    "number of clicks, 0 or more"
                )
            if self.image_root is not None:
                raise ValueError("image_root is for coco; frames of a video lie below data_path")
            return self
        if self.num_of_pos_points is None:
            raise ValueError("num_of_pos_points is null; expected a whole number of at least 0")
        foreign = {"number_of_points": None, "synthetic": SyntheticConfig()}
        for name, unset in foreign.items():
            if getattr(self, name) != unset:
                raise ValueError(f'{name} is for dataset_type "video"; remove it')
        return self


@dataclass
class MaskCache:
    """Decoded masks, packed to bits, the least recently used dropped beyond a bound."""

    max_bytes: int
    masks: OrderedDict[tuple, np.ndarray] = field(default_factory=OrderedDict)
    num_bytes: int = 0

    def get(self, key: tuple, shape: tuple[int, int]) -> np.ndarray | None:
        packed = self.masks.get(key)
        if packed is None:
            return None
        self.masks.move_to_end(key)
        return np.unpackbits(packed, count=shape[0] * shape[1]).astype(bool).reshape(shape)

    def put(self, key: tuple, mask: np.ndarray) -> None:
        packed = np.packbits(mask)
        if packed.nbytes > self.max_bytes:
            return
        self.masks[key] = packed
        self.num_bytes += packed.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self.masks.popitem(last=False)[1].nbytes


class COCODataset:
    """Clips of COCO video annotations: one random clip of video i is `dataset[i]`.

    `dataset[i]` is that of epoch 0; `dataset[epoch, i]` draws another clip of the same video. Both
    depend on the seed, the epoch and i alone, whatever the process that loads them.

    Args:
        coco_json_path: the annotation file. `images` need `id`, `video_id`, `order_in_video` and
            `path` (or `file_name`); `annotations` need `image_id` and `segmentation`. Objects are
            told apart by `track_id`, `instance_id` or `object_id`, else by category.
        image_size: (H, W) of the clips; frames are stretched to it.
        video_clip_length: T. A video with fewer frames is padded with invalid ones.
        prompt_types, num_of_pos_points, include_center, num_of_neg_points, box_jitter: see
            `PromptGenerator`.
        image_root: folder that image paths are relative to, instead of the file's own.
        max_objects: at most so many objects of a clip, drawn at random; None takes all.
        max_frame_stride: largest step between neighbouring frames of a clip.
        augment: see `AugmentConfig`; None changes nothing.
        mask_cache_mb: bound of the cache of decoded masks.

    Raises:
        UserError: everything that is wrong with the annotations, in one message.
    """

    def __init__(
        self,
        coco_json_path: str | Path,
        image_size: tuple[int, int] = (512, 512),
        video_clip_length: int = 5,
        prompt_types: Sequence[str] | None = None,
        num_of_pos_points: int = 1,
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        box_jitter: float = 0.0,
        image_root: str | Path | None = None,
        max_objects: int | None = None,
        max_frame_stride: int = 1,
        augment: AugmentConfig | None = None,
        mask_cache_mb: int = 256,
        seed: int = 0,
    ):
        self.image_size = tuple(image_size)
        self.video_clip_length = video_clip_length
        self.prompts = PromptGenerator(
            prompt_types,
            num_of_pos_points,
            include_center,
            num_of_neg_points,
            box_jitter=box_jitter,
        )
        self.max_objects = max_objects
        self.max_frame_stride = max_frame_stride
        self.augment = augment or AugmentConfig()
        self.seed = seed
        self.cache = MaskCache(mask_cache_mb * 2**20)
        self.videos, self.warnings = read_coco_videos(Path(coco_json_path), image_root)
        self.trainable = [
            video
            for video in self.videos
            if any(
                annotation.area
                for frame in video.frames
                for annotation in frame.annotations.values()
            )
        ]
        if not self.trainable:
            raise UserError(
                f"{coco_json_path}: no annotation has a mask; expected a `segmentation` (RLE or "
                "polygons) in at least one; boxes alone train nothing here"
            )

    def __len__(self) -> int:
        return len(self.trainable)

    def __getitem__(self, index: int | tuple[int, int]) -> Clip:
        index, rng = locate_clip(index, len(self), self.seed)
        return self._draw_clip(self.trainable[index], rng)

    def _draw_clip(self, video: Video, rng: np.random.Generator) -> Clip:
        size = self.image_size
        indices, num_padding = draw_frames(
            video, self.video_clip_length, self.max_frame_stride, rng
        )
        seen = [o for o in video.object_ids if any(o in video.visible(t) for t in indices)]
        if self.max_objects is not None and len(seen) > self.max_objects:
            chosen = rng.choice(len(seen), self.max_objects, replace=False)
            seen = [seen[place] for place in sorted(chosen)]

        images = np.stack([resize_image(self.read_frame(video, t), size) for t in indices])
        masks = np.stack(
            [[self.read_mask(video, t, o, size) for o in seen] for t in indices]
        )  # (T, N, H, W)
        return finish_clip(
            video, indices, images, masks, seen, num_padding, self.prompts, self.augment, rng
        )

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 at the video's own size."""
        return read_image(video.frames[frame_idx].path, video.size)

    def read_mask(
        self,
        video: Video,
        frame_idx: int,
        object_id: int | str,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """(H, W) bool of one object; empty where it has no annotation. At `size` where given."""
        size = video.size if size is None else size
        annotation = video.frames[frame_idx].annotations.get(object_id)
        if annotation is None or annotation.area == 0:
            return np.zeros(size, bool)
        key = (video.video_id, frame_idx, object_id, size)
        mask = self.cache.get(key, size)
        if mask is None:
            try:
                mask = decode_segmentation(annotation.segmentation, video.size)
            except ValueError as problem:
                raise UserError(
                    f"annotation {annotation.annotation_id} (object {object_id}, "
                    f"{video.frames[frame_idx].path}): {problem}"
                ) from None
            mask = resize_mask(mask, size)
            self.cache.put(key, mask)
        return mask


class VideoDataset:
    """Clips of videos without annotations, with made-up objects: cut-outs of other frames.

    `dataset[i]` is a random clip of video i with epoch 0, `dataset[epoch, i]` another one with
    other objects. Both depend on the seed, the epoch and i alone.

    Whole videos, for evaluation, have objects of their own: `videos` names them, `read_frame` and
    `read_mask` draw them. These are the same for every seed.

    Args:
        data_path: a folder with one sub-folder of frames for each video, or the frames of one
            video; see `read_video_folders`.
        image_size: (H, W) of the clips; frames are stretched to it.
        video_clip_length: T. A video with fewer frames is padded with invalid ones.
        number_of_points: range of the positive clicks of a point prompt, both ends included.
        prompt_types, include_center, num_of_neg_points, box_jitter: see `PromptGenerator`.
        max_objects: at most so many objects of a clip.
        max_frame_stride: largest step between neighbouring frames of a clip.
        synthetic: see `SyntheticConfig`.
        augment: see `AugmentConfig`; None changes nothing.
        mask_cache_mb: bound of the cache of masks of whole videos.

    Raises:
        UserError: no videos, or everything that is wrong with the pictures, in one message.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_size: tuple[int, int] = (512, 512),
        video_clip_length: int = 5,
        prompt_types: Sequence[str] | None = None,
        number_of_points: tuple[int, int] = (1, 3),
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        box_jitter: float = 0.0,
        max_objects: int | None = None,
        max_frame_stride: int = 1,
        synthetic: SyntheticConfig | None = None,
        augment: AugmentConfig | None = None,
        mask_cache_mb: int = 256,
        seed: int = 0,
    ):
        self.image_size = tuple(image_size)
        self.video_clip_length = video_clip_length
        self.prompts = PromptGenerator(
            prompt_types,
            number_of_points,
            include_center,
            num_of_neg_points,
            box_jitter=box_jitter,
        )
        self.max_objects = max_objects
        self.max_frame_stride = max_frame_stride
        self.synthetic = synthetic or SyntheticConfig()
        self.augment = augment or AugmentConfig()
        self.seed = seed
        self.cache = MaskCache(mask_cache_mb * 2**20)
        videos, self.warnings = read_video_folders(Path(data_path))
        self.videos = []
        for video in videos:
            num_objects = draw_num_objects(self.synthetic, max_objects, _whole_video_rng(video))
            self.videos.append(replace(video, object_ids=list(range(1, num_objects + 1))))
        self._places = {video.video_id: place for place, video in enumerate(self.videos)}
        self._staged: tuple[int, Scene] | None = None  # the whole video that was read last

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int | tuple[int, int]) -> Clip:
        index, rng = locate_clip(index, len(self), self.seed)
        return self._draw_clip(index, rng)

    def _draw_clip(self, place: int, rng: np.random.Generator) -> Clip:
        video = self.videos[place]
        indices, num_padding = draw_frames(
            video, self.video_clip_length, self.max_frame_stride, rng
        )
        images = [resize_image(_read_upright(video, t), self.image_size) for t in indices]
        scene = draw_scene(
            images[0],
            indices[-1] - indices[0] + 1,
            draw_num_objects(self.synthetic, self.max_objects, rng),
            self.synthetic,
            lambda rng: self._draw_picture(place, rng),
            rng,
        )
        composed = [
            scene.compose(image, t - indices[0]) for image, t in zip(images, indices, strict=True)
        ]
        images, masks = (np.stack(parts) for parts in zip(*composed, strict=True))
        objects = list(range(1, scene.num_objects + 1))
        return finish_clip(
            video, indices, images, masks, objects, num_padding, self.prompts, self.augment, rng
        )

    def _draw_picture(self, place: int, rng: np.random.Generator) -> np.ndarray:
        """A frame of another video, of the same one where there is no other."""
        if len(self.videos) > 1:
            place = (place + int(rng.integers(1, len(self.videos)))) % len(self.videos)
        video = self.videos[place]
        return _read_upright(video, int(rng.integers(len(video.frames))))

    def _stage(self, video_id: int | str) -> Scene:
        """The objects of a whole video; those of one video are kept."""
        place = self._places[video_id]
        if self._staged is None or self._staged[0] != place:
            video = self.videos[place]
            rng = _whole_video_rng(video)
            num_objects = draw_num_objects(self.synthetic, self.max_objects, rng)
            scene = draw_scene(
                _read_upright(video, 0),
                len(video.frames),
                num_objects,
                self.synthetic,
                lambda rng: self._draw_picture(place, rng),
                rng,
            )
            self._staged = (place, scene)
        return self._staged[1]

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 at the video's own size, with the objects of the whole video on it."""
        return self._stage(video.video_id).compose(_read_upright(video, frame_idx), frame_idx)[0]

    def read_mask(
        self,
        video: Video,
        frame_idx: int,
        object_id: int,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """(H, W) bool of one object of the whole video. At `size` where given."""
        mask = self.cache.get((video.video_id, frame_idx, object_id), video.size)
        if mask is None:
            masks = self._stage(video.video_id).masks(frame_idx)
            for place, of_object in enumerate(masks, start=1):
                self.cache.put((video.video_id, frame_idx, place), of_object)
            mask = masks[object_id - 1]
        return mask if size is None else resize_mask(mask, size)


def _whole_video_rng(video: Video) -> np.random.Generator:
    """The stream of a whole video: its own, whatever the seed and the videos beside it."""
    name = zlib.crc32(str(video.video_id).encode())
    return np.random.default_rng(np.random.SeedSequence(name, spawn_key=_WHOLE_VIDEO_STREAM))


def _read_upright(video: Video, frame_idx: int) -> np.ndarray:
    """(H, W, 3) uint8 of a frame, its EXIF orientation applied: nothing says otherwise."""
    path = video.frames[frame_idx].path
    pixels = read_image(path)
    if pixels.shape[:2] != video.size:
        raise UserError(
            f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected "
            f"{video.size[1]}x{video.size[0]} (width x height); did it change?"
        )
    return pixels


class ClipSampler:
    """Endless (epoch, index) pairs for a DataLoader; each epoch visits every clip once.

    The pair at position p depends on the seed and p alone, so a resumed run goes on at its place.

    Args:
        num_clips: clips of an epoch.
        start: positions to leave out, already used.
    """

    def __init__(self, num_clips: int, *, shuffle: bool, seed: int, start: int = 0):
        self.num_clips = num_clips
        self.shuffle = shuffle
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, first = divmod(self.start, self.num_clips)
        while True:
            order = np.arange(self.num_clips)
            if self.shuffle:
                # `num_clips` is no clip's index: no clip draws from this stream.
                np.random.default_rng([self.seed, epoch, self.num_clips]).shuffle(order)
            for index in order[first:]:
                yield epoch, int(index)
            epoch, first = epoch + 1, 0
