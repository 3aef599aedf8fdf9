"""Folders of frames, and made-up objects over them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from sam2train.data_pictures import Header, read_header, read_image
from sam2train.data_source import ClipPixels, Frame, Video, VideoSource, listed
from sam2train.data_synthetic import Scene, SyntheticConfig, sample_num_objects, sample_scene
from sam2train.errors import UserError
from sam2train.files import natural_key
from sam2train.transforms import resize_image

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
# Keeps the random numbers of whole synthetic videos apart from those of everything else.
_WHOLE_VIDEO_STREAM = (2,)


def subfolders(folder: Path) -> list[Path]:
    """Its folders that are not hidden, in natural order."""
    return sorted(
        (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: (natural_key(entry.name), entry.name),
    )


def list_pictures(folder: Path) -> list[Path]:
    """Its pictures, known by their suffixes, in natural order; without hidden files."""
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


def index_frames(
    folder: Path, pictures: list[Path], pool: ThreadPoolExecutor, problems: list[str]
) -> Video | None:
    """The video of the pictures in a folder, without annotations; None where something is wrong,
    which is added to the problems.

    Args:
        pool: reads the headers; that waits for the disk.
    """
    headers = list(pool.map(_try_header, pictures))
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


def _try_header(path: Path) -> Header | str:
    """The header of a picture, or what is wrong with the file."""
    try:
        return read_header(path)
    except UserError as problem:
        return str(problem)


class VideoFolders(VideoSource):
    """The videos in a folder, without annotations.

    Each sub-folder with pictures is a video, named like the folder. A folder that holds pictures
    itself is one video. Frames go by their names in natural order; hidden files, files without the
    suffix of a picture, and folders inside a video are left out. Sizes are those after the EXIF
    orientation.

    Raises:
        UserError: no videos, or all problems of the pictures at once.
    """

    def __init__(self, path: Path):
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
                    f"{path}: pictures lie in the folder itself ({listed([p.name for p in own])}) "
                    f"and in sub-folders ({listed([f.name for f in with_pictures])}), so what is a "
                    "video is not clear; move one or the other elsewhere"
                )
            pictures, with_pictures, folders = {path: own}, [path], [path]
        if not with_pictures:
            raise UserError(f"{path}: no pictures in it or its sub-folders; {wanted}{_hint(path)}")

        problems: list[str] = []
        warnings: list[str] = []
        with ThreadPoolExecutor(8) as pool:
            found = [index_frames(f, pictures[f], pool, problems) for f in with_pictures]
        videos = [video for video in found if video is not None]
        if without := [folder.name for folder in folders if not pictures[folder]]:
            warnings.append(f"{listed(without)}: no pictures, so no video")
        if short := [str(video.video_id) for video in videos if len(video.frames) == 1]:
            warnings.append(f"{listed(short)}: a single frame: nothing to track")
        super().__init__(path, videos, warnings, problems)

    def read_picture(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8, the EXIF orientation applied: no annotation says otherwise."""
        path = video.frames[frame_idx].path
        pixels = read_image(path)
        if pixels.shape[:2] != video.size:
            raise UserError(
                f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected "
                f"{video.size[1]}x{video.size[0]} (width x height); did it change?"
            )
        return pixels


_HOW_TO_EXTRACT = "take out their frames first: ffmpeg -i VIDEO -q:v 2 FOLDER/frame_%05d.jpg"


def _hint(path: Path) -> str:
    """What a folder without videos holds instead."""
    films = sorted(p.name for p in path.rglob("*") if p.suffix.lower() in _FILM_SUFFIXES)
    if films:
        return f"; there are films ({listed(films)}): {_HOW_TO_EXTRACT}"
    deeper = sorted(p for p in path.glob("*/*") if p.is_dir() and list_pictures(p))
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
        images = [resize_image(self.read_picture(video, t), size) for t in indices]
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
