"""What mask pictures hold, and masks that are kept.

What a picture holds is counted once: which values, on how many pixels, and how these lie. It is
kept under cache/ by the content of the file. Decoded masks are kept for the epochs to come and
shared by the processes that load data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sam2train.data_index import INDEX_FOLDER
from sam2train.data_pictures import pack_grey, read_mask_picture
from sam2train.data_source import Video
from sam2train.errors import UserError
from sam2train.files import check_regular, write_bytes

_SMALL_IDS = 127  # of 255: brighter objects on black are told from it in a JPEG, too
_MAX_COLOURS = 256  # of one picture; a photograph has more


@dataclass
class MaskFacts:
    """What one mask picture holds: pixels by value, all of them counts."""

    path: Path
    size: tuple[int, int]  # (H, W)
    kind: Literal["palette", "grey", "colour"]
    areas: Counter[int]  # the background included
    border: Counter[int]  # pixels on the border of the picture
    interior: Counter[int]  # pixels whose 3x3 neighbourhood has one value
    # Only of values without any interior, such as those of smoothed edges:
    alone: Counter[int] = field(
        default_factory=Counter
    )  # pixels without a neighbour of their value
    touching: Counter[int] = field(default_factory=Counter)  # beside another value, not background
    palette: dict[int, int] = field(default_factory=dict)  # used index -> R + 256 G + 65536 B
    whole_palette: bytes = b""

    def by_colour(self) -> MaskFacts:
        """The same counts by R + 256 G + 65536 B."""
        if self.kind == "colour":
            return self

        def packed(counts: Counter[int]) -> Counter[int]:
            merged: Counter[int] = Counter()
            for value, count in counts.items():
                merged[self.palette.get(value, pack_grey(value))] += count
            return merged

        counts = (self.areas, self.border, self.interior, self.alone, self.touching)
        return MaskFacts(self.path, self.size, "colour", *map(packed, counts))


def read_facts(path: Path, raw: bytes | None = None) -> MaskFacts:
    """What a mask picture holds.

    Args:
        raw: the bytes of the file, where they are read already.

    Raises:
        UserError: missing, damaged, no picture, a JPEG of ids, or one with more colours than masks
            have.
    """
    picture = read_mask_picture(path, raw)
    values = picture.values
    if picture.is_jpeg and not picture.is_colour and 0 < values.max() <= _SMALL_IDS:
        raise UserError(
            f"{path}: a JPEG, in which small ids such as 1 and 2 are not exact: this one has the "
            f"values 0 to {values.max()}; write the masks again as PNG, from where they were made"
        )
    names: np.ndarray | None = None
    if picture.is_colour:
        # Runs along rows first: a mask has few, and sorting them is far cheaper than all pixels.
        flat = values.ravel()
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        names, of_run = np.unique(flat[starts], return_inverse=True)
        if len(names) > _MAX_COLOURS:
            raise UserError(
                f"{path}: a picture of mode RGB; expected a palette or grey PNG whose pixels are "
                f"the ids of objects, or at most {_MAX_COLOURS} colours, one for each object; this "
                f"one has {len(names)} colours (a photograph, or a mask that was saved as JPEG?)"
            )
        lengths = np.diff(np.append(starts, flat.size))
        values = np.repeat(of_run.ravel(), lengths).reshape(values.shape)
    kind = "colour" if picture.is_colour else "grey" if picture.palette is None else "palette"

    def count(chosen: np.ndarray) -> Counter[int]:
        numbers = np.bincount(chosen.ravel())  # many times as fast as np.unique
        used = np.flatnonzero(numbers)
        keys = used if names is None else names[used]
        return Counter(dict(zip(keys.tolist(), numbers[used].tolist(), strict=True)))

    areas = count(values)
    border = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    along = int(np.bincount(border).argmax())
    # What follows needs the neighbours of objects only, and a byte a pixel is twice as fast.
    values = _around_objects(values, along).astype(np.uint8 if values.max() < 256 else values.dtype)
    same_across = values[:, 1:] == values[:, :-1]
    same_down = values[1:] == values[:-1]
    rows = same_across[:, 1:] & same_across[:, :-1]
    inside = rows[1:-1] & rows[:-2] & rows[2:] & same_down[:-1, 1:-1] & same_down[1:, 1:-1]
    facts = MaskFacts(
        path, picture.values.shape, kind, areas, count(border), count(values[1:-1, 1:-1][inside])
    )
    if kind == "palette":
        facts.palette = {value: int(picture.palette[value]) for value in areas}
        facts.whole_palette = np.asarray(picture.palette, np.uint32).tobytes()
        if all(colour == pack_grey(value) for value, colour in facts.palette.items()):
            facts.kind = "grey"
    if len(areas) > len(facts.interior):
        _count_thin(values, same_across, same_down, along, facts, count)
    return facts


def _around_objects(values: np.ndarray, background: int) -> np.ndarray:
    """The part of the picture with all that is not background, and a pixel around it."""
    other = values != background
    rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
    if not len(rows):
        return values[:1, :1]
    return values[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]


def _count_thin(
    values: np.ndarray,
    same_across: np.ndarray,
    same_down: np.ndarray,
    background: int,
    facts: MaskFacts,
    count: Callable[[np.ndarray], Counter[int]],
) -> None:
    """Fill what is known of values without any interior."""
    alone = np.ones(values.shape, bool)
    alone[:, 1:] &= ~same_across
    alone[:, :-1] &= ~same_across
    alone[1:] &= ~same_down
    alone[:-1] &= ~same_down
    other = values != background
    touching = np.zeros(values.shape, bool)
    across = ~same_across & other[:, 1:] & other[:, :-1]
    down = ~same_down & other[1:] & other[:-1]
    touching[:, 1:] |= across
    touching[:, :-1] |= across
    touching[1:] |= down
    touching[:-1] |= down
    facts.alone, facts.touching = count(values[alone]), count(values[touching])


# Facts on disk

# To change where `read_facts` counts other things: facts of before are not read then.
_FACTS_VERSION = b"sam2train mask facts 1 "
_COUNT_FIELDS = ("areas", "border", "interior", "alone", "touching", "palette")
# New masks from which facts are written; those of fewer are found again in less than a second.
WRITTEN_FROM = 200


class FactsCache:
    """Facts of the masks of one data set. A picture is read once: its bytes give the name of its
    facts, and are decoded only where no facts have this name.

    Args:
        path: of the data set; each has a file of its own.
    """

    def __init__(self, path: Path):
        name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
        self.file = INDEX_FOLDER / f"{name[:32]}.masks"
        self._kept: dict[str, list] = {}
        self._palettes: list[str] = []
        self._used: dict[str, MaskFacts] = {}
        self._num_new: list[None] = []  # of threads: to append is one step, to count is not
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            head, body = self.file.read_bytes().split(b"\n", 1)
            if head == _FACTS_VERSION + str(zlib.crc32(body)).encode():
                content = json.loads(body)
                self._kept, self._palettes = content["facts"], content["palettes"]

    def read(self, path: Path) -> MaskFacts:
        """What a mask picture holds. Raises UserError as `read_facts` does."""
        check_regular(path)
        try:
            raw = path.read_bytes()
        except OSError:
            return read_facts(path)  # says why it cannot be read
        name = hashlib.blake2b(raw, digest_size=16).hexdigest()
        kept = self._kept.get(name)
        if kept is not None:
            facts = self._unpack(path, kept)
        else:
            facts = read_facts(path, raw)
            self._num_new.append(None)
        self._used[name] = facts
        return facts

    def write(self) -> None:
        """Keep the facts that were used, if enough of them are new; a folder that takes no file is
        no error."""
        if len(self._num_new) < WRITTEN_FROM:
            return
        palettes: dict[bytes, int] = {}
        packed = {}
        for name, facts in self._used.items():
            number = palettes.setdefault(facts.whole_palette, len(palettes))
            counts = [list(getattr(facts, field).items()) for field in _COUNT_FIELDS]
            packed[name] = [list(facts.size), facts.kind, counts, number]
        content = {"facts": packed, "palettes": [palette.hex() for palette in palettes]}
        body = json.dumps(content, separators=(",", ":")).encode()
        with contextlib.suppress(OSError):
            write_bytes(self.file, _FACTS_VERSION + str(zlib.crc32(body)).encode() + b"\n" + body)

    def _unpack(self, path: Path, kept: list[Any]) -> MaskFacts:
        size, kind, counts, palette = kept
        *counters, colours = map(dict, counts)
        return MaskFacts(
            path,
            tuple(size),
            kind,
            *map(Counter, counters),
            palette=colours,
            whole_palette=bytes.fromhex(self._palettes[palette]),
        )


# Decoded masks in memory

# A process that was killed while it held the lock must not stop the others.
_PATIENCE = 5.0  # seconds


class MaskCache:
    """Masks of videos, packed to bits, in one block of memory that the processes of a loader share,
    forked or started anew.

    A mask that is in the cache is never dropped. Each epoch visits the videos in a new order, so
    dropping the mask that was not used for longest would often drop one that is needed next. Masks
    are kept at two sizes: that of the clips and the video's own. The ignore mask of a frame is kept
    like that of an object. A pickled copy, other than for a process of a loader, keeps nothing.

    Args:
        max_bytes: size of the block, its table included; memory is taken as it fills.
        videos: those whose masks may come.
        image_size: (H, W) of the clips.
        ignoring: ids of the videos with ignore masks.
    """

    def __init__(
        self,
        max_bytes: int,
        videos: Sequence[Video],
        image_size: tuple[int, int],
        ignoring: Collection[int | str] = (),
    ):
        self.image_size, self._ignoring = image_size, {*ignoring}
        self._first: dict[int | str, int] = {}  # video id -> row of its first frame and object
        num_rows = 0
        for video in videos:
            self._first[video.video_id] = num_rows
            num_rows += len(video.frames) * self._of_frame(video)
        self._num_rows, self._file = num_rows, None
        if max_bytes > 8 * (1 + 2 * num_rows):
            self._keep(_unnamed_file())
            os.truncate(self._file, max_bytes)
            # The kind that can be sent to a process that is started anew.
            self._lock = multiprocessing.get_context("spawn").Lock()
            self._map(max_bytes)
            self._end[0] = 8 * (1 + 2 * num_rows)

    def _of_frame(self, video: Video) -> int:
        """Masks of a frame; the ignore mask is the last."""
        return len(video.object_ids) + (video.video_id in self._ignoring)

    def _keep(self, file: int) -> None:
        """Take over an open file."""
        self._file = file
        weakref.finalize(self, os.close, file).atexit = False

    def _map(self, max_bytes: int) -> None:
        block = mmap.mmap(self._file, max_bytes)
        words = np.frombuffer(block, np.int64, 1 + 2 * self._num_rows)
        self._end = words[:1]  # where the next mask goes
        self._offsets = words[1:].reshape(2, self._num_rows)  # of each mask in the block; 0 is none
        self._bytes = np.frombuffer(block, np.uint8)

    def __reduce__(self) -> tuple:
        can_share = hasattr(reduction, "DupFd") and get_spawning_popen() is not None
        if self._file is None or not can_share:
            return MaskCache, (0, [], self.image_size)
        file = reduction.DupFd(self._file)
        kept = (self.image_size, self._ignoring, self._first, self._num_rows, self._lock, file)
        return _map_again, kept

    @property
    def num_bytes(self) -> int:
        """Bytes that the table and the masks take so far."""
        return 0 if self._file is None else int(self._end[0])

    def get(
        self, video: Video, frame_idx: int, object_id: int | str | None, size: tuple[int, int]
    ) -> np.ndarray | None:
        """(H, W) bool, a copy that the caller may change; None where it is not in the cache.

        The object None stands for the ignore mask of the frame.
        """
        place = self._place(video, frame_idx, object_id, size)
        if place is None or not self._lock.acquire(timeout=_PATIENCE):
            return None
        offset = int(self._offsets[place])
        self._lock.release()
        if offset == 0:
            return None
        num_pixels = size[0] * size[1]
        packed = self._bytes[offset : offset + (num_pixels + 7) // 8]
        return np.unpackbits(packed, count=num_pixels).view(bool).reshape(size)

    def put(
        self, video: Video, frame_idx: int, object_id: int | str | None, mask: np.ndarray
    ) -> None:
        """Keep a mask (H, W) bool, if there is room and its size is one of the two."""
        place = self._place(video, frame_idx, object_id, mask.shape)
        if place is None:
            return
        packed = np.packbits(mask)
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        try:
            offset = int(self._end[0])
            if self._offsets[place] == 0 and offset + packed.nbytes <= len(self._bytes):
                self._bytes[offset : offset + packed.nbytes] = packed
                self._end[0] = offset + packed.nbytes
                self._offsets[place] = offset  # last: from now on others read it
        finally:
            self._lock.release()

    def _place(
        self, video: Video, frame_idx: int, object_id: int | str | None, size: tuple[int, int]
    ) -> tuple[int, int] | None:
        """Where the table has a mask; None for one that is never kept."""
        if self._file is None or size not in (self.image_size, video.size):
            return None
        row = self._first[video.video_id] + frame_idx * self._of_frame(video)
        objects = video.object_ids
        place = len(objects) if object_id is None else objects.index(object_id)
        return int(size != self.image_size), row + place


def _map_again(
    image_size: tuple[int, int],
    ignoring: set[int | str],
    first: dict[int | str, int],
    num_rows: int,
    lock: Any,
    file: Any,
) -> MaskCache:
    """The same cache in another process."""
    cache = MaskCache(0, [], image_size, ignoring)
    cache._first, cache._num_rows, cache._lock = first, num_rows, lock
    cache._keep(file.detach())
    cache._map(os.fstat(cache._file).st_size)
    return cache


def _unnamed_file() -> int:
    """An open file in memory, not /dev/shm: containers often give that 64 MB."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("masks")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
