"""Several data sets as one, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sam2train.data_source import ClipPixels, IntensityRange, Video, VideoSource, shared_pictures


class Mixture(VideoSource):
    """The videos of several sources, those of the first one first.

    Where two sources have a video of the same id, all ids begin with the place of their source, as
    in "2/bear". Each part keeps its own way to read.

    Args:
        parts: at least one, with videos in each.
        weights: one for each part: how often an epoch visits each of its videos; with 0.5, half of
            them, and the other half in the next epoch.

    Raises:
        DataError: parts share pictures, so that one's masks lie on the pictures of the other.
    """

    mask_hint = "expected at least one object with a pixel in one of the data sets"

    def __init__(self, parts: Sequence[VideoSource], weights: Sequence[float]):
        self._parts: dict[int | str, tuple[VideoSource, int | str]] = {}  # source and its own id
        ids = [video.video_id for part in parts for video in part.videos]
        is_unique = len({*ids}) == len(ids)
        videos = []
        for place, part in enumerate(parts, start=1):
            for video in part.videos:
                video_id = video.video_id if is_unique else f"{place}/{video.video_id}"
                self._parts[video_id] = (part, video.video_id)
                videos.append(replace(video, video_id=video_id))
        self._sources = list(zip(parts, weights, strict=True))
        path = Path(" + ".join(str(part.path) for part in parts))
        warnings = [f"{part.path}: {line}" for part in parts for line in part.warnings]
        super().__init__(path, videos, warnings, shared_pictures(videos))

    def scale_levels(self, wanted: IntensityRange) -> None:
        """See `VideoSource.scale_levels`; each part has chosen its own for "auto" already."""
        for part, _ in self._sources if wanted != "auto" else ():
            part.scale_levels(wanted)
        self.notes = [
            f"{part.path}: {len(part.videos)} videos, weight {weight:g}"
            for part, weight in self._sources
        ]
        self.notes += [f"{part.path}: {line}" for part, _ in self._sources for line in part.notes]

    def _own(self, video: Video) -> tuple[VideoSource, Video]:
        """The source of a video, and the video as its source knows it."""
        part, own_id = self._parts[video.video_id]
        return part, replace(video, video_id=own_id)

    def read_picture(self, video: Video, frame_idx: int) -> np.ndarray:
        part, own = self._own(video)
        return part.read_picture(own, frame_idx)

    def read_masks(
        self, video: Video, frame_idx: int, object_id: int | str
    ) -> dict[int | str, np.ndarray]:
        part, own = self._own(video)
        return part.read_masks(own, frame_idx, object_id)

    def read_small_masks(
        self, video: Video, frame_idx: int, object_id: int | str, size: tuple[int, int]
    ) -> dict[int | str, np.ndarray]:
        part, own = self._own(video)
        return part.read_small_masks(own, frame_idx, object_id, size)

    def read_frame(self, video: Video, frame_idx: int) -> np.ndarray:
        part, own = self._own(video)
        return part.read_frame(own, frame_idx)

    def read_small_frame(self, video: Video, frame_idx: int, size: tuple[int, int]) -> np.ndarray:
        part, own = self._own(video)
        return part.read_small_frame(own, frame_idx, size)

    def has_mask(self, video: Video, frame_idx: int, object_id: int | str) -> bool:
        part, own = self._own(video)
        return part.has_mask(own, frame_idx, object_id)

    def read_ignore(self, video: Video, frame_idx: int) -> np.ndarray | None:
        part, own = self._own(video)
        return part.read_ignore(own, frame_idx)

    def has_ignored(self, video: Video) -> bool:
        part, own = self._own(video)
        return part.has_ignored(own)

    def is_trainable(self, video: Video) -> bool:
        part, own = self._own(video)
        return part.is_trainable(own)

    def sample_clip(
        self,
        video: Video,
        indices: Sequence[int],
        size: tuple[int, int],
        max_objects: int | None,
        rng: np.random.Generator,
    ) -> ClipPixels | None:
        part, own = self._own(video)
        return part.sample_clip(own, indices, size, max_objects, rng)

    def weighted(self, videos: Sequence[Video]) -> list[tuple[list[Video], float]]:
        """See `VideoSource.weighted`."""
        groups = [
            ([video for video in videos if self._parts[video.video_id][0] is part], weight)
            for part, weight in self._sources
        ]
        return [(group, weight) for group, weight in groups if group]
