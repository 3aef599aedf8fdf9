"""A COCO video JSON -> its videos with their masks, or everything that is wrong with the file."""

from __future__ import annotations

import codecs
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np

from sam2train.data_pictures import Header, read_header
from sam2train.data_rle import decode_segmentation, segmentation_area
from sam2train.data_source import Annotation, Frame, Video, VideoSource, listed, tracking_warnings
from sam2train.errors import UserError
from sam2train.files import read_json

_IDENTITY_KEYS = ("track_id", "instance_id", "object_id", "category_id")


class CocoVideos(VideoSource):
    """The videos of a COCO video JSON.

    Args:
        path: the annotation file. `images` need `id`, `video_id`, `order_in_video` and `path` (or
            `file_name`); `annotations` need `image_id` and `segmentation`. Objects are told apart
            by `track_id`, `instance_id` or `object_id`, else by category.
        image_root: folder that image paths are relative to; None takes that of the file.

    Raises:
        UserError: all problems of the file at once.
    """

    mask_hint = (
        "expected a `segmentation` (RLE or polygons) in at least one; boxes alone train nothing "
        "here"
    )

    def __init__(self, path: Path, image_root: str | Path | None = None):
        content = _read_coco(path)
        if image_root is not None and not Path(image_root).is_dir():
            raise UserError(f"dataset.image_root: {image_root} is no folder")
        problems: list[str] = []
        warnings: list[str] = []
        if path.read_bytes().startswith(codecs.BOM_UTF8):
            warnings.append("the file begins with a byte order mark; read without it")
        images = _read_images(content["images"], path.parent, image_root, problems, warnings)
        frames = {image_id: Frame(image.path, {}) for image_id, image in images.items()}
        _read_annotations(content["annotations"], images, frames, problems, warnings)
        videos = _group_videos(images, frames, problems)
        warnings += tracking_warnings(videos)
        super().__init__(path, videos, warnings, problems)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The mask of one object: each has a segmentation of its own."""
        annotation = video.frames[frame_idx].annotations[object_id]
        try:
            return {object_id: decode_segmentation(annotation.segmentation, video.size)}
        except ValueError as problem:
            raise UserError(
                f"annotation {annotation.annotation_id} (object {object_id}, "
                f"{video.frames[frame_idx].path}): {problem}"
            ) from None


def _read_coco(path: Path) -> dict[str, Any]:
    """The top of a COCO file, with `images` and `annotations` as lists of mappings."""
    wanted = "expected a COCO JSON of videos: a mapping with `images` and `annotations`"
    content = read_json(path, wanted)
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
    stated: tuple[int, int]  # the size that the JSON gives, of the picture where it gives none


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
        elif image_root is not None and _is_absolute(name := _image_names(entry)[0]):
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
        if "\\" in _image_names(entry)[0] and "\\" not in path.as_posix():
            told.setdefault("backslashes in the path; read as folders", []).append(where)
        if ".." in path.parts:
            told.setdefault(
                "`..` in the path: found while the folders have these names", []
            ).append(where)
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
        given = size if None in stated else stated
        images[image_id] = _Image(video_id, order, path, size, given)
    warnings += [f"{listed(wheres)}: {what}" for what, wheres in told.items()]
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


def _image_names(entry: dict[str, Any]) -> list[str]:
    """The paths that an entry gives, `path` before `file_name`."""
    names = (entry.get(key) for key in ("path", "file_name"))
    return [name for name in names if isinstance(name, str) and name]


def _is_absolute(name: str) -> bool:
    """Whether a path is absolute, on this system or on Windows."""
    return PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def _locate(
    entry: dict[str, Any], folder: Path, image_root: str | Path | None
) -> tuple[Path | None, Header | str]:
    """The file of an image with its header, or with what is wrong with it.

    Relative paths begin at `image_root`, or at the folder of the annotations where it is None. The
    last parts of an absolute path that does not exist here are looked for under `image_root`.
    """
    names = _image_names(entry)
    if not names:
        return None, "`path` (or `file_name`) is missing or no text"
    root = folder if image_root is None else Path(image_root)
    candidates = []
    for spelling in dict.fromkeys(s for n in names for s in (n, PureWindowsPath(n).as_posix())):
        candidates.append(root / spelling)  # an absolute one stays as it is
        if image_root is not None and _is_absolute(spelling):
            parts = PurePath(spelling).parts
            candidates += [root.joinpath(*parts[k:]) for k in range(1, len(parts))]
    try:
        path = next((path for path in candidates if path.is_file()), candidates[0])
        there = path.exists()
    except OSError as problem:  # the name is too long for a file
        return None, f"`path` is {names[0][:60]!r}...: {problem.strerror}"
    try:
        return path, read_header(path)
    except UserError as problem:
        if there:
            return path, str(problem)
        if not _is_absolute(names[0]):
            return path, f"{problem}; relative paths begin at {root}, see dataset.image_root"
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
        if isinstance(raw.get("segmentation"), list) and area and image.stated != image.size:
            (height, width), (h, w) = image.stated, image.size
            problems.append(
                f"{where}: polygons count in pixels of a picture of {width}x{height} as the file "
                f"says or of {w}x{h} as it is (width x height): correct `width` and `height`, or "
                "give an RLE"
            )
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
        warnings.append(f"{listed(used_twice)}: the id is used twice")
    if num_empty:
        warnings.append(f"{num_empty} annotations have no pixel: the object counts as absent there")


def _group_videos(
    images: _Images,
    frames: dict[int | str, Frame],
    problems: list[str],
) -> list[Video]:
    by_video: dict[int | str, list[tuple[int | str, _Image]]] = {}
    for image_id, image in images.items():
        by_video.setdefault(image.video_id, []).append((image_id, image))
    videos = []
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
        videos.append(Video(video_id, members[0][1].size, ordered, object_ids))
    return videos
