"""SA-V's JSON of masklets with films or folders of frames."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam2train.data_pictures import read_film_header
from sam2train.data_rle import decode_segmentation, segmentation_area
from sam2train.data_source import (
    Annotation,
    Frame,
    Video,
    VideoSource,
    listed,
    tracking_warnings,
)
from sam2train.data_videos import index_frames, list_pictures
from sam2train.data_vos import VosVideos, find_masks, read_list
from sam2train.errors import UserError
from sam2train.files import natural_key, read_json

# Films have 24 frames a second, masklets 6.
LABELLED_EVERY = 4
FRAME_FOLDERS = ("JPEGImages_24fps", "JPEGImages", ".")


class Masklet(NamedTuple):
    """Where the mask of an object on a labelled frame is: `masklet[row][column]` of a file."""

    path: Path
    row: int
    column: int


def read_sav(path: Path) -> VideoSource:
    """SA-V's training set, or its validation and test sets, which are folders of PNGs."""
    return SavVideos(path) if find_masks(path) is None else VosVideos(path)


class SavVideos(VideoSource):
    """The videos with SA-V's `<video>_manual.json`, or else `<video>_auto.json`.

    The frames of a video are the pictures in `JPEGImages_24fps/<video>`, `JPEGImages/<video>` or
    `<video>`, below the given folder or beside the JSON, or else the film `<video>.mp4` beside it.
    Pictures named by numbers are those frames of the film, so a folder may hold every fourth frame
    alone. Every fourth frame is labelled: clips are made of those, and only those are scored.

    Masks stay in their files; the content of the file that was read last is kept in memory.

    Args:
        path: the folder that contains all this, or a list of some of the videos in it (.txt).

    Raises:
        UserError: no such file, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path):
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
        with ThreadPoolExecutor(8) as pool:
            for name in names:
                if name not in annotations:
                    problems.append(
                        f"{name}: no {name}_manual.json below {root}, but {path} lists it"
                    )
                    continue
                try:
                    if video := _index_masklets(name, annotations[name], root, pool, problems):
                        videos.append(video)
                except UserError as problem:
                    problems.append(str(problem))
                if annotations[name].stem.endswith("_auto"):
                    automatic.append(name)
        warnings = tracking_warnings(videos)
        if automatic:
            warnings.append(f"{listed(automatic)}: automatic masklets, there are no manual ones")
        super().__init__(path, videos, warnings, problems)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The mask of one object: each has an RLE of its own."""
        place = video.frames[frame_idx].annotations[object_id].segmentation
        if self._masklets[0] != place.path:
            self._masklets = (place.path, _read_masklets(place.path)["masklet"])
        rle = self._masklets[1][place.row][place.column]
        try:
            return {object_id: decode_segmentation(rle, video.size)}
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


def _index_masklets(
    name: str, annotations: Path, root: Path, pool: ThreadPoolExecutor, problems: list[str]
) -> Video | None:
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
    every = 1 if len(rows) == len(paths) == numbers[-1] + 1 else LABELLED_EVERY
    if (len(rows) - 1) * every > numbers[-1]:
        raise UserError(
            f"{annotations}: {len(rows)} labelled frames do not fit {numbers[-1] + 1} frames; "
            f"expected every {LABELLED_EVERY}th to be labelled, or each"
        )
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
    return Video(name, size, frames, [o for o in object_ids if o in shown])
