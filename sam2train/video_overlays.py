"""A tracked video as one picture: ground truth with the prompts, prediction, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from sam2train.evaluate import TrackedVideo, Videos
from sam2train.overlays import comparison, id_mask, save_png
from sam2train.tracking import Overlay
from sam2train.transforms import resize_image


def draw_overlay(dataset: Videos, tracked: TrackedVideo, folder: Path, name: str) -> Overlay:
    """Write `folder/<name>_video_<id>.png`, at most as many frames as fit a screen.

    Args:
        name: what was scored, such as "step_000100"; part of the title.
    """
    video = tracked.video
    frames = np.stack([dataset.read_frame(video, t) for t in range(len(video.frames))])
    numbers = {object_id: place for place, object_id in enumerate(video.object_ids, start=1)}
    scale = np.array(video.size, np.float32)[::-1] / np.array(dataset.image_size)[::-1]
    prompts = [
        {
            **prompt,
            "object_id": numbers[prompt["object_id"]],
            "points": prompt["points"] * scale,
            "box": None if prompt["box"] is None else prompt["box"] * np.tile(scale, 2),
            "mask": None if prompt["mask"] is None else _resize_mask(prompt["mask"], video.size),
        }
        for prompt in tracked.prompts
    ]
    means = {scores.object_id: scores for scores in tracked.scores.objects}
    per_frame = [
        {o: s.J[list(s.frames).index(t)] for o, s in means.items() if t in s.frames}
        for t in range(len(frames))
    ]
    score = np.mean([scores.J_and_F for scores in means.values()]) if means else math.nan
    title = f"video_{video.video_id}"
    path = folder / f"{name}_{file_name(title)}.png"
    save_png(
        comparison(
            frames,
            {numbers[o]: masks for o, masks in tracked.prediction.items()},
            {numbers[o]: masks for o, masks in tracked.ground_truth.items()},
            prompts,
            title=f"{video.video_id}, {name.replace('_', ' ')}: J&F {score:.3f}",
            scores=[f"J {np.mean(list(j.values())):.2f}" if j else "" for j in per_frame],
        ),
        path,
    )
    # One frame with toggled masks: the middle of what is scored, where tracking shows.
    middle = len(frames) // 2
    order = list(numbers)
    return Overlay(
        name=title,
        path=path,
        frame=frames[middle],
        prediction=id_mask({o: m[middle] for o, m in tracked.prediction.items()}, order),
        ground_truth=id_mask({o: m[middle] for o, m in tracked.ground_truth.items()}, order),
        class_labels={number: f"object {o}" for o, number in numbers.items()},
    )


def file_name(text: str) -> str:
    """The text with `_` for what a file name had better not hold."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a prompt at another size, for a picture."""
    picture = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    return resize_image(picture, size)[..., 0] > 127
