"""Predicted masks as palette PNGs, in the layout that the DAVIS evaluation reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam2train.data_source import Video
from sam2train.data_videos import PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame
from sam2train.files import file_name, write_text
from sam2train.pictures import object_colours


class MaskFolder:
    """Writes `<folder>/<video>/<frame>.png`: one picture a frame, the pixel is the object's number.

    A folder has the name of its video; where that is not a safe or free file name, `videos.json`
    says which video it is.

    A number is the object's id where all ids of the video are 1 to 255; else objects count from 1
    in their order of appearance, and `objects.json` in the folder says which is which. Frames are
    named as their pictures are, or by position where these names repeat (a film).

    Raises:
        UserError: the folder holds something already.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"--save-masks {folder}: there is something already; name a new or empty folder"
            )
        self.colours = [0, 0, 0, *object_colours(256)[1:].ravel().tolist()]
        self.renamed: dict[str, dict[int, str]] = {}
        self.videos: dict[str, str] = {}
        self.taken = {"objects.json", "videos.json"}
        # Of the video that is being written.
        self.name = ""
        self.numbers: dict[int | str, int] = {}
        self.names: list[str] = []

    def write(self, seen: SeenFrame) -> None:
        """Write one frame's prediction; the frames of a video come in order.

        Raises:
            UserError: more than 255 objects.
        """
        video = seen.video
        if seen.frame_idx == 0:
            self.name = file_name(video.video_id, self.taken)
            self.numbers, self.names = self._number(video, self.name), _frame_names(video)
            (self.folder / self.name).mkdir(parents=True)
            if self.name != str(video.video_id):
                self.videos[self.name] = str(video.video_id)
                self._write_json("videos.json", self.videos)
        ids = np.zeros(video.size, np.uint8)
        for object_id, mask in seen.prediction.items():
            ids[mask] = self.numbers[object_id]
        picture = Image.fromarray(ids)
        picture.putpalette(self.colours)
        picture.save(self.folder / self.name / f"{self.names[seen.frame_idx]}.png")

    def _number(self, video: Video, name: str) -> dict[int | str, int]:
        if len(video.object_ids) > 255:
            raise UserError(
                f"--save-masks: video {video.video_id!r} has {len(video.object_ids)} objects; a "
                "palette PNG holds 255"
            )
        if all(isinstance(o, int) and 1 <= o <= 255 for o in video.object_ids):
            return {o: o for o in video.object_ids}
        numbers = {o: place for place, o in enumerate(video.object_ids, start=1)}
        self.renamed[name] = {number: str(o) for o, number in numbers.items()}
        self._write_json("objects.json", self.renamed)
        return numbers

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.folder / name, json.dumps(content, indent=2) + "\n")


def _frame_names(video: Video) -> list[str]:
    """The names of the pictures; positions where these repeat, or for the frames of a film."""
    stems = [file_name(frame.path.stem) for frame in video.frames]
    pictures = all(frame.path.suffix.lower() in PICTURE_SUFFIXES for frame in video.frames)
    if pictures and len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{t:05d}" for t in range(len(stems))]
