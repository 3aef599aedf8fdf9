"""An index of videos in columns, and a hash of data by its content.

The index lies in a file that processes map, so that a large data set is read once and shared,
whether they are forked or started anew. By the hash two numbers are known to speak of the same
data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from sam2train.data_rle import Parts
from sam2train.data_source import Annotation, Frame, Video, VideoSource
from sam2train.files import check_regular, file_hash

# Below the current folder, as runs/ is; may be deleted at any time.
INDEX_FOLDER = Path("cache/index")
# Bytes of a JSON from which its index is packed; that of a smaller one is made faster than read.
PACKED_FROM = 1 << 20
_VERSION = b"sam2train index 1\n"
_KEPT = 8  # videos whose frames are Python objects at a time

# How a segmentation is stored: the text of an RLE of the video's size, with its keys in one order
# or the other, or JSON.
SIZE_FIRST, COUNTS_FIRST, AS_JSON, AS_PARTS = range(4)
RLE_KEYS = {("size", "counts"): SIZE_FIRST, ("counts", "size"): COUNTS_FIRST}


@dataclass(frozen=True)
class VideoIndex:
    """Videos of V, F frames and A annotations, in the order of their frames.

    Columns: `video_first` (V + 1,) rows of frames; `video_size` (V, 2); `path_end` (F + 1,) bytes
    of `paths`; `labelled`, `page` (F,), page -1: none; `frame_first` (F + 1,) rows of annotations;
    `ignored_end` (F + 1,) bytes of `ignored`, JSON; `object` (A,) place in the ids of the video;
    `area`, `kind` (A,); `name` (A,) where all are whole numbers; `segment_end` (A + 1,) bytes of
    `segments`; `picture_size`, `picture_time` (F,) bytes and nanoseconds.

    Texts: `video_ids`, `object_ids` of each video, `names` of annotations or null, and what the
    source has found: `warnings`, `notes`, `levels`.
    """

    columns: Mapping[str, np.ndarray]
    texts: Mapping[str, Any]
    path: Path | None = None  # of the file; None: in memory only

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames_of", lru_cache(_KEPT)(self._make_frames))

    def __reduce__(self) -> tuple:
        if self.path is not None:
            return _reopen, (self.path,)
        return VideoIndex, (dict(self.columns), self.texts)

    def videos(self) -> list[Video]:
        """The videos; their frames are made when they are asked for."""
        first, sizes = self.columns["video_first"].tolist(), self.columns["video_size"].tolist()
        ids = zip(self.texts["video_ids"], self.texts["object_ids"], strict=True)
        return [
            Video(video_id, tuple(sizes[v]), Frames(self, v, first[v + 1] - first[v]), object_ids)
            for v, (video_id, object_ids) in enumerate(ids)
        ]

    def shows_any(self) -> np.ndarray:
        """(V,) bool: whether a labelled frame of a video has an object with a pixel."""
        columns = self.columns
        full = np.concatenate([[0], np.cumsum(columns["area"] > 0)])
        of_frame = np.diff(full[columns["frame_first"]]) * columns["labelled"]
        return np.diff(np.concatenate([[0], np.cumsum(of_frame)])[columns["video_first"]]) > 0

    def picture_paths(self) -> list[str]:
        """(F,) of the frames."""
        pieces = self._pieces("path_end", "paths", slice(0, len(self.columns["labelled"])))
        return list(map(os.fsdecode, pieces))

    def _make_frames(self, video: int) -> list[Frame]:
        columns, object_ids = self.columns, self.texts["object_ids"][video]
        rows = slice(*columns["video_first"][video : video + 2].tolist())
        size = columns["video_size"][video].tolist()
        frames = []
        paths = self._pieces("path_end", "paths", rows)
        regions = self._pieces("ignored_end", "ignored", rows)
        firsts = columns["frame_first"][rows.start : rows.stop + 1].tolist()
        members = slice(firsts[0], firsts[-1])
        found = self._annotations(members, object_ids, size)
        pages, labelled = columns["page"][rows].tolist(), columns["labelled"][rows].tolist()
        for t, (path, region) in enumerate(zip(paths, regions, strict=True)):
            annotations = dict(found[firsts[t] - firsts[0] : firsts[t + 1] - firsts[0]])
            page = None if pages[t] < 0 else pages[t]
            ignored = _segmentation(region[1:], region[0], size) if region else None
            path = Path(os.fsdecode(path))
            frames.append(Frame(path, annotations, bool(labelled[t]), page, ignored))
        return frames

    def _annotations(
        self, rows: slice, object_ids: Sequence[int | str], size: list[int]
    ) -> list[tuple[int | str, Annotation]]:
        columns, names = self.columns, self.texts["names"]
        names = columns["name"][rows].tolist() if names is None else names[rows]
        pieces = self._pieces("segment_end", "segments", rows)
        parts = zip(
            columns["object"][rows].tolist(),
            names,
            columns["kind"][rows].tolist(),
            columns["area"][rows].tolist(),
            pieces,
            strict=True,
        )
        return [
            (object_ids[place], Annotation(name, _segmentation(piece, kind, size), area))
            for place, name, kind, area, piece in parts
        ]

    def _pieces(self, ends: str, text: str, rows: slice) -> list[bytes]:
        places = self.columns[ends][rows.start : rows.stop + 1]
        whole = self.columns[text][places[0] : places[-1]].tobytes()
        return [whole[a:b] for a, b in pairwise((places - places[0]).tolist())]


class Frames(Sequence[Frame]):
    """The frames of one video of an index."""

    def __init__(self, index: VideoIndex, video: int, number: int):
        self.index, self.video, self.number = index, video, number

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, place: int) -> Frame: ...
    @overload
    def __getitem__(self, place: slice) -> list[Frame]: ...
    def __getitem__(self, place: int | slice) -> Frame | list[Frame]:
        return self.index.frames_of(self.video)[place]

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.index.frames_of(self.video))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


def pack_videos(videos: Sequence[Video], texts: Mapping[str, Any]) -> VideoIndex | None:
    """The index of videos; None where they hold what JSON cannot.

    Args:
        texts: what the source has found.
    """
    rows: dict[str, list] = {name: [] for name in ("path", "labelled", "page", "ignored", "count")}
    rows |= {name: [] for name in ("object", "name", "area", "kind", "segment")}
    try:
        for video in videos:
            places = {o: place for place, o in enumerate(video.object_ids)}
            for frame in video.frames:
                rows["path"].append(os.fsencode(frame.path))
                rows["labelled"].append(frame.is_labelled)
                rows["page"].append(-1 if frame.page is None else frame.page)
                region = b""
                if frame.ignored is not None:
                    kind, region = _stored(frame.ignored, video.size)
                    region = bytes([kind]) + region
                rows["ignored"].append(region)
                rows["count"].append(len(frame.annotations))
                for object_id, annotation in frame.annotations.items():
                    kind, segment = _stored(annotation.segmentation, video.size)
                    rows["object"].append(places[object_id])
                    rows["name"].append(annotation.annotation_id)
                    rows["area"].append(annotation.area)
                    rows["kind"].append(kind)
                    rows["segment"].append(segment)
    except (TypeError, ValueError):  # bytes of an RLE that was made in Python
        return None
    whole = all(type(name) is int and abs(name) < 2**62 for name in rows["name"])
    columns = {
        "video_first": ends([len(video.frames) for video in videos]),
        "video_size": np.array([video.size for video in videos], np.int64).reshape(-1, 2),
        "path_end": ends([len(path) for path in rows["path"]]),
        "paths": as_bytes(b"".join(rows["path"])),
        "labelled": np.array(rows["labelled"], bool),
        "page": np.array(rows["page"], np.int32),
        "frame_first": ends(rows["count"]),
        "ignored_end": ends([len(region) for region in rows["ignored"]]),
        "ignored": as_bytes(b"".join(rows["ignored"])),
        "object": np.array(rows["object"], np.int32),
        "area": np.array(rows["area"], np.int64),
        "kind": np.array(rows["kind"], np.uint8),
        "name": np.array(rows["name"] if whole else [], np.int64),
        "segment_end": ends([len(segment) for segment in rows["segment"]]),
        "segments": as_bytes(b"".join(rows["segment"])),
    }
    named = {
        "video_ids": [v.video_id for v in videos],
        "object_ids": [v.object_ids for v in videos],
    }
    named["names"] = None if whole else rows["name"]
    return VideoIndex(columns, {**texts, **named})


def ends(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each of N pieces starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def as_bytes(text: bytes) -> np.ndarray:
    """(N,) uint8."""
    return np.frombuffer(text, np.uint8)


def _stored(segmentation: Any, size: tuple[int, int]) -> tuple[int, bytes]:
    """The kind of a segmentation and its bytes."""
    if isinstance(segmentation, Parts):
        return AS_PARTS, json.dumps(segmentation.segmentations).encode()
    if isinstance(segmentation, dict):
        kind = RLE_KEYS.get(tuple(segmentation))
        counts = segmentation.get("counts")
        fits = segmentation.get("size") == list(size) and isinstance(counts, str)
        if kind is not None and fits and counts.isascii():
            return kind, counts.encode()
    return AS_JSON, json.dumps(segmentation).encode()


def _segmentation(stored: bytes, kind: int, size: list[int]) -> Any:
    if kind == SIZE_FIRST:
        return {"size": list(size), "counts": stored.decode()}
    if kind == COUNTS_FIRST:
        return {"counts": stored.decode(), "size": list(size)}
    value = json.loads(stored)
    return Parts(tuple(value)) if kind == AS_PARTS else value


# In a file


def index_path(file: Path, settings: Any) -> Path:
    """Where the index of a file with this content belongs, if it is read with these settings."""
    digest = hashlib.sha256(_VERSION + repr(settings).encode() + file_hash(file).encode())
    return INDEX_FOLDER / f"{digest.hexdigest()[:32]}.index"


def with_pictures(index: VideoIndex) -> VideoIndex:
    """The index with `picture_size` and `picture_time` (F,), by which changed files are known.

    Raises:
        OSError: one of them is not there.
    """
    stats = [os.stat(path) for path in index.picture_paths()]
    sizes = np.array([stat.st_size for stat in stats], np.int64)
    times = np.array([stat.st_mtime_ns for stat in stats], np.int64)
    columns = {**index.columns, "picture_size": sizes, "picture_time": times}
    return replace(index, columns=columns)


def has_its_pictures(index: VideoIndex) -> bool:
    """Whether all pictures are there and as large and old as they were."""
    try:
        now = with_pictures(index).columns
    except OSError:
        return False
    return all(
        np.array_equal(now[name], index.columns[name]) for name in ("picture_size", "picture_time")
    )


def write_index(index: VideoIndex, path: Path) -> VideoIndex:
    """The index as the file holds it; the one in memory where the folder takes none.

    The checksum tells a file that a power cut has torn, so that nothing waits for the disk.
    """
    columns = {name: np.ascontiguousarray(column) for name, column in index.columns.items()}
    places, at = {}, 0
    for name, column in columns.items():
        places[name] = (column.dtype.str, column.shape, at)
        at += -(-column.nbytes // 64) * 64
    checksum = 0
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            texts = json.dumps(dict(index.texts)).encode()
            for column in columns.values():
                checksum = zlib.crc32(column, checksum)
            head = {"columns": places, "bytes": at, "crc": zlib.crc32(texts, checksum)}
            head = json.dumps(head | {"texts": len(texts)}).encode() + b"\n"
            file.write(_VERSION + head)
            file.write(b"\0" * (-file.tell() % 64))
            for column in columns.values():
                file.write(column.data if column.size else b"")
                file.write(b"\0" * (-column.nbytes % 64))
            file.write(texts)
        os.replace(partial, path)
        return open_index(path) or index
    except OSError:  # a read-only folder or a full disk
        return index
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def open_index(path: Path) -> VideoIndex | None:
    """The index in a file, mapped; None where there is none or it is torn."""
    try:
        with open(path, "rb") as file:
            if file.readline() != _VERSION:
                return None
            head = json.loads(file.readline())
            start = -(-file.tell() // 64) * 64
            block = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(block, np.uint8)
        texts = content[start + head["bytes"] :][: head["texts"]].tobytes()
        columns, checksum = {}, 0
        for name, (dtype, shape, at) in head["columns"].items():
            count = int(np.prod(shape))
            columns[name] = np.frombuffer(block, dtype, count, start + at).reshape(shape)
            checksum = zlib.crc32(columns[name], checksum)
        if zlib.crc32(texts, checksum) != head["crc"]:
            return None
        return VideoIndex(columns, json.loads(texts), path.resolve())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reopen(path: Path) -> VideoIndex:
    index = open_index(path)
    if index is None:
        raise FileNotFoundError(f"{path}: the index of the data is gone; start the run again")
    return index


# The hash of data

# Files up to this size are read whole. Of larger ones three pieces are read, so that films and
# large data sets take seconds; another frame rarely has as many bytes and the same pieces.
_WHOLE = 64 * 1024
_PIECE = 16 * 1024
# Frames whose bytes are read, spread evenly over all; of the others the size counts. A data set of
# a million frames would otherwise be read once more at the start of each run. Masks are all read.
MAX_READ = 2000


def fingerprint(source: VideoSource) -> str:
    """sha256 in hexadecimal over videos, labelled frames, objects, masks, and the picture files by
    their sizes and samples of their bytes. Folders do not count: moved data is the same data.
    """
    files = list({frame.path: None for video in source.videos for frame in video.frames})
    step = max(len(files) / MAX_READ, 1.0)
    read = {int(k * step) for k in range(min(len(files), MAX_READ))}
    with ThreadPoolExecutor(8) as pool:  # waits for the disk
        found = pool.map(lambda k: _sample(files[k], read_bytes=k in read), range(len(files)))
        samples = dict(zip(files, found, strict=True))

    def plain(value: Any) -> str:
        """What JSON does not know: a file that holds masks, bytes of an RLE, a number of NumPy."""
        if isinstance(value, Path):
            if value not in samples:
                samples[value] = _sample(value)
            return samples[value]
        return value.hex() if isinstance(value, bytes) else str(value)

    total = hashlib.sha256()
    for video in source.videos:
        total.update(repr((video.video_id, video.size, video.object_ids)).encode())
        for frame in video.frames:
            head = (frame.is_labelled, frame.page, samples[frame.path], frame.ignored)
            masks = [
                (repr(object_id), int(annotation.area), annotation.segmentation)
                for object_id, annotation in frame.annotations.items()
            ]
            total.update(json.dumps((head, masks), default=plain).encode())
    return total.hexdigest()


def _sample(path: Path, *, read_bytes: bool = True) -> str:
    """Hash of a file's size and bytes, or of pieces at its start, middle and end."""
    if not read_bytes:
        return str(path.stat().st_size)
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for start in (0, (size - _PIECE) // 2, size - _PIECE):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()
