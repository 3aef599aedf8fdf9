"""Videos as they are indexed, whatever they were read from; folders of frames -> videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sam2train.errors import UserError
from sam2train.files import natural_key
from sam2train.images import Header, read_header

# What Pillow reads and people keep frames in.
PICTURE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
}
PICTURE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif"}
_FILM_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
_SHOWN_PROBLEMS = 12


@dataclass(frozen=True)
class Annotation:
    """One object on one frame."""

    annotation_id: int | str
    segmentation: Any
    area: int  # pixels


@dataclass(frozen=True)
class Frame:
    """One frame of a video; on a labelled one, objects without an entry are absent."""

    path: Path  # of the picture, or of the film that holds all frames of the video
    annotations: dict[int | str, Annotation]  # by object id
    is_labelled: bool = True  # False: nobody looked for objects here


@dataclass(frozen=True)
class Video:
    """The frames of one video in order, all of one size."""

    video_id: int | str
    size: tuple[int, int]  # (H, W)
    frames: list[Frame]
    object_ids: list[int | str]  # in order of appearance

    @property
    def labelled(self) -> list[int]:
        """The frames to learn from and to score: where absent means absent."""
        return [t for t, frame in enumerate(self.frames) if frame.is_labelled]

    def visible(self, frame_idx: int) -> list[int | str]:
        """Objects with at least one annotated pixel on a frame."""
        annotations = self.frames[frame_idx].annotations
        return [o for o in self.object_ids if o in annotations and annotations[o].area > 0]


class DataError(UserError):
    """Everything that is wrong with the data at a path, in one message.

    Attributes:
        problems: all of them, where the message shows the first few.
        videos: what could be read, with its `warnings`.
    """

    def __init__(
        self, path: Path, problems: Sequence[str], videos: list[Video], warnings: list[str]
    ):
        self.problems, self.videos, self.warnings = list(problems), videos, warnings
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        super().__init__(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  - "
            + "\n  - ".join(shown)
            + (f"\n  ... and {rest} more" if rest else "")
        )


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def tracking_warnings(videos: Sequence[Video]) -> list[str]:
    """About videos that can teach nothing."""
    without, short = [], []
    for video in videos:
        num_shown = Counter(o for t in video.labelled for o in video.visible(t))
        if not num_shown:
            without.append(f"video {video.video_id!r}")
        elif max(num_shown.values()) == 1:
            short.append(f"video {video.video_id!r}")
    told = {
        "no object, so no clip for training": without,
        "no object is on more than one frame: nothing to track": short,
    }
    return [f"{listed(names)}: {what}" for what, names in told.items() if names]


def read_video_folders(path: Path) -> tuple[list[Video], list[str]]:
    """The videos in a folder, without annotations, and warnings.

    Each sub-folder with pictures is a video, named like the folder. A folder that holds pictures
    itself is one video. Frames go by their names in natural order; hidden files, files that are no
    pictures by their suffix, and folders inside a video are passed over. Sizes are those after the
    EXIF orientation.

    Raises:
        UserError: no videos, or all problems of the pictures at once.
    """
    wanted = "expected a folder with one sub-folder of pictures for each video"
    if not path.is_dir():
        what = "no such folder"
        if path.is_file():
            what = "is a file"
            if path.suffix.lower() == ".json":
                wanted += '; COCO annotations need dataset.dataset_type: "coco"'
            elif path.suffix.lower() in _FILM_SUFFIXES:
                wanted += f"; {_HOW_TO_EXTRACT}"
        raise UserError(f"{path}: {what}; {wanted}")
    folders = subfolders(path)
    pictures = {folder: list_pictures(folder) for folder in folders}
    with_pictures = [folder for folder in folders if pictures[folder]]
    if own := list_pictures(path):
        if with_pictures:
            raise UserError(
                f"{path}: pictures lie in the folder itself ({listed([p.name for p in own])}) and "
                f"in sub-folders ({listed([f.name for f in with_pictures])}), so what is a video "
                "is not clear; move one or the other elsewhere"
            )
        pictures, with_pictures, folders = {path: own}, [path], [path]
    if not with_pictures:
        raise UserError(f"{path}: no pictures in it or its sub-folders; {wanted}{_hint(path)}")

    problems: list[str] = []
    warnings: list[str] = []
    videos = []
    with ThreadPoolExecutor(8) as pool:  # reading headers waits for the disk
        for folder in with_pictures:
            headers = list(pool.map(try_header, pictures[folder]))
            if video := make_video(folder, pictures[folder], headers, problems):
                videos.append(video)
    if without := [folder.name for folder in folders if not pictures[folder]]:
        warnings.append(f"{listed(without)}: no pictures, so no video")
    if short := [str(video.video_id) for video in videos if len(video.frames) == 1]:
        warnings.append(f"{listed(short)}: a single frame: nothing to track")
    if problems:
        raise DataError(path, problems, videos, warnings)
    return videos, warnings


_HOW_TO_EXTRACT = "take out their frames first: ffmpeg -i VIDEO -q:v 2 FOLDER/frame_%05d.jpg"


def subfolders(folder: Path) -> list[Path]:
    """Its folders that are not hidden, in natural order."""
    return sorted(
        (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: (natural_key(entry.name), entry.name),
    )


def list_pictures(folder: Path) -> list[Path]:
    """Its pictures by suffix, in natural order; those that macOS and others hide are none."""
    return sorted(
        (
            entry
            for entry in folder.iterdir()
            if entry.suffix.lower() in PICTURE_SUFFIXES
            and not entry.name.startswith(".")
            and not entry.is_dir()
        ),
        key=lambda picture: (natural_key(picture.stem), picture.name),
    )


def _hint(path: Path) -> str:
    """What a folder without videos holds instead."""
    films = sorted(p.name for p in path.rglob("*") if p.suffix.lower() in _FILM_SUFFIXES)
    if films:
        return f"; there are films ({listed(films)}): {_HOW_TO_EXTRACT}"
    deeper = sorted(p for p in path.glob("*/*") if p.is_dir() and list_pictures(p))
    return f"; its videos seem to lie in {deeper[0].parent}" if deeper else ""


def try_header(path: Path) -> Header | str:
    try:
        return read_header(path)
    except UserError as problem:
        return str(problem)


def make_video(
    folder: Path, pictures: list[Path], headers: list[Header | str], problems: list[str]
) -> Video | None:
    """The video of a folder; None where something is wrong with it."""
    found = [header for header in headers if isinstance(header, str)]
    for first, second in pairwise(pictures):
        if natural_key(first.stem) == natural_key(second.stem):
            found.append(
                f"{folder}: {first.name} and {second.name} have the same place in the order; "
                "keep one"
            )
    sizes: dict[tuple[int, int], str] = {}
    for picture, header in zip(pictures, headers, strict=True):
        if isinstance(header, Header):
            sizes.setdefault(header.shown, picture.name)
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h} ({name})" for (h, w), name in sizes.items())
        found.append(f"{folder}: frames of different sizes: {shown}; a video has one size")
    problems += found
    if found:
        return None
    frames = [Frame(picture, {}) for picture in pictures]
    return Video(folder.name or folder.resolve().name, next(iter(sizes)), frames, [])
