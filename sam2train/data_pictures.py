"""Pictures and masks as they lie on disk: decoded in full, or an error that names the file."""

from __future__ import annotations

import io
import os
import struct
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sam2train.errors import UserError
from sam2train.files import check_regular

_EXIF_ORIENTATION = 0x0112
MAX_ID = 65535  # of an object in a picture of ids


class Header(NamedTuple):
    """What the head of a picture file says."""

    stored: tuple[int, int]  # (H, W) of the pixels in the file
    shown: tuple[int, int]  # (H, W) once the EXIF orientation is applied
    is_turned: bool  # the EXIF orientation changes the picture


def read_header(path: Path) -> Header:
    """Sizes and orientation, without decoding the picture.

    Raises:
        UserError: missing, unreadable or no picture.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            # Pillow turns a TIFF itself. For a PNG without the tag, getexif() decodes the whole
            # picture in search of one at its end.
            skip = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            orientation = 1 if skip else image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as problem:  # Pillow's parsers also raise struct.error, KeyError and others
        raise UserError(_why_unreadable(path, problem)) from problem
    shown = (width, height) if 5 <= orientation <= 8 else (height, width)
    return Header((height, width), shown, 2 <= orientation <= 8)


def _open(path: Path) -> Image.Image:
    """The picture in a file. Opening a pipe or a device would wait for whoever writes there."""
    check_regular(path)
    return Image.open(path)


def count_pages(path: Path) -> int:
    """Pictures in a TIFF: the pages of a stack, if all have one size; 1 for any other file.

    Raises:
        UserError: missing, unreadable or no picture.
    """
    if path.suffix.lower() not in STACK_SUFFIXES:
        return 1
    try:
        with _open(path) as image:
            sizes = set()
            for page in range(image.n_frames):
                image.seek(page)
                sizes.add(image.size)
            # Pages of other sizes are thumbnails or the levels of a pyramid.
            return image.n_frames if len(sizes) == 1 else 1
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem


STACK_SUFFIXES = {".tif", ".tiff"}


def read_levels(path: Path, page: int | None = None) -> np.ndarray | None:
    """(H, W) values of a picture of more than 8 bits, not scaled; None for any other picture.

    Raises:
        UserError: missing, truncated or no picture.
    """
    try:
        with _open(path) as image:
            if not _is_deep(image):
                return None
            image.seek(page or 0)
            return np.asarray(image)
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def read_image(
    path: Path,
    size: tuple[int, int] | None = None,
    page: int | None = None,
    levels: tuple[float, float] | None = None,
    least: tuple[int, int] | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB; transparency is dropped.

    Args:
        page: of a stack; None takes the first.
        levels: what becomes black and white in a picture of more than 8 bits; None takes the whole
            range of the file's type.
        size: (H, W) the picture must have. Where the stored pixels fit it, the EXIF orientation is
            left alone; else it is applied. None applies it.
        least: (H, W) that is enough: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that has
            as many pixels, which skips a part of the work.

    Raises:
        UserError: missing, truncated, no picture, or of another size.
    """
    try:
        with _open(path) as image:
            if page is not None:
                image.seek(page)
            stored = (image.height, image.width)
            turn = size is None or stored != tuple(size)
            if least is not None and image.format == "JPEG":
                swap = turn and 5 <= image.getexif().get(_EXIF_ORIENTATION, 1) <= 8
                if size is None or (stored[::-1] if swap else stored) == tuple(size):
                    image.draft(None, least if swap else (least[1], least[0]))
            is_reduced = (image.height, image.width) != stored
            image.load()  # raises for a truncated file, of which OpenCV returns half a picture
            if turn:
                image = ImageOps.exif_transpose(image)
            pixels = _to_rgb(image, levels)
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem
    if size is not None and not is_reduced and pixels.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected "
            f"{size[1]}x{size[0]} (width x height)"
        )
    return pixels


class MaskPicture(NamedTuple):
    """A mask as it is on disk, before the meaning of its values is decided."""

    values: np.ndarray  # (H, W) palette indices or grey values, uint16; of colours uint32, packed
    palette: np.ndarray | None  # (256,) uint32, packed colours of the indices; None: no palette
    is_colour: bool  # values are R + 256 G + 65536 B
    is_jpeg: bool = False  # whatever the name of the file says: its values are not exact


def pack_grey(values: np.ndarray | int) -> np.ndarray | int:
    """R + 256 G + 65536 B of grey values; those above 255, which no colour has, stay apart."""
    return values * 0x010101


def read_id_mask(path: Path) -> np.ndarray:
    """(H, W) uint16: the palette index or grey value of each pixel, 0 for the background.

    Raises:
        UserError: missing, truncated, no picture, or one in colours.
    """
    picture = read_mask_picture(path)
    if picture.is_colour:
        raise UserError(
            f"{path}: a picture of mode RGB; expected a palette or grey PNG whose pixels are the "
            f"ids of objects, up to {MAX_ID}"
        )
    return picture.values


