"""A tracked video on disk: as one picture of ground truth with prompts, prediction and errors, as
palette PNGs in the layout that the DAVIS evaluation reads, as a COCO video JSON, and as a film."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from sam2train.clips import Prompt
from sam2train.data_clips import ClipDataset, stack_ignored
from sam2train.data_source import Video
from sam2train.data_videos import PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame, TrackedVideo
from sam2train.files import file_name, printable, write_text
from sam2train.metrics import ObjectScores
from sam2train.pictures import (
    comparison,
    draw_masks,
    id_mask,
    object_colours,
    paint_prompts,
    pick_frames,
    save_png,
)
from sam2train.transforms import resize_mask_smoothly, resize_mask_to_paint

MAX_SHOWN = 8  # of a picture
MAX_TOGGLED = 255  # objects in a mask of W&B's
_FILM_SIDE = (320, 640)  # px: the longer side of a film lies between these
_CODECS = ("vp09", "mp4v")  # browsers play the first one; OpenCV's wheels cannot write H.264


@dataclass(frozen=True, eq=False)
class Overlay:
    """One frame with its masks, to be judged by a person.

    Raises ValueError for what W&B would show wrong without an error: it shows a float frame black,
    and stretches a mask of another size.
    """

    name: str
    path: Path  # the composed PNG, on disk
    frame: np.ndarray  # (H, W, 3) uint8
    prediction: np.ndarray  # (H, W) object ids, 0..255, 0 is background
    ground_truth: np.ndarray  # (H, W) as `prediction`
    class_labels: Mapping[int, str]  # object id -> text

    def __post_init__(self) -> None:
        if self.frame.dtype != np.uint8 or self.frame.shape[2:] != (3,):
            raise ValueError(f"frame is {self.frame.dtype} {self.frame.shape}, not uint8 (H, W, 3)")
        for mask in (self.prediction, self.ground_truth):
            if mask.shape != self.frame.shape[:2] or mask.min() < 0 or mask.max() > 255:
                raise ValueError(
                    f"mask of shape {mask.shape} with ids {mask.min()}..{mask.max()} on a frame of "
                    f"{self.frame.shape[:2]}; W&B needs equal sizes and ids in 0..255"
                )


class OverlayDrawer:
    """Draws the first videos that are scored, at most as many frames of each as fit a screen.

    `see_frame` keeps what will be drawn, `see_video` writes `folder/<name>_video_<id>.png`;
    `overlays` has what was written.

    Args:
        name: what was scored, such as "step_000100"; part of the title.
        most: how many videos.
    """

    def __init__(self, dataset: ClipDataset, folder: Path, name: str, most: int):
        self.dataset, self.folder, self.name, self.most = dataset, folder, name, most
        self.overlays: list[Overlay] = []
        self._taken: set[str] = set()  # names of pictures
        # Of the video that is being tracked: (H, W, 3) uint8 with its masks, and which frames.
        self._kept: list[tuple[np.ndarray, SeenFrame]] = []
        self._shown: list[int] = []
        self._middle = 0

    def see_frame(self, index: int, seen: SeenFrame) -> None:
        """Keep the frame if it will be drawn; `index` counts the videos."""
        if index >= self.most:
            return
        if seen.frame_idx == 0:
            self._kept.clear()
            self._shown, self._middle = _picked(seen.video, seen.prompts)
        if seen.frame_idx in (*self._shown, self._middle):
            self._kept.append((self.dataset.read_frame(seen.video, seen.frame_idx), seen))

    def see_video(self, index: int, tracked: TrackedVideo) -> None:
        """Draw the video from the frames kept; `index` counts the videos."""
        if index >= self.most:
            return
        video = tracked.video
        shown = self._shown
        kept = {seen.frame_idx: (frame, seen) for frame, seen in self._kept}
        numbers = {object_id: place for place, object_id in enumerate(video.object_ids, start=1)}
        means = {scores.object_id: scores for scores in tracked.scores.objects}
        score = np.mean([scores.J_and_F for scores in means.values()]) if means else math.nan
        name = file_name(f"video_{video.video_id}", self._taken)
        path = self.folder / f"{self.name}_{name}.png"
        save_png(
            comparison(
                np.stack([kept[t][0] for t in shown]),
                *(
                    {
                        n: np.stack([getattr(kept[t][1], side)[o] for t in shown])
                        for o, n in numbers.items()
                    }
                    for side in ("prediction", "ground_truth")
                ),
                self._prompts(tracked, numbers, shown),
                title=(
                    f"{printable(video.video_id)}, {self.name.replace('_', ' ')}: J&F {score:.3f}"
                ),
                frame_labels=[f"frame {t}" for t in shown],
                scores=[_mean_J(means.values(), t) for t in shown],
                max_frames=len(shown),
                names={number: printable(o) for o, number in numbers.items()},
                ignore=stack_ignored([kept[t][1].ignore for t in shown], video.size),
            ),
            path,
        )
        # One frame with toggled masks: the middle, where tracking shows.
        frame, seen = kept[self._middle]
        order = video.object_ids[:MAX_TOGGLED]
        self.overlays.append(
            Overlay(
                name=name,
                path=path,
                frame=frame,
                prediction=id_mask(seen.prediction, order, video.size),
                ground_truth=id_mask(seen.ground_truth, order, video.size),
                class_labels={numbers[o]: f"object {o}" for o in order},
            )
        )

    def _prompts(
        self, tracked: TrackedVideo, numbers: dict[int | str, int], shown: list[int]
    ) -> list[dict]:
        """Those on the frames shown, counted among these, in pixels of the video."""
        sizes = tracked.video.size, self.dataset.image_size
        return [
            {
                **_in_video(prompt, *sizes),
                "object_id": numbers[prompt["object_id"]],
                "frame_index": shown.index(prompt["frame_index"]),
            }
            for prompt in tracked.prompts
            if prompt["frame_index"] in shown
        ]


def _in_video(prompt: Prompt, size: tuple[int, int], image_size: tuple[int, int]) -> Prompt:
    """A prompt in pixels of the model's input, in pixels of the video."""
    scale = np.array(size, np.float32)[::-1] / np.array(image_size)[::-1]
    box, mask = prompt["box"], prompt["mask"]
    return {
        **prompt,
        "points": prompt["points"] * scale,
        "box": None if box is None else box * np.tile(scale, 2),
        "mask": None if mask is None else resize_mask_smoothly(mask, size),
    }


