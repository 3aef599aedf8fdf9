"""Large COCO files: read once, kept as an index under cache/, and mapped from there afterwards.

The index of a file without surprises is made from its columns; any other file is left to
`data_coco`, which reads all dialects and says what is wrong.
"""

from __future__ import annotations

import gc
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sam2train.data_coco import CocoVideos, Unlabelled, find_unlabelled
from sam2train.data_coco_files import Findings
from sam2train.data_index import (
    PACKED_FROM,
    RLE_KEYS,
    VideoIndex,
    as_bytes,
    ends,
    has_its_pictures,
    index_path,
    open_index,
    pack_videos,
    with_pictures,
    write_index,
)
from sam2train.data_pictures import Film, read_header
from sam2train.data_source import Frame, Video, video_warnings
from sam2train.machine import num_cores

# Keys that say more of a frame or an annotation than is read here.
_LABEL_WORDS = {"is_annotated", "is_labelled", "is_labeled", "labelled", "labeled"}
_LABEL_WORDS |= {"is_vid_train_frame", "is_key_frame", "is_keyframe"}
_PLACES = ("order_in_video", "frame_id", "frame_index", "frame_number")
_CHUNK = 1 << 16  # characters of RLE text at a time: what is worked out of them fits the caches


class _NotPlainError(Exception):
    """The file has something that is not read here."""


def plain_index(content: Mapping[str, Any], root: Path) -> VideoIndex | None:
    """The index of a file whose frames have ids, videos, places and existing pictures below `root`,
    and whose annotations have a `track_id` and an RLE of the size of the picture, one for each
    object and frame; None for any other file. No frame is called unlabelled in it.
    """
    try:
        return _read_columns(content, root)
    except (
        _NotPlainError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
        OSError,
    ):
        return None


def _need(condition: bool) -> None:
    if not condition:
        raise _NotPlainError


def _column(entries: Sequence[Mapping[str, Any]], key: str, *kinds: type) -> list:
    found = [entry[key] for entry in entries]
    _need(set(map(type, found)) <= {*kinds} and len(set(map(type, found))) <= 1)
    return found


def _read_columns(content: Mapping[str, Any], root: Path) -> VideoIndex:
    images, annotations = content["images"], content["annotations"]
    order, columns, video_ids, sizes, key = _image_columns(images, root)
    num_frames, num_all = len(images), len(annotations)

    raw_ids = np.array(_column(images, "id", int), np.int64)
    by_id = np.argsort(raw_ids)
    sorted_ids = raw_ids[by_id]
    _need((np.diff(sorted_ids) > 0).all())
    wanted = np.array(_column(annotations, "image_id", int), np.int64)
    found = np.minimum(np.searchsorted(sorted_ids, wanted), num_frames - 1)
    _need((sorted_ids[found] == wanted).all())
    place_of = np.empty(num_frames, np.int64)  # image of the file -> row of its frame
    place_of[order] = np.arange(num_frames)
    row = place_of[by_id[found]]

    names = np.array(_column(annotations, "id", int), np.int64)
    _need((np.diff(names) > 0).all() or (np.diff(np.sort(names)) > 0).all())
    _need(names.min() > -(2**62) and names.max() < 2**62)
    for flag in ("iscrowd", "ignore"):
        flags = [entry.get(flag) for entry in annotations]
        _need(set(map(type, flags)) <= {int, bool, type(None)} and not any(flags))
    tracks = np.array(_column(annotations, "track_id", int), np.int64)
    _need((tracks != -1).all())
    categories = [entry.get("category_id") for entry in annotations]
    if set(map(type, categories)) != {type(None)}:
        categories = np.array(_column(annotations, "category_id", int), np.int64)
    else:
        categories = np.zeros(num_all, np.int64)

    # In the order of frames, and in each as in the file.
    by_frame = np.argsort(row, kind="stable")
    row, tracks, names = row[by_frame], tracks[by_frame], names[by_frame]
    video = np.searchsorted(columns["video_first"], row, side="right") - 1
    span = int(tracks.max()) - int(tracks.min()) + 1
    _need(span * len(video_ids) < 2**62 and num_frames * num_all < 2**62)
    keys = video * span + (tracks - tracks.min())
    by_key = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[by_key], prepend=-1))  # of each object of each video
    first = by_key[starts]
    of_pair = np.empty(num_all, np.int64)
    of_pair[by_key] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, num_all)))
    categories = categories[by_frame]
    _need((categories == categories[first][of_pair]).all())
    # An object is once on a frame.
    _need((np.diff(np.sort(row * len(starts) + of_pair)) > 0).all())
    # The objects of a video in the order in which they appear.
    appear = np.argsort(first)
    firsts = np.searchsorted(video[first[appear]], np.arange(len(video_ids) + 1))
    place = np.empty(len(starts), np.int64)
    place[appear] = np.arange(len(starts)) - np.repeat(firsts[:-1], np.diff(firsts))
    ids = tracks[first[appear]].tolist()
    object_ids = [ids[a:b] for a, b in pairwise(firsts.tolist())]

    segments = _column(annotations, "segmentation", dict)
    segments = [segments[k] for k in by_frame.tolist()]
    kinds = [RLE_KEYS.get(tuple(segment)) for segment in segments]
    _need(None not in kinds)
    stated = [value for segment in segments for value in segment["size"]]
    _need(len(stated) == 2 * num_all and set(map(type, stated)) == {int})
    of_annotation = np.array(sizes, np.int64)[video]
    _need((np.array(stated, np.int64).reshape(-1, 2) == of_annotation).all())
    counts = _column(segments, "counts", str)
    text = "".join(counts).encode("ascii")
    segment_end = ends(np.fromiter(map(len, counts), np.int64, num_all))
    areas = rle_areas(as_bytes(text), segment_end, of_annotation.prod(axis=1))
    _need(areas is not None)

    columns |= {
        "frame_first": np.searchsorted(row, np.arange(num_frames + 1)),
        "object": place[of_pair].astype(np.int32),
        "area": areas,
        "kind": np.array(kinds, np.uint8),
        "name": names,
        "segment_end": segment_end,
        "segments": as_bytes(text),
        "labelled": np.ones(num_frames, bool),
        "page": np.full(num_frames, -1, np.int32),
        "ignored_end": np.zeros(num_frames + 1, np.int64),
        "ignored": as_bytes(b""),
    }
    notes = [] if key == "order_in_video" else [f"order of frames from `{key}`"]
    texts = {"video_ids": video_ids, "object_ids": object_ids, "names": None}
    return VideoIndex(columns, texts | {"warnings": [], "notes": notes, "levels": {}})


