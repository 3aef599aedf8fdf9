"""Folders of frames, and made-up objects over them."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sam2train.data_pictures import (
    STACK_SUFFIXES,
    Header,
    count_pages,
    read_film_header,
    read_header,
)
from sam2train.data_source import ClipPixels, Frame, Video, VideoSource, listed, shared_pictures
from sam2train.data_synthetic import Scene, SyntheticConfig, sample_num_objects, sample_scene
from sam2train.errors import UserError
from sam2train.files import natural_key, read_json
from sam2train.transforms import resize_frame

# Suffixes of pictures that Pillow reads and that are usual for frames.
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
FILM_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
# Keeps the random numbers of whole synthetic videos apart from those of everything else.
_WHOLE_VIDEO_STREAM = (2,)


def subfolders(folder: Path) -> list[Path]:
    """Its folders that are not hidden, in natural order."""
    return sorted(
        (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: (natural_key(entry.name), entry.name),
    )


def list_pictures(folder: Path) -> list[Path]:
    """Its pictures, known by their suffixes, in the order of `frame_key`; without hidden files."""
    pictures = _files(folder, PICTURE_SUFFIXES)
    key = frame_key([picture.stem for picture in pictures])
    return sorted(pictures, key=lambda picture: (key(picture.stem), picture.name))


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return [
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in suffixes
        and not entry.name.startswith(".")
        and not entry.is_dir()
    ]


_WITH_FRACTION = re.compile(r"([^0-9]*)([0-9]+)(?:\.([0-9]+))?")


def frame_key(names: Sequence[str]) -> Callable[[str], tuple]:
    """The order of frames from their names: natural order, but numbers with a fraction, such as
    time stamps in seconds, in the order of these numbers.

    760577.375 comes before 760577.5. But 1.9 comes before 1.10 where the parts behind the dot count
    up one by one: they are numbers of their own.
    """
    parts = [_WITH_FRACTION.fullmatch(name) for name in names]
    if not all(parts) or len({part[1] for part in parts}) > 1:
        return _natural
    fractions = [(int(part[2]), part[3]) for part in parts if part[3] is not None]
    if len({len(digits) for _, digits in fractions}) < 2:
        return _natural  # either order is the same
    behind: dict[int, list[int]] = {}
    for whole, digits in fractions:
        behind.setdefault(whole, []).append(int(digits))
    steps = [b - a for numbers in behind.values() for a, b in pairwise(sorted(numbers))]
    padded = any(digits[0] == "0" and len(digits) > 1 for _, digits in fractions)
    if steps and set(steps) == {1} and not padded:
        return _natural
    return _as_number


def _natural(name: str) -> tuple:
    return natural_key(name)


def _as_number(name: str) -> tuple:
    part = _WITH_FRACTION.fullmatch(name)
    return (Decimal(f"{part[2]}.{part[3] or 0}"),)


def frame_names(frame: Frame) -> list[str]:
    """The names that the mask of a frame may have: its picture's, or its number in a stack."""
    return [frame.path.stem] if frame.page is None else [f"{frame.page:05d}", str(frame.page)]


def ask_for_frames(videos: Sequence[Video], meta: Path, warnings: list[str]) -> list[Video]:
    """The videos with `Video.asked` as YouTube-VOS' `meta.json` has it; unchanged without the file.

    It is {"videos": {<video>: {"objects": {<object>: {"frames": ["00000", "00005", ...]}}}}} and
    asks for each frame that an object names, as Cutie's `VOSTestDataset` reads it. LVOS' file of
    that name has `frame_range` in place of `frames`; it asks for all frames.

    Args:
        warnings: get a line on a file that is another, and on frames without a picture.
    """
    try:
        content = read_json(meta, "expected YouTube-VOS' JSON with `videos`", optional=True)
    except UserError as problem:
        warnings.append(f"{problem}; all frames are asked for")
        return list(videos)
    marked, missing = [], []
    for video in videos:
        names = _asked_names(content, str(video.video_id))
        places = {n: t for t, frame in enumerate(video.frames) for n in frame_names(frame)}
        missing += [f"{video.video_id}/{name}" for name in sorted(names - places.keys())]
        asked = frozenset(places[name] for name in names & places.keys())
        marked.append(replace(video, asked=asked) if names else video)
    if missing:
        warnings.append(f"{meta}: asks for frames without a picture: {listed(missing)}")
    return marked


