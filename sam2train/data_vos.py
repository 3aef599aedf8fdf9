"""Folders of pictures and of PNG masks, as DAVIS, YouTube-VOS, MOSE and SA-V have them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2train.data_pictures import read_id_mask
from sam2train.data_source import (
    Annotation,
    Frame,
    Video,
    VideoSource,
    listed,
    tracking_warnings,
)
from sam2train.data_videos import index_frames, list_pictures, subfolders
from sam2train.errors import UserError
from sam2train.files import natural_key

# Frames and masks; the second pair is that of SA-V's validation and test sets.
LAYOUTS = (("JPEGImages", "Annotations"), ("JPEGImages_24fps", "Annotations_6fps"))
VOID = 255
USUAL_RESOLUTION = "480p"  # of DAVIS, whose results are reported on it


class IdMask(NamedTuple):
    """Where the mask of an object is: the pixels of one value, or all that are not 0."""

    path: Path
    value: int | None


class VosVideos(VideoSource):
    """The videos below `JPEGImages` with the masks below `Annotations`.

    A mask has the name of its frame; frames without one are unlabelled: never in a clip, never
    scored. A PNG holds the ids of all objects; where a video's masks lie in folders of their own,
    each folder is an object, and objects may overlap. Void pixels (255 beside other ids) belong to
    no object.

    Args:
        path: the folder that contains both, or a list of some of the videos below it (a text file
            such as ImageSets/2017/train.txt). A folder of a resolution may lie between.

    Raises:
        UserError: no such folders, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path):
        found = find_masks(path)
        if not path.exists() or found is None:
            what = "no such file or folder" if not path.exists() else "no frames with masks"
            raise UserError(
                f"{path}: {what}; expected a folder with JPEGImages/<video>/*.jpg and "
                "Annotations/<video>/*.png, or a list of its videos such as "
                "ImageSets/2017/train.txt"
            )
        problems: list[str] = []
        warnings: list[str] = []
        frames_root = _video_root(found[0], warnings)
        masks_root = found[1] / frames_root.relative_to(found[0])
        if not masks_root.is_dir():
            raise UserError(f"{masks_root}: no such folder; expected the masks of {frames_root}")
        folders = [frames_root / name for name in read_list(path)] if path.is_file() else None
        folders = subfolders(frames_root) if folders is None else folders

        videos, unlabelled = [], []
        with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside Python's lock
            for folder in folders:
                masks = masks_root / folder.name
                if not folder.is_dir():
                    problems.append(f"{folder}: no such folder, but {path} lists it")
                elif not masks.is_dir():
                    unlabelled.append(folder.name)
                elif video := _index_folder(folder, masks, pool, problems, warnings):
                    videos.append(video)
        if unlabelled:
            warnings.append(f"{listed(unlabelled)}: no masks in {masks_root}, left out")
        if not videos and not problems:
            raise UserError(f"{path}: no video with masks in {frames_root}")
        warnings += tracking_warnings(videos)
        super().__init__(path, videos, warnings, problems)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The masks of all objects in the PNG that has the wanted one."""
        places = {o: a.segmentation for o, a in video.frames[frame_idx].annotations.items()}
        path = places[object_id].path
        ids = read_id_mask(path)
        if ids.shape != video.size:
            raise UserError(f"{path}: {_sizes(ids.shape, video.size)}; did it change?")
        return {
            o: ids != 0 if place.value is None else ids == place.value
            for o, place in places.items()
            if place.path == path
        }


def find_masks(path: Path) -> tuple[Path, Path] | None:
    """The folders of frames and of masks at or above a path; None where there are none."""
    for root in [path, *path.parents]:
        for frames, masks in LAYOUTS:
            if (root / frames).is_dir() and (root / masks).is_dir():
                return root / frames, root / masks
        if path.is_dir():
            break  # a list of videos may lie deeper; a data folder may not
    return None


def read_list(path: Path) -> list[str]:
    """Names of videos from a text file with one a line, or from a list of DAVIS-2016, which names
    every frame."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text; expected a list of videos, one a line") from None
    words = (line.split()[0] for line in lines if line.strip())
    names = (Path(word).parent.name if Path(word).suffix else word for word in words)
    return list(dict.fromkeys(names))


