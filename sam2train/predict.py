"""`--predict`: objects that a user prompts in a video of theirs, tracked to its end and written.

The tracker is the one that evaluation scores (`evaluate.track_video`). Everything is written frame
by frame, so that a video may be of any length.
"""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import cv2
import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from rich.console import Console

from sam2train.checkpoint import as_trained, load_checkpoint
from sam2train.clips import Prompt, empty_prompt
from sam2train.config import Section, build
from sam2train.data_pictures import STACK_SUFFIXES, read_mask_picture
from sam2train.data_source import Video, VideoSource, in_time, listed
from sam2train.data_videos import VideoFolders
from sam2train.datasets import data_paths
from sam2train.demo import is_demo_path, resolve_data_path
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame, TrackedFrame, track_video
from sam2train.experiment import Experiment, base_hash, build_model, uses_bf16
from sam2train.files import (
    file_name,
    json_object,
    read_regular_file,
    replacing,
    resolve_path,
    write_text,
)
from sam2train.machine import count_bar, say
from sam2train.model import SAM2Model
from sam2train.run_folder import RunFolder
from sam2train.transforms import resize_frame, resize_mask
from sam2train.video_files import CocoFile, FilmFile, MaskFolder

FORMS = (
    'expected "ID: box X0 Y0 X1 Y1 @FRAME", "ID: point X Y + point X Y - @FRAME" or "ID: mask '
    'FILE.png @FRAME", in pixels of the video; without @FRAME on frame 0'
)
COLUMNS = ("frame", "name", "object_id", "prompted", "object_score", "predicted_iou", "area")
MAX_OBJECTS = 255  # of a palette PNG
_RECENT = 8  # frames of a film that stay decoded: the overlay comes after the model has read ahead
_FILM_RATE = 24.0  # frames a second of an overlay where the video does not say its own


# -- what the user gives --------------------------------------------------------------------------


class GivenPrompt(Section):
    """One object on one frame, in pixels of the video: an entry of the JSON of `--prompts`."""

    object: int | str
    frame: int = Field(0, ge=0)
    box: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1
    points: tuple[tuple[float, float], ...] = ()  # (x, y)
    labels: tuple[Literal[0, 1], ...] | None = None  # of the points; None: all lie on the object
    mask: str | None = None  # a picture of the size of the video

    @model_validator(mode="after")
    def _says_one_thing(self) -> GivenPrompt:
        clicked = self.box is not None or bool(self.points)
        if clicked == (self.mask is not None):
            raise ValueError("give a box, points, or both, or else a mask")
        if self.labels is not None and len(self.labels) != len(self.points):
            raise ValueError(f"{len(self.labels)} labels for {len(self.points)} points")
        return self


Given = list[tuple[str, GivenPrompt]]  # with the place where it stands, for messages


def read_prompts(texts: Sequence[str], path: Path | None) -> Given:
    """The prompts of the command line, then those of a JSON file: a list of `GivenPrompt`s.

    Paths of masks in the file begin at its folder.

    Raises:
        UserError: none at all, or one that cannot be read.
    """
    given = [(f'--prompt "{text}"', parse_prompt(text)) for text in texts]
    if path is not None:
        wanted = (
            'expected a list of prompts such as [{"object": 1, "frame": 0, "box": [10, 20, 80, '
            "90]}], or with points and labels, or a mask"
        )
        raw = read_regular_file(path, wanted)
        entries = json_object(raw, path, wanted, key_of_list="prompts").get("prompts")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UserError(f"{path}: {wanted}")
        for place, entry in enumerate(entries):
            prompt = build(GivenPrompt, entry, f"{path}, prompt {place}")
            if prompt.mask is not None:
                prompt = prompt.model_copy(update={"mask": str(path.parent / prompt.mask)})
            given.append((f"{path}, prompt {place}", prompt))
    if not given:
        raise UserError(
            f"--predict: no object to track; {FORMS} after --prompt, or a --prompts FILE"
        )
    return given


