"""Loading clips and reading annotation files beside SAM 2's loader, plain PIL and pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

from sam2train.clips import collate_fn
from sam2train.data_loader import load_batches
from sam2train.datasets import COCODataset, DatasetConfig, build_dataset
from sam2train.speed_clock import (
    CPU,
    Mismatch,
    Row,
    VideoFiles,
    alternate,
    import_training,
    in_process,
    made_up_frames,
    peak_of,
    write_video,
)
from sam2train.transforms import MEAN, STD, AugmentConfig

# Ours and SAM 2's pictures differ by their resizing (bicubic and bilinear), masks at their outline.
_SAME_IMAGES, _SAME_CLIP_MASKS = 0.1, 0.97
# The augmentation of the official recipe.
_AUGMENT = AugmentConfig(
    horizontal_flip=0.5,
    degrees=25,
    shear=20,
    brightness=0.1,
    contrast=0.03,
    saturation=0.03,
    greyscale=0.05,
    frame_brightness=0.1,
    frame_contrast=0.05,
    frame_saturation=0.05,
)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a process that loads data, where torch uses one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_loader(
    folder: Path,
    *,
    size: tuple[int, int] = (1080, 1920),
    image_size: int = 512,
    num_frames: int = 8,
    num_objects: int = 3,
    film_frames: int = 240,
    rounds: int = 5,
) -> list[Row]:
    """Seconds of a frame in a batch of one clip, by one process: ours against SAM 2's loader and
    against PIL with torchvision; the place in a film; and the bytes of a batch."""
    files = write_video(folder / "jpegs", size, num_frames, num_objects)
    film_size = size[0] // 6 * 4, size[1] // 6 * 4  # an even number of pixels, as codecs want

    def ours(**options: Any) -> Callable[[], Any]:
        data = COCODataset(
            files.coco, (image_size, image_size), num_frames, prompt_types=["point"], **options
        )
        return lambda: collate_fn([data[0]])

    variants = {
        "clip": ours(mask_cache_mb=0),
        "clip, masks cached": ours(),
        "clip, augmented": ours(mask_cache_mb=0, augment=_AUGMENT),
        "SAM 2": _their_loader(files, image_size, num_frames, num_objects),
        "SAM 2, augmented": _their_loader(files, image_size, num_frames, num_objects, augment=True),
        "PIL + torchvision": lambda: load_plainly(files, image_size),
    }
    images, masks = variants["clip"](), variants["SAM 2"]()
    _check_same(images, masks)
    with _one_thread():
        seconds = alternate(variants, rounds, CPU)
    medians = {name: statistics.median(taken) / num_frames for name, taken in seconds.items()}
    at = f"{size[1]} x {size[0]} JPEG + {num_objects} RLE -> {image_size} px, one process"

    def row(name: str, beside: str) -> Row:
        details = {"ours": seconds[name], "other": seconds[beside]}
        label = f"a frame of a {name}"
        return Row("loader", label, at, medians[name], medians[beside], "s", beside, details)

    return [
        row("clip", "SAM 2"),
        row("clip", "PIL + torchvision"),
        row("clip, masks cached", "SAM 2"),
        row("clip, augmented", "SAM 2, augmented"),
        _bytes_of_batch(files, image_size, num_frames, variants["SAM 2"]()),
        _place_in_film(folder / "film", film_size, film_frames, rounds),
    ]


def _silent(line: str) -> None:
    """Where a reader would say what it concluded."""


def _check_same(ours: Any, theirs: Any) -> None:
    """Raise Mismatch where two batches do not show the same pictures and masks."""
    apart = (ours.img_batch.float() - theirs.img_batch.float()).abs().mean().item()
    # SAM 2's loader shuffles objects; together they cover the same pixels.
    found, expected = ours.masks.any(1), theirs.masks.any(1)
    overlap = ((found & expected).sum() / (found | expected).sum()).item()
    if apart > _SAME_IMAGES or overlap < _SAME_CLIP_MASKS:
        raise Mismatch(
            f"our clip and SAM 2's differ by {apart:.3f} in pictures and overlap by {overlap:.3f} "
            "in masks: nothing is compared"
        )


def _their_loader(
    files: VideoFiles, image_size: int, num_frames: int, num_objects: int, *, augment: bool = False
) -> Callable[[], Any]:
    """A batch of one clip by SAM 2's data set of SA-V's JSON, transforms and collate function."""
    raw, clips = import_training("dataset.vos_raw_dataset"), import_training("dataset.vos_dataset")
    change, sampler = import_training("dataset.transforms"), import_training("dataset.vos_sampler")
    collate = import_training("utils.data_utils").collate_fn
    resize = change.RandomResizeAPI(image_size, square=True, consistent_transform=True)
    finish = [change.ToTensorAPI(), change.NormalizeAPI(MEAN.tolist(), STD.tolist())]
    before, between = [], []
    if augment:  # as the official recipe has it
        before = [
            change.RandomHorizontalFlip(True),
            change.RandomAffine(25, True, shear=20, image_interpolation="bilinear"),
        ]
        between = [
            change.ColorJitter(True, 0.1, 0.03, 0.03, None),
            change.RandomGrayscale(True, 0.05),
            change.ColorJitter(False, 0.1, 0.05, 0.05, None),
        ]
    steps = change.ComposeAPI([*before, resize, *between, *finish])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its length
        dataset = clips.VOSDataset(
            [steps],
            training=True,
            video_dataset=raw.JSONRawDataset(str(files.frames), str(files.masklets)),
            sampler=sampler.RandomUniformSampler(num_frames, num_objects),
            multiplier=1,
        )
    # In SAM 2's loader the numbers of videos are ints.
    return lambda: collate([dataset[0]], dict_key="all")


def load_plainly(files: VideoFiles, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (T, 3, H, W) and masks (T, N, H, W) as most people load them first: PIL, pycocotools
    and torchvision, and nothing else."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    size = [image_size, image_size]
    rows = json.loads((files.masklets / "video_manual.json").read_text())["masklet"]
    images, masks = [], []
    for path, row in zip(sorted((files.frames / "video").iterdir()), rows, strict=True):
        picture = F.resize(Image.open(path).convert("RGB"), size)
        images.append(F.normalize(F.to_tensor(picture), MEAN.tolist(), STD.tolist()))
        stack = torch.from_numpy(rle.decode(row)).permute(2, 0, 1)
        masks.append(F.resize(stack, size, InterpolationMode.NEAREST).bool())
    return torch.stack(images), torch.stack(masks)


def _bytes_of_batch(files: VideoFiles, image_size: int, num_frames: int, theirs: Any) -> Row:
    """What a process that loads data hands over for one clip."""
    config = DatasetConfig(
        data_path=str(files.coco), image_size=(image_size, image_size), video_clip_length=num_frames
    )
    data = build_dataset(config, AugmentConfig(), 0, str(files.coco), training=True, say=_silent)
    batch = next(load_batches(data, config, 0, start=0, pin_memory=False, say=_silent))
    sizes = [_num_bytes(batch), sum(t.nbytes for t in (theirs.img_batch, theirs.masks))]
    at = f"T = {num_frames}, {image_size} px"
    return Row("loader", "bytes of a batch from a worker", at, *sizes, "B")


def _num_bytes(value: Any) -> int:
    """Of all tensors in a data class."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if not is_dataclass(value):
        return 0
    return sum(_num_bytes(getattr(value, field.name)) for field in fields(value))


