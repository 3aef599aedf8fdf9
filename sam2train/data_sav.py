"""Folders of frames or films with masks in JSON: SA-V with a file of masklets for each video, and
MeViS with one file for all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam2train.data_mask_values import MaskValues
from sam2train.data_pictures import read_film_header
from sam2train.data_rle import decode_part, decode_segmentation, segmentation_area
from sam2train.data_source import (
    Annotation,
    Frame,
    Video,
    VideoSource,
    listed,
    shared_pictures,
    tracking_warnings,
)
from sam2train.data_videos import index_frames, list_pictures
from sam2train.data_vos import VosVideos, find_masks, read_list
from sam2train.errors import UserError
from sam2train.files import natural_key, read_json
from sam2train.machine import watched
from sam2train.transforms import resize_mask

MAX_FRAMES = 10**7  # of a film, for counts that are none
FRAME_FOLDERS = ("JPEGImages_24fps", "JPEGImages", ".")


class Masklet(NamedTuple):
    """Where the mask of an object on a labelled frame is: `masklet[row][column]` of a file."""

    path: Path
    row: int
    column: int


def read_sav(
    path: Path, annotation_stride: int | None = None, mask_values: MaskValues = "auto"
) -> VideoSource:
    """SA-V's training set, or its validation and test sets, which are folders of PNGs."""
    if find_masks(path) is None:
        return SavVideos(path, annotation_stride)
    return VosVideos(path, mask_values)


class SavVideos(VideoSource):
    """The videos with SA-V's `<video>_manual.json`, or else `<video>_auto.json`.

    The frames of a video are the pictures in `JPEGImages_24fps/<video>`, `JPEGImages/<video>` or
    `<video>`, below the given folder or beside the JSON, or else the film `<video>.mp4` beside it.
    Pictures named by numbers are those frames of the film, so a folder may hold every fourth frame
    alone. Rows of masklets belong to every n-th frame, in SA-V to every fourth: n follows from how
    many frames and how many rows there are. Clips are made of those, and only those are scored.

    Masks stay in their files; the content of the file that was read last is kept in memory.

    Args:
        path: the folder that contains all this, or a list of some of the videos in it (.txt).
        annotation_stride: n; None takes what the counts say.

    Raises:
        UserError: no such file, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path, annotation_stride: int | None = None):
        self._masklets: tuple[Path | None, list] = (None, [])
        wanted = (
            "expected a folder with <video>_manual.json, or a list (.txt) of some of its videos"
        )
        if not path.exists() or (path.is_file() and path.suffix != ".txt"):
            what = "is a file" if path.exists() else "no such folder"
            raise UserError(f"{path}: {what}; {wanted}")
        root = path if path.is_dir() else path.parent
        # An automatic file sorts before the manual one of the same video, which replaces it.
        files = sorted([*root.rglob("*_auto.json"), *root.rglob("*_manual.json")])
        annotations = {file.stem.rsplit("_", 1)[0]: file for file in files}
        names = sorted(annotations, key=natural_key) if path.is_dir() else read_list(path)
        if not names:
            raise UserError(f"{path}: no such file in it; {wanted}")

        problems: list[str] = []
        videos, automatic = [], []
        strides: dict[str, list[str]] = {}
        with ThreadPoolExecutor(8) as pool:
            for name in watched(names, "videos", len(names)):
                if name not in annotations:
                    problems.append(
                        f"{name}: no {name}_manual.json below {root}, but {path} lists it"
                    )
                    continue
                try:
                    place = name, annotations[name], root
                    found = _index_masklets(*place, annotation_stride, pool, problems)
                    if found is not None:
                        videos.append(found[0])
                        strides.setdefault(found[1], []).append(name)
                except UserError as problem:
                    problems.append(str(problem))
                if annotations[name].stem.endswith("_auto"):
                    automatic.append(name)
        warnings = tracking_warnings(videos)
        if automatic:
            warnings.append(f"{listed(automatic)}: automatic masklets, there are no manual ones")
        problems += shared_pictures(videos)
        notes = [f"{listed(of_note)}: {note}" for note, of_note in strides.items()]
        super().__init__(path, videos, warnings, problems, notes)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The mask of one object: each has an RLE of its own."""
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
        place = video.frames[frame_idx].annotations[object_id].segmentation
        if self._masklets[0] != place.path:
            self._masklets = (place.path, _read_masklets(place.path)["masklet"])
        rle = self._masklets[1][place.row][place.column]
        try:
            return how(rle, video.size)
        except ValueError as problem:
            where = f"{place.path}: masklet[{place.row}][{place.column}]"
            raise UserError(f"{where}: {problem}") from None


def _read_masklets(path: Path) -> dict[str, Any]:
    content = read_json(path, "expected SA-V's JSON with `masklet`")
    rows = content.get("masklet")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise UserError(
            f"{path}: `masklet` is missing or no list of lists; expected SA-V's JSON, for each "
            "labelled frame a list with an RLE for each object"
        )
    ids = content.get("masklet_id")
    widths = {len(row) for row in rows} | ({len(ids)} if isinstance(ids, list) else set())
    if len(widths) != 1:
        raise UserError(
            f"{path}: rows of `masklet` (and `masklet_id`) have {sorted(widths)} entries; expected "
            "one for each object in all"
        )
    return content