def _asked_names(content: Any, video: str) -> set[str]:
    """The frames that the objects of a video name; empty where the file is another."""
    for key in ("videos", video, "objects"):
        content = content.get(key) if isinstance(content, dict) else None
    entries = content.values() if isinstance(content, dict) else ()
    named = [entry.get("frames") for entry in entries if isinstance(entry, dict)]
    lists = [names for names in named if isinstance(names, list)]
    return {name for names in lists for name in names if isinstance(name, str)}


def index_frames(
    folder: Path,
    pictures: list[Path],
    pool: ThreadPoolExecutor,
    problems: list[str],
    name: str | None = None,
) -> Video | None:
    """The video of the pictures in a folder, without annotations; None where something is wrong,
    which is added to the problems.

    A single picture with many pages (a TIFF stack) is a video of its pages.

    Args:
        pool: reads the headers; that waits for the disk.
        name: of the video; None takes that of the folder.
    """
    name = folder.name or folder.resolve().name if name is None else name
    headers = list(pool.map(_try_header, pictures))
    found = [header for header in headers if isinstance(header, str)]
    key = frame_key([picture.stem for picture in pictures])
    for first, second in pairwise(pictures):
        if key(first.stem) == key(second.stem):
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
    if not found:
        pages = list(pool.map(count_pages, pictures))
        stacks = [
            picture.name for picture, number in zip(pictures, pages, strict=True) if number > 1
        ]
        if stacks and len(pictures) > 1:
            found.append(
                f"{folder}: files of many pages ({listed(stacks)}) beside other pictures; expected "
                "one such file, or pictures of one frame each: move each stack to a folder of its "
                "own"
            )
    problems += found
    if found:
        return None
    frames = [Frame(picture, {}) for picture in pictures]
    if stacks:
        frames = [Frame(pictures[0], {}, page=page) for page in range(pages[0])]
    return Video(name, next(iter(sizes)), frames, [])


def _try_header(path: Path) -> Header | str:
    """The header of a picture, or what is wrong with the file."""
    try:
        return read_header(path)
    except UserError as problem:
        return str(problem)