def _place_in_film(folder: Path, size: tuple[int, int], num_frames: int, rounds: int) -> Row:
    """Seconds of a clip at the end of an mp4 against one at its beginning, each from a data set
    that has read nothing yet."""
    stride, length = 4, 4  # SA-V labels every fourth frame
    (folder / "masklets").mkdir(parents=True)
    path = folder / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, size[::-1])
    rows = []
    for t, (picture, (mask,)) in enumerate(made_up_frames(size, num_frames, 1)):
        writer.write(picture)
        if t % stride == 0:
            encoded = rle.encode(np.asfortranarray(mask))
            rows.append([{"size": list(size), "counts": encoded["counts"].decode()}])
    writer.release()
    (folder / "film_manual.json").write_text(json.dumps({"masklet": rows}))
    config = DatasetConfig(dataset_type="sav", data_path=str(folder))

    def read(first: int) -> None:
        path = str(folder)
        data = build_dataset(config, AugmentConfig(), 0, path, training=False, say=_silent)
        (video,) = data.videos
        for t in range(first, first + stride * length, stride):
            data.read_frame(video, t)

    ends = {"beginning": lambda: read(0), "end": lambda: read(num_frames - stride * length)}
    with _one_thread():
        seconds = alternate(ends, rounds, CPU)
    return Row(
        "loader",
        "a clip at the end of a film",
        f"{length} frames of an mp4, {size[1]} x {size[0]}, {num_frames} frames",
        statistics.median(seconds["end"]),
        statistics.median(seconds["beginning"]),
        "s",
        "at its beginning",
        seconds,
    )


