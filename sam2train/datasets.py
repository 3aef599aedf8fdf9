"""Videos on disk -> clips: `COCODataset` reads annotations, `VideoDataset` makes up objects."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from sam2train.clips import Clip
from sam2train.clips import collate_fn as collate_fn  # beside the data sets it batches
from sam2train.coco import read_coco_videos
from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.images import decode_segmentation, read_image
from sam2train.mask_cache import MaskCache
from sam2train.sampling import (
    AnnotatedVideos,
    clip_settings,
    draw_frames,
    finish_clip,
    locate_clip,
)
from sam2train.synthetic import Scene, SyntheticConfig, draw_num_objects, draw_scene
from sam2train.transforms import resize_image, resize_mask
from sam2train.videos import Video, read_video_folders

# Keeps the random numbers of whole synthetic videos apart from those of everything else.
_WHOLE_VIDEO_STREAM = (2,)

Clicks = Annotated[int, Field(ge=0)]


class DatasetConfig(Section):
    """The `dataset:` section of an experiment."""

    dataset_type: Literal["coco", "video", "vos", "sav"] = Field(
        "coco",
        description="coco: masks from a COCO JSON; video: folders of frames, made-up objects; "
        "vos: JPEGImages and Annotations as DAVIS has them; sav: films or frames and SA-V's JSON",
    )
    data_path: str = Field(
        description="training data: the COCO JSON, the folder of videos, or for vos and sav the "
        "folder that holds them or a list of some of them (.txt) below it"
    )
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
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="of the order of clips, and of all that is drawn for a clip: frames, objects, "
        "augmentation, prompts, correction clicks; null: trainer.seed",
    )
    prompt_types: tuple[Literal["point", "bbox", "mask"], ...] = ("point", "bbox", "mask")
    prompt_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="how often each of the prompt types is drawn; null draws all alike"
    )
    num_of_pos_points: Clicks | tuple[Clicks, Clicks] = Field(
        default_factory=lambda known: (1, 3) if known.get("dataset_type") == "video" else 1,
        alias="number_of_points",
        description="positive clicks of a point prompt, or their range [low, high]; "
        "1, and [1, 3] for video, where it is not given",
    )
    include_center: bool = Field(False, alias="include_center_point")
    num_of_neg_points: int = Field(0, ge=0)
    box_jitter: float = Field(0.0, ge=0, le=0.5, description="noise of boxes, share of their side")
    max_conditioning_frames: int = Field(
        1, ge=1, description="a clip has 1 to so many; objects get a prompt on each"
    )
    mask_cache_mb: int = Field(
        256, ge=0, description="decoded masks kept in memory, of one data set in all processes"
    )
    synthetic: SyntheticConfig = Field(
        default_factory=SyntheticConfig, description="video: the made-up objects"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DatasetConfig:
        clicks = self.num_of_pos_points
        if isinstance(clicks, tuple) and clicks[0] > clicks[1]:
            raise ValueError(f"num_of_pos_points is {list(clicks)}; expected [lowest, highest]")
        weights = self.prompt_weights
        if weights is not None and len(weights) != len(self.prompt_types):
            raise ValueError(
                f"prompt_weights has {len(weights)} numbers for {len(self.prompt_types)} "
                "prompt_types; expected one for each"
            )
        if self.image_root is not None and self.dataset_type != "coco":
            raise ValueError("image_root is for coco; other frames lie below data_path")
        if self.synthetic != SyntheticConfig() and self.dataset_type != "video":
            raise ValueError('synthetic is for dataset_type "video"; remove it')
        return self


class COCODataset(AnnotatedVideos):
    """Clips of COCO video annotations: one random clip of video i is `dataset[i]`.

    Args:
        coco_json_path: the annotation file. `images` need `id`, `video_id`, `order_in_video` and
            `path` (or `file_name`); `annotations` need `image_id` and `segmentation`. Objects are
            told apart by `track_id`, `instance_id` or `object_id`, else by category.
        image_root: folder that image paths are relative to, instead of the file's own.
        mask_cache_mb: see `AnnotatedVideos`.
        The others: see `clip_settings`.

    Raises:
        UserError: everything that is wrong with the annotations, in one message.
    """

    what_masks_are = (
        "expected a `segmentation` (RLE or polygons) in at least one; boxes alone train nothing "
        "here"
    )

    def __init__(
        self,
        coco_json_path: str | Path,
        image_size: tuple[int, int] = (512, 512),
        video_clip_length: int = 5,
        prompt_types: Sequence[str] | None = None,
        num_of_pos_points: int | tuple[int, int] = 1,
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        image_root: str | Path | None = None,
        mask_cache_mb: int = 256,
        **settings: Any,
    ):
        points = (num_of_pos_points, include_center, num_of_neg_points)
        settings = clip_settings(image_size, video_clip_length, prompt_types, *points, **settings)
        videos, warnings = read_coco_videos(Path(coco_json_path), image_root)
        super().__init__(coco_json_path, videos, warnings, settings, mask_cache_mb)

    def decode(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        annotation = video.frames[frame_idx].annotations[object_id]
        try:
            return {object_id: decode_segmentation(annotation.segmentation, video.size)}
        except ValueError as problem:
            raise UserError(
                f"annotation {annotation.annotation_id} (object {object_id}, "
                f"{video.frames[frame_idx].path}): {problem}"
            ) from None


class VideoDataset:
    """Clips of videos without annotations, with made-up objects: cut-outs of other frames.

    `dataset[i]` is a random clip of video i; another epoch, by `set_epoch` or as
    `dataset[epoch, i]`, draws another one with other objects. Both depend on the seed, the epoch
    and i alone.

    Whole videos, for evaluation, have objects of their own: `videos` names them, `read_frame` and
    `read_mask` draw them. These are the same for every seed.

    Args:
        data_path: a folder with one sub-folder of frames for each video, or the frames of one
            video; see `read_video_folders`.
        number_of_points: range of the positive clicks of a point prompt, both ends included.
        synthetic: see `SyntheticConfig`.
        mask_cache_mb: bound of the cache of masks of whole videos.
        The others: see `clip_settings`.

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
        synthetic: SyntheticConfig | None = None,
        mask_cache_mb: int = 256,
        **settings: Any,
    ):
        points = (number_of_points, include_center, num_of_neg_points)
        self.settings = clip_settings(
            image_size, video_clip_length, prompt_types, *points, **settings
        )
        self.image_size, self.prompts = self.settings.image_size, self.settings.prompts
        self.epoch = 0
        self.synthetic = synthetic or SyntheticConfig()
        videos, self.warnings = read_video_folders(Path(data_path))
        self.videos = []
        for video in videos:
            num_objects = self._draw_num_objects(_whole_video_rng(video))
            self.videos.append(replace(video, object_ids=list(range(1, num_objects + 1))))
        self.cache = MaskCache(mask_cache_mb * 2**20, self.videos, self.image_size)
        self._places = {video.video_id: place for place, video in enumerate(self.videos)}
        self._staged: tuple[int, Scene] | None = None  # the whole video that was read last

    def __len__(self) -> int:
        return len(self.videos)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of `dataset[i]`, 0 before; for loaders without `ClipSampler`."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> Clip:
        place, rng = locate_clip(index, len(self), self.settings.seed, self.epoch)
        video, settings = self.videos[place], self.settings
        indices, num_padding = draw_frames(
            video, settings.video_clip_length, settings.max_frame_stride, rng
        )
        images = [resize_image(_read_upright(video, t), self.image_size) for t in indices]
        scene = draw_scene(
            images[0],
            indices[-1] - indices[0] + 1,
            self._draw_num_objects(rng),
            self.synthetic,
            lambda rng: self._draw_picture(place, rng),
            rng,
        )
        composed = [
            scene.compose(image, t - indices[0]) for image, t in zip(images, indices, strict=True)
        ]
        images, masks = (np.stack(parts) for parts in zip(*composed, strict=True))
        objects = list(range(1, scene.num_objects + 1))
        return finish_clip(video, indices, images, masks, objects, num_padding, settings, rng)

    def _draw_num_objects(self, rng: np.random.Generator) -> int:
        return draw_num_objects(self.synthetic, self.settings.max_objects, rng)

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
            num_objects = self._draw_num_objects(rng)
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
        mask = self.cache.get(video, frame_idx, object_id, video.size)
        if mask is None:
            masks = self._stage(video.video_id).masks(frame_idx)
            for place, of_object in enumerate(masks, start=1):
                self.cache.put(video, frame_idx, place, of_object)
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
