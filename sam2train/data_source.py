"""The index that every data format is read into: a format is a child of `VideoSource`. Several data
sets are one in a `Mixture`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from sam2train.data_pictures import STACK_SUFFIXES, Film, read_image, read_levels
from sam2train.errors import UserError
from sam2train.machine import time_limit
from sam2train.transforms import resize_frame, resize_mask

_SHOWN_PROBLEMS = 12
T = TypeVar("T")


@dataclass(frozen=True)
class Annotation:
    """One object on one frame."""

    annotation_id: int | str  # for messages
    segmentation: Any  # where the mask is; only the source that made the index reads it
    area: int  # pixels


@dataclass(frozen=True)
class Frame:
    """One frame of a video; on a labelled one, objects without an entry are absent."""

    path: Path  # of the picture, or of the file that holds many frames
    annotations: dict[int | str, Annotation]  # by object id
    is_labelled: bool = True  # False: nobody looked for objects here
    page: int | None = None  # position in the film or stack at `path`; None: a file of one picture
    # Where the pixels are that nobody decided on; only the source that made the index reads it.
    ignored: Any = None


@dataclass(frozen=True)
class Video:
    """The frames of one video in order, all of one size."""

    video_id: int | str
    size: tuple[int, int]  # (H, W)
    frames: list[Frame]
    object_ids: list[int | str]  # in order of appearance
    # frames that an evaluation server wants masks of; None: all
    asked: frozenset[int] | None = None

    @property
    def labelled(self) -> list[int]:
        """The frames to learn from and to score: on these, absent means absent."""
        return [t for t, frame in enumerate(self.frames) if frame.is_labelled]

    def visible(self, frame_idx: int) -> list[int | str]:
        """Objects with at least one annotated pixel on a frame."""
        annotations = self.frames[frame_idx].annotations
        return [o for o in self.object_ids if o in annotations and annotations[o].area > 0]


# See `VideoSource.scale_levels`.
IntensityRange = Literal["auto", "full"] | tuple[float, float]
_SCALED = "pictures of more than 8 bits"
_SAMPLED = 16  # frames of a video whose values are looked at


class ClipPixels(NamedTuple):
    """Frames and masks of one clip, before augmentation."""

    images: np.ndarray  # (T', H, W, 3) uint8
    masks: np.ndarray  # (T', N, H, W) bool
    object_ids: list[int | str]  # (N,)
    # (T', H, W) bool, pixels nobody decided on; None: there are none
    ignore: np.ndarray | None = None


class VideoSource:
    """The videos at one path: indexed when the source is made, pixels and masks read on demand.

    Each data format is a child of this class. It fills `videos`, `warnings` and `notes` and
    implements `read_masks`; where frames are neither pictures nor films, `read_picture` too. The
    other methods are for formats that do more than read. A source is copied into the processes that
    load data, and `read_picture` is called from several threads.

    Args:
        path: where the videos come from, for messages.
        videos: all that can be read, each with all its frames.
        warnings: what was read in another way than it is written, a line each.
        problems: what is wrong with the data, a line each.
        notes: what was concluded from the files where they leave a choice, and why: a line for each
            file or video, such as "object identity from attributes.track_id".

    Raises:
        DataError: there are problems.
    """

    # Ends the message about a source without any mask.
    mask_hint = "expected at least one object with a pixel"
    # True: masks are drawn by the source, and the index has no annotations.
    makes_objects = False

    def __init__(
        self,
        path: Path,
        videos: list[Video],
        warnings: Sequence[str] = (),
        problems: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        self.path, self.videos = path, videos
        self.warnings, self.notes = list(warnings), list(notes)
        self._film = Film()
        self._levels: dict[int | str, tuple[float, float]] = {}  # video id -> see `scale_levels`
        if not problems:
            self.scale_levels("auto")
        if problems:
            raise DataError(self, problems)

    def read_picture(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8: a frame as it lies on disk, at the video's own size.

        Raises:
            UserError: the file is missing, damaged, or of another size.
        """
        return self.read_pixels(video, frame_idx, video.size)

    def read_pixels(
        self,
        video: Video,
        frame_idx: int,
        size: tuple[int, int] | None,
        least: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """`read_picture`, of a film, a stack or a picture that must have the size, if one is given;
        else its EXIF orientation is applied."""
        frame = video.frames[frame_idx]
        if frame.page is not None and frame.path.suffix.lower() not in STACK_SUFFIXES:
            return self._film.read(frame.path, frame.page)
        levels = self._levels.get(video.video_id)
        return read_image(frame.path, size, frame.page, levels, least)

    def scale_levels(self, wanted: IntensityRange) -> None:
        """Choose what becomes black and white in videos of more than 8 bits: one scale for all
        frames of a video, so that a thing keeps its brightness.

        Args:
            wanted: "auto" takes the 0.5th and the 99.5th percentile of up to 16 frames; "full" the
                range of the file's type; or the two values.
        """
        notes: dict[str, list[str]] = {}
        self._levels.clear()
        self.notes = [note for note in self.notes if _SCALED not in note]
        for video in self.videos:
            levels = None if not video.frames or wanted == "full" else _levels_of(video, wanted)
            if levels is not None:
                self._levels[video.video_id] = levels
                note = f"{_SCALED}, {levels[0]:g} is black and {levels[1]:g} white in all frames"
                notes.setdefault(note, []).append(str(video.video_id))
        self.notes += [
            f"{listed(videos)}: {note}; dataset.intensity_range changes it"
            for note, videos in notes.items()
        ]

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """Masks by object id, (H, W) bool at the video's own size: that of one object, and those of
        other objects on the frame that are decoded with it at no further cost.

        Raises:
            UserError: the file is missing, damaged, or of another size.
        """
        raise NotImplementedError

    def read_small_masks(
        self, video: Video, frame_idx: int, object_id: int | str, size: tuple[int, int]
    ) -> dict[int | str, np.ndarray]:
        """`read_masks`, resized to `size`; formats that can do so without all pixels of a mask
        implement it."""
        masks = self.read_masks(video, frame_idx, object_id)
        return {o: resize_mask(mask, size) for o, mask in masks.items()}

    def read_ignore(self, video: Video, frame_idx: int) -> np.ndarray | None:
        """(H, W) bool at the video's own size: the pixels of a frame that the annotators left
        undecided (void, crowds), which neither the loss nor a score may count; None where there are
        none. Formats that fill `Frame.ignored` implement it.

        Raises:
            UserError: the file is missing, damaged, or of another size.
        """
        return None

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8: a frame as a model sees it, at the video's own size."""
        return self.read_picture(video, frame_idx)

    def read_small_frame(self, video: Video, frame_idx: int, size: tuple[int, int]) -> np.ndarray:
        """`read_frame`, resized to `size`. Where frames are pictures, a JPEG is decoded at 1/2, 1/4
        or 1/8 of its size if that is enough: on photographs, one value in 100 differs from that of
        the full decoding by more than 4 of 255."""
        kind, base = type(self), VideoSource
        if kind.read_picture is base.read_picture and kind.read_frame is base.read_frame:
            return resize_frame(self.read_pixels(video, frame_idx, video.size, size), size)
        return resize_frame(self.read_frame(video, frame_idx), size)

    def has_mask(self, video: Video, frame_idx: int, object_id: int | str) -> bool:
        """Whether `read_masks` would find a pixel of the object, as far as the index knows."""
        annotation = video.frames[frame_idx].annotations.get(object_id)
        return annotation is not None and annotation.area > 0

    def has_ignored(self, video: Video) -> bool:
        """Whether `read_ignore` may find a pixel on one of the frames."""
        return any(frame.ignored is not None for frame in video.frames)

    def is_trainable(self, video: Video) -> bool:
        """Whether clips of a video have objects."""
        return self.makes_objects or any(video.visible(t) for t in video.labelled)

    def weighted(self, videos: Sequence[Video]) -> list[tuple[list[Video], float]]:
        """The videos in groups, each with how often an epoch visits one of them."""
        return [(list(videos), 1.0)]

    def sample_clip(
        self,
        video: Video,
        indices: Sequence[int],
        size: tuple[int, int],
        max_objects: int | None,
        rng: np.random.Generator,
    ) -> ClipPixels | None:
        """A training clip with objects of its own; None: it has those of the index.

        Args:
            indices: (T',) frames of the clip, ascending.
            size: (H, W) of the clip.
        """
        return None


# Seconds; a slow network disk gives a frame in a few.
FRAME_TIMEOUT = 300.0


def in_time(read: Callable[..., T]) -> Callable[..., T]:
    """A method that reads something of a frame, with MachineFault where that takes too long."""

    @wraps(read)
    def read_in_time(self: Any, video: Video, frame_idx: int, *more: Any, **how: Any) -> T:
        def late() -> str:
            return (
                f"frame {frame_idx} of video {video.video_id} was not read after "
                f"{FRAME_TIMEOUT:g} s; does the disk with {video.frames[frame_idx].path} answer?"
            )

        with time_limit(FRAME_TIMEOUT, late):
            return read(self, video, frame_idx, *more, **how)

    return read_in_time


class DataError(UserError):
    """Everything that is wrong with the data at a path, in one message.

    Attributes:
        source: what could be read.
        problems: all of them, where the message shows the first few.
    """

    def __init__(self, source: VideoSource, problems: Sequence[str]):
        self.source, self.problems = source, list(problems)
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        super().__init__(
            f"{source.path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  - "
            + "\n  - ".join(shown)
            + (f"\n  and {rest} more" if rest else "")
        )


def _levels_of(video: Video, wanted: IntensityRange) -> tuple[float, float] | None:
    """Black and white of a video; None where its pictures have 8 bits, or one value only."""
    places = np.linspace(0, len(video.frames) - 1, min(len(video.frames), _SAMPLED)).astype(int)
    found = []
    for t in places:
        frame = video.frames[t]
        is_picture = frame.page is None or frame.path.suffix.lower() in STACK_SUFFIXES
        try:
            values = read_levels(frame.path, frame.page) if is_picture else None
        except UserError:
            continue  # reading the frame says what is wrong with it
        if values is None:
            return None
        if wanted != "auto":
            return wanted
        values = values[:: max(1, values.shape[0] // 256), :: max(1, values.shape[1] // 256)]
        found.append(values[np.isfinite(values)].astype(np.float64))
    values = np.concatenate(found) if found else np.zeros(0)
    if len(values) == 0 or (values.min() >= 0 and 1 < values.max() <= 255):
        return None  # 8 bits in a wider type
    low, high = np.percentile(values, [0.5, 99.5])
    if low == high:  # small things on an even ground
        low, high = values.min(), values.max()
    return (float(low), float(high)) if low < high else None


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def shared_pictures(videos: Sequence[Video]) -> list[str]:
    """Problems of videos that have picture files in common: the masks of one lie on the pictures of
    another."""
    resolve = cache(Path.resolve)  # of folders: the disk is asked once for each
    owners: dict[tuple[Path, int | None], Video] = {}
    pairs: dict[tuple[int | str, int | str], list[str]] = {}
    for video in videos:
        links = bool(video.frames) and video.frames[0].path.is_symlink()
        for frame in video.frames:
            path = frame.path
            path = path.resolve() if links else resolve(path.parent) / path.name
            place = path, frame.page
            owner = owners.setdefault(place, video)
            if owner is not video:
                pair = (owner.video_id, video.video_id)
                pairs.setdefault(pair, []).append(str(frame.path))
    return [
        f"videos {one!r} and {two!r} share {len(set(paths))} pictures ({listed(paths)}): give each "
        "video pictures of its own, in folders with names of their own"
        for (one, two), paths in pairs.items()
    ]


def files_outside(videos: Sequence[Video], roots: Sequence[Path], *, every: bool) -> list[Path]:
    """The files of frames and masks that do not lie in one of the folders once links are followed.

    Args:
        every: follow a link in the place of each file, which asks the disk once for each of them;
            else those of folders, and of the first frame of a video.
    """
    resolve = cache(Path.resolve)  # of folders: the disk is asked once for each
    inside = [root.resolve() for root in roots]
    found: dict[Path, None] = {}
    for video in videos:
        for place, frame in enumerate(video.frames):
            masks = [*(one.segmentation for one in frame.annotations.values()), frame.ignored]
            files = {frame.path, *(mask.path for mask in masks if hasattr(mask, "path"))}
            for path in files:
                follow = every or place == 0
                real = path.resolve() if follow else resolve(path.parent) / path.name
                if not any(real.is_relative_to(root) for root in inside):
                    found[path] = None
    return list(found)


NOTHING_TO_TRACK = "no object is on more than one frame: nothing to track"


def only_prompts(videos: Sequence[Video]) -> bool:
    """Whether each object has a mask on one frame and other frames are unlabelled, as in a test set
    that gives out the prompts alone."""
    prompted = unlabelled = False
    for video in videos:
        seen: set[int | str] = set()
        for frame in video.frames:
            shown = {o for o, annotation in frame.annotations.items() if annotation.area > 0}
            if seen & shown:
                return False
            seen |= shown
            unlabelled |= not frame.is_labelled
        prompted |= bool(seen)
    return prompted and unlabelled


def tracking_warnings(videos: Sequence[Video]) -> list[str]:
    """Warnings about videos from which no tracking can be learned."""
    most = [
        max(Counter(o for t in video.labelled for o in video.visible(t)).values(), default=0)
        for video in videos
    ]
    return video_warnings([video.video_id for video in videos], most)


def video_warnings(video_ids: Sequence[int | str], most: Sequence[int]) -> list[str]:
    """`tracking_warnings`, from the labelled frames that show the object which shows most often."""
    told = {"no object, so no clip for training": 0}
    told[NOTHING_TO_TRACK] = 1
    named = {
        what: [f"video {v!r}" for v, number in zip(video_ids, most, strict=True) if number == bad]
        for what, bad in told.items()
    }
    return [f"{listed(names)}: {what}" for what, names in named.items() if names]


# Several sources as one


def _of_part(method: Callable[..., T]) -> Callable[..., T]:
    """The same method of the source that a video is from, given the video as that source has it."""

    @wraps(method)
    def ask_part(self: Mixture, video: Video, *more: Any, **how: Any) -> T:
        part, own_id = self._parts[video.video_id]
        return getattr(part, method.__name__)(replace(video, video_id=own_id), *more, **how)

    return ask_part


class Mixture(VideoSource):
    """The videos of several sources, those of the first one first.

    Where two sources have a video of the same id, all ids begin with the place of their source, as
    in "2/bear". Each part keeps its own way to read.

    Args:
        parts: at least one, with videos in each.
        weights: one for each part: how often an epoch visits each of its videos; with 0.5, half of
            them, and the other half in the next epoch.

    Raises:
        DataError: parts share pictures, so that one's masks lie on the pictures of the other.
    """

    mask_hint = "expected at least one object with a pixel in one of the data sets"

    def __init__(self, parts: Sequence[VideoSource], weights: Sequence[float]):
        self._parts: dict[int | str, tuple[VideoSource, int | str]] = {}  # source and its own id
        ids = [video.video_id for part in parts for video in part.videos]
        is_unique = len({*ids}) == len(ids)
        videos = []
        for place, part in enumerate(parts, start=1):
            for video in part.videos:
                video_id = video.video_id if is_unique else f"{place}/{video.video_id}"
                self._parts[video_id] = (part, video.video_id)
                videos.append(replace(video, video_id=video_id))
        self._sources = list(zip(parts, weights, strict=True))
        path = Path(" + ".join(str(part.path) for part in parts))
        warnings = [f"{part.path}: {line}" for part in parts for line in part.warnings]
        super().__init__(path, videos, warnings, shared_pictures(videos))

    def scale_levels(self, wanted: IntensityRange) -> None:
        """See `VideoSource.scale_levels`; each part has chosen its own for "auto" already."""
        for part, _ in self._sources if wanted != "auto" else ():
            part.scale_levels(wanted)
        self.notes = [
            f"{part.path}: {len(part.videos)} videos, weight {weight:g}"
            for part, weight in self._sources
        ]
        self.notes += [f"{part.path}: {line}" for part, _ in self._sources for line in part.notes]

    read_picture = _of_part(VideoSource.read_picture)
    read_masks = _of_part(VideoSource.read_masks)
    read_small_masks = _of_part(VideoSource.read_small_masks)
    read_frame = _of_part(VideoSource.read_frame)
    read_small_frame = _of_part(VideoSource.read_small_frame)
    read_ignore = _of_part(VideoSource.read_ignore)
    has_mask = _of_part(VideoSource.has_mask)
    has_ignored = _of_part(VideoSource.has_ignored)
    is_trainable = _of_part(VideoSource.is_trainable)
    sample_clip = _of_part(VideoSource.sample_clip)

    def weighted(self, videos: Sequence[Video]) -> list[tuple[list[Video], float]]:
        """See `VideoSource.weighted`."""
        groups = [
            ([video for video in videos if self._parts[video.video_id][0] is part], weight)
            for part, weight in self._sources
        ]
        return [(group, weight) for group, weight in groups if group]