def _picked(video: Video, prompts: list[Prompt]) -> tuple[list[int], int]:
    """The frames of the picture, and the one whose masks can be toggled; labelled ones, since the
    others have no ground truth."""
    frames = video.labelled or list(range(len(video.frames)))
    prompted = {frames.index(prompt["frame_index"]) for prompt in prompts}
    shown = [frames[place] for place in pick_frames(len(frames), prompted, MAX_SHOWN)]
    return shown, frames[len(frames) // 2]


def _mean_J(objects: Iterable[ObjectScores], frame_idx: int) -> str:
    """The mean of the objects for which this frame counts, as a text."""
    found = [s.J[s.frames == frame_idx] for s in objects]
    values = np.concatenate(found) if found else np.zeros(0)
    return f"J {values.mean():.2f}" if len(values) else ""


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


class CocoFile:
    """A COCO video JSON that is written annotation by annotation: a long video has too many to be
    kept."""

    def __init__(self, file: TextIO):
        self.file, self.number = file, 0
        self.has_names = False

    def begin(self, video: Video, picture_of: Callable[[int], Path], first: int) -> None:
        """All but the annotations; frames before `first` are marked as not annotated.

        Args:
            picture_of: the file of a frame; paths are relative to the folder of this one where they
                lie below.
        """
        # A reader takes one kind of id in a video.
        self.has_names = any(isinstance(object_id, str) for object_id in video.object_ids)
        height, width = video.size
        size = {"width": width, "height": height}
        about = {"id": 1, "name": str(video.video_id), "length": len(video.frames), **size}
        categories = json.dumps([{"id": 1, "name": "object"}])
        self.file.write(f'{{"videos": {json.dumps([about])},\n"categories": {categories},\n')
        home = Path(self.file.name).resolve().parent
        self.file.write('"images": [')
        for t in range(len(video.frames)):
            path = picture_of(t).resolve()
            name = path.relative_to(home) if path.is_relative_to(home) else path
            entry = {"id": t + 1, "video_id": 1, "order_in_video": t, "path": name.as_posix()}
            self._row({**entry, **size, "is_annotated": t >= first}, t)
        self.file.write('],\n"annotations": [')

    def add(self, t: int, object_id: int | str, mask: np.ndarray, score: float) -> None:
        """A mask (H, W) bool that is not empty."""
        code = rle.encode(np.asfortranarray(mask.view(np.uint8)))
        entry = {
            "id": self.number + 1,
            "image_id": t + 1,
            "category_id": 1,
            "track_id": str(object_id) if self.has_names else object_id,
            "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
            "area": int(rle.area(code)),
            "bbox": rle.toBbox(code).tolist(),
            "score": score,
            "iscrowd": 0,
        }
        self._row(entry, self.number)
        self.number += 1

    def _row(self, entry: Mapping[str, Any], place: int) -> None:
        self.file.write(("," if place else "") + "\n" + json.dumps(entry))

    def __exit__(self, *error: Any) -> None:
        self.file.write("]}\n")


class FilmFile:
    """An MP4 of frames with masks and prompts; none where OpenCV has no encoder.

    Args:
        size: (H, W) of the video.
        rate: frames a second.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float):
        self.path, self.partial = path, path.with_name(f".{path.name}")
        self.scale = np.clip(max(size), *_FILM_SIDE) / max(size)
        # Codecs store colours for squares of two pixels.
        self.size = tuple(max(2, 2 * round(self.scale * side / 2)) for side in size)
        path.parent.mkdir(parents=True, exist_ok=True)
        for codec in _CODECS:
            how = cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, self.size[::-1]
            self.writer = cv2.VideoWriter(str(self.partial), *how)
            if self.writer.isOpened():
                break
        # Encoding a frame takes as long as tracking it on a GPU: it goes on beside that.
        self.pool = ThreadPoolExecutor(1)
        self.encoded: Future | None = None

    def add(
        self,
        pixels: np.ndarray,
        masks: Mapping[int | str, np.ndarray],
        prompts: Iterable[Prompt],
        image_size: tuple[int, int],
    ) -> None:
        """The next frame, (H, W, 3) uint8, with the prompts given on it, in pixels of the model's
        input; objects have their colours by their order in `masks`."""
        if self.encoded is not None:
            self.encoded.result()  # raises what went wrong
        self.encoded = self.pool.submit(self._add, pixels, masks, prompts, image_size)

    def _add(
        self,
        pixels: np.ndarray,
        masks: Mapping[int | str, np.ndarray],
        prompts: Iterable[Prompt],
        image_size: tuple[int, int],
    ) -> None:
        smooth = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(pixels, self.size[::-1], interpolation=smooth)
        numbers = {object_id: place for place, object_id in enumerate(masks, start=1)}
        shown = {numbers[o]: mask for o, mask in masks.items() if mask.any()}
        smaller = {n: resize_mask_to_paint(mask, self.size) for n, mask in shown.items()}
        here = [
            {**_in_video(p, pixels.shape[:2], image_size), "object_id": numbers[p["object_id"]]}
            for p in prompts
        ]
        picture = paint_prompts(draw_masks(picture, smaller), here, self.scale)
        self.writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.pool.shutdown()
        self.writer.release()
        if kind is None and self.encoded is not None:
            self.encoded.result()
        with contextlib.suppress(FileNotFoundError):
            if kind is None:
                os.replace(self.partial, self.path)
            else:
                self.partial.unlink()
