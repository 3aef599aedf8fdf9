"""Folders of pictures and of PNG masks: DAVIS, YouTube-VOS, MOSE and SA-V, and the PNGs of ids of
KITTI MOTS, MOTSChallenge and CVAT's export "MOTS PNG"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple

import numpy as np

from sam2train.data_mask_values import MaskValues, Reading, decide, decide_folder
from sam2train.data_masks import FactsCache, MaskFacts
from sam2train.data_pictures import read_colour_mask, read_id_mask
from sam2train.data_source import (
    Annotation,
    Video,
    VideoSource,
    listed,
    shared_pictures,
    tracking_warnings,
)
from sam2train.data_videos import (
    PICTURE_SUFFIXES,
    ask_for_frames,
    frame_names,
    index_frames,
    list_pictures,
    subfolders,
)
from sam2train.errors import UserError
from sam2train.files import check_regular, name_fault, natural_key, shorten
from sam2train.machine import num_cores, watched

# Frames and masks; the second pair is that of SA-V's validation and test sets.
_PICTURES = "|".join(re.escape(suffix) for suffix in sorted(PICTURE_SUFFIXES))
_FRAME = re.compile(rf".*?(?:{_PICTURES})(?=\s|$)", re.IGNORECASE)  # the first path of a line
LAYOUTS = (("JPEGImages", "Annotations"), ("JPEGImages_24fps", "Annotations_6fps"))
_RESOLUTION = re.compile(r"\d+p|full-?resolution", re.IGNORECASE)
USUAL_RESOLUTION = "480p"  # of DAVIS, whose results are reported on it


class IdMask(NamedTuple):
    """Where the mask of an object is: the pixels of some values, or all that are not 0."""

    path: Path
    values: tuple[int, ...] | None
    colours: bool = False  # values are R + 256 G + 65536 B

    def read(self) -> np.ndarray:
        """(H, W): what `choose` takes, for all masks in the file."""
        return read_colour_mask(self.path) if self.colours else read_id_mask(self.path)

    def choose(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) bool."""
        if self.values is None:
            return pixels != 0
        if len(self.values) == 1:
            return pixels == self.values[0]
        return np.isin(pixels, self.values)