def _image_columns(
    images: Sequence[Mapping[str, Any]], root: Path
) -> tuple[np.ndarray, dict[str, np.ndarray], list, list[list[int]], str]:
    """Images of the file in the order of frames, with columns, ids and sizes of the videos."""
    keys = set().union(*images)
    _need(not keys & _LABEL_WORDS)
    key = next((key for key in _PLACES if key in keys), None)
    _need(key is not None)
    owners, places = _column(images, "video_id", int, str), _column(images, key, int)
    names = _column(images, "path" if "path" in keys else "file_name", str)
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    video = np.array([numbers[owner] for owner in owners])
    order = np.lexsort((np.array(places, np.int64), video))
    videos, ordered = video[order], np.array(places, np.int64)[order]
    _need(((np.diff(videos) > 0) | (np.diff(ordered) > 0)).all())

    sizes = list(zip(_column(images, "height", int), _column(images, "width", int), strict=True))
    _need(not _OTHER_NAMES.search("\n".join(names)))
    start = "" if str(root) == "." else f"{root}/"
    files = [start + name for name in names]
    _need(len(set(files)) == len(files))
    homes = {file.rpartition("/")[0] for file in files}
    _need(len(set(map(os.path.realpath, homes))) == len(homes))
    firsts = {owner: k for k, owner in enumerate(owners)}.values()
    stats = np.array(_check_pictures(files, sizes, firsts), np.int64)
    of_videos = [None] * len(numbers)
    for number, size in zip(video.tolist(), sizes, strict=True):
        _need(of_videos[number] in (None, size))
        of_videos[number] = size
    paths = [os.fsencode(files[k]) for k in order.tolist()]
    stats = stats[order]
    columns = {
        "video_first": np.searchsorted(videos, np.arange(len(numbers) + 1)),
        "video_size": np.array(of_videos, np.int64),
        "path_end": ends([len(path) for path in paths]),
        "paths": as_bytes(b"".join(paths)),
        "picture_size": stats[:, 0],
        "picture_time": stats[:, 1],
    }
    return order, columns, list(numbers), of_videos, key


# Names that may mean several files: with `\`, `%`, `?` or `:`, absolute, or with `.` and `..`.
_OTHER_NAMES = re.compile(r"[\\%?:]|(^|/)\.{0,2}(/|$)", re.MULTILINE)


