"""A COCO video JSON -> its videos with their masks, or everything that is wrong with the file."""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

import numpy as np

from sam2train.data_coco_files import (
    ID_WANTED,
    TASKS,
    Findings,
    Image,
    Roots,
    as_id,
    has_tracks,
    image_names,
    image_roots,
    locate,
    whole_number,
)
from sam2train.data_coco_objects import (
    Crowds,
    read_annotations,
    read_crowds,
    split_crowds,
)
from sam2train.data_rle import Parts, decode_part, decode_segmentation
from sam2train.data_source import (
    Annotation,
    Frame,
    Video,
    VideoSource,
    listed,
    shared_pictures,
    tracking_warnings,
)
from sam2train.errors import UserError
from sam2train.files import json_object, natural_key, read_regular_file
from sam2train.machine import watched
from sam2train.transforms import resize_mask

Unlabelled = Literal["absent", "ignore", "auto"]
# Where the place of a frame in its video is; the file names where an image has none of these.
_ORDER_KEYS = ("order_in_video", "frame_id", "frame_index", "frame_number")
# Whether somebody looked for objects on a frame.
_LABEL_KEYS = ("is_annotated", "is_labelled", "is_labeled", "labelled", "labeled")
_LABEL_KEYS += ("is_vid_train_frame", "is_key_frame", "is_keyframe")
_TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
_WANTED = "expected a COCO JSON of videos: a mapping with `images` and `annotations`"


