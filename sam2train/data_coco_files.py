"""What the entries of a COCO file say of themselves: the ids of images and objects, the video of an
image, and where its picture lies, however its path is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from sam2train.data_pictures import Header, read_header
from sam2train.data_videos import frame_key
from sam2train.errors import UserError

TASKS = "tasks"  # where `json_object` puts the list that a file is
ID_WANTED = "expected a whole number or text"
# Where the id of an object is, the first that an annotation has. CVAT and others keep their own
# fields in `attributes`; a name there is compared without its capitals, `_`, `-` and spaces.
_TRACK_KEYS = ("track_id", "attributes.trackid", "attributes.track", "attributes.trackingid")
_OBJECT_KEYS = ("instance_id", "object_id", "attributes.instanceid", "attributes.objectid")
_OBJECT_KEYS += ("attributes.objid",)
CATEGORY, NO_ID = "category_id", "no id of an object"

# Folders beside a JSON that hold its frames, where the names do not say it.
_USUAL_FOLDERS = ("JPEGImages", "frames", "images")
# Label Studio and others put a part of a hash before the name of an uploaded file.
_UPLOAD_HASH = re.compile(r"^[0-9a-f]{4,32}-(?=.)")


@dataclass(frozen=True)
class Image:
    """What annotations need to know of an image."""

    video_id: int | str
    place: int  # in its video, from 0
    size: tuple[int, int]
    stated: tuple[int, int]  # the size that the JSON gives, of the picture where it gives none
    is_labelled: bool | None  # what the JSON says; None: nothing


@dataclass
class Findings:
    """What there is to say about a file, a line each."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Located(NamedTuple):
    """The file of an image."""

    path: Path | None
    header: Header | str  # or what is wrong with the file
    remarks: tuple[str, ...] = ()  # how it was found, where not as it is written
    is_shortened: bool = False  # found by the end of its path: other paths may lead there, too


class Roots(NamedTuple):
    """Where relative paths begin."""

    folders: tuple[Path, ...]
    is_set: bool  # by dataset.image_root


def whole_number(value: Any) -> int | None:
    """A whole number, also where it is text or a float such as 3.0; None for anything else."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def as_id(value: Any) -> int | str | None:
    """An id as JSON files have it, or None for what cannot be one."""
    return value if isinstance(value, str) else whole_number(value)


def has_tracks(annotations: Iterable[Mapping[str, Any]]) -> bool:
    """Whether an id of an object, other than the category, is on several images."""
    seen: dict[tuple[str, Any], Any] = {}
    for raw in annotations:
        key, value = identity(raw)
        object_id = as_id(value)
        if key in (CATEGORY, NO_ID) or object_id is None:
            continue
        image_id = as_id(raw.get("image_id"))
        if seen.setdefault((key, object_id), image_id) != image_id:
            return True
    return False


def has_identity(raw: Mapping[str, Any]) -> bool:
    """Whether an annotation says which object it is, by more than its category."""
    return identity(raw)[0] not in (CATEGORY, NO_ID)


def identity(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Where the id of the object is, and the id; null and -1 are none."""
    attributes = raw.get("attributes")
    inner: dict[str, tuple[str, Any]] = {}
    if isinstance(attributes, dict):
        for name, value in attributes.items():
            plain = name.lower().replace("_", "").replace("-", "").replace(" ", "")
            if as_id(value) is not None:  # a check box or a list is something else
                inner["attributes." + plain] = (f"attributes.{name}", value)
    for key in (*_TRACK_KEYS, *_OBJECT_KEYS):
        name, value = inner.get(key, (key, None)) if "." in key else (key, raw.get(key))
        if value is not None and whole_number(value) != -1:
            return name, value
    if raw.get(CATEGORY) is not None:
        return CATEGORY, raw[CATEGORY]
    return NO_ID, 1


def image_roots(path: Path, image_root: str | Path | None) -> Roots:
    """`image_root`, or else the folder of the JSON and the usual folders in it that are there.

    Raises:
        UserError: `image_root` is no folder.
    """
    if image_root is not None:
        if not Path(image_root).is_dir():
            raise UserError(f"dataset.image_root: {image_root} is no folder")
        return Roots((Path(image_root),), True)
    own = [path.parent / name for name in _USUAL_FOLDERS]
    own += [path.with_suffix("") / name for name in (*_USUAL_FOLDERS, ".")]
    return Roots((path.parent, *(folder for folder in own if folder.is_dir())), False)


def image_names(entry: Mapping[str, Any]) -> list[str]:
    """The paths that an entry gives, `path` before `file_name`."""
    names = (entry.get(key) for key in ("path", "file_name"))
    return [name for name in names if isinstance(name, str) and name]


