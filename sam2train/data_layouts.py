"""JSON annotations in layouts other than COCO's: YouTube-VIS, OVIS, BURST and MeViS; which layout a
file has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sam2train.data_coco import CocoVideos, read_coco
from sam2train.data_coco_index import read_large_coco
from sam2train.data_cvat import cvat_file, cvat_to_coco
from sam2train.data_label_studio import is_label_studio, label_studio_to_coco
from sam2train.data_rle import decode_segmentation, segmentation_area
from sam2train.data_source import (
    Annotation,
    Video,
    VideoSource,
    listed,
    shared_pictures,
    tracking_warnings,
)
from sam2train.data_videos import index_frames, list_pictures
from sam2train.errors import UserError
from sam2train.files import read_json
from sam2train.machine import watched


def is_youtube_vis(content: Mapping[str, Any]) -> bool:
    """Whether tracks are annotations, each with `segmentations`, one for each frame."""
    tracks = content.get("annotations")
    return isinstance(tracks, list) and any(
        isinstance(track, dict) and "segmentations" in track for track in tracks
    )


def youtube_vis_to_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The same videos with an image for each frame and an annotation for each mask.

    Raises:
        UserError: no videos, or tracks that do not fit them.
    """
    wanted = (
        "expected YouTube-VIS: `videos` with `file_names`, and `annotations` with `segmentations`, "
        "one or null for each frame"
    )
    videos, tracks = content.get("videos"), content.get("annotations")
    for key, entries in (("videos", videos), ("annotations", tracks)):
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: `{key}` is missing or no list of mappings; {wanted}")
    images, annotations, lengths = [], [], {}
    for video in videos:
        names, video_id = video.get("file_names"), video.get("id")
        if not isinstance(names, list) or not names or not isinstance(video_id, int | str):
            raise UserError(f"{path}: video {video_id!r} has no `file_names` or no id; {wanted}")
        lengths[video_id] = len(names)
        for t, name in enumerate(names):
            image = {"id": f"{video_id}[{t}]", "video_id": video_id, "order_in_video": t}
            image |= {"file_name": name}
            images.append(image | {key: video[key] for key in ("height", "width") if key in video})
    for track in tracks:
        masks, video_id = track.get("segmentations"), track.get("video_id")
        where = f"{path}: annotation {track.get('id')!r}"
        if not isinstance(video_id, int | str) or video_id not in lengths:
            raise UserError(f"{where}: video_id {video_id!r} is no video of the file; {wanted}")
        if not isinstance(masks, list) or len(masks) != lengths[video_id]:
            found = len(masks) if isinstance(masks, list) else "no list of"
            raise UserError(
                f"{where}: {found} `segmentations` for the {lengths[video_id]} frames of video "
                f"{video_id!r}; {wanted}"
            )
        same = {key: track[key] for key in ("category_id", "iscrowd") if key in track}
        annotations += [
            same
            | {
                "id": f"{track.get('id')}[{t}]",
                "image_id": f"{video_id}[{t}]",
                "track_id": track.get("id"),
                "segmentation": mask,
            }
            for t, mask in enumerate(masks)
            if mask is not None
        ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": content.get("categories", []),
    }


_LISTS = ("all_image_paths", "annotated_image_paths", "segmentations")


def is_burst(content: Mapping[str, Any]) -> bool:
    """Whether there are `sequences` with masks by track for some of their frames."""
    sequences = content.get("sequences")
    return isinstance(sequences, list) and any(
        isinstance(sequence, dict) and "annotated_image_paths" in sequence for sequence in sequences
    )


