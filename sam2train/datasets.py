"""Videos on disk -> clips. `COCODataset` reads COCO video annotations."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from sam2train.clips import Clip
from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.images import decode_segmentation, read_image, segmentation_area, stored_sizes
from sam2train.prompts import PromptGenerator
from sam2train.transforms import AugmentConfig, augment, normalise, resize_image, resize_mask

_IDENTITY_KEYS = ("track_id", "instance_id", "object_id")
_SHOWN_PROBLEMS = 12


class DatasetConfig(Section):
    """The `dataset:` section of an experiment."""

    dataset_type: Literal["coco"] = Field("coco", description="kind of data at `data_path`")
    data_path: str = Field(description="training data: the COCO JSON file")
    val_path: str | None = Field(None, description="videos that choose the best checkpoint")
    test_path: str | None = Field(None, description="videos that a result is reported on")
    image_root: str | None = Field(None, description="folder that image paths are relative to")
    image_size: tuple[int, int] = Field((512, 512), description="(H, W) of the model's input")
    video_clip_length: int = Field(5, ge=1, description="T, frames of a clip")
    max_frame_stride: int = Field(1, ge=1, description="largest step between frames of a clip")
    max_objects: int | None = Field(None, ge=1, description="objects of a clip; null takes all")
    batch_size: int = Field(1, ge=1)
    num_workers: int = Field(0, ge=0, description="processes that load data; 0 loads in line")
    shuffle: bool = True
    prompt_types: tuple[Literal["point", "bbox", "mask"], ...] = ("point", "bbox", "mask")
    num_of_pos_points: int = Field(1, ge=0)
    include_center: bool = Field(False, alias="include_center_point")
    num_of_neg_points: int = Field(0, ge=0)
    box_jitter: float = Field(0.0, ge=0, le=1, description="noise of boxes, share of their side")
    mask_cache_mb: int = Field(256, ge=0, description="decoded masks kept in memory, per process")


@dataclass(frozen=True)
class Annotation:
    """One object on one frame."""

    annotation_id: int | str
    segmentation: Any
    area: int  # pixels


@dataclass(frozen=True)
class Frame:
    """One frame of a video; objects without an entry are absent."""

    path: Path
    annotations: dict[int | str, Annotation]  # by object id


@dataclass(frozen=True)
class Video:
    """The frames of one video in order, all of one size."""

    video_id: int | str
    size: tuple[int, int]  # (H, W)
    frames: list[Frame]
    object_ids: list[int | str]  # in order of appearance

    def visible(self, frame_idx: int) -> list[int | str]:
        """Objects with at least one pixel on a frame."""
        annotations = self.frames[frame_idx].annotations
        return [o for o in self.object_ids if o in annotations and annotations[o].area > 0]


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
            raise UserError(f"{coco_json_path}: no video has an object with a mask")

    def __len__(self) -> int:
        return len(self.trainable)

    def __getitem__(self, index: int | tuple[int, int]) -> Clip:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        index %= len(self)
        rng = np.random.default_rng([self.seed, epoch, index])
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
        if rng.random() < self.augment.reverse:
            indices, images, masks = indices[::-1], images[::-1], masks[::-1]
        images, masks = augment(images, masks, self.augment, rng)

        # A thin object may lose its last pixel to the resize or the augmentation.
        kept = np.flatnonzero(masks.any(axis=(0, 2, 3)))
        if len(kept) == 0:
            raise UserError(
                f"video {video.video_id}, frames {indices[0]} to {indices[-1]}: no object is left at "
                f"{size[1]}x{size[0]}; enlarge dataset.image_size or weaken augment"
            )
        seen, masks = [seen[place] for place in kept], masks[:, kept]
        prompts = []
        for place, object_id in enumerate(seen):
            first = int(masks[:, place].any(axis=(1, 2)).argmax())
            prompts.append(
                self.prompts.generate(
                    masks[first, place], rng, object_id=object_id, frame_index=first
                )
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
            object_ids=seen,
            frame_valid=torch.arange(len(indices)) < len(indices) - num_padding,
            frame_size=video.size,
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


def draw_frames(
    video: Video, clip_length: int, max_stride: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Frames of one clip: (T',) ascending positions, and the T - T' that are missing.

    The first frame shows an object wherever the video allows it: what is seen first is prompted
    there, and the whole clip is left for tracking.

    Args:
        clip_length: T.
        max_stride: largest step; lowered where the video is too short for it.
    """
    num_frames = len(video.frames)
    taken = min(clip_length, num_frames)
    fits = (num_frames - 1) // max(taken - 1, 1)
    stride = int(rng.integers(1, max(min(max_stride, fits), 1) + 1))
    starts = np.arange(num_frames - stride * (taken - 1))
    good = [start for start in starts if video.visible(start)]
    if not good:  # the objects of this video appear late
        good = [s for s in starts if any(video.visible(s + stride * t) for t in range(taken))]
    if not good:  # or between the frames of this stride
        shown = next(t for t in range(num_frames) if video.visible(t))
        stride, good = 1, [min(shown, num_frames - taken)]
    start = int(good[rng.integers(len(good))])
    return [start + stride * t for t in range(taken)], clip_length - taken


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
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            for index in order[first:]:
                yield epoch, int(index)
            epoch, first = epoch + 1, 0