def name_videos(
    images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The images of a file that says nothing of videos, with `video_id` and `order_in_video`, and a
    note.

    Frames of a video are the pictures of one folder whose `name`s differ in their last number, in
    the order of these numbers. They are left as they are, for videos of one frame, where objects
    have no ids and the categories cannot tell objects apart either: one is twice on an image, or
    none is on two images of a video.
    """
    names = {image["id"]: PurePath(PureWindowsPath(image["name"]).as_posix()) for image in images}
    plain = {i: name.with_name(_UPLOAD.sub("", name.name)) for i, name in names.items()}
    if all(plain[i] != names[i] for i in names) and len({*plain.values()}) == len(names):
        names = plain  # each upload has a random part of its own
    groups: dict[tuple[str, str], list[Any]] = {}
    for i, name in names.items():
        group = str(name.parent), _LAST_NUMBER.sub(r"\1", name.stem)
        groups.setdefault(group, []).append(i)
    if not has_tracks(annotations):
        owner = {i: group for group, members in groups.items() for i in members}
        times = Counter((a["image_id"], a.get("category_id")) for a in annotations)
        frames = Counter((owner[i], category) for i, category in times)
        if max(times.values(), default=0) > 1 or max(frames.values(), default=0) < 2:
            return [dict(image) for image in images], []
    folders = {folder for folder, _ in groups}
    places: dict[Any, dict[str, Any]] = {}
    for (folder, prefix), members in groups.items():
        own = prefix.rstrip("_-. ")
        alone = len(folders) == len(groups)  # a folder each
        video_id = (folder if folder != "." else own or "video") if alone else f"{folder}/{own}"
        if video_id in {known["video_id"] for known in places.values()}:
            video_id = f"{folder}/{prefix}"
        key = frame_key([names[i].stem for i in members])
        members.sort(key=lambda i: (key(names[i].stem), names[i].name))
        for place, i in enumerate(members):
            places[i] = {"video_id": video_id, "order_in_video": place}
    note = (
        "frames of a video are the pictures of one folder whose names differ in their last number, "
        f"in this order (videos: {len(groups)}, frames: {len(images)})"
    )
    return [{**image, **places[image["id"]]} for image in images], [note]


# Label Studio puts 8 random digits before the name of an upload.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
_LAST_NUMBER = re.compile(r"^(.*?)[0-9]+(?:\.[0-9]+)?$")


def is_absolute(name: str) -> bool:
    """Whether a path is absolute, on this system or on Windows."""
    return PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def locate(entry: Mapping[str, Any], roots: Roots) -> Located:
    """The file of an image with its header, or with what is wrong with it.

    Where no file has the path as it is written, or with its backslashes and `%20` read as a server
    or Windows reads them, the end of the path is looked for under dataset.image_root: the folder of
    another machine or of an upload is not there.
    """
    names = image_names(entry)
    if not names:
        return Located(None, "`path` (or `file_name`) is missing or no text")
    try:
        candidates = _candidates(names, roots)
        first = next(candidates)
        found = first if first.path.is_file() else None
        found = found or next((c for c in candidates if c.path.is_file()), None)
        # A pipe or a device in the place of the file, which reading the header names.
        rest = _candidates(names, roots)
        odd = (c for c in rest if c.path.exists() and not c.path.is_dir())
        found = found or next(odd, first)
        there = found.path.exists()
    except (OSError, ValueError) as problem:  # too long for a file, or with a NUL
        reason = getattr(problem, "strerror", None) or problem
        return Located(None, f"`path` is {names[0][:60]!r}...: {reason}")
    try:
        return found._replace(header=read_header(found.path))
    except UserError as problem:
        if there:
            return found._replace(header=str(problem))
        if not is_absolute(names[0]):
            begin = "relative paths begin at"
            text = f"{problem}; {begin} {roots.folders[0]}, see dataset.image_root"
            return found._replace(header=text)
        advice = "; set dataset.image_root to the folder that holds the frames"
        if roots.is_set:
            advice = (
                f", and no end of this path exists under dataset.image_root ({roots.folders[0]})"
            )
        return found._replace(header=f"{problem}{advice}")


def _candidates(names: list[str], roots: Roots) -> Iterator[Located]:
    """Files that the names may mean, the likeliest first."""
    spellings = {}
    for name in names:
        for spelling, remarks in path_spellings(name):
            spellings.setdefault(spelling, remarks)
    for spelling, remarks in spellings.items():
        if ".." in PurePath(spelling).parts:
            remarks = (*remarks, "`..` in the path: found while the folders have these names")
        for root in roots.folders:
            # An absolute path stays as it is.
            yield Located(root / spelling, "", remarks)
    if not roots.is_set:
        return
    root = roots.folders[0]
    for spelling, remarks in spellings.items():
        parts = [part for part in PurePath(spelling).parts if part != ".."]
        remarks = (*remarks, "the end of the path, found under dataset.image_root")
        for place in range(1 if is_absolute(spelling) else 0, len(parts)):
            yield Located(root.joinpath(*parts[place:]), "", remarks, True)
        short = _UPLOAD_HASH.sub("", parts[-1]) if parts else ""
        if short and short != parts[-1]:
            yield Located(root / short, "", (*remarks, "without the hash of the upload"), True)


def path_spellings(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A path as it is written, and as Windows or a web server reads it; with what was done."""
    yield name, ()
    folders = PureWindowsPath(name).as_posix()
    done: tuple[str, ...] = ()
    if folders != name:
        done = ("backslashes in the path; read as folders",)
        yield folders, done
    plain = unquote(folders)
    if plain != folders:
        yield plain, (*done, "%xx in the path; read as the character")
    if "?" in name:  # /data/local-files/?d=folder/name.jpg
        asked = parse_qs(urlsplit(name).query)
        for path in asked.get("d", []):
            yield path, ("the path after ?d=",)