class VideoFolders(VideoSource):
    """The videos in a folder, without annotations.

    Each sub-folder with pictures is a video, named like the folder, and so is each film, named like
    its file, and each TIFF of many pages. A folder that holds pictures itself is one video; a path
    may also be one film or stack. Frames go by their names, see `frame_key`; hidden files, files
    with another suffix, and folders inside a video are left out. Sizes are those after the EXIF
    orientation.

    Raises:
        UserError: no videos, or all problems of the pictures at once.
    """

    def __init__(self, path: Path):
        wanted = "expected a folder with one sub-folder of pictures for each video, or with films"
        suffix = path.suffix.lower()
        single = path.is_file() and suffix in FILM_SUFFIXES | STACK_SUFFIXES
        if not path.is_dir() and not single:
            what = "no such folder"
            if path.is_file():
                what = "is a file"
                if suffix == ".json":
                    wanted += '; COCO annotations need dataset.dataset_type: "coco"'
            raise UserError(f"{path}: {what}; {wanted}")
        folders = [] if single else subfolders(path)
        pictures = {folder: list_pictures(folder) for folder in folders}
        with_pictures = [folder for folder in folders if pictures[folder]]
        films = [path] if single else [f for where in (path, *folders) for f in _films(where)]
        if own := [] if single else list_pictures(path):
            if with_pictures:
                raise UserError(
                    f"{path}: pictures lie in the folder itself ({listed([p.name for p in own])}) "
                    f"and in sub-folders ({listed([f.name for f in with_pictures])}), so what is a "
                    "video is not clear; move one or the other elsewhere"
                )
            pictures, with_pictures = {path: own}, [path]
        if not with_pictures and not films:
            raise UserError(f"{path}: no pictures in it or its sub-folders; {wanted}{_hint(path)}")

        problems: list[str] = []
        warnings: list[str] = []
        notes: list[str] = []
        found: list[Video | None] = []
        with ThreadPoolExecutor(8) as pool:
            for folder in with_pictures:
                stacks = [p for p in pictures[folder] if p.suffix.lower() in STACK_SUFFIXES]
                if len(stacks) == len(pictures[folder]) > 1 and all(_is_stack(p) for p in stacks):
                    for stack in stacks:
                        name = stack.stem if folder == path else f"{folder.name}/{stack.stem}"
                        found.append(index_frames(folder, [stack], pool, problems, name))
                else:
                    found.append(index_frames(folder, pictures[folder], pool, problems))
            found += pool.map(lambda film: _index_film(film, path, problems), films)
        videos = [video for video in found if video is not None]
        many = {v.frames[0].path.name for v in videos if v.frames[0].page is not None}
        if many:
            notes.append(f"{listed(sorted(many))}: films or files of many pages, a video each")
        for video_id, number in Counter(video.video_id for video in videos).items():
            if number > 1:
                problems.append(f"{path}: {number} videos have the name {video_id}; rename them")
        of_films = {film.parent for film in films}
        empty = [f.name for f in folders if not pictures.get(f) and f not in of_films]
        if empty and path not in with_pictures:
            warnings.append(f"{listed(empty)}: no pictures, so no video")
        if short := [str(video.video_id) for video in videos if len(video.frames) == 1]:
            warnings.append(f"{listed(short)}: a single frame: nothing to track")
        problems += shared_pictures(videos)
        super().__init__(path, videos, warnings, problems, notes)

    def read_picture(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8, the EXIF orientation applied: no annotation says otherwise."""
        pixels = self.read_pixels(video, frame_idx, None)
        if pixels.shape[:2] != video.size:
            raise UserError(
                f"{video.frames[frame_idx].path}: the picture is "
                f"{pixels.shape[1]}x{pixels.shape[0]}, expected "
                f"{video.size[1]}x{video.size[0]} (width x height); did it change?"
            )
        return pixels


def _films(folder: Path) -> list[Path]:
    films = _files(folder, FILM_SUFFIXES)
    return sorted(films, key=lambda film: (natural_key(film.name), film.name))


def _is_stack(path: Path) -> bool:
    try:
        return count_pages(path) > 1
    except UserError:
        return False  # indexing the frames says what is wrong with it


def _index_film(film: Path, root: Path, problems: list[str]) -> Video | None:
    """The video of a film; None where it cannot be read."""
    if film.suffix.lower() in STACK_SUFFIXES:
        with ThreadPoolExecutor(1) as pool:
            return index_frames(film.parent, [film], pool, problems, film.stem)
    try:
        size, num_frames = read_film_header(film)
    except UserError as problem:
        problems.append(str(problem))
        return None
    name = film.stem if film.parent in (root, root.parent) else f"{film.parent.name}/{film.stem}"
    return Video(name, size, [Frame(film, {}, page=page) for page in range(num_frames)], [])


def _hint(path: Path) -> str:
    """What a folder without videos holds instead."""
    deeper = sorted(p for p in path.glob("*/*") if p.is_dir() and (list_pictures(p) or _films(p)))
    return f"; its videos seem to lie in {deeper[0].parent}" if deeper else ""


class MadeUpVideos(VideoFolders):
    """Folders of frames, with made-up objects over them: cut-outs of other frames.

    A training clip has new objects each time. A whole video has objects of its own, the same for
    every seed and whatever videos lie beside it, so that scores can be compared.

    Args:
        path: see `VideoFolders`.
        synthetic: what the objects are like; None takes the defaults.
        max_objects: of a whole video; None leaves it to `synthetic`.
    """

    makes_objects = True

    def __init__(
        self,
        path: Path,
        synthetic: SyntheticConfig | None = None,
        max_objects: int | None = None,
    ):
        self.synthetic, self.max_objects = synthetic or SyntheticConfig(), max_objects
        # The objects of the whole video that was read last, and its place in `videos`.
        self._staged: tuple[int, Scene] | None = None
        super().__init__(path)
        self.videos = [self._with_objects(video) for video in self.videos]
        self._places = {video.video_id: place for place, video in enumerate(self.videos)}

    def _with_objects(self, video: Video) -> Video:
        rng = _whole_video_rng(video)
        num_objects = sample_num_objects(self.synthetic, self.max_objects, rng)
        return replace(video, object_ids=list(range(1, num_objects + 1)))

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 at the video's own size, with the objects of the whole video on it."""
        picture = self.read_picture(video, frame_idx)
        return self._stage(video).compose(picture, frame_idx)[0]

    def has_mask(self, video: Video, frame_idx: int, object_id: int | str) -> bool:
        return True

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """Masks of all objects of the whole video."""
        return dict(enumerate(self._stage(video).masks(frame_idx), start=1))

    def sample_clip(
        self,
        video: Video,
        indices: Sequence[int],
        size: tuple[int, int],
        max_objects: int | None,
        rng: np.random.Generator,
    ) -> ClipPixels:
        """Frames at `size` with new objects, and their masks."""
        place, first = self._places[video.video_id], indices[0]
        images = [resize_frame(self.read_picture(video, t), size) for t in indices]
        num_objects = sample_num_objects(self.synthetic, max_objects, rng)
        scene = self._sample_scene(place, images[0], indices[-1] - first + 1, num_objects, rng)
        composed = [
            scene.compose(image, t - first) for image, t in zip(images, indices, strict=True)
        ]
        images, masks = (np.stack(parts) for parts in zip(*composed, strict=True))
        return ClipPixels(images, masks, list(range(1, scene.num_objects + 1)))

    def _stage(self, video: Video) -> Scene:
        """The objects of a whole video; those of one video are kept."""
        place = self._places[video.video_id]
        if self._staged is None or self._staged[0] != place:
            # A copy of the video may have fewer frames: the objects follow from all of them.
            whole = self.videos[place]
            rng = _whole_video_rng(whole)
            num_objects = sample_num_objects(self.synthetic, self.max_objects, rng)
            background = self.read_picture(whole, 0)
            scene = self._sample_scene(place, background, len(whole.frames), num_objects, rng)
            self._staged = (place, scene)
        return self._staged[1]

    def _sample_scene(
        self,
        place: int,
        background: np.ndarray,
        num_frames: int,
        num_objects: int,
        rng: np.random.Generator,
    ) -> Scene:
        def sample_picture(rng: np.random.Generator) -> np.ndarray:
            """A frame of another video; of the same one where there is no other."""
            other = place
            if len(self.videos) > 1:
                other = (place + int(rng.integers(1, len(self.videos)))) % len(self.videos)
            video = self.videos[other]
            return self.read_picture(video, int(rng.integers(len(video.frames))))

        return sample_scene(
            background, num_frames, num_objects, self.synthetic, sample_picture, rng
        )


def _whole_video_rng(video: Video) -> np.random.Generator:
    """The random numbers of a whole video: they follow from its name alone."""
    name = zlib.crc32(str(video.video_id).encode())
    return np.random.default_rng(np.random.SeedSequence(name, spawn_key=_WHOLE_VIDEO_STREAM))
