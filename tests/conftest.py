"""Small data sets written by the tests themselves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Collection
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import DataLoader

from sam2train.data_loader import ClipSampler
from sam2train.datasets import COCODataset
from sam2train.errors import UserError
from sam2train.transforms import MEAN, STD

# A busy machine is no failure.
settings.register_profile("sam2train", deadline=None)
settings.load_profile("sam2train")

# The models of the tests are so small that threads mostly wait for each other, on a busy machine
# for very long.
torch.set_num_threads(1)

# Seconds that torch waits for a loader process to end before it ends it. Its 5 seconds, many times
# over, are a good part of a test run.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

# A shell starts background jobs with SIGINT ignored, `nohup` with SIGHUP; tests send these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SIZE = (48, 64)  # (H, W) of the frames of make_coco
SHARED = Path(__file__).parents[2] / "shared" / "data"  # beside a checkout of the project's authors
collect_ignore_glob = [] if SHARED.is_dir() else ["test_shared_*.py"]
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
    size: tuple[int, int] = SIZE,
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


def stacks(frames, video) -> dict:
    """Object id -> (T, H, W) bool from what a tracker gives frame by frame."""
    empty = np.zeros(video.size, bool)
    found = [[frame.masks.get(o, empty) for o in video.object_ids] for frame in frames]
    assert len(found) == len(video.frames)
    return dict(zip(video.object_ids, np.array(found).swapaxes(0, 1), strict=True))


@pytest.fixture
def coco(tmp_path):
    """One video of 6 frames with the objects 1 and 2."""
    return make_coco(tmp_path)


def edit(path, change):
    """Let `change` work on the content of a JSON file; returns its path."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def load(path, **options):
    options = {"image_size": SIZE, "video_clip_length": 4} | options
    return COCODataset(path, **options)


def fails(path, **options):
    """The message of the error that reading the file raises."""
    with pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert str(path) in message or "image_root" in message
    return message


def same(a, b):
    """Whether two clips are equal, bit for bit, prompts included."""
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.masks, b.masks)
        and torch.equal(a.frame_valid, b.frame_valid)
        and (a.frame_indices, a.object_ids, a.video_id)
        == (b.frame_indices, b.object_ids, b.video_id)
        and len(a.prompts) == len(b.prompts)
        and all(
            np.array_equal(p[key], q[key]) if isinstance(p[key], np.ndarray) else p[key] == q[key]
            for p, q in zip(a.prompts, b.prompts, strict=True)
            for key in p
        )
    )


def assert_workers_change_nothing(dataset):
    """Two processes load the clips that none load, in their order, for more than an epoch."""
    epochs = []
    for num_workers in (0, 2):
        sampler = ClipSampler(len(dataset), shuffle=True, seed=3)
        loader = DataLoader(
            dataset, 1, sampler=sampler, num_workers=num_workers, collate_fn=itemgetter(0)
        )
        epochs.append(list(islice(loader, 6)))
    assert all(map(same, *epochs))


def to_pixels(images):
    """(T, H, W, 3) uint8 from the images of a clip."""
    pixels = images.permute(0, 2, 3, 1).numpy() * STD + MEAN
    return (pixels * 255).round().astype(np.uint8)


def make_frames(folder, names, *, size=SIZE, seed=0, exif=None):
    """Write pictures of smooth noise, another one for each name; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names:
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        picture.save(folder / name, **({} if exif is None else {"exif": exif}))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that writes small-sweep.yaml beside small.yaml; its trials do not train."""
    from functools import partial

    from small_sweep import EXPERIMENT, TRIAL, write_sweep

    from sam2train import sweep, sweep_file, sweep_processes

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    program = tmp_path / "program"
    program.mkdir()
    (program / "run.py").write_text(TRIAL)
    monkeypatch.setattr(sweep_file, "REPOSITORY", program)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.setattr(sweep_processes, "PRELOADED", ())  # these trials need none of it
    monkeypatch.setattr(sweep, "LOOK", 0.02)
    return partial(write_sweep, tmp_path)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