class VosVideos(VideoSource):
    """The videos below `JPEGImages` with the masks below `Annotations`.

    A mask has the name of its frame; frames without one are unlabelled: never in a clip, never
    scored. A PNG holds the ids of all objects; where a video's masks lie in folders of their own,
    each folder is an object, and objects may overlap. What the pixel values of a video mean is
    decided from all its masks: see `data_mask_values`. Void pixels (255 beside other ids) belong to
    no object, and `read_ignore` has them. Where `meta.json` beside the masks names frames, as that
    of YouTube-VOS does, these alone are asked for: see `ask_for_frames`.

    Args:
        mask_values: how pixel values are read, where `auto` decides wrongly.
        path: the folder that contains both, or a list of some of the videos below it (a text file
            such as ImageSets/2017/train.txt). A folder of a resolution may lie between.

    Raises:
        UserError: no such folders, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path, mask_values: MaskValues = "auto"):
        found = find_masks(path)
        if not path.exists() or found is None:
            what = "no such file or folder" if not path.exists() else "no frames with masks"
            raise UserError(
                f"{path}: {what}; expected a folder with JPEGImages/<video>/*.jpg and "
                "Annotations/<video>/*.png, or a list of its videos such as "
                "ImageSets/2017/train.txt"
            )
        if not path.is_dir():
            check_regular(path)
        report = MaskReport(FactsCache(path))
        problems, warnings = report.problems, report.warnings
        frames_root, names = found[0], None
        if path.is_file():
            # A list may name videos in folders below the frames; that of a resolution is no part of
            # their names.
            names = read_list(path, frames_root)
            tops = {PurePath(name).parts[0] for name in names}
            if len(tops) == 1 and _RESOLUTION.fullmatch(top := tops.pop()):
                frames_root = frames_root / top
        if names is None or not any((found[0] / name).is_dir() for name in names):
            frames_root = _video_root(frames_root, warnings)
        names = [f.name for f in subfolders(frames_root)] if names is None else names
        if path.is_file() and frames_root != found[0]:
            names = read_list(path, frames_root)
        masks_root = found[1] / frames_root.relative_to(found[0])
        if not masks_root.is_dir():
            raise UserError(f"{masks_root}: no such folder; expected the masks of {frames_root}")

        videos, unlabelled = [], []
        # Pillow decodes outside Python's lock; 8 at least, as reading also waits for the disk.
        with ThreadPoolExecutor(max(8, num_cores())) as pool:
            for name in watched(names, "videos", len(names)):
                folder, masks = frames_root / name, masks_root / name
                if not folder.is_dir():
                    problems.append(f"{folder}: no such folder, but {path} lists it")
                elif not masks.is_dir():
                    unlabelled.append(name)
                elif video := index_folder(folder, masks, pool, report, mask_values, name):
                    videos.append(video)
        report.facts.write()
        if unlabelled:
            warnings.append(f"{listed(unlabelled)}: no masks in {masks_root}, left out")
        if not videos and not problems:
            raise UserError(f"{path}: no video with masks in {frames_root}")
        warnings += tracking_warnings(videos)
        problems += shared_pictures(videos)
        videos = ask_for_frames(videos, found[1].parent / "meta.json", warnings)
        super().__init__(path, videos, warnings, problems, report.notes())

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        """The masks of all objects in the PNG that has the wanted one."""
        places = {o: a.segmentation for o, a in video.frames[frame_idx].annotations.items()}
        wanted = places[object_id]
        pixels = _read_pixels(wanted, video.size)
        return {o: place.choose(pixels) for o, place in places.items() if place.path == wanted.path}

    def read_ignore(self, video: Video, frame_idx: int) -> np.ndarray | None:
        """(H, W) bool: void pixels; None where the mask of the frame has none."""
        place = video.frames[frame_idx].ignored
        return None if place is None else place.choose(_read_pixels(place, video.size))


def _read_pixels(place: IdMask, size: tuple[int, int]) -> np.ndarray:
    pixels = place.read()
    if pixels.shape != size:
        raise UserError(f"{place.path}: {_sizes(pixels.shape, size)}; did it change?")
    return pixels


def find_masks(path: Path) -> tuple[Path, Path] | None:
    """The folders of frames and of masks at or above a path; None where there are none."""
    for root in [path, *path.parents]:
        for frames, masks in LAYOUTS:
            homes = [root, *_split_of(root)] if (root / frames).is_dir() else []
            if home := next((home for home in homes if (home / masks).is_dir()), None):
                return root / frames, home / masks
        if path.is_dir():
            break  # a list of videos may lie deeper; a data folder may not
    return None


def _split_of(root: Path) -> list[Path]:
    """Where the masks of a folder of YouTube-VOS may lie that has all frames and no masks: `valid`
    of `valid_all_frames`, beside it or beside `all_frames`, in which it comes."""
    name, above = root.absolute().name, root.absolute().parent
    split = name.removesuffix("_all_frames")
    return [] if split in (name, "") else [above / split, above.parent / split]


def read_list(path: Path, root: Path | None = None) -> list[str]:
    """Names of videos from a text file with one a line, or from a list of DAVIS-2016, which names
    every frame. Names may have folders, dots and spaces.

    Args:
        root: the folder of the videos; a line that is none of them ends at its first space, as in
            lists that have more columns. None takes lines as they are.

    Raises:
        UserError: no text, or a name that leads out of the root.
    """
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text; expected a list of videos, one a line") from None
    names = dict.fromkeys(_listed_video(line.strip(), root) for line in lines if line.strip())
    for name in names:
        _check_inside(path, name, root)
    return list(names)


def _listed_video(line: str, root: Path | None) -> str:
    """The video that a line of a list names, by itself or by one of its frames."""
    if frame := _FRAME.match(line):
        # DAVIS begins at the folder above the frames: /JPEGImages/480p/bear/00000.jpg
        folders = [part for part in frame[0].replace("\\", "/").split("/")[:-1] if part != "."]
        for top in ("JPEGImages", "JPEGImages_24fps"):
            if top in folders:
                folders = folders[folders.index(top) + 1 :]
                if root is not None and len(folders) > 1 and folders[0] == root.name:
                    folders = folders[1:]
        return "/".join(folders)
    name = line.rstrip("/")
    first = line.split()[0].rstrip("/")
    there = root is None or (root / name).is_dir() or not (root / first).is_dir()
    return name if there else first


def _check_inside(path: Path, name: str, root: Path | None) -> None:
    """UserError for a listed name that is not below the folder of the videos."""
    fault = name_fault(name) if PurePath(name).parts else "empty"
    if fault is not None:
        fault = f"is no name of a folder ({fault})"
    elif PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        fault = "is an absolute path"
    elif ".." in PureWindowsPath(name).parts:
        fault = "leads upwards (..)"
    elif root is not None and not (root / name).resolve().is_relative_to(root.resolve()):
        fault = f"is a link to {(root / name).resolve()}, outside {root}"
    if fault:
        raise UserError(
            f"{path}: {shorten(repr(name))} {fault}; a list names videos below "
            f"{root or 'its data folder'}: put the frames there, or use their own folder as "
            "dataset.data_path"
        )


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


@dataclass
class MaskReport:
    """What was found in the masks of a data set."""

    facts: FactsCache
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    readings: dict[str, list[str]] = field(default_factory=dict)  # what was concluded -> videos

    def notes(self) -> list[str]:
        """A line for each conclusion, with the videos that it holds for."""
        return [f"{listed(videos)}: {what}" for what, videos in self.readings.items()]


def index_folder(
    folder: Path,
    masks: Path,
    pool: ThreadPoolExecutor,
    report: MaskReport,
    mask_values: MaskValues,
    name: str | None = None,
) -> Video | None:
    """The video of the frames in a folder with the masks in another; None where the pictures have
    problems or there are none, which the report then says.

    Args:
        name: of the video; None takes that of the folder.
    """
    pictures = list_pictures(folder)
    if not pictures:
        report.problems.append(f"{folder}: no pictures")
        return None
    video = index_frames(folder, pictures, pool, report.problems, name)
    files = list(_mask_files(masks, report.problems))
    found = list(pool.map(lambda file: _try_facts(file[0], report.facts), files))
    report.problems += [fault for fault in found if isinstance(fault, str)]
    if video is None:
        return None
    frame_of = {name: t for t, frame in enumerate(video.frames) for name in frame_names(frame)}
    fitting: list[tuple[int | str | None, MaskFacts]] = []  # with the object that a folder names
    for (path, owner), facts in zip(files, found, strict=True):
        if isinstance(facts, str):
            continue
        if path.stem not in frame_of:
            report.problems.append(f"{path}: no frame of this name in {folder}")
        elif facts.size != video.size:
            report.problems.append(f"{path}: {_sizes(facts.size, video.size)}")
        else:
            fitting.append((owner, facts))
    own = [facts for owner, facts in fitting if owner is None]
    in_folders = [facts for owner, facts in fitting if owner is not None]
    try:
        reading = decide(own, mask_values) if own else None
        of_folders = decide_folder(in_folders, mask_values) if in_folders else None
    except ValueError as problem:
        report.problems.append(f"{masks}: {problem}")
        return None

    on_frame: dict[int, dict[int | str, Annotation]] = {}
    ignored: dict[int, IdMask] = {}
    for owner, facts in fitting:
        t = frame_of[facts.path.stem]
        if (reading if owner is None else of_folders or Reading({})).colours:
            facts = facts.by_colour()
        objects = on_frame.setdefault(t, {})
        if owner is None:
            objects |= _annotations(facts, reading, {})
            if _area(facts, reading.ignored):
                ignored[t] = IdMask(facts.path, reading.ignored, reading.colours)
        elif of_folders is None:
            area = facts.areas.total() - facts.areas[0]
            objects[owner] = Annotation(str(facts.path), IdMask(facts.path, None), area)
        else:
            objects |= _annotations(facts, of_folders, {1: owner})
    for kind in (reading, of_folders):
        if kind is not None:
            report.readings.setdefault(kind.note, []).append(str(video.video_id))
    if ignored:
        values = ", ".join(map(str, reading.ignored))
        report.warnings.append(
            f"{masks}: {len(ignored)} masks with void pixels ({values}), of no object: left out of "
            "the loss, and of scores unless evaluation.void is background"
        )
    frames = [
        replace(
            f, annotations=on_frame.get(t, {}), is_labelled=t in on_frame, ignored=ignored.get(t)
        )
        for t, f in enumerate(video.frames)
    ]
    object_ids = sorted({o for objects in on_frame.values() for o in objects}, key=_in_order)
    return Video(video.video_id, video.size, frames, object_ids)


def _annotations(
    facts: MaskFacts, reading: Reading, names: dict[int, int | str]
) -> dict[int | str, Annotation]:
    """The objects in one mask; `names` has other ids for some."""
    found: dict[int | str, Annotation] = {}
    for object_id, values in reading.objects.items():
        if area := _area(facts, values):
            place = IdMask(facts.path, values, reading.colours)
            found[names.get(object_id, object_id)] = Annotation(str(facts.path), place, area)
    return found


def _area(facts: MaskFacts, values: tuple[int, ...]) -> int:
    return sum(facts.areas[value] for value in values)


def _in_order(object_id: int | str) -> tuple[str | int, ...]:
    return natural_key(str(object_id))


def _try_facts(path: Path, facts: FactsCache) -> MaskFacts | str:
    """What a mask holds, or what is wrong with the file."""
    try:
        return facts.read(path)
    except UserError as problem:
        return str(problem)


def _sizes(mask: tuple[int, int], frame: tuple[int, int]) -> str:
    return f"the mask is {mask[1]}x{mask[0]}, its frames {frame[1]}x{frame[0]} (width x height)"


# PNGs of ids as MOTS has them

_FRAMES = ("images", "image_02", "img1")  # CVAT, KITTI MOTS, MOTSChallenge
_MASKS = "instances"


class MotsVideos(VosVideos):
    """Videos in `images` with PNGs of the same names in `instances`, 16 bits a pixel: class * 1000
    + number is an object, 0 the background, and 10000 a region that no loss and no score counts.

    One video lies in the two folders themselves, several in sub-folders of the same name in both,
    or each with two such folders in a folder of its own.

    Args:
        path: the folder that holds `images` and `instances`, or the folders that do.

    Raises:
        UserError: no such folders, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path):
        places = _places(path)
        if not places:
            what = "no images with instances" if path.is_dir() else "no such folder"
            raise UserError(
                f"{path}: {what}; expected {_FRAMES[0]}/*.jpg and {_MASKS}/*.png of the same names "
                f"(or {_FRAMES[0]}/<video>/ and {_MASKS}/<video>/), as in CVAT's export MOTS PNG"
            )
        report = MaskReport(FactsCache(path))
        videos: list[Video] = []
        with ThreadPoolExecutor(max(8, num_cores())) as pool:  # see `VosVideos`
            for name, frames, masks in watched(places, "videos", len(places)):
                if not masks.is_dir():
                    report.problems.append(f"{masks}: no such folder; expected masks of {frames}")
                elif video := index_folder(frames, masks, pool, report, "auto", name):
                    videos.append(video)
        report.facts.write()
        for video in videos:
            wrong = [o for o in video.object_ids if not 1000 <= int(o) < 10000]
            if wrong:
                report.problems.append(
                    f"video {video.video_id!r}: ids {wrong[:5]}; expected class * 1000 + number. "
                    "If these are plain ids, name the folders JPEGImages/<video> and "
                    "Annotations/<video> and set dataset.dataset_type: vos"
                )
        warnings = report.warnings + tracking_warnings(videos)
        problems = report.problems + shared_pictures(videos)
        # Not that of VosVideos, which looks for its own folders.
        super(VosVideos, self).__init__(path, videos, warnings, problems, report.notes())

    @staticmethod
    def recognise(path: Path) -> bool:
        """Whether the folders of a path are those of this format."""
        return bool(_places(path))


def _places(path: Path) -> list[tuple[str, Path, Path]]:
    """Name, frames and masks of each video; the masks may be missing."""
    if not path.is_dir():
        return []
    found = []
    for root in (path, *subfolders(path)):
        masks = root / _MASKS
        frames = next((root / name for name in _FRAMES if (root / name).is_dir()), None)
        if frames is None or not masks.is_dir():
            continue
        if list_pictures(frames):
            found.append((root.name or root.resolve().name, frames, masks))
        else:
            found += [(below.name, below, masks / below.name) for below in subfolders(frames)]
    return found
