"""MOTS PNGs: ids of class * 1000 + number beside images, in the layouts that exist."""

import numpy as np
import pytest
from conftest import OBJECT_COLOURS, SIZE, moving_masks
from PIL import Image

from sam2train.config import build
from sam2train.data_mots import MotsVideos
from sam2train.datasets import DatasetConfig, build_dataset
from sam2train.errors import UserError
from sam2train.transforms import AugmentConfig

MASKS = moving_masks(4, 2, SIZE)


def write(frames, masks, ids=(2001, 1003)):
    """Frames of the two objects, and their ids with a region to ignore at the lower right."""
    for folder in (frames, masks):
        folder.mkdir(parents=True, exist_ok=True)
    (masks.parent / "labels.txt").write_text("tool\n")
    for t in range(4):
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        values = np.zeros(SIZE, np.uint16)
        values[-6:, -20:] = 10000
        for k in range(2):
            pixels[MASKS[t, k]] = OBJECT_COLOURS[k]
            values[MASKS[t, k]] = ids[k]
        Image.fromarray(pixels).save(frames / f"frame_{t:06d}.png")
        Image.fromarray(values).save(masks / f"frame_{t:06d}.png")


def load(path, name="mots"):
    raw = {"dataset_type": name, "data_path": str(path), "image_size": SIZE}
    config = build(DatasetConfig, raw, "dataset")
    said = []
    data = build_dataset(config, AugmentConfig(), 0, str(path), training=True, say=said.append)
    return data, said


LAYOUTS = {
    "one video": [("images", "instances")],
    "one task a folder": [("a/images", "a/instances"), ("b/images", "b/instances")],
    "one folder a video": [("images/a", "instances/a"), ("images/b", "instances/b")],
    "KITTI": [("image_02/0000", "instances/0000"), ("image_02/0001", "instances/0001")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mots", "vos"])
def test_layouts(tmp_path, layout, name):
    root = tmp_path / "train"
    for frames, masks in LAYOUTS[layout]:
        write(root / frames, root / masks)
    data, said = load(root, name)
    assert len(data.videos) == len(LAYOUTS[layout])
    assert len({video.video_id for video in data.videos}) == len(data.videos)
    assert ("read as dataset_type: mots" in said[0]) == (name == "vos")
    for video in data.videos:
        assert video.object_ids == [1003, 2001]
        assert len(video.frames) == 4
        for k, object_id in enumerate((2001, 1003)):
            np.testing.assert_array_equal(data.read_mask(video, 2, object_id), MASKS[2, k])
        free = 120 - MASKS[1, :, -6:, -20:].sum()
        assert data.read_ignore(video, 1).sum() == free


def test_what_is_missing_or_has_plain_ids_is_told(tmp_path):
    with pytest.raises(UserError, match="no images with instances; expected images/"):
        MotsVideos(tmp_path)
    with pytest.raises(UserError, match="no such folder; expected images/"):
        MotsVideos(tmp_path / "nowhere")
    write(tmp_path / "images", tmp_path / "instances", ids=(1, 2))
    with pytest.raises(UserError, match=r"ids \[1, 2.*class \* 1000.*dataset_type: vos"):
        MotsVideos(tmp_path)
    (tmp_path / "instances" / "frame_000003.png").rename(tmp_path / "instances" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: no frame of this name"):
        MotsVideos(tmp_path)
