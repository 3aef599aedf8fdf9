"""Large COCO files: read once, kept as an index under cache/, and mapped from there afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sam2train.data_coco import CocoVideos, Unlabelled, find_unlabelled, starts_with_mark
from sam2train.data_coco_objects import Findings
from sam2train.data_coco_plain import plain_index
from sam2train.data_index import (
    PACKED_FROM,
    VideoIndex,
    has_its_pictures,
    index_path,
    open_index,
    pack_videos,
    with_pictures,
    write_index,
)
from sam2train.data_pictures import Film
from sam2train.data_source import Frame, Video, video_warnings


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
        is_other = root is not None or starts_with_mark(path)
        index = None if is_other else plain_index(content(), path.parent)
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
