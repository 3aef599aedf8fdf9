"""Videos on disk -> clips. `COCODataset` reads COCO video annotations."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from sam2train.clips import Clip
from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.images import (
    Header,
    decode_segmentation,
    read_header,
    read_image,
    segmentation_area,
)
from sam2train.prompts import PromptGenerator
from sam2train.transforms import AugmentConfig, augment, normalise, resize_image, resize_mask

_IDENTITY_KEYS = ("track_id", "instance_id", "object_id", "category_id")
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
    box_jitter: float = Field(0.0, ge=0, le=0.5, description="noise of boxes, share of their side")
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
            raise UserError(
                f"{coco_json_path}: no annotation has a mask; expected a `segmentation` (RLE or "
                "polygons) in at least one; boxes alone train nothing here"
            )

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
        # Backwards, too, the clip should begin with something to prompt.
        if rng.random() < self.augment.reverse and masks[-1].any():
            indices = indices[::-1]
            images, masks = np.ascontiguousarray(images[::-1]), np.ascontiguousarray(masks[::-1])
        augmented = augment(images, masks, self.augment, rng)
        if augmented[1].any():  # else a crop or turn lost every object: the clip stays as it is
            images, masks = augmented

        # One of several objects may have left the picture with the augmentation.
        kept = np.flatnonzero(masks.any(axis=(0, 2, 3)))
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
                # `num_clips` is no clip's index: no clip draws from this stream.
                np.random.default_rng([self.seed, epoch, self.num_clips]).shuffle(order)
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
    if image_root is not None and not Path(image_root).is_dir():
        raise UserError(f"dataset.image_root: {image_root} is no folder")
    problems: list[str] = []
    warnings: list[str] = []
    images = _read_images(content["images"], path.parent, image_root, problems, warnings)
    frames = {image_id: Frame(image.path, {}) for image_id, image in images.items()}
    _read_annotations(content["annotations"], images, frames, problems, warnings)
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
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; expected a COCO JSON with video annotations")
    try:
        # A byte order mark, as some Windows tools write it, is no reason to refuse a file.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as problem:
        what = "is empty" if path.stat().st_size == 0 else f"is not valid JSON ({problem})"
        raise UserError(f"{path}: the file {what}") from None
    wanted = "expected a COCO dataset: a mapping with `images` and `annotations`"
    if not isinstance(content, dict):
        raise UserError(f"{path}: the top level is a {type(content).__name__}; {wanted}")
    tracks = content.get("annotations")
    if isinstance(tracks, list) and any(
        isinstance(t, dict) and "segmentations" in t for t in tracks
    ):
        raise UserError(
            f"{path}: this is the YouTube-VIS layout (`videos`, one `segmentations` list a track); "
            f"{wanted}, one annotation for each object on each frame"
        )
    for key in ("images", "annotations"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: `{key}` is missing or no list of mappings; {wanted}")
        if not entries:
            raise UserError(f"{path}: `{key}` is empty; {wanted}")
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
    folder: Path,
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
        images.broken.update(_as_id(entry.get("id")) for entry in entries)
        return images

    with ThreadPoolExecutor(8) as pool:  # finding files and reading headers waits for the disk
        located = list(pool.map(lambda entry: _locate(entry, folder, image_root), entries))
    under_root: dict[Path, str] = {}  # file -> the absolute path that led to it
    told: dict[str, list[str]] = {}  # warning -> the images it is about
    for place, (entry, (path, header)) in enumerate(zip(entries, located, strict=True)):
        image_id = _as_id(entry.get("id"))
        where = f"image {entry.get('id')!r}"
        found: list[str] = []
        if image_id is None:
            where = f"the image at position {place}"
            found.append(f"{where}: `id` is {entry.get('id')!r}; {_ID_WANTED}")
        elif image_id in images or image_id in images.broken:
            found.append(f"{where}: the id is used twice")
        video_id = _as_id(entry.get("video_id"))
        if video_id is None:
            found.append(f"{where}: `video_id` is {entry.get('video_id')!r}; {_ID_WANTED}")
        # CocoVID calls it `frame_id`.
        stated_order = entry.get("order_in_video", entry.get("frame_id"))
        order = _whole_number(stated_order)
        if order is None:
            found.append(f"{where}: `order_in_video` is {stated_order!r}; expected a whole number")
        if isinstance(header, str):
            found.append(f"{where}: {header}")
        elif image_root is not None and _is_absolute(name := _image_name(entry)):
            other = under_root.setdefault(path, name)
            if other != name:
                found.append(
                    f"{where}: {name} and {other} both lead to {path}; set dataset.image_root to "
                    "the folder that holds all videos"
                )
        if found:
            problems.extend(found)
            images.broken.add(image_id)
            continue
        if isinstance(stated_order, str):
            told.setdefault("`order_in_video` is text; read as a number", []).append(where)
        if "\\" in _image_name(entry) and "\\" not in path.as_posix():
            told.setdefault("backslashes in the path; read as folders", []).append(where)
        stated = (entry.get("height"), entry.get("width"))
        size = header.shown if stated == header.shown else header.stored
        if stated not in ((None, None), size):
            told.setdefault(
                f"the file says {stated[1]}x{stated[0]}, the picture is {size[1]}x{size[0]} "
                "(width x height); the picture counts",
                [],
            ).append(where)
        if header.is_turned:
            done = "ignored: the pixels count as stored, unless the JSON has the turned size"
            if size != header.stored:
                done = "applied: the JSON has the size of the turned picture"
            told.setdefault(f"an EXIF orientation, {done}", []).append(where)
        images[image_id] = _Image(video_id, order, path, size)
    warnings += [f"{_listed(wheres)}: {what}" for what, wheres in told.items()]
    return images


_ID_WANTED = "expected a whole number or text"


def _whole_number(value: Any) -> int | None:
    """A whole number, also where it is text or a float such as 3.0; None for anything else."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_id(value: Any) -> int | str | None:
    """An id as JSON files have it, or None for what cannot be one."""
    return value if isinstance(value, str) else _whole_number(value)


