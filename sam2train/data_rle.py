"""Masks as JSON files have them: RLE and polygons in all their forms, read into run lengths."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from sam2train.files import MORE_ALLOWED, size_limit
from sam2train.transforms import MaskPart, cut_mask

# Bounds of the polygons of one mask: pycocotools needs time and memory in proportion to both.
MAX_CORNERS = 100_000
MAX_OUTLINE = 1_000_000  # pixels

_POLYGONS = "polygons [[x1, y1, x2, y2, ...], ...]"


class Parts(NamedTuple):
    """A mask that is the union of several segmentations."""

    segmentations: tuple[Any, ...]


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from COCO: compressed or uncompressed RLE, polygons, or `Parts` of these; nothing
    is an empty mask.

    Raises:
        ValueError: what is wrong with it, without saying where; the caller knows that.
    """
    if isinstance(segmentation, Parts):
        parts = [decode_segmentation(part, size) for part in segmentation.segmentations]
        return np.logical_or.reduce(parts)
    part = decode_part(segmentation, size)
    mask, (top, left) = np.zeros(size, bool), part.corner
    height, width = part.pixels.shape
    mask[top : top + height, left : left + width] = part.pixels
    return mask


def decode_part(segmentation: Any, size: tuple[int, int]) -> MaskPart:
    """The rectangle around a segmentation, so that a small object costs little; see
    `decode_segmentation`."""
    if isinstance(segmentation, Parts):
        return cut_mask(decode_segmentation(segmentation, size))
    runs = run_lengths(segmentation, size)
    box = bounding_box(runs, size[0])
    if box is None:
        return MaskPart(np.zeros((0, 0), bool), (0, 0), size)
    left, top, right, bottom = box
    start, end = left * size[0], (right + 1) * size[0]
    lengths = np.diff(np.clip(np.cumsum(runs), start, end), prepend=start)
    inside = np.arange(len(runs)) % 2 == 1
    columns = np.repeat(inside, lengths)
    columns = np.append(columns, np.zeros(end - start - len(columns), bool))
    columns = columns.reshape(right + 1 - left, size[0])[:, top : bottom + 1]
    return MaskPart(columns.T, (top, left), size)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """The compressed RLE of a mask (H, W) bool, as JSON files have it."""
    counts = rle.encode(np.asfortranarray(mask.view(np.uint8)))["counts"]
    return {"size": list(mask.shape), "counts": counts.decode()}


def segmentation_area(segmentation: Any, size: tuple[int, int]) -> int:
    """Pixels of a segmentation; only `Parts` are decoded. Raises ValueError as
    `decode_segmentation`."""
    if isinstance(segmentation, Parts):
        return int(decode_segmentation(segmentation, size).sum())
    return int(run_lengths(segmentation, size)[1::2].sum())


