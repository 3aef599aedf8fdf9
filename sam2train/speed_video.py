"""A made-up video as every reader wants it, and whole-video evaluation beside SAM 2's predictor."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle

from sam2train.clips import Prompt
from sam2train.data_clips import ClipDataset
from sam2train.datasets import COCODataset
from sam2train.demo import JPEG_QUALITY
from sam2train.evaluate import first_prompts, track_video
from sam2train.features import FeaturesConfig
from sam2train.model import SAM2Model
from sam2train.speed_clock import Mismatch, Row, alternate, build_predictor, gemm_rates, gemms
from sam2train.speed_step import build_ours

# Share of pixels on which our masks and the predictor's agree, at least: it stores memories in
# bfloat16, and takes the masks of a prompted frame through a quarter of the size.
_SAME_MASKS = 0.97


@dataclass(frozen=True)
class VideoFiles:
    """One video on disk, in the layouts of ours and of SAM 2's readers."""

    folder: Path

    @property
    def frames(self) -> Path:
        """A folder with one folder of JPEGs, %05d.jpg."""
        return self.folder / "frames"

    @property
    def coco(self) -> Path:
        return self.folder / "annotations.json"

    @property
    def masklets(self) -> Path:
        """A folder with SA-V's JSON of the video."""
        return self.folder / "masklets"