# -- index ----------------------------------------------------------------------------------------


def measure_index(folder: Path, *, num_annotations: int = 200_000, rounds: int = 2) -> list[Row]:
    """Seconds until a COCO JSON can be asked for a clip, against `pycocotools.COCO`."""
    from pycocotools.coco import COCO

    path = write_large_json(folder / "many", num_annotations)

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            COCO(str(path))

    runs = {"ours": lambda: _read_dataset(path), "theirs": theirs}
    seconds = alternate(runs, rounds, CPU, warm_up=False)
    at = f"{num_annotations:,} annotations"
    medians = [statistics.median(seconds[name]) for name in ("ours", "theirs")]
    few = write_large_json(folder / "few", 200)
    own = _worker_bytes(path) - _worker_bytes(few)
    held = in_process(bytes_of_coco, str(path))
    return [
        Row("index", "COCO JSON", at, *medians, "s", "pycocotools", seconds),
        Row("index", "own memory of a worker", at, own, held, "B", "pycocotools in one process"),
    ]


def _worker_bytes(path: Path, num_clips: int = 20) -> int:
    """Bytes that a process that loads data shares with no other, after some clips."""
    data = _read_dataset(path)
    config = DatasetConfig(data_path=str(path), num_workers=1)
    batches = load_batches(data, config, 0, start=0, pin_memory=False, say=_silent)
    for _ in range(num_clips):
        next(batches)
    (worker,) = multiprocessing.active_children()
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def bytes_of_coco(path: str) -> int:
    """What `pycocotools.COCO` adds to a process at its peak, with the file that it has read."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return peak_of(lambda: COCO(path), CPU)


def _read_dataset(path: Path) -> COCODataset:
    return COCODataset(path, (64, 64), prompt_types=["point"])


def write_large_json(folder: Path, num_annotations: int) -> Path:
    """A COCO JSON of many videos, 20 frames with 10 objects each, whose frames are one JPEG."""
    size, num_frames, num_objects = (480, 854), 20, 10
    folder.mkdir(parents=True)
    ((picture, _),) = made_up_frames(size, 1, 1)
    cv2.imwrite(str(folder / "frame.jpg"), picture)
    segmentations = []
    for _, masks in made_up_frames(size, num_frames, num_objects):
        encoded = [rle.encode(np.asfortranarray(mask)) for mask in masks]
        segmentations.append(
            [{"size": list(size), "counts": e["counts"].decode()} for e in encoded]
        )
    images, annotations = [], []
    for video in range(-(-num_annotations // (num_frames * num_objects))):
        place = f"video_{video:05d}"
        (folder / place).mkdir()
        for t in range(num_frames):
            name = f"{place}/{t:05d}.jpg"
            os.link(folder / "frame.jpg", folder / name)
            image = {"id": len(images) + 1, "video_id": place, "order_in_video": t, "path": name}
            images.append(image | {"height": size[0], "width": size[1]})
            for k in range(num_objects):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": 1,
                    "track_id": k + 1,
                    "segmentation": segmentations[t][k],
                }
                annotations.append(annotation)
    path = folder / "annotations.json"
    categories = [{"id": 1, "name": "ellipse"}]
    content = {"images": images, "annotations": annotations[:num_annotations]}
    path.write_text(json.dumps(content | {"categories": categories}))
    return path