def read_coco_videos(
    path: Path, image_root: str | Path | None = None
) -> tuple[list[Video], list[str]]:
    """The videos of a COCO video JSON, and warnings about what was read with a grain of salt.

    Raises:
        UserError: all problems of the file at once.
    """
    content = _read_json(path)
    problems: list[str] = []
    warnings: list[str] = []
    images = _read_images(content["images"], path, image_root, problems, warnings)
    frames = {image_id: Frame(image.path, {}) for image_id, image in images.items()}

    annotation_ids = set()
    num_empty = 0
    for place, raw in enumerate(content["annotations"]):
        annotation_id = raw.get("id", f"at position {place}")
        where = f"annotation {annotation_id}"
        if annotation_id in annotation_ids:
            warnings.append(f"{where}: the id is used twice")
        annotation_ids.add(annotation_id)
        image = images.get(raw.get("image_id"))
        if image is None:
            if raw.get("image_id") not in images.broken:
                problems.append(
                    f"{where}: image_id {raw.get('image_id')!r} is no image of the file"
                )
            continue
        identity = next((raw[key] for key in _IDENTITY_KEYS if raw.get(key) is not None), None)
        object_id = raw.get("category_id", 1) if identity is None else identity
        try:
            area = segmentation_area(raw.get("segmentation"), image.size)
        except (ValueError, TypeError) as problem:
            problems.append(f"{where} (image {raw['image_id']}): segmentation: {problem}")
            continue
        num_empty += area == 0
        of_frame = frames[raw["image_id"]].annotations
        if object_id in of_frame:
            told_by = "category" if identity is None else "track"
            problems.append(
                f"annotations {of_frame[object_id].annotation_id} and {annotation_id} are both "
                f"{told_by} {object_id!r} on image {raw['image_id']}; give each object its own "
                "`track_id`, or merge the parts of one object into one segmentation"
            )
            continue
        of_frame[object_id] = Annotation(annotation_id, raw.get("segmentation"), area)
    if num_empty:
        warnings.append(f"{num_empty} annotations have no pixel: the object counts as absent there")

    videos = _group_videos(images, frames, problems, warnings)
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        raise UserError(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  - "
            + "\n  - ".join(shown)
            + (f"\n  ... and {rest} more" if rest else "")
        )
    return videos, warnings


def _read_json(path: Path) -> dict[str, Any]:
    """The top of a COCO file, with `images` and `annotations` as lists of mappings."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a COCO JSON with video annotations")
    try:
        # A byte order mark, as some Windows tools write it, is no reason to refuse a file.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as problem:
        what = "is empty" if path.stat().st_size == 0 else f"is not valid JSON ({problem})"
        raise UserError(f"{path}: the file {what}") from None
    wanted = "expected a COCO dataset: a mapping with `images` and `annotations`"
    if not isinstance(content, dict):
        raise UserError(f"{path}: the top level is a {type(content).__name__}; {wanted}")
    if content.get("videos") and any(
        "segmentations" in a for a in content.get("annotations") or []
    ):
        raise UserError(
            f"{path}: this is the YouTube-VIS layout (`videos`, one `segmentations` list a track); "
            f"{wanted}, one annotation for each object on each frame"
        )
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list) or not all(
            isinstance(entry, dict) for entry in content[key]
        ):
            raise UserError(f"{path}: `{key}` is missing or no list of mappings; {wanted}")
    if not content["images"]:
        raise UserError(f"{path}: `images` is empty; {wanted}")
    return content


@dataclass(frozen=True)
class _Image:
    """An entry of `images`, checked against its file."""

    video_id: int | str
    order: int
    path: Path
    size: tuple[int, int]


class _Images(dict):
    """Checked images by id; `broken` holds the ids of those already reported."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set = set()