def burst_to_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The same videos with an image for each frame and an annotation for each mask.

    The frames of a sequence are in `<dataset>/<seq_name>`.

    Raises:
        UserError: a sequence without what it needs.
    """
    wanted = (
        "expected BURST: `sequences` with `seq_name`, `width`, `height`, `all_image_paths`, "
        "`annotated_image_paths` and as many `segmentations`"
    )
    sequences = content.get("sequences")
    if not isinstance(sequences, list) or not all(isinstance(one, dict) for one in sequences):
        raise UserError(f"{path}: `sequences` is missing or no list of mappings; {wanted}")
    images, annotations = [], []
    for sequence in sequences:
        name = sequence.get("seq_name")
        lists = [sequence.get(key) for key in _LISTS]
        sizes = [sequence.get(key) for key in ("height", "width")]
        good = all(isinstance(part, list) for part in lists) and len(lists[1]) == len(lists[2])
        good &= all(type(side) is int for side in sizes) and isinstance(name, str)
        if not good or not all(isinstance(part, str) for part in lists[0] + lists[1]):
            raise UserError(f"{path}: sequence {name!r}; {wanted}")
        everything, annotated, masks = lists
        looked_at = set(annotated)
        if unknown := looked_at - set(everything):
            raise UserError(
                f"{path}: sequence {name!r}: {sorted(unknown)[0]} is annotated, but not in "
                f"`all_image_paths`; {wanted}"
            )
        video_id = str(PurePath(str(sequence.get("dataset") or ""), name))
        for t, picture in enumerate(everything):
            images.append(
                {
                    "id": f"{video_id}/{picture}",
                    "video_id": video_id,
                    "order_in_video": t,
                    "file_name": f"{video_id}/{picture}",
                    "height": sizes[0],
                    "width": sizes[1],
                    "is_annotated": picture in looked_at,
                }
            )
        categories = sequence.get("track_category_ids")
        categories = categories if isinstance(categories, dict) else {}  # names only
        for picture, of_frame in zip(annotated, masks, strict=True):
            if not isinstance(of_frame, dict):
                raise UserError(f"{path}: sequence {name!r}: {picture} has no mapping; {wanted}")
            for track, mask in of_frame.items():
                rle = mask.get("rle") if isinstance(mask, dict) else mask
                annotations.append(
                    {
                        "id": f"{video_id}/{picture}/{track}",
                        "image_id": f"{video_id}/{picture}",
                        "track_id": int(track) if track.isdecimal() else track,
                        "category_id": categories.get(track),
                        "segmentation": rle
                        if isinstance(rle, dict) or rle is None
                        else {"size": sizes, "counts": rle},
                    }
                )
    return {
        "images": images,
        "annotations": annotations,
        "categories": content.get("categories", []),
    }


# Layouts of JSON files: how one is known, and what rewrites it as COCO.
_LAYOUTS = {
    "youtube_vis": (is_youtube_vis, youtube_vis_to_coco),
    "burst": (is_burst, burst_to_coco),
    "label_studio": (is_label_studio, label_studio_to_coco),
}
_CVAT = "cvat"


def read_layout(
    path: Path, image_root: str | Path | None, layout: str | None = None, **settings: Any
) -> CocoVideos:
    """The videos of a file in the given layout, or in the one that its name and content show.

    Args:
        layout: youtube_vis, burst, label_studio or cvat; None: one of these or COCO.
        settings: of `CocoVideos`.

    Raises:
        UserError: what is wrong with the file, all of it.
    """
    if layout == _CVAT or (layout is None and cvat_file(path) is not None):
        path = cvat_file(path) or path
        content, notes = cvat_to_coco(path, image_root)
        return CocoVideos(path, image_root, content=content, notes=notes, **settings)
    warnings: list[str] = []
    content = functools.cache(lambda: read_coco(path, warnings))

    def as_coco() -> Mapping[str, Any]:
        """Nothing where it has another layout, or something to tell."""
        known = layout or any(is_it(content()) for is_it, _ in _LAYOUTS.values())
        return {} if known or warnings else content()

    def read() -> CocoVideos:
        kind, notes = layout, []
        if kind is None:
            kind = next((name for name, (is_it, _) in _LAYOUTS.items() if is_it(content())), None)
            if kind is not None:
                notes.append(f"the file has the layout of {kind}, and is read as such")
        found = content() if kind is None else _LAYOUTS[kind][1](path, content())
        notes += found.get("notes", []) if kind is not None else []
        told = {"warnings": warnings, "notes": notes}
        return CocoVideos(path, image_root, content=found, **told, **settings)

    return read_large_coco(path, image_root, {"layout": layout, **settings}, read, as_coco)


_EXPRESSIONS, _RLES, _JPEGS = "meta_expressions.json", "mask_dict.json", "JPEGImages"


class MevisVideos(VideoSource):
    """The videos in `meta_expressions.json` with the masks in `mask_dict.json`.

    `mask_dict.json` has for each object a list with an entry for each frame of its video: an RLE,
    or null where it does not show. Which objects are in a video is said by the `anno_id` of its
    expressions; an object that no expression names goes to the only video that its list and its
    size fit. The text of the expressions is not read.

    Args:
        path: the folder that holds both files and `JPEGImages/<video>/`.

    Raises:
        UserError: a file is missing, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path):
        if not self.recognise(path):
            raise UserError(
                f"{path}: expected a folder with {_RLES}, {_EXPRESSIONS} and {_JPEGS}/<video>/, "
                "as MeViS has them"
            )
        masks = read_json(path / _RLES, "expected MeViS' masks, a list for each object")
        meta = read_json(path / _EXPRESSIONS, "expected MeViS' expressions with `videos`")
        entries = meta.get("videos")
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise UserError(f"{path / _EXPRESSIONS}: `videos` is missing or no mapping of videos")
        problems: list[str] = []
        videos: dict[str, Video] = {}
        with ThreadPoolExecutor(8) as pool:
            for name, entry in watched(entries.items(), "videos", len(entries)):
                if video := _index_video(path / _JPEGS / name, entry, pool, problems):
                    videos[name] = replace(video, video_id=name)
        owners, left_out = _owners(masks, entries, videos, problems)
        for name, object_ids in watched(owners.items(), "masks of videos", len(owners)):
            for object_id in object_ids:
                _add_object(videos[name], object_id, masks[object_id], path / _RLES, problems)
        indexed = [replace(video, object_ids=_appearing(video)) for video in videos.values()]
        warnings = tracking_warnings(indexed)
        if left_out:
            warnings.append(
                f"{path / _RLES}: objects {listed(left_out)} are named by no expression and fit "
                "no single video, left out"
            )
        notes = [f"objects are the keys of {_RLES}, {sum(map(len, owners.values()))} in all"]
        problems += shared_pictures(indexed)
        super().__init__(path, indexed, warnings, problems, notes)

    @staticmethod
    def recognise(path: Path) -> bool:
        """Whether the files of a path are those of this format."""
        return all((path / name).is_file() for name in (_RLES, _EXPRESSIONS))

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The mask of one object: each has an RLE of its own."""
        annotation = video.frames[frame_idx].annotations[object_id]
        return {object_id: decode_segmentation(annotation.segmentation, video.size)}


def _index_video(
    folder: Path, entry: dict[str, Any], pool: ThreadPoolExecutor, problems: list[str]
) -> Video | None:
    """The frames of a video in the order of `frames`, without objects."""
    names = entry.get("frames")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        problems.append(f"{_EXPRESSIONS}: video {folder.name!r} has no list of `frames`")
        return None
    there = {p.stem: p for p in list_pictures(folder)} if folder.is_dir() else {}
    if missing := [name for name in names if name not in there]:
        problems.append(f"{folder}: no pictures of the frames {listed(missing)}")
        return None
    return index_frames(folder, [there[name] for name in names], pool, problems)


def _owners(
    masks: dict[str, Any],
    entries: dict[str, dict[str, Any]],
    videos: dict[str, Video],
    problems: list[str],
) -> tuple[dict[str, list[str]], list[str]]:
    """The objects of each video, and those that are in none."""
    named: dict[str, set[str]] = {}
    for name, entry in entries.items():
        expressions = entry.get("expressions")
        for expression in expressions.values() if isinstance(expressions, dict) else ():
            if not isinstance(expression, dict):
                continue
            for object_id in expression.get("anno_id", ()):
                named.setdefault(str(object_id), set()).add(name)
    owners: dict[str, list[str]] = {name: [] for name in videos}
    left_out = []
    for object_id, of_frames in masks.items():
        fitting = named.get(object_id) or {
            name for name, video in videos.items() if _may_be_of(of_frames, video)
        }
        if object_id in named and len(fitting) > 1:
            problems.append(f"{_EXPRESSIONS}: object {object_id} is in {listed(sorted(fitting))}")
        elif len(fitting) == 1 and (name := next(iter(fitting))) in owners:
            owners[name].append(object_id)
        elif object_id not in named:
            left_out.append(object_id)
    missing = [object_id for object_id in named if object_id not in masks]
    if missing:
        problems.append(f"{_RLES}: no masks of the objects {listed(missing)}")
    return owners, left_out


def _may_be_of(of_frames: Any, video: Video) -> bool:
    """Whether a list of masks may be of a video: as many frames, of its size."""
    if not isinstance(of_frames, list) or len(of_frames) != len(video.frames):
        return False
    return all(
        rle is None or (isinstance(rle, dict) and rle.get("size") == list(video.size))
        for rle in of_frames
    )


def _add_object(
    video: Video, object_id: str, of_frames: Any, path: Path, problems: list[str]
) -> None:
    """Fill the annotations of one object."""
    where = f"{path}: object {object_id} (video {video.video_id!r})"
    if not isinstance(of_frames, list) or len(of_frames) != len(video.frames):
        number = len(of_frames) if isinstance(of_frames, list) else "no list of"
        problems.append(
            f"{where}: {number} masks; expected one for each of {len(video.frames)} frames"
        )
        return
    key = int(object_id) if object_id.isdecimal() else object_id
    for t, (frame, rle) in enumerate(zip(video.frames, of_frames, strict=True)):
        if rle is None:
            continue
        try:
            area = segmentation_area(rle, video.size)
        except ValueError as problem:
            problems.append(f"{where}, frame {t}: {problem}")
            continue
        if area:
            frame.annotations[key] = Annotation(f"{object_id} {t}", rle, area)


def _appearing(video: Video) -> list[int | str]:
    return list(dict.fromkeys(o for frame in video.frames for o in frame.annotations))
