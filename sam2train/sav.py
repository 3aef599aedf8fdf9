"""SA-V's JSON of masklets with films or folders of frames -> clips."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from sam2train.errors import UserError
from sam2train.files import natural_key, read_json
from sam2train.images import decode_segmentation, segmentation_area
from sam2train.sampling import AnnotatedVideos, clip_settings
from sam2train.videos import (
    Annotation,
    DataError,
    Frame,
    Video,
    list_pictures,
    listed,
    make_video,
    tracking_warnings,
    try_header,
)
from sam2train.vos import read_list

# Films have 24 frames a second, masklets 6.
LABELLED_EVERY = 4
FRAME_FOLDERS = ("JPEGImages_24fps", "JPEGImages", ".")


class Masklet(NamedTuple):
    """Where the mask of an object on a labelled frame is: `masklet[row][column]` of a file."""

    path: Path
    row: int
    column: int


class SAVDataset(AnnotatedVideos):
    """Clips of videos as SA-V has them: one random clip of video i is `dataset[i]`.

    Every fourth frame is labelled; clips are made of those, and only those are scored. Masks stay
    in their files, of which the last one that was read is kept.

    Args:
        data_path: see `read_sav_videos`.
        mask_cache_mb: see `AnnotatedVideos`.
        The others: see `clip_settings`.

    Raises:
        UserError: everything that is wrong with the files, in one message.
    """

    def __init__(
        self, data_path: str | Path, *clip: Any, mask_cache_mb: int = 256, **settings: Any
    ):
        settings = clip_settings(*clip, **settings)
        videos, warnings = read_sav_videos(Path(data_path))
        super().__init__(data_path, videos, warnings, settings, mask_cache_mb)
        self._film = Film()
        self._masklets: tuple[Path | None, list] = (None, [])

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 at the video's own size."""
        path = video.frames[frame_idx].path
        if path.suffix == ".mp4":
            return self._film.read(path, frame_idx)
        return super().read_frame(video, frame_idx)

    def decode(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        place = video.frames[frame_idx].annotations[object_id].segmentation
        if self._masklets[0] != place.path:
            self._masklets = (place.path, _read_sav(place.path)["masklet"])
        rle = self._masklets[1][place.row][place.column]
        try:
            return {object_id: decode_segmentation(rle, video.size)}
        except ValueError as problem:
            where = f"{place.path}: masklet[{place.row}][{place.column}]"
            raise UserError(f"{where}: {problem}") from None


class Film:
    """Frames of one film at a time, in order: a frame after the last one is near, others are not.

    Frames are counted, never sought: seeking lands beside the wanted frame in some films.
    """

    def __init__(self) -> None:
        self._open: tuple[Any, ...] = (None, None, None, 0)  # process, path, capture, next frame

    def __reduce__(self) -> tuple:
        return Film, ()

    def read(self, path: Path, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            UserError: the film cannot be read that far.
        """
        process, opened, capture, position = self._open
        # A forked process would share the place in the file with its parent.
        if (process, opened) != (os.getpid(), path) or position > frame_idx:
            # With threads of its own a decoder cannot be let go in a forked process: it would wait
            # for threads that only its parent has.
            one_thread = [cv2.CAP_PROP_N_THREADS, 1]
            capture, position = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, one_thread), 0
        while position < frame_idx and capture.grab():
            position += 1
        good, pixels = capture.read()
        if not good:
            self._open = (None, None, None, 0)
            raise UserError(f"{path}: ends or is damaged at frame {position}")
        self._open = (os.getpid(), path, capture, position + 1)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_sav_videos(path: Path) -> tuple[list[Video], list[str]]:
    """The videos with SA-V's `<video>_manual.json`, or else `<video>_auto.json`, and warnings.

    The frames of a video are the pictures in `JPEGImages_24fps/<video>`, `JPEGImages/<video>` or
    `<video>`, below the given folder or beside the JSON, or else the film `<video>.mp4` beside it.
    Pictures with numbers for names count as those frames of the film, so that every fourth alone
    will do.

    Args:
        path: the folder that contains all this, or a list of some of the videos in it (.txt).

    Raises:
        UserError: no such file, or all problems of frames and masks at once.
    """
    wanted = "expected a folder with <video>_manual.json, or a list (.txt) of some of its videos"
    if not path.exists() or (path.is_file() and path.suffix != ".txt"):
        raise UserError(f"{path}: {'is a file' if path.exists() else 'no such folder'}; {wanted}")
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
                problems.append(f"{name}: no {name}_manual.json below {root}, but {path} lists it")
                continue
            try:
                if video := _read_video(name, annotations[name], root, pool, problems):
                    videos.append(video)
            except UserError as problem:
                problems.append(str(problem))
            if annotations[name].stem.endswith("_auto"):
                automatic.append(name)
    warnings = tracking_warnings(videos)
    if automatic:
        warnings.append(f"{listed(automatic)}: automatic masklets, there are no manual ones")
    if problems:
        raise DataError(path, problems, videos, warnings)
    return videos, warnings


def _read_sav(path: Path) -> dict[str, Any]:
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


def _read_video(
    name: str, annotations: Path, root: Path, pool: ThreadPoolExecutor, problems: list[str]
) -> Video | None:
    content = _read_sav(annotations)
    folders = [base / top / name for base in (root, annotations.parent) for top in FRAME_FOLDERS]
    film = annotations.with_name(f"{name}.mp4")
    if folder := next((f for f in folders if f.is_dir() and list_pictures(f)), None):
        pictures = list_pictures(folder)
        plain = make_video(folder, pictures, list(pool.map(try_header, pictures)), problems)
        if plain is None:
            return None
        size, paths = plain.size, pictures
        numbers = [int(p.stem) for p in paths if p.stem.isdecimal()]
        if len(numbers) < len(paths) or numbers[0] != 0:
            numbers = list(range(len(paths)))
    elif film.is_file():
        size, num_frames = _film_header(film)
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
            "object, each another one"
        )
    found: list[str] = []
    frames = []
    for number, path in zip(numbers, paths, strict=True):
        row, between = divmod(number, every)
        # SA-V has null where nobody looked for the object.
        if between or row >= len(rows) or None in rows[row]:
            frames.append(Frame(path, {}, is_labelled=False))
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
        frames.append(Frame(path, objects))
    problems += found
    shown = {o for frame in frames for o in frame.annotations}
    return Video(name, size, frames, [o for o in object_ids if o in shown])


def _film_header(path: Path) -> tuple[tuple[int, int], int]:
    """(H, W) and the number of frames, without decoding them."""
    capture = cv2.VideoCapture(str(path))
    good, first = capture.read()
    num_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not good or num_frames < 1:
        raise UserError(f"{path}: is no film that OpenCV can read")
    return first.shape[:2], num_frames