def _read_images(
    entries: list[dict[str, Any]],
    json_path: Path,
    image_root: str | Path | None,
    problems: list[str],
    warnings: list[str],
) -> _Images:
    images = _Images()
    if all("video_id" not in entry for entry in entries):
        problems.append(
            "no image has a `video_id`: this is image COCO, not video COCO; add `video_id` and "
            "`order_in_video` to each image"
        )
        images.broken.update(entry.get("id") for entry in entries)
        return images

    locate = _Locator(json_path.parent, image_root)
    paths = [locate(entry) for entry in entries]
    with ThreadPoolExecutor(8) as pool:  # reading headers waits for the disk
        sizes = list(pool.map(_try_sizes, paths))
    if locate.num_backslashes:
        warnings.append(f"{locate.num_backslashes} paths have backslashes; read as folders")
    for place, (entry, path, size) in enumerate(zip(entries, paths, sizes, strict=True)):
        image_id = entry.get("id")
        where = f"image {image_id!r}"
        found: list[str] = []
        if image_id is None:
            found.append(f"the image at position {place} has no `id`")
        elif image_id in images or image_id in images.broken:
            found.append(f"{where}: the id is used twice")
        if entry.get("video_id") is None:
            found.append(f"{where}: `video_id` is missing")
        order = entry.get("order_in_video")
        try:
            order = int(order)
        except (TypeError, ValueError):
            found.append(f"{where}: `order_in_video` is {order!r}; expected a whole number")
        if path is None:
            found.append(f"{where}: `path` (or `file_name`) is missing")
        elif isinstance(size, str):
            found.append(f"{where}: {size}" + locate.advice(path))
        if found:
            problems.extend(found)
            images.broken.add(image_id)
            continue
        if isinstance(entry["order_in_video"], str) and not any("is text" in w for w in warnings):
            warnings.append("`order_in_video` is text; read as numbers")
        stored, shown = size
        stated = (entry.get("height"), entry.get("width"))
        if stated not in (stored, (None, None)) and stated != shown:
            warnings.append(
                f"{where}: the file says {stated[1]}x{stated[0]}, the picture is "
                f"{stored[1]}x{stored[0]} (width x height); the picture counts"
            )
        images[image_id] = _Image(
            entry["video_id"], order, path, shown if stated == shown else stored
        )
    return images


class _Locator:
    """Finds image files: under `image_root`, as given, or relative to the annotation file."""

    def __init__(self, folder: Path, image_root: str | Path | None):
        self.folder = folder
        self.image_root = None if image_root is None else Path(image_root)
        self.num_backslashes = 0

    def __call__(self, entry: dict[str, Any]) -> Path | None:
        name = entry.get("path") or entry.get("file_name")
        if not isinstance(name, str):
            return None
        candidates = self._candidates(name)
        found = next((path for path in candidates if path.is_file()), None)
        if found is None and "\\" in name:
            forward = self._candidates(PureWindowsPath(name).as_posix())
            found = next((path for path in forward if path.is_file()), None)
            self.num_backslashes += found is not None
        return found or candidates[0]

    def _candidates(self, name: str) -> list[Path]:
        if self.image_root is None:
            return [self.folder / name]  # an absolute name stays as it is
        parts = Path(name).parts
        # An absolute path of another machine: its tail may exist under the root.
        tails = [self.image_root.joinpath(*parts[k:]) for k in range(1, len(parts))]
        return [self.image_root / name, *(tails if Path(name).is_absolute() else [])]

    def advice(self, path: Path) -> str:
        if path.is_absolute() and not path.exists() and self.image_root is None:
            return "; set dataset.image_root to the folder that holds the frames"
        return ""


def _try_sizes(path: Path | None) -> tuple | str | None:
    if path is None:
        return None
    try:
        return stored_sizes(path)
    except UserError as problem:
        return str(problem)


def _group_videos(
    images: _Images, frames: dict[Any, Frame], problems: list[str], warnings: list[str]
) -> list[Video]:
    by_video: dict[Any, list[tuple[Any, _Image]]] = {}
    for image_id, image in images.items():
        by_video.setdefault(image.video_id, []).append((image_id, image))
    videos = []
    for video_id, members in by_video.items():
        members.sort(key=lambda member: member[1].order)
        orders = [image.order for _, image in members]
        for (a, first), (b, second) in zip(members, members[1:], strict=False):
            if first.order == second.order:
                problems.append(
                    f"video {video_id!r}: images {a!r} and {b!r} both have order_in_video "
                    f"{first.order}"
                )
        sizes = {image.size for _, image in members}
        if len(sizes) > 1:
            shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
            problems.append(f"video {video_id!r}: frames of different sizes ({shown})")
        if len(orders) == 1:
            warnings.append(f"video {video_id!r} has one frame: nothing to track")
        ordered = [frames[image_id] for image_id, _ in members]
        object_ids = list(dict.fromkeys(o for frame in ordered for o in frame.annotations))
        videos.append(Video(video_id, members[0][1].size, ordered, object_ids))
    return videos
