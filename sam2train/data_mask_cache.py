"""Decoded masks, kept for the epochs to come and shared by the processes that load data."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Collection, Sequence
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np

from sam2train.data_source import Video

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