def parse_prompt(text: str) -> GivenPrompt:
    """The prompt in a word of the command line; see `FORMS`."""
    where = f'--prompt "{text}"'

    def fail(fault: str) -> UserError:
        return UserError(f"{where}: {fault}; {FORMS}")

    who, colon, rest = text.partition(":")
    if not colon or not who.strip():
        raise fail("no object before a colon")
    who = who.strip()
    raw: dict[str, Any] = {"object": int(who) if who.isdecimal() else who}
    if at := re.search(r"(?:^|\s)@(\S*)\s*$", rest):
        if not at[1].isdecimal():
            raise fail(f"@{at[1]} names no frame")
        raw["frame"], rest = int(at[1]), rest[: at.start()]
    if (words := rest.split()) and words[0] == "mask":
        raw["mask"] = rest.strip()[len("mask") :].strip()
        if not raw["mask"]:
            raise fail("no file after mask")
        words = []
    points, labels = [], []
    while words:
        kind = words.pop(0)
        if kind not in ("box", "point"):
            raise fail(f"{kind!r} is no kind of prompt")
        count = 4 if kind == "box" else 2
        try:
            numbers = [float(word) for word in words[:count]]
        except ValueError:
            numbers = []
        if len(numbers) < count:
            raise fail(f"{kind} takes {count} numbers")
        words = words[count:]
        if kind == "box":
            if "box" in raw:
                raise fail("two boxes for one object")
            raw["box"] = numbers
        else:
            points.append(numbers)
            labels.append(int(words.pop(0) == "+") if words and words[0] in ("+", "-") else 1)
    if points:
        raw |= {"points": points, "labels": labels}
    return build(GivenPrompt, raw, where)


def make_prompts(given: Given, video: Video, side: int) -> list[Prompt]:
    """What the model takes, in pixels of its square input.

    Args:
        side: of that input.

    Raises:
        UserError: all that does not fit the video, in one message.
    """
    (height, width), last = video.size, len(video.frames) - 1
    scale = np.array([side / width, side / height], np.float32)
    problems, prompts, seen = [], [], {}
    for where, one in given:
        wrong = []
        if one.frame > last:
            wrong.append(f"frame {one.frame} of a video with the frames 0 to {last}")
        if (first := seen.setdefault((one.object, one.frame), where)) != where:
            wrong.append(
                f"object {one.object} has a prompt on frame {one.frame} already ({first}); give "
                "all its clicks in one"
            )
        corners = [] if one.box is None else [one.box[:2], one.box[2:]]
        for x, y in (*corners, *one.points):
            if not (0 <= x <= width and 0 <= y <= height):
                wrong.append(f"({x:g}, {y:g}) lies outside of the video, {width}x{height}")
        if one.box is not None and not (one.box[0] < one.box[2] and one.box[1] < one.box[3]):
            wrong.append("the box is empty; expected X0 < X1 and Y0 < Y1")
        prompt = empty_prompt(one.object, one.frame)
        if one.mask is not None:
            try:
                prompt["mask"] = resize_mask(read_mask(one, video.size), (side, side))
            except UserError as problem:
                wrong.append(str(problem))
        else:
            points = np.array([*corners, *one.points], np.float32).reshape(-1, 2) * scale
            labels = [2, 3] if corners else []
            labels += [1] * len(one.points) if one.labels is None else one.labels
            prompt.update(points=points, labels=np.array(labels, np.int32))
            prompt["box"] = points[:2].reshape(4) if corners else None
        problems += [f"{where}: {fault}" for fault in wrong]
        prompts.append(prompt)
    if (number := len({one.object for _, one in given})) > MAX_OBJECTS:
        problems.append(f"{number} objects; a palette PNG holds {MAX_OBJECTS}: predict in parts")
    if problems:
        raise UserError("\n".join(problems))
    return prompts


