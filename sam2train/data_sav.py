"""SA-V's JSON of masklets with films or folders of frames."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
            for name in names:
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
