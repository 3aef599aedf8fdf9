"""Where the picture of an entry in a JSON file lies, however its path is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from sam2train.data_pictures import Header, read_header
from sam2train.errors import UserError

# Folders beside a JSON that hold its frames, where the names do not say it.
_USUAL_FOLDERS = ("JPEGImages", "frames", "images")
# Label Studio and others put a part of a hash before the name of an uploaded file.
_UPLOAD_HASH = re.compile(r"^[0-9a-f]{4,32}-(?=.)")


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
        for spelling, remarks in _path_spellings(name):
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


def _path_spellings(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
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