def _video_root(folder: Path, warnings: list[str]) -> Path:
    """The folder whose sub-folders are the videos: itself, or that of a resolution below it."""
    below = subfolders(folder)
    if any(list_pictures(entry) for entry in below):
        return folder
    resolutions = [entry for entry in below if subfolders(entry)]
    if not resolutions:
        raise UserError(f"{folder}: no pictures in its sub-folders; expected <video>/*.jpg")
    chosen = next((r for r in resolutions if r.name == USUAL_RESOLUTION), resolutions[0])
    if len(resolutions) > 1:
        names = ", ".join(entry.name for entry in resolutions)
        if chosen.name != USUAL_RESOLUTION:
            raise UserError(f"{folder}: several resolutions ({names}); keep one")
        warnings.append(f"{folder}: of {names}, {USUAL_RESOLUTION} is read")
    return chosen


def _mask_files(folder: Path, problems: list[str]) -> Iterator[tuple[Path, int | str | None]]:
    """PNGs of a video with the object they belong to; None where they hold the ids of all."""
    own, objects = list_pictures(folder), subfolders(folder)
    if own and objects:
        problems.append(
            f"{folder}: masks ({own[0].name}) beside folders of masks ({objects[0].name}); "
            "expected PNGs of all objects, or a folder for each object"
        )
    numbers = all(entry.name.isdecimal() for entry in objects)
    files = [(path, None) for path in own] + [
        (path, int(entry.name) if numbers else entry.name)
        for entry in objects
        for path in list_pictures(entry)
    ]
    for path, owner in files:
        if path.suffix.lower() == ".png":
            yield path, owner
        else:  # JPEG changes ids, and a second file would be a second mask of its frame
            problems.append(f"{path}: a mask that is no PNG; write it as one, or remove it")


def _index_folder(
    folder: Path,
    masks: Path,
    pool: ThreadPoolExecutor,
    problems: list[str],
    warnings: list[str],
) -> Video | None:
    """A video with its masks; None where the pictures have problems or there are none."""
    pictures = list_pictures(folder)
    if not pictures:
        problems.append(f"{folder}: no pictures")
        return None
    video = index_frames(folder, pictures, pool, problems)
    files = list(_mask_files(masks, problems))
    counted = list(pool.map(_try_areas, (path for path, _ in files)))
    if video is None:
        problems += [areas for areas in counted if isinstance(areas, str)]
        return None

    frame_of = {frame.path.stem: t for t, frame in enumerate(video.frames)}
    values = {v for areas in counted if isinstance(areas, tuple) for v in areas[1]}
    # 255 is the only value beside 0: DAVIS-2016 marks its one object so.
    binary = values == {VOID}
    on_frame: dict[int, dict[int | str, Annotation]] = {}
    num_void = 0
    for (path, owner), areas in zip(files, counted, strict=True):
        if isinstance(areas, str):
            problems.append(areas)
        elif path.stem not in frame_of:
            problems.append(f"{path}: no frame of this name in {folder}")
        elif areas[0] != video.size:
            problems.append(f"{path}: {_sizes(areas[0], video.size)}")
        else:
            objects = on_frame.setdefault(frame_of[path.stem], {})
            if owner is not None:
                area = sum(areas[1].values())
                objects[owner] = Annotation(str(path), IdMask(path, None), area)
                continue
            for value, area in areas[1].items():
                if value == VOID and not binary:
                    num_void += 1
                    continue
                object_id = 1 if binary else value
                objects[object_id] = Annotation(str(path), IdMask(path, value), area)
    if num_void:
        warnings.append(f"{masks}: {num_void} masks with void pixels (255), of no object")
    frames = [
        Frame(frame.path, on_frame.get(t, {}), is_labelled=t in on_frame)
        for t, frame in enumerate(video.frames)
    ]
    object_ids = sorted({o for objects in on_frame.values() for o in objects}, key=_in_order)
    return Video(video.video_id, video.size, frames, object_ids)


def _in_order(object_id: int | str) -> tuple[str | int, ...]:
    return natural_key(str(object_id))


def _try_areas(path: Path) -> tuple[tuple[int, int], dict[int, int]] | str:
    """Size and pixels of each value but 0, or what is wrong with the file."""
    try:
        ids = read_id_mask(path)
    except UserError as problem:
        return str(problem)
    counts = np.bincount(ids.ravel())  # many times as fast as np.unique
    counts[0] = 0
    return ids.shape, {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def _sizes(mask: tuple[int, int], frame: tuple[int, int]) -> str:
    return f"the mask is {mask[1]}x{mask[0]}, its frames {frame[1]}x{frame[0]} (width x height)"
