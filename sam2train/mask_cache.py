"""Decoded masks in memory that the processes which load data share."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Sequence

import numpy as np

from sam2train.videos import Video

# A process that was killed while it held the lock must not stop the others.
_PATIENCE = 5.0  # seconds


class MaskCache:
    """Masks of videos, packed to bits, in one block of memory that forked processes share.

    What is in stays in. Clips visit the videos in a new order each epoch, so dropping what was not
    used for longest would drop what comes next; keeping any fixed part is the better use of a block
    that is too small. Masks are kept at two sizes, that of the clips and the video's own. A copy
    sent to a process that was not forked keeps nothing.

    Args:
        max_bytes: size of the block, its table included; memory is taken as it fills.
        videos: those whose masks may come.
        image_size: (H, W) of the clips.
    """

    def __init__(self, max_bytes: int, videos: Sequence[Video], image_size: tuple[int, int]):
        self.image_size = image_size
        self._first: dict[int | str, int] = {}  # video id -> row of its first frame and object
        num_rows = 0
        for video in videos:
            self._first[video.video_id] = num_rows
            num_rows += len(video.frames) * len(video.object_ids)
        num_words = 1 + 2 * num_rows
        # An anonymous map, not /dev/shm: containers often give that 64 MB.
        self._block = mmap.mmap(-1, max_bytes) if max_bytes > 8 * num_words else None
        if self._block is not None:
            words = np.frombuffer(self._block, np.int64, num_words)
            self._end = words[:1]  # where the next mask goes
            self._offsets = words[1:].reshape(2, num_rows)  # of each mask in the block; 0 is none
            self._bytes = np.frombuffer(self._block, np.uint8)
            self._end[0] = 8 * num_words
            self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple:
        return MaskCache, (0, [], self.image_size)

    @property
    def num_bytes(self) -> int:
        """What the table and the masks take so far."""
        return 0 if self._block is None else int(self._end[0])

    def get(
        self, video: Video, frame_idx: int, object_id: int | str, size: tuple[int, int]
    ) -> np.ndarray | None:
        """(H, W) bool, the caller's own; None where it is not in the cache."""
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

    def put(self, video: Video, frame_idx: int, object_id: int | str, mask: np.ndarray) -> None:
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
        self, video: Video, frame_idx: int, object_id: int | str, size: tuple[int, int]
    ) -> tuple[int, int] | None:
        """Where the table has a mask; None for one that is never kept."""
        if self._block is None or size not in (self.image_size, video.size):
            return None
        row = self._first[video.video_id] + frame_idx * len(video.object_ids)
        return int(size != self.image_size), row + video.object_ids.index(object_id)
