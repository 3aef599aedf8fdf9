"""Pictures and masks as they lie on disk: decoded in full, or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as rle

from sam2train.errors import UserError

_EXIF_ORIENTATION = 0x0112


def stored_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(H, W) as stored and (H, W) as shown after the EXIF orientation, from the header alone.

    Raises:
        UserError: missing, unreadable or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except (OSError, UnidentifiedImageError, ValueError) as problem:
        raise UserError(_why_unreadable(path, problem)) from None
    return (height, width), (width, height) if turned else (height, width)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Args:
        size: (H, W) the picture must have. Where only the stored pixels fit it, the EXIF
            orientation is left alone; else it is applied. None applies it.

    Raises:
        UserError: missing, truncated, no picture, or of another size.
    """
    try:
        with Image.open(path) as image:
            image.load()  # Pillow raises for a truncated file; OpenCV would return half a picture
            if size is None or (image.height, image.width) != tuple(size):
                image = ImageOps.exif_transpose(image)
            pixels = _to_rgb(image)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as problem:
        raise UserError(_why_unreadable(path, problem)) from None
    if size is not None and pixels.shape[:2] != tuple(size):
        raise UserError(
            f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]}, expected "
            f"{size[1]}x{size[0]} (width x height)"
        )
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip 16 bits to 8 and turn the picture white.
        grey = np.asarray(image, np.float64)
        peak = 65535.0 if grey.max() > 255 else 255.0
        grey = np.clip(grey * (255.0 / peak), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _why_unreadable(path: Path, problem: Exception) -> str:
    if not path.exists():
        return f"{path}: no such file"
    start = path.read_bytes()[:64] if path.is_file() else b""
    if path.is_dir():
        what = "is a folder"
    elif not start:
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


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from COCO: compressed or uncompressed RLE, or polygons; nothing is an empty mask.

    Raises:
        ValueError: what is wrong with it, without saying where; the caller knows that.
    """
    encoded = encode_segmentation(segmentation, size)
    if encoded is None:
        return np.zeros(size, bool)
    try:
        return rle.decode(encoded).astype(bool)
    except ValueError:
        raise ValueError("the run lengths do not describe a mask of its size") from None


def segmentation_area(segmentation: Any, size: tuple[int, int]) -> int:
    """Pixels of a segmentation, without decoding it. Raises ValueError as `decode_segmentation`."""
    encoded = encode_segmentation(segmentation, size)
    return 0 if encoded is None else int(rle.area(encoded))


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> dict | None:
    """A COCO segmentation as compressed RLE for pycocotools; None where it is empty."""
    height, width = size
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, dict):
        if "counts" not in segmentation or "size" not in segmentation:
            raise ValueError("an RLE needs `size` [height, width] and `counts`")
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(
                f"the RLE has size {segmentation['size']}, the frame [{height}, {width}] "
                "([height, width])"
            )
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != height * width or any(run < 0 for run in counts):
                raise ValueError(f"the run lengths add up to {sum(counts)}, not {height} x {width}")
            return rle.frPyObjects(segmentation, height, width)
        return {"size": [height, width], "counts": counts}
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        raise ValueError("expected an RLE or a list of polygons [[x1, y1, x2, y2, ...], ...]")
    for polygon in segmentation:
        # pycocotools takes four numbers for a box, and fills garbage for an odd count.
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon of {len(polygon)} numbers; expected x, y pairs of 3 corners or more"
            )
    return rle.merge(rle.frPyObjects(segmentation, height, width))