def _stride(
    annotations: Path,
    content: dict[str, Any],
    numbers: list[int],
    is_film: bool,
    wanted: int | None,
) -> tuple[int, str]:
    """Frames from one row of masklets to the next, and a note that says why.

    Args:
        numbers: of the frames that are there, in the film.
        wanted: what the user says.

    Raises:
        UserError: rows that do not fit, or fit in more than one way.
    """
    num_rows, last = len(content["masklet"]), numbers[-1]
    stated = content.get("video_frame_count")
    if type(stated) not in (int, float) or not 0 < stated < MAX_FRAMES:
        stated = None
    num_frames = last + 1 if stated is None else max(int(stated), last + 1)
    advice = "set dataset.annotation_stride to the frames from one labelled frame to the next"
    if is_film and stated is not None and abs(int(stated) - len(numbers)) > 1:
        told = (
            f"{annotations}: `video_frame_count` is {stated:g}, but its film shows {len(numbers)}"
        )
        if wanted is None:
            raise UserError(
                f"{told} frames: which frames the rows of `masklet` belong to is not sure; take "
                "the film that was annotated, or set dataset.annotation_stride to go by this one"
            )
        num_frames = len(numbers)
    if wanted is not None:
        if (num_rows - 1) * wanted >= num_frames:
            raise UserError(
                f"{annotations}: {num_rows} labelled frames do not fit {num_frames} frames with "
                f"dataset.annotation_stride {wanted}"
            )
        return wanted, f"every {wanted}. frame is labelled (dataset.annotation_stride)"
    if num_rows < 2:
        return max(num_frames, 1), "the first frame is labelled"
    if len(numbers) == num_rows and numbers[0] == 0:
        steps = {b - a for a, b in pairwise(numbers)}
        if len(steps) == 1:  # the labelled frames alone, or a label on each
            return steps.pop(), "every frame that is there is labelled"
    # Row r is frame r * stride: the last row lies in the film, and no further row would.
    fitting = [
        stride
        for stride in range(1, num_frames)
        if (num_rows - 1) * stride < num_frames <= num_rows * stride
    ]
    if not fitting:  # a film that was counted in another way, by less than one row
        fitting = [
            stride
            for stride in range(1, num_frames)
            if num_rows * stride < num_frames <= (num_rows + 1) * stride
        ]
        fitting = fitting if len(fitting) == 1 else []
    counts = f"{num_rows} labelled frames of {num_frames}"
    if not fitting:
        raise UserError(
            f"{annotations}: {num_rows} labelled frames do not fit {num_frames} frames; expected "
            f"every n-th to be labelled up to the end; {advice}"
        )
    if len(fitting) > 1:
        choices = ", ".join(map(str, fitting))
        raise UserError(
            f"{annotations}: {counts}: every n-th is labelled, but n may be {choices}; {advice} "
            "(4 in SA-V)"
        )
    return fitting[0], f"every {fitting[0]}. frame is labelled ({counts})"


def _index_masklets(
    name: str,
    annotations: Path,
    root: Path,
    annotation_stride: int | None,
    pool: ThreadPoolExecutor,
    problems: list[str],
) -> tuple[Video, str] | None:
    """A video and what was concluded of it; None where its pictures have problems."""
    content = _read_masklets(annotations)
    is_film = False
    folders = [base / top / name for base in (root, annotations.parent) for top in FRAME_FOLDERS]
    film = annotations.with_name(f"{name}.mp4")
    if folder := next((f for f in folders if f.is_dir() and list_pictures(f)), None):
        pictures = list_pictures(folder)
        plain = index_frames(folder, pictures, pool, problems)
        if plain is None:
            return None
        size, paths = plain.size, pictures
        numbers = [int(p.stem) for p in paths if p.stem.isdecimal()]
        if len(numbers) < len(paths) or numbers[0] != 0:
            numbers = list(range(len(paths)))
    elif film.is_file():
        is_film = True
        size, num_frames = read_film_header(film)
        paths, numbers = [film] * num_frames, list(range(num_frames))
    else:
        raise UserError(f"{annotations}: no frames; expected {film} or pictures in {folders[0]}/")

    rows = content["masklet"]
    every, note = _stride(annotations, content, numbers, is_film, annotation_stride)
    object_ids = content.get("masklet_id") or list(range(len(rows[0]) if rows else 0))
    if not all(type(o) in (int, str) for o in object_ids) or len({*object_ids}) < len(object_ids):
        raise UserError(
            f"{annotations}: `masklet_id` is {object_ids}; expected a number or text for each "
            "object, all different"
        )
    found: list[str] = []
    frames = []
    for number, path in zip(numbers, paths, strict=True):
        page = number if is_film else None
        row, between = divmod(number, every)
        # SA-V has null where nobody looked for the object.
        if between or row >= len(rows) or None in rows[row]:
            frames.append(Frame(path, {}, is_labelled=False, page=page))
            continue
        objects = {}
        for column, (object_id, rle) in enumerate(zip(object_ids, rows[row], strict=True)):
            try:
                area = segmentation_area(rle, size)
            except ValueError as problem:
                found.append(f"{annotations}: masklet[{row}][{column}]: {problem}")
                continue
            if area:
                place = Masklet(annotations, row, column)
                objects[object_id] = Annotation(f"{name} {row} {column}", place, area)
        frames.append(Frame(path, objects, page=page))
    problems += found
    shown = {o for frame in frames for o in frame.annotations}
    return Video(name, size, frames, [o for o in object_ids if o in shown]), note


# MeViS

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