def _listed(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _image_name(entry: dict[str, Any]) -> str | None:
    name = entry.get("path") or entry.get("file_name")
    return name if isinstance(name, str) else None


def _is_absolute(name: str) -> bool:
    """Also for a Windows path that is read elsewhere."""
    return PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def _locate(
    entry: dict[str, Any], folder: Path, image_root: str | Path | None
) -> tuple[Path | None, Header | str]:
    """The file of an image with its header, or with what is wrong with it.

    It lies at the path as given, from `image_root` or else from the folder of the annotations. Of
    an absolute path of another machine, the tail may exist under `image_root`.
    """
    name = _image_name(entry)
    if name is None:
        return None, "`path` (or `file_name`) is missing or no text"
    root = folder if image_root is None else Path(image_root)
    candidates = []
    for spelling in dict.fromkeys((name, PureWindowsPath(name).as_posix())):
        candidates.append(root / spelling)  # an absolute one stays as it is
        if image_root is not None and _is_absolute(name):
            parts = PurePath(spelling).parts
            candidates += [root.joinpath(*parts[k:]) for k in range(1, len(parts))]
    path = next((path for path in candidates if path.is_file()), candidates[0])
    try:
        return path, read_header(path)
    except UserError as problem:
        advice = ""
        if _is_absolute(name) and not path.exists():
            advice = "; set dataset.image_root to the folder that holds the frames"
            if image_root is not None:
                advice = f", and no end of this path exists under dataset.image_root ({root})"
        return path, f"{problem}{advice}"


def _read_annotations(
    entries: list[dict[str, Any]],
    images: _Images,
    frames: dict[int | str, Frame],
    problems: list[str],
    warnings: list[str],
) -> None:
    """Fill the annotations of the frames."""
    annotation_ids: set[int | str] = set()
    used_twice: list[str] = []
    num_empty = 0
    # video -> what tells its objects apart, and the type of their ids -> an annotation with it
    kinds: dict[int | str, dict[tuple[str, str], str]] = {}
    for place, raw in enumerate(entries):
        annotation_id = _as_id(raw.get("id"))
        if annotation_id is None:
            annotation_id = f"at position {place}"
        elif annotation_id in annotation_ids:
            used_twice.append(f"annotation {annotation_id}")
        annotation_ids.add(annotation_id)
        where = f"annotation {annotation_id}"
        image_id = _as_id(raw.get("image_id"))
        if image_id is None:
            problems.append(f"{where}: `image_id` is {raw.get('image_id')!r}; {_ID_WANTED}")
            continue
        if image_id not in images:
            if image_id not in images.broken:  # those are reported already
                problems.append(f"{where}: image_id {image_id!r} is no image of the file")
            continue
        where += f" (image {image_id!r})"
        key = next((key for key in _IDENTITY_KEYS if raw.get(key) is not None), None)
        object_id = 1 if key is None else _as_id(raw[key])
        if object_id is None:
            problems.append(f"{where}: `{key}` is {raw[key]!r}; {_ID_WANTED}")
            continue
        image = images[image_id]
        kinds.setdefault(image.video_id, {}).setdefault(
            (key or "no id of an object", "text" if isinstance(object_id, str) else "a number"),
            where,
        )
        try:
            area = segmentation_area(raw.get("segmentation"), image.size)
        except ValueError as problem:
            problems.append(f"{where}: segmentation: {problem}")
            continue
        num_empty += area == 0
        of_frame = frames[image_id].annotations
        if object_id in of_frame:
            problems.append(
                f"annotations {of_frame[object_id].annotation_id} and {annotation_id} (image "
                f"{image_id!r}) are the same object ({key or 'no id'} {object_id!r}); give each "
                "object its own `track_id`, or merge the parts of one object into one segmentation"
            )
            continue
        of_frame[object_id] = Annotation(annotation_id, raw.get("segmentation"), area)
    for video_id, of_video in kinds.items():
        if len(of_video) > 1:
            shown = ", ".join(
                f"{where} has {key} ({kind})" for (key, kind), where in of_video.items()
            )
            problems.append(
                f"video {video_id!r}: {shown}; tell all objects of a video apart in one way, best "
                "by a `track_id`"
            )
    if used_twice:
        warnings.append(f"{_listed(used_twice)}: the id is used twice")
    if num_empty:
        warnings.append(f"{num_empty} annotations have no pixel: the object counts as absent there")


def _group_videos(
    images: _Images,
    frames: dict[int | str, Frame],
    problems: list[str],
    warnings: list[str],
) -> list[Video]:
    by_video: dict[int | str, list[tuple[int | str, _Image]]] = {}
    for image_id, image in images.items():
        by_video.setdefault(image.video_id, []).append((image_id, image))
    videos = []
    without, short = [], []
    for video_id, members in by_video.items():
        members.sort(key=lambda member: member[1].order)
        for (a, first), (b, second) in pairwise(members):
            if first.order == second.order:
                problems.append(
                    f"video {video_id!r}: images {a!r} and {b!r} both have order_in_video "
                    f"{first.order}"
                )
        sizes = {image.size for _, image in members}
        if len(sizes) > 1:
            shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
            problems.append(f"video {video_id!r}: frames of different sizes ({shown})")
        ordered = [frames[image_id] for image_id, _ in members]
        object_ids = list(dict.fromkeys(o for frame in ordered for o in frame.annotations))
        video = Video(video_id, members[0][1].size, ordered, object_ids)
        videos.append(video)
        num_shown = Counter(o for t in range(len(ordered)) for o in video.visible(t))
        if not num_shown:
            without.append(f"video {video_id!r}")
        elif max(num_shown.values()) == 1:
            short.append(f"video {video_id!r}")
    if without:
        warnings.append(f"{_listed(without)}: no object, so no clip for training")
    if short:
        warnings.append(f"{_listed(short)}: no object is on more than one frame: nothing to track")
    return videos
