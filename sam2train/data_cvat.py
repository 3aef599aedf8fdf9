"""CVAT's own XML 1.1, "for images" and "for video", rewritten as COCO video."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any
from xml.parsers import expat

import numpy as np

from sam2train.data_coco_files import image_roots, name_videos
from sam2train.data_pictures import read_header
from sam2train.data_rle import encode_mask
from sam2train.data_videos import PICTURE_SUFFIXES, list_pictures, subfolders
from sam2train.errors import UserError
from sam2train.files import MORE_ALLOWED, read_regular_file, size_limit
from sam2train.machine import watched

FILE_NAME = "annotations.xml"  # in a folder as CVAT's ZIP unpacks
_XML_WANTED = 'expected CVAT\'s XML 1.1: `annotations` with <image> ("for images") or <track>'
_SHAPES = ("polygon", "mask")
_OTHER_SHAPES = ("box", "ellipse", "polyline", "points", "cuboid", "skeleton")
# An XML of an hour of video with ten polygons a frame has about 200 MB.
_MAX_XML = 1 << 30
_MAX_NESTED = 32  # CVAT writes 7 at most
_NOTHING = ("", "__undefined__")  # attributes that nobody filled in


def cvat_file(path: Path) -> Path | None:
    """The XML at a path: an `.xml` itself, or `annotations.xml` in a folder."""
    if path.is_dir():
        return path / FILE_NAME if (path / FILE_NAME).is_file() else None
    return path if path.suffix.lower() == ".xml" else None


def cvat_to_coco(path: Path, image_root: str | Path | None) -> tuple[dict[str, Any], list[str]]:
    """The same frames and masks as COCO has them, and what there is to say about them.

    "For video": tracks are objects, and the k-th frame is the picture with the number k or at the
    place k of a folder. "For images": see `name_videos` for what a video is; objects are told apart
    by an attribute such as `track_id`, else by label.

    Raises:
        UserError: no such XML, nothing in it has a mask, or frames and pictures do not fit.
    """
    root = _parse(path)
    tracks, images = root.findall("track"), root.findall("image")
    if root.tag != "annotations" or not (tracks or images):
        raise UserError(f"{path}: has neither <image> nor <track> in <annotations>; {_XML_WANTED}")
    if tracks and images:
        raise UserError(f"{path}: has both <image> and <track>; {_XML_WANTED}")
    kinds = Counter(shape.tag for holder in (*tracks, *images) for shape in holder)
    others = ", ".join(f"{kinds[kind]} <{kind}>" for kind in _OTHER_SHAPES if kinds[kind])
    if not any(kinds[kind] for kind in _SHAPES):
        raise UserError(
            f"{path}: has no <polygon> and no <mask>, only {others or 'frames without shapes'}; "
            "these train nothing here; in CVAT, draw polygons or masks (its Segment Anything makes "
            "them of boxes) and export again"
        )
    notes = [f"CVAT's XML {'for video' if tracks else 'for images'}"]
    if others:
        notes.append(f"{others} left out: no masks")
    labels: dict[str, int] = {}
    if tracks:
        content = _of_video(path, root, tracks, image_root, labels, notes)
    else:
        content = _of_images(path, images, image_root, labels, notes)
    content["categories"] = [{"id": number, "name": name} for name, number in labels.items()]
    return content, notes


def _parse(path: Path) -> ET.Element:
    """The tree of an XML file. A document type, which may define entities that grow to any size or
    that read other files, is refused before anything of it is used."""
    raw = read_regular_file(path, _XML_WANTED)
    if len(raw) > (most := size_limit(_MAX_XML)):
        raise UserError(
            f"{path}: has {len(raw):,} bytes, more than {most:,}; {_XML_WANTED}. {MORE_ALLOWED}"
        )
    builder = ET.TreeBuilder()
    level = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal level
        level += 1
        if level > _MAX_NESTED:
            raise UserError(f"{path}: more than {_MAX_NESTED} levels of elements; {_XML_WANTED}")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal level
        level -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise UserError(
            f"{path}: has a <!DOCTYPE>, which CVAT never writes and which may hide what is read; "
            "delete it if you know where the file is from"
        )

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(raw, True)
        return builder.close()
    except (expat.ExpatError, LookupError, ValueError) as problem:  # LookupError: of the encoding
        raise UserError(f"{path}: the file is not valid XML ({problem}); {_XML_WANTED}") from None


def _of_images(
    path: Path,
    entries: Sequence[ET.Element],
    image_root: str | Path | None,
    labels: dict[str, int],
    notes: list[str],
) -> dict[str, Any]:
    roots = image_roots(path, image_root).folders
    images, annotations = [], []
    listings: dict[Path, dict[str, str]] = {}
    for k, entry in enumerate(watched(entries, "images", len(entries))):
        name = entry.get("name")
        if not name:
            raise UserError(f"{path}: <image id={entry.get('id')!r}> has no `name`; {_XML_WANTED}")
        where = f"{path}: <image name={name!r}>"
        known = _picture_name(name, entry.get("subset"), roots, listings)
        image = {"id": k, "file_name": known, "name": name}
        size = tuple(_number(entry, key, where) for key in ("height", "width"))
        images.append(image | {"height": size[0], "width": size[1]})
        for shape in entry:
            if shape.tag in _SHAPES:
                annotation = _annotation(shape, shape.get("label"), size, labels, where)
                annotations.append(annotation | {"id": len(annotations), "image_id": k})
    images, told = name_videos(images, annotations)
    notes += told
    return {"images": images, "annotations": annotations}


def _picture_name(
    name: str, subset: str | None, roots: Sequence[Path], listings: dict[Path, dict[str, str]]
) -> str:
    """The name with what the export leaves out of it: the folder of a subset, and the suffix of a
    frame of a video. As it is if no such file is there."""
    for kept in [name, *([f"{subset}/{name}"] if subset else [])]:
        for root in roots:
            if PurePath(kept).suffix.lower() in PICTURE_SUFFIXES:
                if (root / kept).is_file():
                    return kept
                continue
            folder = (root / kept).parent
            if folder not in listings:
                found = list_pictures(folder) if folder.is_dir() else []
                listings[folder] = {picture.stem: picture.name for picture in found}
            if file := listings[folder].get(PurePath(kept).name):
                return str(PurePath(kept).with_name(file))
    return name


# Videos


def _of_video(
    path: Path,
    root: ET.Element,
    tracks: Sequence[ET.Element],
    image_root: str | Path | None,
    labels: dict[str, int],
    notes: list[str],
) -> dict[str, Any]:
    tasks = {track.get("task_id") for track in tracks}
    if len(tasks) > 1:
        raise UserError(
            f"{path}: has tracks of {len(tasks)} tasks, whose frames have the same numbers; export "
            "each task by itself, and name the files in a list: dataset.data_path: [a.xml, b.xml]"
        )
    shapes = {track: _shapes_of(path, track) for track in tracks}
    last = max((max(found) for found in shapes.values() if found), default=0)
    pictures = _pictures_of(path, root, image_root, last, notes)
    size = _stated_size(path, root) or read_header(next(iter(pictures.values()))).stored
    annotations = []
    for number, (track, found) in enumerate(watched(shapes.items(), "tracks", len(shapes))):
        where = f"{path}: <track id={track.get('id', number)!r}>"
        for frame, shape in found.items():
            if shape is None:
                continue
            annotation = _annotation(shape, track.get("label"), size, labels, where)
            name = track.get("id", str(number))
            annotation["track_id"] = int(name) if name.isdecimal() else name
            if frame not in pictures:
                raise UserError(
                    f"{where}: has a mask on frame {frame}, and there is no picture for it; "
                    f"expected those of all frames, frame_{frame:06d}.jpg among them"
                )
            annotations.append(annotation | {"id": len(annotations), "image_id": frame})
    _drop_single_tracks(annotations, notes)
    unknown = _unknown_frames(shapes.values(), pictures)
    start, step = (_meta_number(root, key) for key in ("start_frame", "frame_filter"))
    stop = _meta_number(root, "stop_frame")
    images = []
    for place, (frame, file) in enumerate(pictures.items()):
        image = {"id": frame, "video_id": path.stem, "order_in_video": place}
        if path.name == FILE_NAME:
            image["video_id"] = path.parent.name or path.resolve().parent.name
        looked_at = frame not in unknown and (frame - (start or 0)) % (step or 1) == 0
        looked_at &= (start or 0) <= frame and (stop is None or frame <= stop)
        images.append(
            image
            | {"path": str(file.absolute()), "height": size[0], "width": size[1]}
            | {"is_annotated": looked_at}
        )
    if unknown:
        notes.append(
            f"{len(unknown)} frames are within a track and have no shape of it (only key frames "
            "are in the file): they count as unlabelled"
        )
    if all(image["is_annotated"] for image in images):
        for image in images:
            del image["is_annotated"]
    return {"images": images, "annotations": annotations}


def _shapes_of(path: Path, track: ET.Element) -> dict[int, ET.Element | None]:
    """Frame -> the mask of a track, None where it is outside; empty if the track has no masks."""
    found: dict[int, ET.Element | None] = {}
    for shape in track:
        if shape.tag not in _SHAPES:
            continue
        frame = _number(shape, "frame", f"{path}: <track id={track.get('id')!r}>")
        if found.get(frame) is not None:
            raise UserError(
                f"{path}: <track id={track.get('id')!r}> has two masks on frame {frame}; keep one"
            )
        found[frame] = None if shape.get("outside") == "1" else shape
    return dict(sorted(found.items()))


def _drop_single_tracks(annotations: list[dict[str, Any]], notes: list[str]) -> None:
    """Take the ids of tracks away where each is on one frame only, and the frames are several.

    So CVAT writes shapes that were drawn on single frames, all brush masks among them: such an id
    is of a mask and not of an object.
    """
    times = Counter(annotation["track_id"] for annotation in annotations)
    if max(times.values(), default=0) > 1 or len({a["image_id"] for a in annotations}) < 2:
        return
    for annotation in annotations:
        del annotation["track_id"]
    notes.append("each <track> has a mask on one frame only: single shapes, not tracks of objects")


def _unknown_frames(
    tracks: Iterable[dict[int, ET.Element | None]], pictures: dict[int, Path]
) -> set[int]:
    """Frames on which an object has no shape though nothing says that it is outside.

    CVAT lists all frames of a track until it is outside. Where one is left out in between, the file
    has key frames only, and then the last shape of a track does not end it either.
    """
    tracks = [track for track in tracks if track]
    between: set[int] = set()
    behind: set[int] = set()
    for track in tracks:
        frames = list(track)
        for frame, following in zip(frames, [*frames[1:], None], strict=True):
            if track[frame] is None:
                continue
            if following is None:
                behind |= {other for other in pictures if other > frame}
            else:
                between |= {other for other in pictures if frame < other < following}
    single = all(sum(s is not None for s in track.values()) < 2 for track in tracks)
    return set() if single or not between else between | behind


def _pictures_of(
    path: Path, root: ET.Element, image_root: str | Path | None, last: int, notes: list[str]
) -> dict[int, Path]:
    """Number of the frame -> its picture, in order."""
    own, *usual = image_roots(path, image_root).folders
    named = path.with_suffix("")  # a folder with the name of the file has the frames of no other
    usual.sort(key=lambda folder: named not in (folder, *folder.parents))
    folders = [own] if image_root is not None else [*usual, own]
    folders += [only[0] for folder in folders if len(only := subfolders(folder)) == 1]
    found = next(((folder, p) for folder in folders if (p := list_pictures(folder))), None)
    if found is None:
        raise UserError(
            f"{path}: no pictures in {folders[0]} or beside the file; CVAT's XML for video has no "
            "names of frames: export with images, or extract them from the film as "
            "images/frame_000000.jpg and on, or set dataset.image_root to the folder that has them"
        )
    folder, pictures = found
    numbers = [_last_number(picture.stem) for picture in pictures]
    start, size = _meta_number(root, "start_frame") or 0, _meta_number(root, "size")
    counted = None not in numbers and len(set(numbers)) == len(numbers)
    if counted and min(numbers) in (0, start):
        notes.append(f"frames are the pictures of {folder} by the numbers in their names")
        return dict(sorted(zip(numbers, pictures, strict=True)))
    if last >= len(pictures) or size not in (None, len(pictures)):
        raise UserError(
            f"{path}: {folder} has {len(pictures)} pictures, {pictures[0].name} the first, the "
            f"task {size or 'an unknown number of'} frames, and the last shape is on frame {last}; "
            "name the pictures by their frames from 0 on, such as frame_000000.jpg"
        )
    notes.append(
        f"frames are the pictures of {folder} by their places: frame 0 is {pictures[0].name}"
    )
    return dict(enumerate(pictures))


def _last_number(stem: str) -> int | None:
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if digits and len(digits) < 19 else None


def _meta_number(root: ET.Element, key: str) -> int | None:
    """A number of the task; of "step=5" the 5."""
    text = next((e.text or "" for e in root.iterfind(f"meta/*/{key}")), "").strip()
    text = text.removeprefix("step=")
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _stated_size(path: Path, root: ET.Element) -> tuple[int, int] | None:
    stated = root.find("meta/*/original_size")
    sides = [stated.findtext(key, "") for key in ("height", "width")] if stated is not None else []
    good = sides and all(side.strip().isdecimal() and int(side) > 0 for side in sides)
    return (int(sides[0]), int(sides[1])) if good else None


# Shapes


def _annotation(
    shape: ET.Element,
    label: str | None,
    size: tuple[int, int],
    labels: dict[str, int],
    where: str,
) -> dict[str, Any]:
    """A shape as an annotation without id and image."""
    found = {"category_id": labels.setdefault(str(label), len(labels) + 1)}
    attributes = dict(_attributes(shape))
    if attributes:
        found["attributes"] = attributes
    try:
        if shape.tag == "polygon":
            found["segmentation"] = [_corners(shape.get("points", ""))]
        else:
            found["segmentation"] = _read_mask(shape, size)
    except ValueError as problem:
        frame = f" on frame {shape.get('frame')}" if shape.get("frame") else ""
        raise UserError(f"{where}: <{shape.tag}>{frame}: {problem}") from None
    return found


def _attributes(shape: ET.Element) -> Iterator[tuple[str, int | str]]:
    for attribute in shape.findall("attribute"):
        value = (attribute.text or "").strip()
        if value not in _NOTHING:
            yield attribute.get("name", ""), int(value) if value.isdecimal() else value


def _corners(points: str) -> list[float]:
    """x, y, x, y, ... from "x,y;x,y;..."."""
    pairs = [pair.split(",") for pair in points.split(";") if pair.strip()]
    if len(pairs) < 3 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"`points` is {points[:40]!r}; expected x,y;x,y;... of 3 corners or more")
    return [float(value) for pair in pairs for value in pair]


def _read_mask(shape: ET.Element, size: tuple[int, int]) -> dict[str, Any]:
    """An RLE of the frame from run lengths along the rows of a rectangle."""
    left, top, width, height = (
        _number(shape, key, "<mask>") for key in ("left", "top", "width", "height")
    )
    if width < 1 or height < 1 or left + width > size[1] or top + height > size[0]:
        raise ValueError(
            f"its rectangle (left {left}, top {top}, {width}x{height}) is not within the frame "
            f"({size[1]}x{size[0]}, width x height)"
        )
    runs = [part.strip() for part in shape.get("rle", "").split(",") if part.strip()]
    if not all(run.isdecimal() and len(run) < 12 for run in runs) or len(runs) > width * height + 1:
        raise ValueError("`rle` is no list of run lengths: 3, 5, 2, ...")
    lengths = np.array(runs, np.int64)
    if lengths.sum() != width * height:
        raise ValueError(f"the run lengths add up to {lengths.sum()}, not {width} x {height}")
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = inside
    return encode_mask(mask)


def _number(element: ET.Element, key: str, where: str) -> int:
    text = (element.get(key) or "").strip()
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{where}: <{element.tag}> has {key}={text!r}; expected a whole number")
    return int(text)
