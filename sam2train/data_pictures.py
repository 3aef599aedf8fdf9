"""Pictures and masks as they lie on disk: decoded in full, or an error that names the file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sam2train.errors import UserError

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
        with Image.open(path) as image:
            width, height = image.size
            # Pillow turns a TIFF itself. For a PNG without the tag, getexif() decodes the whole
            # picture in search of one at its end.
            skip = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            orientation = 1 if skip else image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as problem:  # Pillow's parsers also raise struct.error, KeyError and others
        raise UserError(_why_unreadable(path, problem)) from problem
    shown = (width, height) if 5 <= orientation <= 8 else (height, width)
    return Header((height, width), shown, 2 <= orientation <= 8)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB; transparency is dropped.

    Args:
        size: (H, W) the picture must have. Where the stored pixels fit it, the EXIF orientation is
            left alone; else it is applied. None applies it.

    Raises:
        UserError: missing, truncated, no picture, or of another size.
    """
    try:
        with Image.open(path) as image:
            image.load()  # raises for a truncated file, of which OpenCV returns half a picture
            if size is None or (image.height, image.width) != tuple(size):
                image = ImageOps.exif_transpose(image)
            pixels = _to_rgb(image)
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem
    if size is not None and pixels.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected "
            f"{size[1]}x{size[0]} (width x height)"
        )
    return pixels


def read_id_mask(path: Path) -> np.ndarray:
    """(H, W) uint16: the palette index or grey value of each pixel, 0 for the background.

    Raises:
        UserError: missing, truncated, no picture, or one in colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode, pixels = image.mode, np.asarray(image)
    except Exception as problem:
        raise UserError(_why_unreadable(path, problem)) from problem
    if pixels.ndim == 3:  # a few masks of DAVIS-2016 are grey in RGB files
        colours = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
        pixels = colours[..., 0] if (colours == colours[..., :1]).all() else pixels
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui" or not 0 <= pixels.min() <= MAX_ID:
        raise UserError(
            f"{path}: a picture of mode {mode}; expected a palette or grey PNG whose pixels are "
            f"the ids of objects, up to {MAX_ID}"
        )
    return pixels.astype(np.uint16)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip 16 bits to 8 and turn the picture white.
        grey = np.asarray(image, np.float64)
        peak = 65535.0 if image.mode.startswith("I;16") or grey.max() > 255 else 255.0
        grey = np.clip(grey * (255.0 / peak), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return np.asarray(image.convert("RGB"))


def _why_unreadable(path: Path, problem: Exception) -> str:
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
    """Frames of films, read in order: the next frame is decoded at once, an earlier one means
    starting over.

    Frames are counted by decoding, never sought: seeking lands beside the wanted frame in some
    films. Each thread and each process keeps one film open.
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
        process, opened, capture, position = getattr(self._state, "open", (None, None, None, 0))
        # A forked process would share the position in the file with its parent.
        if (process, opened) != (os.getpid(), path) or position > frame_idx:
            # A decoder with threads of its own cannot be closed in a forked process: it would wait
            # for threads that exist in its parent only.
            one_thread = [cv2.CAP_PROP_N_THREADS, 1]
            capture, position = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, one_thread), 0
        while position < frame_idx and capture.grab():
            position += 1
        good, pixels = capture.read()
        if not good:
            self._state.open = (None, None, None, 0)
            raise UserError(f"{path}: ends or is damaged at frame {position}")
        self._state.open = (os.getpid(), path, capture, position + 1)
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_film_header(path: Path) -> tuple[tuple[int, int], int]:
    """(H, W) and the number of frames, without decoding them.

    Raises:
        UserError: OpenCV cannot read the film.
    """
    capture = cv2.VideoCapture(str(path))
    good, first = capture.read()
    num_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not good or num_frames < 1:
        raise UserError(f"{path}: is no film that OpenCV can read")
    return first.shape[:2], num_frames
