"""MeViS: folders of frames, and RLE masks of all objects in one JSON."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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
            for name, entry in entries.items():
                if video := _index_video(path / _JPEGS / name, entry, pool, problems):
                    videos[name] = replace(video, video_id=name)
        owners, left_out = _owners(masks, entries, videos, problems)
        for name, object_ids in owners.items():
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