def write_video(
    folder: Path, size: tuple[int, int], num_frames: int, num_objects: int
) -> VideoFiles:
    """Ellipses that move over smooth noise, as JPEGs with RLE masks of every frame.

    Args:
        size: (H, W) of the frames.
    """
    files = VideoFiles(folder)
    for place in (files.frames / "video", files.masklets):
        place.mkdir(parents=True)
    rows: list[list[dict[str, Any]]] = []
    for t, (picture, masks) in enumerate(made_up_frames(size, num_frames, num_objects)):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (files.frames / "video" / f"{t:05d}.jpg").write_bytes(jpeg.tobytes())
        encoded = [rle.encode(np.asfortranarray(mask)) for mask in masks]
        rows.append([{"size": list(size), "counts": e["counts"].decode()} for e in encoded])
    images = [
        {
            "id": t + 1,
            "video_id": "video",
            "order_in_video": t,
            "path": f"frames/video/{t:05d}.jpg",
            "height": size[0],
            "width": size[1],
        }
        for t in range(num_frames)
    ]
    annotations = [
        {
            "id": t * num_objects + k + 1,
            "image_id": t + 1,
            "category_id": 1,
            "track_id": k + 1,
            "segmentation": segmentation,
        }
        for t, row in enumerate(rows)
        for k, segmentation in enumerate(row)
    ]
    categories = [{"id": 1, "name": "ellipse"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    files.coco.write_text(json.dumps(content))
    (files.masklets / "video_manual.json").write_text(json.dumps({"masklet": rows}))
    return files


def made_up_frames(
    size: tuple[int, int], num_frames: int, num_objects: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Frames (H, W, 3) uint8, BGR, each with the (H, W) uint8 masks of its objects."""
    rng = np.random.default_rng(0)
    height, width = size
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    background = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(0, 12, (height, width, 3), np.uint8)  # else a JPEG has little to decode
    for t in range(num_frames):
        picture = cv2.add(np.roll(background, 3 * t, axis=1), grain)
        masks = []
        for k in range(num_objects):
            mask = np.zeros(size, np.uint8)
            x, y = width * (0.25 + 0.5 * t / num_frames), height * (k + 0.5) / num_objects
            centre = int(x), int(y)
            axes = width // 10, height // (3 * num_objects)
            cv2.ellipse(mask, centre, axes, 10.0 * k, 0, 360, 1, -1)
            picture[mask > 0] = (20 * k, 200 - 20 * k, 255 - 20 * k)
            masks.append(mask)
        yield picture, masks


def measure_evaluation(
    device: torch.device,
    folder: Path,
    *,
    objects: tuple[int, ...] = (1, 3),
    config_path: str = "configs/sam2.1_hiera_t.yaml",
    image_size: int = 512,
    size: tuple[int, int] = (480, 854),
    num_frames: int = 8,
    rounds: int = 2,
) -> list[Row]:
    """Seconds of a whole video, from the JPEGs to masks of its own size, ours against
    `SAM2VideoPredictor`."""
    model = build_ours(config_path, image_size, device).eval()
    caching = build_ours(config_path, image_size, device).eval()
    caching.use_feature_cache(FeaturesConfig(folder=str(folder / "features")))
    predictor = build_predictor(model)
    rows = []
    for num_objects in objects:
        files = write_video(folder / str(num_objects), size, num_frames, num_objects)
        data = COCODataset(files.coco, (image_size, image_size), prompt_types=["bbox"])
        (video,) = data.videos
        prompts = first_prompts(data, video, np.random.default_rng(0))
        runs = {
            "a frame": partial(_track, model, data, prompts),
            "a frame, features cached": partial(_track, caching, data, prompts),
            "theirs": partial(_predict, predictor, files.frames / "video", prompts, image_size),
        }
        theirs = runs["theirs"]()
        own = ("a frame", "a frame, features cached")
        agreement = min(_agreement(runs[what](), theirs) for what in own)
        if agreement < _SAME_MASKS:
            raise Mismatch(
                f"our masks agree with the predictor's on {agreement:.4f} of the pixels only: "
                "nothing is compared"
            )
        seconds = alternate(runs | gemms(device), rounds, device, warm_up=False)
        details = {"agreement": agreement, "gemm_rates": gemm_rates(seconds, device)}
        name = Path(config_path).stem
        at = f"{name}, {image_size} px, {num_frames} frames of {size[0]}p, {num_objects} object"
        at += "s" * (num_objects > 1)
        medians = {name: statistics.median(taken) / num_frames for name, taken in seconds.items()}
        rows += [
            Row(
                "evaluation",
                what,
                at,
                medians[what],
                medians["theirs"],
                "s",
                "SAM2VideoPredictor",
                {**details, "ours": seconds[what], "other": seconds["theirs"]},
            )
            for what in own
        ]
    return rows


def _track(
    model: SAM2Model, data: ClipDataset, prompts: list[Prompt]
) -> list[dict[Any, np.ndarray]]:
    """The masks of each frame by object id, as the evaluation gets them."""
    return [frame.masks for frame in track_video(model, data, data.videos[0], prompts)]


@torch.inference_mode()
def _predict(
    predictor: torch.nn.Module, frames: Path, prompts: list[Prompt], image_size: int
) -> list[dict[Any, np.ndarray]]:
    """The same, as a user of the predictor gets them."""
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        state = predictor.init_state(str(frames))
        for prompt in prompts:
            predictor.add_new_points_or_box(
                state,
                prompt["frame_index"],
                prompt["object_id"],
                torch.from_numpy(prompt["points"]) / image_size,
                torch.from_numpy(prompt["labels"]),
                normalize_coords=False,
            )
        return [
            dict(zip(ids, (logits[:, 0] > 0).cpu().numpy(), strict=True))
            for _, ids, logits in predictor.propagate_in_video(state)
        ]


def _agreement(ours: list[dict[Any, np.ndarray]], theirs: list[dict[Any, np.ndarray]]) -> float:
    """Share of equal pixels over frames and objects; of pixels that one object at most has in the
    predictor's masks, which may overlap where ours do not."""
    equal = total = 0
    for found, expected in zip(ours, theirs, strict=True):
        alone = sum(mask.astype(np.uint8) for mask in expected.values()) <= 1
        for object_id, mask in expected.items():
            equal += int((mask == found[object_id])[alone].sum())
            total += int(alone.sum())
    return equal / total
