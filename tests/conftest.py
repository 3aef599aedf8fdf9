"""Small data sets written by the tests themselves."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from PIL import Image
from pycocotools import mask as rle

# A busy machine is no failure.
settings.register_profile("sam2train", deadline=None)
settings.load_profile("sam2train")

# The models of the tests are so small that threads mostly wait for each other, on a busy machine
# for very long.
torch.set_num_threads(1)

OBJECT_COLOURS = ((220, 40, 40), (40, 200, 60), (60, 80, 230), (230, 210, 40))


def moving_masks(num_frames: int, num_objects: int, size: tuple[int, int]) -> np.ndarray:
    """(T, N, H, W) bool: rectangles, one to a band of the frame, moving right by 2 px a frame."""
    height, width = size
    masks = np.zeros((num_frames, num_objects, height, width), bool)
    band = height // num_objects
    for t in range(num_frames):
        for k in range(num_objects):
            left = (4 * k + 2 * t) % (width // 2)
            masks[t, k, k * band + 1 : (k + 1) * band - 1, left : left + width // 4] = True
    return masks


def encode(mask: np.ndarray) -> dict:
    """A mask (H, W) bool as compressed COCO RLE that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def make_coco(
    folder: Path,
    *,
    num_videos: int = 1,
    num_frames: int = 6,
    num_objects: int = 2,
    size: tuple[int, int] = (48, 64),
    absent: Collection[tuple[int, int, int]] = (),
) -> Path:
    """The path of a COCO video JSON in `folder`, its PNG frames beside it.

    Videos have the ids 1, 2, ..., objects the track ids 1, 2, ... and all the category 1. Object k
    is a rectangle of OBJECT_COLOURS[k - 1] on grey, and moves as in `moving_masks`.

    Args:
        num_objects: of each video, up to 4.
        size: (H, W) of the frames.
        absent: (video id, frame from 0, track id) without an annotation; the frame stays grey.
    """
    images, annotations = [], []
    for video_id in range(1, num_videos + 1):
        masks = moving_masks(num_frames, num_objects, size)
        (folder / f"video_{video_id:03d}").mkdir(parents=True, exist_ok=True)
        for t in range(num_frames):
            name = f"video_{video_id:03d}/frame_{t:03d}.png"
            image_id = len(images) + 1
            pixels = np.full((*size, 3), 90 + 10 * video_id, np.uint8)
            for k in range(num_objects):
                if (video_id, t, k + 1) in absent:
                    continue
                pixels[masks[t, k]] = OBJECT_COLOURS[k]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": 1,
                        "track_id": k + 1,
                        "segmentation": encode(masks[t, k]),
                    }
                )
            Image.fromarray(pixels).save(folder / name)
            images.append(
                {
                    "id": image_id,
                    "video_id": video_id,
                    "order_in_video": t,
                    "path": name,
                    "height": size[0],
                    "width": size[1],
                }
            )
    path = folder / "annotations.json"
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps(content))
    return path