def read_mask(given: GivenPrompt, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a prompt: what is not 0 in its picture, or, where that holds several objects,
    the pixels with the number of the object.

    Raises:
        UserError: no picture, one of another size, or one without the object.
    """
    path = resolve_path(given.mask)
    picture = read_mask_picture(path)
    values = picture.values
    if values.shape != size:
        raise UserError(
            f"{path}: the mask is {values.shape[1]}x{values.shape[0]}, the video "
            f"{size[1]}x{size[0]} (width x height)"
        )
    if picture.is_jpeg:  # its values are not exact
        values = np.where(values > 127, 255, 0)
    found = np.unique(values[values > 0]).tolist()
    if not found:
        raise UserError(f"{path}: the mask is empty")
    if len(found) == 1:
        return values > 0
    if picture.is_colour:
        raise UserError(
            f"{path}: a picture in colours; expected a palette or grey PNG whose pixels are numbers"
        )
    if given.object not in found:
        raise UserError(
            f"{path}: holds the values {listed([str(value) for value in found], 6)}; expected one "
            f"value besides 0, or the object's number, {given.object}, among them"
        )
    return values == given.object


class Footage(VideoFolders):
    """One video without annotations, read as evaluation reads it.

    Args:
        path: a folder of frames, a film, or a TIFF of many pages.
        image_size: (H, W) of the model's input.

    Raises:
        UserError: no video or several.
    """

    read_picture = VideoSource.read_picture  # a JPEG may be decoded at a part of its size

    def __init__(self, path: Path, image_size: tuple[int, int]):
        super().__init__(path)
        if len(self.videos) > 1:
            names = [str(video.video_id) for video in self.videos]
            raise UserError(
                f"--predict {path}: holds {len(names)} videos ({listed(names)}); name one of them"
            )
        (self.video,) = self.videos
        self.image_size = image_size
        source = self.video.frames[0]
        self.is_stack = source.page is not None and source.path.suffix.lower() in STACK_SUFFIXES
        self.is_film = source.page is not None and not self.is_stack
        self._recent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @in_time
    def read_frame(
        self, video: Video, frame_idx: int, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """(H, W, 3) uint8 at `size`, or the video's own where none is given."""
        if size is None:
            return self.read_pixels(video, frame_idx, video.size)
        return resize_frame(self.read_pixels(video, frame_idx, video.size, size), size)

    def read_pixels(self, video: Video, frame_idx: int, *how: Any) -> np.ndarray:
        if not self.is_film:
            return super().read_pixels(video, frame_idx, *how)
        with self._lock:
            if frame_idx not in self._recent:
                pixels = super().read_pixels(video, frame_idx, *how)
                while len(self._recent) >= _RECENT:
                    del self._recent[next(iter(self._recent))]
                self._recent[frame_idx] = pixels
            return self._recent[frame_idx]

    @property
    def rate(self) -> float:
        """Frames a second."""
        rate = 0.0
        if self.is_film:
            rate = cv2.VideoCapture(str(self.video.frames[0].path)).get(cv2.CAP_PROP_FPS)
        return rate if 1 <= rate <= 240 else _FILM_RATE


# -- the command ----------------------------------------------------------------------------------


def predict(
    experiment: Experiment,
    source: Path,
    given: Given,
    weights: str,
    run_dir: Path,
    console: Console,
) -> None:
    """Track the prompted objects of a video, and write what was found into a folder.

    Args:
        source: the video; see `Footage`.
        given: see `read_prompts`.
        weights: a run, a checkpoint, a file of `--export`, or `base`.
        run_dir: a new or empty folder.

    Raises:
        UserError: a video, prompt, file of weights or folder that cannot be used.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"--run-dir {run_dir}: there is something already; name a new folder")
    told = partial(say, console)
    folder, began = RunFolder(run_dir), time.perf_counter()
    model, experiment, origin = load_model(experiment, weights, told)
    footage = Footage(find_video(experiment, source, told), (model.image_size,) * 2)
    for text in (*footage.notes, *footage.warnings):
        told(f"{source}: {text}")
    prompts = make_prompts(given, footage.video, model.image_size)
    object_ids = list(dict.fromkeys(prompt["object_id"] for prompt in prompts))
    video = replace(footage.video, object_ids=object_ids)
    bf16, rules = uses_bf16(experiment, model.device), experiment.evaluation
    frames = track_video(model, footage, video, prompts, bf16=bf16, rules=rules)
    with Written(folder, footage, video, prompts) as written, count_bar(console) as progress:
        task = progress.add_task(str(video.video_id), total=len(video.frames))
        for t, frame in enumerate(frames):
            written.add(t, frame)
            progress.update(task, advance=1)
    entries = [one.model_dump(exclude_defaults=True) for _, one in given]
    for entry in entries:
        if "mask" in entry:
            entry["mask"] = str(resolve_path(entry["mask"]).resolve())
    write_text(folder.prompts, json.dumps(entries) + "\n")
    summary = {
        "video": str(source),
        "num_frames": len(video.frames),
        "objects": {str(o): count for o, count in written.shown.items()},
        "weights": origin,
        "seconds": round(time.perf_counter() - began, 3),
    }
    write_text(folder.summary, json.dumps(summary, indent=1) + "\n")
    shown = ", ".join(f"{o} on {count}" for o, count in written.shown.items())
    told(
        f"{video.video_id}: {len(video.frames)} frames with the weights of {origin['path']}; "
        f"frames that show each object: {shown}"
    )
    told(f"wrote {folder.path}/")
    names = ("masks", "predictions", "frame_pictures", "frame_scores", "overlay", "prompts")
    for line in folder.contents(*names):
        told(line)


def load_model(
    experiment: Experiment, weights: str, told: Callable[[str], None]
) -> tuple[SAM2Model, Experiment, dict[str, Any]]:
    """The model with these weights, in the shape that they were trained in; the experiment with
    that shape; path, sha256 and step of the weights."""
    if weights == "base":
        path = experiment.model.checkpoint_path
        path = path or "no file: random values"
        origin = {"path": path, "sha256": base_hash(experiment), "step": None}
        return build_model(experiment, told), experiment, origin
    path = RunFolder(Path(weights)).checkpoint or Path(weights)
    if path.is_dir():
        raise UserError(
            f"--weights {weights}: a folder without checkpoints/best.pt or last.pt; expected a "
            "run, a checkpoint, a file that --export wrote, or base"
        )
    experiment = as_trained(experiment, path)
    model = build_model(experiment, told)
    loaded = load_checkpoint(model, experiment, path)
    return model, experiment, {key: getattr(loaded, key) for key in ("path", "sha256", "step")}


def find_video(experiment: Experiment, source: Path, told: Callable[[str], None]) -> Path:
    """Where the video lies; demo data of the experiment is drawn where it is a part of that."""
    section = experiment.dataset
    for path in (section.data_path, section.val_path, section.test_path):
        for part in filter(is_demo_path, data_paths(path)):
            if not source.exists() and source.is_relative_to(Path(part).parent):
                resolve_data_path(part, told)
    return resolve_path(source)


# -- what is written ------------------------------------------------------------------------------


class Written:
    """The files of a prediction, which grow frame by frame and get their names at the end.

    Args:
        video: with the prompted objects.
        prompts: in pixels of the model's input.
    """

    def __init__(self, folder: RunFolder, footage: Footage, video: Video, prompts: list[Prompt]):
        self.folder, self.footage, self.video, self.prompts = folder, footage, video, prompts
        self.shown: dict[int | str, int] = dict.fromkeys(video.object_ids, 0)
        self.begin = min(prompt["frame_index"] for prompt in prompts)
        self.masks = MaskFolder(folder.masks)
        self._open = ExitStack()

    def __enter__(self) -> Written:
        with ExitStack() as opened:
            self.scores = csv.DictWriter(
                self._text(opened, self.folder.frame_scores), COLUMNS, lineterminator="\n"
            )
            self.scores.writeheader()
            self.coco = CocoFile(self._text(opened, self.folder.predictions))
            opened.push(self.coco)
            self.coco.begin(self.video, self._picture, self.begin)
            self.film = FilmFile(self.folder.overlay, self.video.size, self.footage.rate)
            opened.push(self.film)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @staticmethod
    def _text(opened: ExitStack, path: Path) -> TextIO:
        unfinished = opened.enter_context(replacing(path))
        return opened.enter_context(open(unfinished, "w", encoding="utf-8", newline=""))

    def _picture(self, t: int) -> Path:
        """The picture of a frame; one of a film or a stack is written by `add`."""
        if not (self.footage.is_film or self.footage.is_stack):
            return self.video.frames[t].path
        suffix = ".jpg" if self.footage.is_film else ".png"  # a film has lost its details before
        return self.folder.frame_pictures / file_name(self.video.video_id) / f"{t:05d}{suffix}"

    def add(self, t: int, frame: TrackedFrame) -> None:
        """The next frame."""
        video, pixels = self.video, self.footage.read_frame(self.video, t)
        empty = np.zeros(video.size, bool)
        masks = {o: frame.masks.get(o, empty) for o in video.object_ids}
        self.masks.write(SeenFrame(video, self.prompts, t, masks, {}))
        here = [prompt for prompt in self.prompts if prompt["frame_index"] == t]
        prompted = {prompt["object_id"] for prompt in here}
        for object_id in frame.masks:
            area = int(masks[object_id].sum())
            self.shown[object_id] += area > 0
            iou = frame.iou_predictions[object_id]
            self.scores.writerow(
                {
                    "frame": t,
                    "name": self.masks.names[t],
                    "object_id": object_id,
                    "prompted": int(object_id in prompted),
                    "object_score": frame.object_scores[object_id],
                    "predicted_iou": iou,
                    "area": area,
                }
            )
            if area:
                self.coco.add(t, object_id, masks[object_id], iou)
        if (path := self._picture(t)).is_relative_to(self.folder.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)
        self.film.add(pixels, masks, here, self.footage.image_size)
