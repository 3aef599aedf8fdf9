"""The demo data: small synthetic videos in which a memory of past frames helps.

COCO video JSON plus JPEG frames of 128 x 128 px, drawn on first use and the same on every run of
one OpenCV build. `easy` and `motion` have short simple scenes to train base weights on; in
`motion` objects vanish, too. `train`, `val` and `test` have occlusions that end, objects that leave
and return, and look-alikes that pass each other; in each video of `absence` one object is out of
the frame for some frames. `fresh` has 96 more videos of the kind of `val` and `test`, for
differences that 12 videos are too few to show.
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
GENERATOR_VERSION = 1  # raise it when the same DemoSplit should give other pictures
JPEG_QUALITY = 88


SPLITS = {
    "easy": DemoSplit(101, 2400, 6, 1, 3, 4.0, 0.05, 1.12, 3, events=False),
    "motion": DemoSplit(105, 600, 6, 1, 3, 4.0, 0.05, 1.12, 0, events=False, vanish_every=2),
    "train": DemoSplit(102, 48, 24, 2, 3, 6.5, 0.12, 1.6, 0, events=True),
    "val": DemoSplit(103, 12, 24, 2, 3, 6.5, 0.12, 1.6, 0, events=True),
    "test": DemoSplit(104, 12, 24, 2, 3, 6.5, 0.12, 1.6, 0, events=True),
    "absence": DemoSplit(106, 20, 32, 2, 3, 6.5, 0.12, 1.6, 0, events=True, only="leaves"),
    "fresh": DemoSplit(107, 96, 24, 2, 3, 6.5, 0.12, 1.6, 0, events=True),
}

# sha256 of each split as OpenCV 5.0.0 on x86-64 Linux draws it.
DIGESTS = {
    "easy": "e6411dc7cf33ec3b43b4eb9b6cb4b22a521710396150706bfd3dee4d577cf286",
    "motion": "23966944df031d091a818e54782b7581cac5496f57d779dd48f3116f38215cba",
    "train": "19fd5f92a7cb97d689ca65aa62326c5e668abe2c961ae212f547faf5c049947d",
    "val": "a264ac1ce94a5af4a8f8f02d6258ef99640365db9eef3b5f393ff5b909307ba2",
    "test": "3cce9c7eb541ddfc43b68a879e5540ebe5150cbcbbeac0716ce6e5952dbdc31d",
    "absence": "0d6a6de047096351fa9a28cf74f291105c8c4e7ef264a3e4c7589fa1323dbac2",
    "fresh": "e54421ec8a6975aac0437aba0fe94ed591e99f056f8071fa24ebbd08b89e35de",
}


def generate(split: DemoSplit, folder: Path) -> None:
    """Write annotations.json, video_data/ and manifest.json of a split into an empty folder."""
    images, annotations, videos = [], [], []
    for video_index in range(split.num_videos):
        frames, masks, events = make_video(split, video_index)
        video_id = f"video_{video_index + 1:03d}"
        (folder / "video_data" / video_id).mkdir(parents=True)
        videos.append({"video_id": video_id, "events": list(events)})
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
        "info": {"description": "sam2train demo, synthetic", "videos": videos},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "shape"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    manifest = {"recipe": recipe(split), "sha256": digest(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def recipe(split: DemoSplit) -> dict:
    """All that the pictures of a split depend on; a split on disk of another recipe is outdated."""
    fields = dataclasses.asdict(split)
    # Without fields that are None: splits written before `only` existed keep their recipe.
    return {"version": GENERATOR_VERSION, **{k: v for k, v in fields.items() if v is not None}}


def digest(folder: Path) -> str:
    """sha256 over names and contents of annotations.json and all frames, in sorted order."""
    total = hashlib.sha256()
    names = ["annotations.json"]
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