def read_colour_mask(path: Path) -> np.ndarray:
    """(H, W) uint32: R + 256 G + 65536 B of each pixel, whatever mode the picture has.

    Raises:
        UserError: see `read_mask_picture`.
    """
    picture = read_mask_picture(path)
    if picture.is_colour:
        return picture.values
    if picture.palette is None:
        return pack_grey(picture.values.astype(np.uint32))
    return picture.palette[picture.values]


def read_mask_picture(path: Path, raw: bytes | None = None) -> MaskPicture:
    """A mask of indices, grey values or colours.

    Args:
        raw: the bytes of the file, where they are read already.

    Raises:
        UserError: missing, truncated, no picture, or one that holds neither.
    """
    palette = None
    try:
        with _open(path) if raw is None else Image.open(io.BytesIO(raw)) as image:
            image.load()
            mode, pixels, is_jpeg = image.mode, np.asarray(image), image.format in ("JPEG", "MPO")
            if mode == "P":
                colours = np.zeros((256, 3), np.uint32)
                given = np.array(image.getpalette("RGB"), np.uint32).reshape(-1, 3)
                colours[: len(given)] = given
                palette = colours @ np.array([1, 256, 65536], np.uint32)
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem
    if pixels.ndim == 3:  # a few masks of DAVIS-2016 are grey in RGB files
        colours = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
        if (colours == colours[..., :1]).all():
            pixels = colours[..., 0]
        elif colours.dtype == np.uint8:
            red, green, blue = np.moveaxis(colours.astype(np.uint32), -1, 0)
            return MaskPicture(red + 256 * green + 65536 * blue, None, True, is_jpeg)
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui" or not 0 <= pixels.min() <= MAX_ID:
        raise UserError(
            f"{path}: a picture of mode {mode}; expected a palette or grey PNG whose pixels are "
            f"the ids of objects, up to {MAX_ID}"
        )
    return MaskPicture(pixels.astype(np.uint16), palette, False, is_jpeg)