def _check_pictures(
    files: list[str], sizes: list[tuple[int, int]], firsts: Iterable[int]
) -> list[tuple[int, int]]:
    """Bytes and time of each picture. All must be files, and those whose heads are read be plain:
    the first of each video, and some 2,000 of all; what is wrong with another one is said when it
    is read.
    """
    stats = [os.lstat(file) for file in files]
    _need(all(stat.S_ISREG(found.st_mode) for found in stats))
    chosen = {*firsts, *range(0, len(files), len(files) // _HEADS + 1)}
    with ThreadPoolExecutor(8) as pool:  # waits for the disk
        chunks = [sorted(chosen)[start : start + 64] for start in range(0, len(chosen), 64)]
        good = pool.map(
            lambda chunk: all(_is_plain_file(files[k], sizes[k]) for k in chunk), chunks
        )
        _need(all(good))
    return [(found.st_size, found.st_mtime_ns) for found in stats]


_HEADS = 2000


def _is_plain_file(path: str, size: tuple[int, int]) -> bool:
    """Whether a file is a picture of 8 bits of this size (H, W) that is not turned."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return _is_plain_head(head, size) or _is_plain_header(Path(path), head, size)


def _is_plain_header(path: Path, head: bytes, size: tuple[int, int]) -> bool:
    """The same for a JPEG with an EXIF part, or with more before its size than was read."""
    if head[:2] != b"\xff\xd8":
        return False
    header = read_header(path)
    return header.stored == size and not header.is_turned


def _is_plain_head(head: bytes, size: tuple[int, int]) -> bool:
    """Whether it begins a JPEG or PNG of 8 bits of this size (H, W) without an EXIF part."""
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        width, height, depth = struct.unpack(">IIB", head[16:25])
        before = head.find(b"IDAT")
        is_flat = before > 0 and b"eXIf" not in head[:before]
        return is_flat and depth <= 8 and (height, width) == size
    if head[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        kind, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return head[at + 4] == 8 and struct.unpack(">HH", head[at + 5 : at + 9]) == size
        if kind == 0xE1 or length < 2:
            break
        at += 2 + length
    return False


def rle_areas(text: np.ndarray, piece_end: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """(A,) int64 pixels of the masks that RLE texts hold; None where one of them is damaged.

    Args:
        text: (N,) uint8, one text after the other.
        piece_end: (A + 1,) where they start, and where the last one ends.
        pixels: (A,) of their frames.
    """
    num_texts = len(piece_end) - 1
    if num_texts == 0 or (np.diff(piece_end) == 0).any():
        return np.zeros(0, np.int64) if num_texts == 0 else None
    cuts = np.searchsorted(piece_end, np.arange(0, piece_end[-1], _CHUNK))
    cuts = np.unique(np.append(np.minimum(cuts, num_texts), num_texts))
    cuts = cuts if cuts[0] == 0 else np.append(0, cuts)

    def of_chunk(a: int, b: int) -> np.ndarray | None:
        start, end = piece_end[a], piece_end[b]
        return _areas(text[start:end], piece_end[a : b + 1] - start, pixels[a:b])

    with ThreadPoolExecutor(num_cores()) as pool:  # NumPy works outside Python's lock
        found = list(pool.map(of_chunk, cuts[:-1].tolist(), cuts[1:].tolist()))
    return None if any(part is None for part in found) else np.concatenate(found)


def _areas(text: np.ndarray, piece_end: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """See `data_rle`, which reads one text in the same way."""
    codes = text - np.uint8(48)  # below 0 it wraps around to large numbers
    if codes.max() > 63 or (codes[piece_end[1:] - 1] & 32).any():
        return None
    last = np.flatnonzero(codes < 32).astype(np.int32)
    first = np.empty_like(last)
    first[0], first[1:] = 0, last[:-1] + 1
    length = last - first + 1
    longest = int(length.max())
    if longest > 6:
        return None
    # 30 bits at most. Sums may wrap around, their differences are right again if the text is.
    runs = (codes[first] & 31).astype(np.int32)
    for place in range(1, longest):
        longer = np.flatnonzero(length > place)
        runs[longer] |= (codes[first[longer] + place] & 31).astype(np.int32) << (5 * place)
    negative = np.flatnonzero(codes[last] & 16)
    runs[negative] -= np.int32(1) << (5 * length[negative])

    starts = np.searchsorted(first, piece_end[:-1])  # of each text, among the runs
    numbers = np.diff(np.append(starts, len(runs)))
    if (numbers > 2 * pixels + 2).any():
        return None
    # From the fourth on, each run is coded as its difference to the one before the last: sums of
    # every other one, less what came before the text, and less its first run, which stands alone.
    sums = np.empty(len(runs) + 1, np.int32)
    sums[0] = 0
    np.cumsum(runs[0::2], out=sums[1::2])
    np.cumsum(runs[1::2], out=sums[2::2])
    odd = np.arange(len(runs), dtype=np.int32) & 1 != np.repeat(starts & 1, numbers)
    heads = runs[starts]
    runs = sums[1:] - np.where(
        odd, np.repeat(sums[starts], numbers), np.repeat(sums[starts + 1], numbers)
    )
    runs[starts] = heads
    if runs.min() < 0 or (np.add.reduceat(runs, starts, dtype=np.int64) != pixels).any():
        return None
    return np.add.reduceat(runs * odd, starts, dtype=np.int64)


# The file under cache/


class IndexedVideos(CocoVideos):
    """The videos of an index, with what was found when it was made.

    Args:
        path: of the JSON, for messages.
    """

    def __init__(self, path: Path, index: VideoIndex):
        self.path, self.index = path, index
        self.videos = index.videos()
        self.warnings, self.notes = list(index.texts["warnings"]), list(index.texts["notes"])
        self._film = Film()
        self._levels = {video_id: tuple(pair) for video_id, pair in index.texts["levels"]}
        ids = index.texts["video_ids"]
        self._shows = dict(zip(ids, index.shows_any().tolist(), strict=True))
        regions = np.diff(index.columns["ignored_end"][index.columns["video_first"]]) > 0
        self._ignores = dict(zip(ids, regions.tolist(), strict=True))

    def has_ignored(self, video: Video) -> bool:
        return self._ignores[video.video_id]

    def is_trainable(self, video: Video) -> bool:
        return self._shows[video.video_id]


def read_large_coco(
    path: Path,
    image_root: str | Path | None,
    settings: Mapping[str, Any],
    read: Callable[[], CocoVideos],
    content: Callable[[], Mapping[str, Any]],
) -> CocoVideos:
    """The videos of a JSON; of a large one, from its index under cache/ if it has been read before.

    An index belongs to the bytes of the JSON, the settings, and the sizes and times of the
    pictures; anything else is read anew.

    Args:
        settings: all that `read` depends on.
        read: what reads the file, whatever it holds.
        content: the same file as COCO has it, for the quick way; raises as `read` does.

    Raises:
        UserError: see `CocoVideos`.
    """
    try:
        if path.stat().st_size < PACKED_FROM or not path.is_file():
            return read()
        root = None if image_root is None else str(Path(image_root).resolve())
        place = index_path(path, (str(path.absolute()), root, dict(settings)))
    except OSError:
        return read()  # says what is wrong
    index = open_index(place)
    if index is not None and has_its_pictures(index):
        return IndexedVideos(path, index)
    collects = gc.isenabled()
    gc.disable()  # a million annotations stay alive until the index is made
    try:
        index = plain_index(content(), path.parent) if root is None else None
        if index is not None:
            index = _with_findings(index, settings["unlabelled_frames"])
        else:
            source = read()
            found = {"warnings": source.warnings, "notes": source.notes}
            levels = list(source._levels.items())
            index = pack_videos(source.videos, found | {"levels": levels})
            if index is None:
                return source
            index = with_pictures(index)
        return IndexedVideos(path, write_index(index, place))
    finally:
        if collects:
            gc.enable()


def _with_findings(index: VideoIndex, unlabelled: Unlabelled) -> VideoIndex:
    """An index with its unlabelled frames and what there is to say, as `CocoVideos` finds it."""
    columns, texts = dict(index.columns), index.texts
    found = Findings(notes=list(texts["notes"]))
    if num_empty := int((columns["area"] == 0).sum()):
        found.warnings.append(
            f"{num_empty} annotations have no pixel: the object counts as absent there"
        )
    firsts, number = columns["video_first"].tolist(), np.diff(columns["frame_first"])
    if not number.all():
        frames = [Frame(Path(), range(n)) for n in number.tolist()]  # as many annotations each
        videos = [
            Video(video_id, (0, 0), frames[a:b], [])
            for video_id, a, b in zip(texts["video_ids"], firsts[:-1], firsts[1:], strict=True)
        ]
        videos = find_unlabelled(videos, None, unlabelled, found)
        columns["labelled"] = np.array([f.is_labelled for video in videos for f in video.frames])
    frame = np.repeat(np.arange(len(number)), number)
    video = np.searchsorted(columns["video_first"], frame, side="right") - 1
    first_object = np.concatenate([[0], np.cumsum([len(ids) for ids in texts["object_ids"]])])
    shown = (columns["area"] > 0) & columns["labelled"][frame]
    owner = first_object[video] + columns["object"]
    times = np.bincount(owner[shown], minlength=first_object[-1])
    most = [int(times[a:b].max(initial=0)) for a, b in pairwise(first_object)]
    warnings = found.warnings + video_warnings(texts["video_ids"], most)
    return VideoIndex(columns, {**texts, "warnings": warnings, "notes": found.notes})
