"""A tracked video as one picture: ground truth with the prompts, prediction, errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sam2train.clips import Prompt
from sam2train.data_clips import stack_ignored
from sam2train.data_source import Video
from sam2train.evaluate import SeenFrame, TrackedVideo, Videos
from sam2train.files import file_name, printable
from sam2train.metrics import ObjectScores
from sam2train.overlays import comparison, id_mask, pick_frames, save_png
from sam2train.tracking import Overlay
from sam2train.transforms import resize_mask_smoothly

MAX_FRAMES = 8  # of a picture
MAX_TOGGLED = 255  # objects in a mask of W&B's


class OverlayDrawer:
    """Draws the first videos that are scored, at most as many frames of each as fit a screen.

    `see_frame` keeps what will be drawn, `see_video` writes `folder/<name>_video_<id>.png`;
    `overlays` has what was written.

    Args:
        name: what was scored, such as "step_000100"; part of the title.
        most: how many videos.
    """

    def __init__(self, dataset: Videos, folder: Path, name: str, most: int):
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
        size = tracked.video.size
        scale = np.array(size, np.float32)[::-1] / np.array(self.dataset.image_size)[::-1]
        return [
            {
                **prompt,
                "object_id": numbers[prompt["object_id"]],
                "frame_index": shown.index(prompt["frame_index"]),
                "points": prompt["points"] * scale,
                "box": None if prompt["box"] is None else prompt["box"] * np.tile(scale, 2),
                "mask": None
                if prompt["mask"] is None
                else resize_mask_smoothly(prompt["mask"], size),
            }
            for prompt in tracked.prompts
            if prompt["frame_index"] in shown
        ]


def _picked(video: Video, prompts: list[Prompt]) -> tuple[list[int], int]:
    """The frames of the picture, and the one whose masks can be toggled; labelled ones, since
    nobody knows what is right on the others."""
    frames = video.labelled or list(range(len(video.frames)))
    prompted = {frames.index(prompt["frame_index"]) for prompt in prompts}
    shown = [frames[place] for place in pick_frames(len(frames), prompted, MAX_FRAMES)]
    return shown, frames[len(frames) // 2]


def _mean_J(objects: Iterable[ObjectScores], frame_idx: int) -> str:
    """The mean of the objects for which this frame counts, as a text."""
    found = [s.J[s.frames == frame_idx] for s in objects]
    values = np.concatenate(found) if found else np.zeros(0)
    return f"J {values.mean():.2f}" if len(values) else ""
