"""The demo data: small synthetic videos in which a memory of past frames helps.

COCO video JSON plus JPEG frames of 128 x 128 px, drawn on first use. `stills` and `clips` train the
base weights: single frames, and simple videos whose objects leave and hide. `train`, `val` and
`test` are harder: looks change, look-alikes pass, motion is faster. `attributes.csv` beside the
annotations says what happens to each object.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

from sam2train.demo_videos import MIN_AREA, SIZE, DemoSplit, make_video
from sam2train.errors import UserError
from sam2train.files import REPOSITORY, read_json, resolve_path

_EXPECTED = "expected the manifest that the generator wrote"
GENERATOR_VERSION = 2  # raise it when the same DemoSplit should give other pictures
JPEG_QUALITY = 88


SPLITS = {
    "stills": DemoSplit(201, 4000, 1, 3, 5, 4.0, 0.3, 0.0, 0.2),
    "clips": DemoSplit(205, 400, 22, 3, 4, 4.0, 0.3, 0.9, 0.2),
    "scenes": DemoSplit(206, 400, 24, 4, 5, 5.0, 0.6, 1.0, 0.4),
    "train": DemoSplit(202, 60, 24, 5, 6, 6.0, 1.0, 1.0, 0.5),
    "val": DemoSplit(223, 16, 24, 5, 6, 6.0, 1.0, 1.0, 0.5),
    "test": DemoSplit(204, 48, 24, 5, 6, 6.0, 1.0, 1.0, 0.5),
}

# sha256 of each split; OpenCV 4.9, 4.12 and 5.0 write the same JPEG files.
DIGESTS = {
    "stills": "d718a150c88b5b86adbd60de02f785bb0a7ccca8a5ad88c0dc5d8a8120a2f913",
    "clips": "5d1085be9f32a887f64af148b66c15c284e6719cb35d6de9038592c5a851eec0",
    "scenes": "f47505bdf59af028b02c3903e676da141dfdb708daf64fa96f27e9e94d8c3f69",
    "train": "5fddc5cd588d959f7fb7dbff207ec9a9256409f488eadb31b8545fff8d6ee314",
    "val": "549490c9f367c2e985f51e3c3e0779722f06706de77b5d7a430632c1f99a7e39",
    "test": "d8763852c528f8d82c0ca121ffa2bc975e7986990760213c25d6c882c7168651",
}


def generate(split: DemoSplit, folder: Path) -> None:
    """Write a split into an empty folder: annotations, attributes, manifest and video_data/."""
    images, annotations, rows = [], [], []
    for video_index in range(split.num_videos):
        frames, masks, attributes = make_video(split, video_index)
        video_id = f"video_{video_index + 1:03d}"
        (folder / "video_data" / video_id).mkdir(parents=True)
        for track_id, names in enumerate(attributes, start=1):
            rows += [f"{video_id},{track_id},{name}" for name in names]
        for t, picture in enumerate(frames):
            path = f"video_data/{video_id}/frame_{t + 1:03d}.jpg"
            jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
            (folder / path).write_bytes(jpeg.tobytes())
            images.append(
                {
                    "id": len(images) + 1,
                    "video_id": video_id,
                    "order_in_video": t,
                    "path": path,
                    "width": SIZE,
                    "height": SIZE,
                }
            )
            for track_id, mask in enumerate(masks[t], start=1):
                area = int(mask.sum())
                if area < MIN_AREA:
                    continue
                code = rle.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": 1,
                        "track_id": track_id,
                        "segmentation": {"size": [SIZE, SIZE], "counts": code["counts"].decode()},
                        "area": area,
                        "bbox": rle.toBbox(code).tolist(),
                        "iscrowd": 0,
                    }
                )
    content = {
        "info": {"description": "sam2train demo, synthetic"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "shape"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "attributes.csv").write_text("\n".join(["video,object,attribute", *rows, ""]))
    manifest = {"recipe": recipe(split), "sha256": digest(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def recipe(split: DemoSplit) -> dict:
    """All that the pictures of a split depend on; a split on disk of another recipe is outdated."""
    return {"version": GENERATOR_VERSION, **dataclasses.asdict(split)}


def digest(folder: Path) -> str:
    """sha256 over names and contents of the annotations, the attributes and all frames."""
    total = hashlib.sha256()
    names = ["annotations.json", "attributes.csv"]
    for parent in sorted(os.listdir(folder / "video_data")):
        inside = sorted(os.listdir(folder / "video_data" / parent))
        names += [f"video_data/{parent}/{name}" for name in inside]
    for name in names:
        with open(f"{folder}/{name}", "rb", buffering=0) as file:
            total.update(name.encode() + b"\0")
            total.update(file.read())
    return total.hexdigest()


def is_demo_path(path: str | Path) -> bool:
    """Whether the path ends in demo/<a split>/annotations.json, present or not."""
    return Path(path).parts[-3:] in {("demo", name, "annotations.json") for name in SPLITS}


def is_intact(path: Path, split: DemoSplit) -> bool:
    """Whether the split at .../annotations.json is complete, unchanged and of this recipe."""
    try:
        manifest = read_json(path.parent / "manifest.json", _EXPECTED)
        return manifest["recipe"] == recipe(split) and manifest["sha256"] == digest(path.parent)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # whatever is damaged, the split is drawn again
        return False


def matches_recorded(path: str | Path) -> bool:
    """Whether an ensured split has the bytes in DIGESTS; other OpenCV builds round differently."""
    path = Path(path)
    manifest = read_json(path.with_name("manifest.json"), _EXPECTED)
    return manifest["sha256"] == DIGESTS.get(path.parent.name)


def resolve_data_path(path: str, say: Callable[[str], None] = print) -> Path:
    """A data set's path, resolved; the demo data is drawn if it belongs there and is missing.

    Args:
        say: gets a line where the demo data is drawn, or differs from the published one.
    """
    path = resolve_path(path)
    annotations = path.with_name("annotations.json")  # lies beside the folder of frames, too
    if is_demo_path(annotations) and path.name in ("annotations.json", "video_data"):
        if not path.is_absolute():
            path, annotations = REPOSITORY / path, REPOSITORY / annotations
        if not annotations.exists():
            say(f"drawing the demo data in {annotations.parent}/, this once")
        ensure(annotations)
        if not matches_recorded(annotations):
            say(f"{path.parent}/ was drawn by another OpenCV: scores may differ in the last digits")
    return path


def ensure(path: str | Path) -> Path:
    """The same path, with the split behind it generated, or repaired if its bytes have changed.

    Args:
        path: .../demo/<split>/annotations.json, below any root.

    Raises:
        UserError: the path has another form, or its folder cannot be written.
    """
    path = Path(path)
    if not is_demo_path(path):
        raise UserError(
            f"{path} is not a path of the demo data; expected .../demo/<split>/annotations.json "
            f"with one of the splits {', '.join(SPLITS)}"
        )
    split, folder = SPLITS[path.parent.name], path.parent
    if is_intact(path, split):
        return path
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(f".{folder.name}-*"):  # from a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > 3600:
                    shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (work / "new").mkdir()
            generate(split, work / "new")
            replace(folder, work, split)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder}: the demo data cannot be written ({error}); expected a writable folder with "
            "100 MB free; make room, or give a path elsewhere that ends in "
            f"demo/{folder.name}/annotations.json"
        ) from error
    return path


def replace(folder: Path, work: Path, split: DemoSplit) -> None:
    """Put work/new in the place of folder, unless another process has just put its own there."""
    path = folder / "annotations.json"
    if is_intact(path, split):
        return
    try:
        if folder.exists():
            folder.rename(work / "old")
        (work / "new").rename(folder)
    except OSError:
        if not is_intact(path, split):
            raise