def bounding_box(runs: np.ndarray, height: int) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2) of the pixels inside, the last column and row included; None without any.

    Args:
        runs: see `run_lengths`.
        height: H of the frame.
    """
    ends = np.cumsum(runs)
    first, last = ends[:-1:2], ends[1::2] - 1
    full = last >= first
    if not full.any():
        return None
    first, last = first[full], last[full]
    rows = (0, height - 1)
    if (first // height == last // height).all():
        rows = (int((first % height).min()), int((last % height).max()))
    return int(first[0] // height), rows[0], int(last[-1] // height), rows[1]


def run_lengths(
    segmentation: Any, size: tuple[int, int], remarks: set[str] | None = None
) -> np.ndarray:
    """(R,) int64: pixels outside, inside, outside, ... the mask, down one column after the other.

    They are read and checked here because pycocotools accepts runs that do not fill the frame, and
    leaves the rest of the mask uninitialised.

    Args:
        remarks: gets a line for what is not COCO as its paper has it.

    Raises:
        ValueError: see `decode_segmentation`.
    """
    height, width = size
    remarks = set() if remarks is None else remarks
    if segmentation is None or segmentation == []:
        return np.array([height * width])
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if segmentation["size"] != [height, width]:
            raise ValueError(
                f"the RLE has size {segmentation['size']}, the frame [{height}, {width}] "
                "([height, width])"
            )
        return _read_counts(segmentation["counts"], size, remarks)
    if isinstance(segmentation, list) or _is_kwcoco(segmentation):
        return _fill_shapes(list(_shapes(segmentation, remarks)), size)
    raise ValueError(f"expected an RLE with `size` and `counts`, or {_POLYGONS}")


def polygon_corners(segmentation: Any) -> list[list]:
    """The coordinates of all rings of polygons, as x, y, x, y, ...; [] for what is not polygons."""
    if not (isinstance(segmentation, list) or _is_kwcoco(segmentation)):
        return []
    try:
        return [ring for shape in _shapes(segmentation, set()) for ring in (shape[0], *shape[1])]
    except ValueError:
        return []


def scaled_polygons(segmentation: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Polygons in pixels, from those in shares of width and height."""

    def scale(ring: list) -> list[list[float]]:
        return [[x * size[1], y * size[0]] for x, y in zip(ring[::2], ring[1::2], strict=True)]

    return [
        {"exterior": scale(outer), "interiors": [scale(hole) for hole in holes]}
        for outer, holes in _shapes(segmentation, set())
    ]


# Run lengths


def _read_counts(counts: Any, size: tuple[int, int], remarks: set[str]) -> np.ndarray:
    """Run lengths from `counts`, in the first of its readings that fills the frame."""
    if isinstance(counts, list):
        return _checked(_parse_list(counts, size, remarks), size)
    if not isinstance(counts, str | bytes) or not counts:
        raise ValueError(f"`counts` is {counts!r}; expected RLE text or a list of run lengths")
    problem = None
    for reading, remark in _readings(counts):
        try:
            runs = _checked(_parse_text(reading, size), size)
        except ValueError as found:
            problem = problem or found
            continue
        if remark:
            remarks.add(remark)
        return runs
    raise problem


def _readings(counts: str | bytes) -> Iterator[tuple[bytes, str]]:
    """RLE text as it is, or as it was before Python wrote it as a literal; with a remark."""
    text = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if text[:2] in ("b'", 'b"') and text[-1] == text[1] and len(text) > 3:
        remark = f"`counts` is Python's text of bytes, {text[:2]}...{text[-1]}; read as the bytes"
        with contextlib.suppress(ValueError, SyntaxError):
            yield ast.literal_eval(text), remark
        text = text[2:-1]
        yield text.encode(), remark
    else:
        yield text.encode(), ""
    if "\\\\" in text:
        yield text.replace("\\\\", "\\").encode(), "backslashes in `counts` are doubled; halved"


