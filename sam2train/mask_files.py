"""Predicted masks as palette PNGs, in the layout that the DAVIS evaluation reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sam2train.data_source import Video
from sam2train.data_videos import PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame
from sam2train.files import write_text
from sam2train.overlays import object_colours


class MaskFolder:
    """Writes `<folder>/<video>/<frame>.png`: one picture a frame, the pixel is the object's number.

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
        # Of the video that is being written.
        self.numbers: dict[int | str, int] = {}
        self.names: list[str] = []

    def write(self, seen: SeenFrame) -> None:
        """Write one frame's prediction; the frames of a video come in order.

        Raises:
            UserError: more than 255 objects, or two videos whose folder would be the same.
        """
        video = seen.video
        name = str(video.video_id).replace(os.sep, "_")
        if seen.frame_idx == 0:
            if (self.folder / name).exists():
                raise UserError(
                    f"--save-masks: two videos would be written to {self.folder / name}; give "
                    "them ids that differ in more than their slashes"
                )
            self.numbers, self.names = self._number(video, name), _frame_names(video)
            (self.folder / name).mkdir(parents=True)
        ids = np.zeros(video.size, np.uint8)
        for object_id, mask in seen.prediction.items():
            ids[mask] = self.numbers[object_id]
        picture = Image.fromarray(ids)
        picture.putpalette(self.colours)
        picture.save(self.folder / name / f"{self.names[seen.frame_idx]}.png")

    def _number(self, video: Video, name: str) -> dict[int | str, int]:
        if len(video.object_ids) > 255:
            raise UserError(
                f"--save-masks: video {name} has {len(video.object_ids)} objects; a palette PNG "
                "holds 255"
            )
        if all(isinstance(o, int) and 1 <= o <= 255 for o in video.object_ids):
            return {o: o for o in video.object_ids}
        numbers = {o: place for place, o in enumerate(video.object_ids, start=1)}
        self.renamed[name] = {number: str(o) for o, number in numbers.items()}
        write_text(self.folder / "objects.json", json.dumps(self.renamed, indent=2) + "\n")
        return numbers


def _frame_names(video: Video) -> list[str]:
    """The names of the pictures; positions where these repeat, or for the frames of a film."""
    stems = [frame.path.stem for frame in video.frames]
    pictures = all(frame.path.suffix.lower() in PICTURE_SUFFIXES for frame in video.frames)
    if pictures and len(set(stems)) == len(stems):
        return stems
    return [f"{t:05d}" for t in range(len(stems))]