def _to_rgb(image: Image.Image, levels: tuple[float, float] | None) -> np.ndarray:
    if _is_deep(image):
        # Pillow would clip 16 bits to 8 and turn the picture white.
        grey = np.nan_to_num(np.asarray(image, np.float64), nan=0.0)
        if levels is None:
            peak = 65535.0 if image.mode.startswith("I;16") or grey.max() > 255 else 255.0
            levels = 0.0, peak
        low, high = levels
        grey = np.clip((grey - low) * (255.0 / (high - low)), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _why_unreadable(path: Path, problem: Exception) -> str:
    if isinstance(problem, UserError):
        return str(problem)
    if not path.exists():
        return f"{path}: no such file"
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as refusal:
        return f"{path}: cannot be read ({refusal.strerror})"
    if not start:
        what = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "is an HTML page, probably a failed download"
    elif isinstance(problem, UnidentifiedImageError):
        what = "is not a picture"
    else:
        what = f"is damaged or cut short ({problem})"
    return f"{path}: {what}"


class Film:
    """Frames of films in any order; those after the last one read cost the least.

    Far frames of an MP4 are sought, and taken only if their time is that of the wanted frame in the
    head of the file: seeking by itself lands beside it in some films. Other films are decoded from
    their start. Each thread and each process keeps one film open.
    """

    def __init__(self) -> None:
        self._state = threading.local()

    def __reduce__(self) -> tuple:
        return Film, ()

    def read(self, path: Path, frame_idx: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            UserError: the film cannot be read that far.
        """
        film = getattr(self._state, "film", None)
        # A forked process would share the position in the file with its parent.
        if film is None or (film.process, film.path) != (os.getpid(), path):
            film = self._state.film = _OpenFilm(path)
        pixels = film.read(frame_idx)
        if pixels is None:
            self._state.film = None
            raise UserError(f"{path}: ends or is damaged at frame {film.position}")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


class _OpenFilm:
    """A film with the position of its decoder."""

    def __init__(self, path: Path):
        self.path, self.process, self.position = path, os.getpid(), 0
        self.times = _frame_times(path)  # None: never sought
        self._open()

    def _open(self) -> None:
        # A decoder with threads of its own cannot be closed in a forked process: it would wait for
        # threads that exist in its parent only.
        one_thread = [cv2.CAP_PROP_N_THREADS, 1]
        check_regular(self.path)
        self.capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG, one_thread)
        self.position = 0

    def read(self, frame_idx: int) -> np.ndarray | None:
        """(H, W, 3) uint8 in OpenCV's order of colours; None where the film ends before."""
        good = False
        if not 0 <= frame_idx - self.position < _NEAR:
            good = frame_idx >= _NEAR and self._seek(frame_idx)
            if not good:
                self._open()
        if not good:
            while self.position < frame_idx and self.capture.grab():
                self.position += 1
            good = self.capture.grab()
        good, pixels = self.capture.retrieve() if good else (False, None)
        if not good:
            return None
        self.position = frame_idx + 1
        return pixels

    def _seek(self, frame_idx: int) -> bool:
        """Whether the decoder holds the frame now, by its time."""
        if self.times is None or frame_idx >= len(self.times):
            return False
        if self.position == 0 and self.capture.grab():
            self.times = self.times + self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        time = self.times[frame_idx]
        near = 0.4 * np.diff(self.times).min()
        start = int((time - self.times[0]) * self.capture.get(cv2.CAP_PROP_FPS)) - 2
        self.capture.set(cv2.CAP_PROP_POS_FRAMES, max(start, 0))
        self.position = 1  # somewhere, but no longer before the first frame
        for _ in range(_MAX_GROUP):
            if not self.capture.grab():
                break
            found = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if found >= time - near:
                if found <= time + near:
                    return True
                break
        self.times = None
        return False


_NEAR = 16  # frames that are decoded rather than sought
_MAX_GROUP = 1000  # frames from one that stands for itself to the next; codecs use up to 250


def read_film_header(path: Path) -> tuple[tuple[int, int], int]:
    """(H, W) and the number of frames that players show.

    The head of a film counts the frames in the file. An edit list may hide some of them, and other
    containers than MP4 only estimate: these films are decoded to count.

    Raises:
        UserError: OpenCV cannot read the film.
    """
    check_regular(path)
    capture = cv2.VideoCapture(str(path))
    good, first = capture.read()
    num_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not good or num_frames < 1:
        raise UserError(f"{path}: is no film that OpenCV can read")
    times = _frame_times(path)
    if times is None or len(times) != num_frames:
        num_frames = 1
        while capture.grab():
            num_frames += 1
    return first.shape[:2], num_frames


_CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}


def _frame_times(path: Path) -> np.ndarray | None:
    """(F,) seconds after the first frame, of all frames of an MP4 in the order of showing; None
    where its head does not say so or hides some of them.

    ISO/IEC 14496-12: the edit list `elst` of a track says which part is shown, in units of the film
    (`mvhd`); `stts` says how long each frame is, in units of the track (`mdhd`), and `ctts` how
    much later than decoded it is shown.
    """
    try:
        with path.open("rb") as file:
            film_scale, tracks = _read_tracks(file, path.stat().st_size)
    except (OSError, ValueError, struct.error):
        return None
    track = next((track for track in tracks if track.get("kind") == b"vide"), None)
    if track is None or not track["times"] or not track["scale"]:
        return None
    counts, lengths = np.array(track["times"]).T
    if not 0 < counts.sum() < _MAX_FILM:
        return None
    length = (counts * lengths).sum() / track["scale"]  # seconds
    edits = [edit for edit in track["edits"] if edit[1] >= 0]  # -1 is a pause before the film
    shown = sum(duration for duration, _ in edits) / film_scale
    if edits and (len(edits) > 1 or shown <= length - length / counts.sum() / 2):
        return None
    times = np.cumsum(np.repeat(lengths, counts)) - lengths[0]
    if track["offsets"]:
        counts, offsets = np.array(track["offsets"]).T
        if counts.sum() != len(times):
            return None
        times = np.sort(times + np.repeat(offsets, counts))
    times = (times - times[0]) / track["scale"]
    return times if (np.diff(times) > 0).all() else None


_MAX_FILM = 10**7  # frames, for counts that are none


def _read_tracks(file: BinaryIO, end: int) -> tuple[int, list[dict[str, Any]]]:
    """Units a second of an MP4, and of each track its kind, units, frame times and edits."""
    film_scale, tracks = 1, []
    ends = [end]
    while ends:
        start = file.tell()
        if start + 8 > ends[-1]:
            file.seek(ends.pop())
            continue
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = struct.unpack(">Q", file.read(8))[0]
        after = start + size if size else ends[-1]
        if after <= start or after > end:
            raise ValueError(f"a box of {size} bytes")
        if name in _CONTAINERS:
            if name == b"trak":
                tracks.append({"times": [], "offsets": [], "edits": [], "scale": 1})
            ends.append(after)
            continue
        if name in (b"mvhd", b"mdhd", b"hdlr", b"stts", b"ctts", b"elst"):
            body = file.read(after - file.tell())
            version = body[0]
            if name in (b"mvhd", b"mdhd"):
                scale = struct.unpack_from(">I", body, 20 if version else 12)[0]
                if name == b"mvhd":
                    film_scale = scale
                else:
                    tracks[-1]["scale"] = scale
            elif name == b"hdlr":
                tracks[-1].setdefault("kind", body[8:12])
            elif name == b"stts":
                tracks[-1]["times"] = list(struct.iter_unpack(">II", body[8:]))
            elif name == b"ctts":
                tracks[-1]["offsets"] = list(struct.iter_unpack(">Ii", body[8:]))
            else:
                entry = ">Qqi" if version else ">Iii"
                found = struct.iter_unpack(entry, body[8:])
                tracks[-1]["edits"] = [(duration, start) for duration, start, _ in found]
        file.seek(after)
    return film_scale, tracks