def _checked(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The runs, if they fill the frame.

    Each is compared first: the sum of numbers that are too large can wrap to that of the frame.
    """
    height, width = size
    large = np.abs(runs).max(initial=0)
    if large > height * width:
        raise ValueError(f"a run of {large} pixels in a frame of {height} x {width}")
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"the run lengths add up to {runs.sum()}, not {height} x {width}, or one is negative"
        )
    return runs


def _parse_list(counts: list, size: tuple[int, int], remarks: set[str]) -> np.ndarray:
    _check_count(len(counts), size)
    if any(type(run) is float and run.is_integer() for run in counts):
        remarks.add("run lengths are floats such as 3.0; read as whole numbers")
        counts = [int(run) if type(run) is float and run.is_integer() else run for run in counts]
    if not counts or not all(type(run) is int for run in counts):
        raise ValueError("`counts` is a list, but not of whole numbers")
    if (large := max(map(abs, counts))) > np.iinfo(np.int64).max:
        raise ValueError(f"a run of {large} pixels in a frame of {size[0]} x {size[1]}")
    return np.array(counts, np.int64)


def _check_count(num_runs: int, size: tuple[int, int]) -> None:
    # Runs of 0 pixels are written at the start, and by some programs at the end.
    if num_runs > 2 * size[0] * size[1] + 2:
        raise ValueError(f"{num_runs} run lengths for a frame of {size[0]} x {size[1]}")


def _parse_text(text: bytes, size: tuple[int, int]) -> np.ndarray:
    """Run lengths from the text code of pycocotools (`rleToString`)."""
    # Each character holds 5 bits, lowest first, and a sixth that says whether the number goes on.
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)
    length = np.diff(last, prepend=-1)
    damaged = not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] >= 32
    if damaged or length.max() > 6:  # 6 characters: 30 bits, far more than a frame has pixels
        raise ValueError("`counts` is no RLE text: damaged, or of another encoding")
    _check_count(len(last), size)
    first = last - length + 1
    shift = 5 * (np.arange(len(codes)) - np.repeat(first, length))
    runs = np.add.reduceat((codes & 31) << shift, first)
    runs -= np.where(codes[last] & 16, 1 << 5 * length, 0)  # two's complement
    # From the fourth on, each run is coded as its difference to the one before the last.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


# Polygons


def _is_kwcoco(shape: Any) -> bool:
    return isinstance(shape, dict) and "exterior" in shape


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shapes(
    segmentation: Any, remarks: set[str], *, nested: bool = False
) -> Iterator[tuple[list, list[list]]]:
    """Outer ring and holes of each shape, as x, y, x, y, ...; checked for what they hold.

    COCO has a list of polygons. Also read: one polygon that is no list of polygons, corners as
    pairs, lists that are nested once more, and kwcoco's mappings with `exterior` and `interiors`.
    """
    if _is_kwcoco(segmentation):
        holes = segmentation.get("interiors") or []
        if not isinstance(holes, list):
            raise ValueError("`interiors` is no list of rings")
        yield _ring(segmentation["exterior"]), [_ring(hole) for hole in holes]
        return
    if segmentation and all(map(_is_number, segmentation)):
        remarks.add("`segmentation` is one polygon instead of a list of polygons")
        yield _ring(segmentation), []
        return
    if _are_pairs(segmentation):
        remarks.add("corners of polygons are pairs [x, y]")
        yield _ring(segmentation), []
        return
    points, rings = [], []
    for shape in segmentation:
        if _is_kwcoco(shape) or (isinstance(shape, list) and shape and type(shape[0]) is list):
            if nested and not _is_kwcoco(shape):
                raise ValueError(f"expected {_POLYGONS}")
            if isinstance(shape, list) and not _are_pairs(shape):
                remarks.add("polygons are nested once more")
            rings += list(_shapes(shape, remarks, nested=True))
        elif not isinstance(shape, list):
            raise ValueError(f"expected {_POLYGONS}")
        elif len(shape) in (2, 4) and all(map(_is_number, shape)):
            points.append(shape)
        else:
            rings.append((_ring(shape), []))
    if points and not rings:
        raise ValueError(
            f"a polygon of {len(points[0])} numbers; expected x, y pairs of 3 corners or more"
        )
    if points:
        remarks.add("single points or lines beside the polygons are left out")
    yield from rings


def _are_pairs(shape: Any) -> bool:
    """Whether it is a ring [[x, y], ...] of three corners or more."""
    return len(shape) > 2 and all(
        isinstance(corner, list) and len(corner) == 2 and all(map(_is_number, corner))
        for corner in shape
    )


def _ring(corners: Any) -> list:
    """x, y, x, y, ... of 3 corners or more, from a list of these or of pairs."""
    if not isinstance(corners, list):
        raise ValueError(f"expected {_POLYGONS}")
    if corners and all(isinstance(corner, list) for corner in corners):
        corners = [value for corner in corners for value in corner]
    if len(corners) > 2 * (most := size_limit(MAX_CORNERS)):
        raise ValueError(
            f"a polygon of {len(corners) // 2} corners, more than {most}; write an RLE. "
            f"{MORE_ALLOWED}"
        )
    # pycocotools takes four numbers for a box, and reads beyond the list for an odd count.
    if len(corners) < 6 or len(corners) % 2:
        raise ValueError(
            f"a polygon of {len(corners)} numbers; expected x, y pairs of 3 corners or more"
        )
    return corners


def _fill_shapes(shapes: list[tuple[list, list[list]]], size: tuple[int, int]) -> np.ndarray:
    """Run lengths of the area that the shapes cover together, without their holes."""
    far = 10 * max(size)
    rings = [ring for outer, holes in shapes for ring in (outer, *holes)]
    if (corners := sum(map(len, rings)) // 2) > (most := size_limit(MAX_CORNERS)):
        raise ValueError(
            f"polygons of {corners} corners, more than {most}; write an RLE. {MORE_ALLOWED}"
        )
    outline = 0.0
    for ring in rings:
        if not all(_is_number(value) and abs(value) <= far for value in ring):
            raise ValueError(f"a polygon has a corner that is no number or beyond +-{far} px")
        corners = np.array(ring, np.float64).reshape(-1, 2)
        outline += np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if outline > (most := size_limit(MAX_OUTLINE)):
        raise ValueError(
            f"polygons with an outline of {outline:.0f} px, more than {most}; write an RLE. "
            f"{MORE_ALLOWED}"
        )
    if not any(holes for _, holes in shapes):
        counts = rle.merge(rle.frPyObjects([outer for outer, _ in shapes], *size))["counts"]
        return _checked(_parse_text(counts, size), size)
    mask = np.zeros(size, bool)
    for outer, holes in shapes:
        filled = rle.decode(rle.merge(rle.frPyObjects([outer], *size))).astype(bool)
        for hole in holes:
            filled &= ~rle.decode(rle.merge(rle.frPyObjects([hole], *size))).astype(bool)
        mask |= filled
    return _checked(_parse_text(encode_mask(mask)["counts"].encode(), size), size)


# Label Studio's own code


def decode_brush(code: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from the run lengths of Label Studio's brush: the pixels that are not
    transparent.

    The code is a stream of bits: 32 of the number of values, 5 of the bits of a value less 1, and
    4 times 4 of the bits of a run length less 1. Then, until all values are there: a bit that is 1
    for a run of one value and 0 for single values, 2 bits that choose one of the four lengths, the
    number of values less 1 in so many bits, and the value or values. Values are the R, G, B, A of
    each pixel, row by row. (thi.ng's rle-pack, which Label Studio's editor uses.)

    Raises:
        ValueError: damaged, or not of this size.
    """
    if not isinstance(code, list) or not all(type(b) is int and 0 <= b <= 255 for b in code):
        raise ValueError("`rle` is no list of bytes")
    bits = np.unpackbits(np.array(code, np.uint8))
    place = 0

    def read(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError(f"`rle` ends after {len(bits)} bits, before its mask does")
        chunk = bits[place : place + count]
        place += count
        return int.from_bytes(np.packbits(chunk).tobytes(), "big") >> (-count % 8)

    number, word = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    height, width = size
    if number != 4 * height * width or word != 8:
        raise ValueError(
            f"`rle` has {number} values of {word} bits; expected {4 * height * width} of 8, four "
            f"for each pixel of {width}x{height} (width x height)"
        )
    values = np.zeros(number, np.uint8)
    filled = 0
    while filled < number:
        is_run = read(1)
        count = read(lengths[read(2)]) + 1
        if filled + count > number:
            raise ValueError("`rle` has more values than the picture")
        if is_run:
            values[filled : filled + count] = read(8)
        else:
            chunk = bits[place : place + 8 * count]
            if len(chunk) < 8 * count:
                raise ValueError(f"`rle` ends after {len(bits)} bits, before its mask does")
            values[filled : filled + count] = np.packbits(chunk)
            place += 8 * count
        filled += count
    return values.reshape(height, width, 4)[:, :, 3] > 0