class CocoVideos(VideoSource):
    """The videos of a COCO video JSON.

    Args:
        path: the annotation file. `images` need `id`, `video_id` and `path` (or `file_name`), and
            are ordered by `order_in_video`, `frame_id`, `frame_index` or `frame_number`, else by
            their names; `annotations` need `image_id` and `segmentation`. Objects are told apart by
            `track_id`, `instance_id` or `object_id`, also within `attributes`, else by category.
            Without any `video_id`, each image is a video of one frame; but if objects are on
            several images by their ids, each folder of images is a video.
        image_root: folder that image paths are relative to; None takes that of the file.
        unlabelled_frames: which frames without any annotation nobody looked at. "auto": those that
            a key such as `is_annotated` says, or where there is none, those between frames
            annotated at a regular distance. "ignore": those that the key says, or else all. In
            "absent", none: objects are absent there.
        same_object_twice: several annotations of one object on one frame are its parts ("unite") or
            an error.
        crowds: what annotations with `iscrowd` are; those with `ignore` are regions that no loss
            and no score counts.
        content: of the file, where it is read already or made from another format.
        warnings, notes: of who did that.

    Raises:
        UserError: all problems of the file at once.
    """

    mask_hint = (
        "expected a `segmentation` (RLE or polygons) in at least one; boxes alone train nothing "
        "here"
    )

    def __init__(
        self,
        path: Path,
        image_root: str | Path | None = None,
        *,
        unlabelled_frames: Unlabelled = "auto",
        same_object_twice: Literal["unite", "error"] = "unite",
        crowds: Crowds = "auto",
        content: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        found = Findings(warnings=list(warnings), notes=list(notes))
        content = read_coco(path, found.warnings) if content is None else content
        _check_top(path, content)
        objects, ignored = split_crowds(content["annotations"], crowds, found)
        content = {**content, "annotations": objects}
        roots = image_roots(path, image_root)
        entries, alone = _with_videos(content, found)
        images = _read_images(entries, roots, found)
        if unlabelled_frames != "absent":
            images.read_labels(found)
        annotations = read_annotations(
            content,
            images.known,
            images.broken,
            found,
            alone=alone,
            unite=same_object_twice == "unite",
        )
        regions = read_crowds(ignored, images.known, found)
        videos = _make_videos(images, annotations, regions, found)
        if not alone:
            videos = find_unlabelled(videos, images.label_key, unlabelled_frames, found)
        found.problems += shared_pictures(videos)
        found.warnings += tracking_warnings(videos)
        super().__init__(path, videos, found.warnings, found.problems, found.notes)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The mask of one object: each has a segmentation of its own."""
        return {object_id: self._decode(decode_segmentation, video, frame_idx, object_id)}

    def read_small_masks(
        self, video: Video, frame_idx: int, object_id: int | str, size: tuple[int, int]
    ) -> dict[int | str, np.ndarray]:
        """The same at `size`; only the rectangle around the object is decoded."""
        part = self._decode(decode_part, video, frame_idx, object_id)
        return {object_id: resize_mask(part, size)}

    def _decode(
        self, how: Callable[..., Any], video: Video, frame_idx: int, object_id: int | str
    ) -> Any:
        annotation = video.frames[frame_idx].annotations[object_id]
        try:
            return how(annotation.segmentation, video.size)
        except ValueError as problem:
            raise UserError(
                f"annotation {annotation.annotation_id} (object {object_id}, "
                f"{video.frames[frame_idx].path}): {problem}"
            ) from None

    def read_ignore(self, video: Video, frame_idx: int) -> np.ndarray | None:
        """(H, W) bool: crowds and regions to ignore; None where the frame has none."""
        ignored = video.frames[frame_idx].ignored
        return None if ignored is None else decode_segmentation(ignored, video.size)


def read_coco(path: Path, warnings: list[str]) -> dict[str, Any]:
    """The content of a JSON of videos; a list at its top stands under `tasks`."""
    raw = read_regular_file(path, _WANTED)
    if raw.startswith(codecs.BOM_UTF8):
        warnings.append("the file begins with a byte order mark; read without it")
    return json_object(raw, path, _WANTED, key_of_list=TASKS)


def _check_top(path: Path, content: Mapping[str, Any]) -> None:
    if content.keys() == {TASKS}:
        raise UserError(f"{path}: the top level is a list, not an object; {_WANTED}")
    for key in ("images", "annotations"):
        entries = content.get(key)
        good = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
        if not (good and entries):
            fault = "is empty" if good else "is missing or no list of mappings"
            raise UserError(f"{path}: `{key}` {fault}; {_WANTED}")


def _with_videos(
    content: Mapping[str, Any], found: Findings
) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """The images with a `video_id`, and whether each is a video of its own."""
    entries = content["images"]
    if any("video_id" in entry for entry in entries):
        return entries, False
    if not has_tracks(content["annotations"]):
        found.notes.append(
            "no image has a `video_id`, and no object is on two images by its id: image COCO, read "
            "as videos of one frame in which each annotation is an object"
        )
        alone = [entry | {"video_id": entry.get("id"), "order_in_video": 0} for entry in entries]
        return alone, True
    kinds: dict[str, set[str]] = {}  # folder -> the names in it without their numbers
    homes = []
    for entry in entries:
        name = PurePath(PureWindowsPath(next(iter(image_names(entry)), "")).as_posix())
        homes.append(str(name.parent))
        kinds.setdefault(homes[-1], set()).add(re.sub(r"\d+", "", name.stem))
    mixed = [folder for folder, of_folder in kinds.items() if len(of_folder) > 1]
    # CVAT's export has no order. In a file with an order and without videos the videos are missing.
    if mixed or any(entry.get(key) is not None for key in _ORDER_KEYS for entry in entries):
        found.problems.append(
            "no image has a `video_id`, though objects are on several images by their ids; what is "
            "a video is clear without it only where images have no order in the file and each "
            "folder has names of one kind, such as frame_000001.png; add `video_id` to each image"
        )
    else:
        found.notes.append(
            "no image has a `video_id`, but objects are on several images by their ids: each "
            f"folder of images is a video ({len(kinds)})"
        )
    with_homes = zip(entries, homes, strict=True)
    return [entry | {"video_id": home} for entry, home in with_homes], False


@dataclass
class _Images:
    """The images whose files are good."""

    known: dict[int | str, Image]
    paths: dict[int | str, Path]
    entries: dict[int | str, Mapping[str, Any]]
    broken: set  # ids of those already reported
    label_key: str | None = None

    def read_labels(self, found: Findings) -> None:
        """Put into each image what the file says about its being labelled."""
        for key in _LABEL_KEYS:
            stated = {
                i: entry[key] for i, entry in self.entries.items() if entry.get(key) is not None
            }
            if not stated:
                continue
            truth = {}
            for image_id, value in stated.items():
                plain = value.strip().lower() if isinstance(value, str) else value
                known = isinstance(plain, str | int | float) and plain in _TRUTH
                if not known:
                    found.problems.append(
                        f"image {image_id!r}: `{key}` is {value!r}; expected true or false"
                    )
                truth[image_id] = known and _TRUTH[plain]
            if not any(truth.values()):
                found.notes.append(f"`{key}` is true on no frame, and is ignored")
                continue
            self.label_key = key
            for image_id, value in truth.items():
                self.known[image_id] = replace(self.known[image_id], is_labelled=value)
            return

    def by_video(self) -> dict[int | str, list[int | str]]:
        """Ids of the images of each video, in order."""
        videos: dict[int | str, list[int | str]] = {}
        for image_id, image in self.known.items():
            videos.setdefault(image.video_id, []).append(image_id)
        for members in videos.values():
            members.sort(key=lambda image_id: self.known[image_id].place)
        return videos


def _read_images(entries: Sequence[Mapping[str, Any]], roots: Roots, found: Findings) -> _Images:
    with ThreadPoolExecutor(8) as pool:  # finding files and reading headers waits for the disk
        places = pool.map(lambda entry: locate(entry, roots), entries)
        located = list(watched(places, "pictures", len(entries)))
    images = _Images({}, {}, {}, set())
    shortened: dict[Path, str] = {}  # file -> the path in the JSON that led to it
    told: dict[str, list[str]] = {}  # warning -> the images it is about
    for place, (entry, (path, header, remarks, is_shortened)) in enumerate(
        zip(entries, located, strict=True)
    ):
        image_id, video_id = as_id(entry.get("id")), as_id(entry.get("video_id"))
        where = f"image {entry.get('id')!r}"
        wrong: list[str] = []
        if image_id is None:
            where = f"the image at position {place}"
            wrong.append(f"{where}: `id` is {entry.get('id')!r}; {ID_WANTED}")
        elif image_id in images.known or image_id in images.broken:
            wrong.append(f"{where}: the id is used twice")
        if video_id is None:
            wrong.append(f"{where}: `video_id` is {entry.get('video_id')!r}; {ID_WANTED}")
        if isinstance(header, str):
            wrong.append(f"{where}: {header}")
        elif is_shortened and shortened.setdefault(path, name := image_names(entry)[0]) != name:
            wrong.append(
                f"{where}: {name} and {shortened[path]} both lead to {path}; set "
                "dataset.image_root to the folder that holds all videos"
            )
        if wrong:
            found.problems.extend(wrong)
            images.broken.add(image_id)
            continue
        for remark in remarks:
            told.setdefault(remark, []).append(where)
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
        images.known[image_id] = Image(video_id, 0, size, given, None)
        images.paths[image_id], images.entries[image_id] = path, entry
    _order_images(images, told, found)
    found.warnings += [f"{listed(wheres)}: {what}" for what, wheres in told.items()]
    return images


def _order_images(images: _Images, told: dict[str, list[str]], found: Findings) -> None:
    """Give each image its place in its video; those without one are broken."""
    keys_used: dict[str, list[str]] = {}
    for video_id, members in images.by_video().items():
        entries = [images.entries[image_id] for image_id in members]
        key = next((k for k in _ORDER_KEYS if any(e.get(k) is not None for e in entries)), None)
        if key is None:
            names = {i: PurePath(images.paths[i].as_posix()) for i in members}
            if all(re.fullmatch(r"\d+(\.\d+)?", name.stem) for name in names.values()):
                orders = {i: float(name.stem) for i, name in names.items()}  # seconds, or numbers
            else:
                orders = {i: natural_key(name.as_posix()) for i, name in names.items()}
            keys_used.setdefault("the file names", []).append(f"video {video_id!r}")
        else:
            orders = {}
            for image_id, entry in zip(members, entries, strict=True):
                if (order := whole_number(entry.get(key))) is None:
                    found.problems.append(
                        f"image {image_id!r}: `{key}` is {entry.get(key)!r}; expected a whole "
                        "number"
                    )
                    images.broken.add(image_id)
                    del images.known[image_id]
                    continue
                if isinstance(entry[key], str):
                    told.setdefault(f"`{key}` is text; read as a number", []).append(
                        f"image {image_id!r}"
                    )
                orders[image_id] = order
            keys_used.setdefault(f"`{key}`", []).append(f"video {video_id!r}")
        ordered = sorted(orders, key=orders.__getitem__)
        for one, two in pairwise(ordered):
            if orders[one] == orders[two]:
                same = f"{key} {orders[one]}" if key else f"the name {images.paths[one].name}"
                found.problems.append(
                    f"video {video_id!r}: images {one!r} and {two!r} both have {same}"
                )
        for place, image_id in enumerate(ordered):
            images.known[image_id] = replace(images.known[image_id], place=place)
    for key, videos in keys_used.items():
        if key != "`order_in_video`":
            where = f"{listed(videos)}: " if len(keys_used) > 1 else ""
            found.notes.append(f"{where}order of frames from {key}")


def _make_videos(
    images: _Images,
    annotations: Mapping[int | str, dict[int | str, Annotation]],
    regions: Mapping[int | str, Parts],
    found: Findings,
) -> list[Video]:
    videos = []
    for video_id, members in images.by_video().items():
        sizes = {images.known[image_id].size for image_id in members}
        if len(sizes) > 1:
            shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
            found.problems.append(f"video {video_id!r}: frames of different sizes ({shown})")
        frames = [
            Frame(
                images.paths[image_id],
                annotations[image_id],
                is_labelled=images.known[image_id].is_labelled is not False,
                ignored=regions.get(image_id),
            )
            for image_id in members
        ]
        object_ids = list(dict.fromkeys(o for frame in frames for o in frame.annotations))
        videos.append(Video(video_id, images.known[members[0]].size, frames, object_ids))
    return videos


# Frames that nobody looked at


def find_unlabelled(
    videos: list[Video], label_key: str | None, how: Unlabelled, found: Findings
) -> list[Video]:
    """The videos with those frames marked that nobody looked at, as far as the file tells."""
    if label_key is not None:
        for video in videos:
            _tell(video, f"`{label_key}`", found)
        return videos
    gaps = [[not (f.annotations or f.ignored) for f in video.frames] for video in videos]
    if how == "ignore":
        marked = [
            _marked(v, [not gap for gap in of_video])
            for v, of_video in zip(videos, gaps, strict=True)
        ]
        why = "frames without an annotation are unlabelled: dataset.unlabelled_frames"
        for video in marked:
            _tell(video, why, found)
        return marked
    distances = [_label_distance(gap) for gap in gaps] if how == "auto" else [None] * len(videos)
    known = Counter(distance for distance in distances if distance)
    usual = known.most_common(1)[0][0] if known else None
    marked, irregular = [], []
    for video, gap, distance in zip(videos, gaps, distances, strict=True):
        shown = [t for t, missing in enumerate(gap) if not missing]
        distance = distance or (usual if shown and _is_every_nth(shown, usual) else None)
        if distance is not None and any(gap):
            labelled = [t % distance == shown[0] % distance for t in range(len(gap))]
            video = _marked(video, labelled)
            _tell(
                video,
                f"every {distance}th is annotated, all others are not; "
                "dataset.unlabelled_frames: absent if objects are absent there",
                found,
            )
        left = sum(not frame.annotations for frame in video.frames if frame.is_labelled)
        if left and shown:
            irregular.append((f"video {video.video_id!r}", left))
        marked.append(video)
    if irregular and how == "auto":
        total = sum(number for _, number in irregular)
        found.notes.append(
            f"{listed([name for name, _ in irregular])}: {total} frames without any annotation "
            "count as frames without the objects; dataset.unlabelled_frames: ignore if nobody "
            "looked at them"
        )
    return marked


def _label_distance(gaps: Sequence[bool]) -> int | None:
    """n, where every n-th frame and no other is annotated; None where it is not so.

    Of the places for annotated frames at least half are taken, and there are two at least that go
    to the end of the video: objects that leave and return by chance seldom do so at a regular
    distance.
    """
    shown = [t for t, missing in enumerate(gaps) if not missing]
    if len(shown) < 2:
        return None
    distance = math.gcd(*(t - shown[0] for t in shown[1:]))
    places = range(shown[0] % distance, len(gaps), distance)
    regular = distance > 1 and len(gaps) >= 2 * distance and 2 * len(shown) >= len(places)
    return distance if regular else None


def _is_every_nth(shown: Sequence[int], distance: int | None) -> bool:
    """Whether all annotated frames of a video are some of every n-th."""
    return distance is not None and len({t % distance for t in shown}) == 1


def _marked(video: Video, labelled: Sequence[bool]) -> Video:
    frames = [
        replace(frame, is_labelled=is_labelled)
        for frame, is_labelled in zip(video.frames, labelled, strict=True)
    ]
    return replace(video, frames=frames)


def _tell(video: Video, why: str, found: Findings) -> None:
    if len(video.labelled) < len(video.frames):
        found.notes.append(
            f"video {video.video_id!r}: {len(video.frames)} frames listed, "
            f"{len(video.labelled)} labelled ({why})"
        )
