"""The layouts of DAVIS and SA-V give the scores and clips of earlier versions, to the last bit."""

import hashlib

import numpy as np
import pytest
from conftest import SIZE, to_pixels
from PIL import Image
from test_data_sav import write_json
from test_data_vos import make_vos

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_sav import SavVideos
from sam2train.data_vos import VosVideos
from sam2train.evaluate import EvaluationConfig, copy_first_mask, track_videos


def read(layout, root, size):
    """A data set of pictures and masks of whole numbers, which every machine draws alike."""
    if layout == "davis":
        make_vos(root, names=("bear",))
        folder, source, num_frames = root / "JPEGImages" / "bear", VosVideos, 6
    else:
        write_json(root / "sav_1_manual.json")
        folder, source, num_frames = root / "JPEGImages_24fps" / "sav_1", SavVideos, 10
        folder.mkdir(parents=True)
    rows, columns = np.indices(SIZE)
    for t in range(num_frames):
        pixels = np.stack([rows * 3 + t, columns * 2, rows * columns + 7 * t], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{t:05d}.png")
    settings = clip_settings(image_size=size, video_clip_length=3, prompt_types=["point", "bbox"])
    return ClipDataset(source(root), settings)


# Of each object: means of J and of F, exactly.
SCORES = {
    "davis": [
        ("0x1.21d40dbcfad77p-1", "0x1.0152aff56a805p-1"),
        ("0x1.21d40dbcfad77p-1", "0x1.ce98b3a62ce99p-2"),
    ],
    "sav": [
        ("0x1.c71c71c71c71cp-2", "0x1.270746c7c5c9dp-1"),
        ("0x1.c71c71c71c71cp-2", "0x1.1435e50d79436p-1"),
    ],
}
CLIPS = {
    "davis": "cb0c13d0d98f69853b3007e52345d5edd5b88547ba6e45c7bfcb44537cc3bbdd",
    "sav": "bd7dff2f982e2aa46fe8a07bf172cc0455b1fd6a8f6cef00125203a8d584f217",
}


@pytest.mark.parametrize("layout", ["davis", "sav"])
def test_copying_the_first_mask_scores_what_it_scored(layout, tmp_path):
    data = read(layout, tmp_path, SIZE)
    (video,) = track_videos(copy_first_mask, data, EvaluationConfig(), seed=0)
    found = [
        (float(of_object.J.mean()).hex(), float(of_object.F.mean()).hex())
        for of_object in video.measures.values()
    ]
    assert found == SCORES[layout]


@pytest.mark.parametrize("layout", ["davis", "sav"])
def test_clips_are_what_they_were(layout, tmp_path):
    """Frames at their own size, masks at half of it as well, and prompts."""
    digest = hashlib.sha256()
    for name, size in (("whole", SIZE), ("half", (SIZE[0] // 2, SIZE[1] // 2))):
        data = read(layout, tmp_path / name, size)
        for epoch in range(3):
            clip = data[epoch, 0]
            if size == SIZE:
                digest.update(np.ascontiguousarray(to_pixels(clip.images)).tobytes())
            digest.update(np.packbits(clip.masks.numpy()).tobytes())
            for prompt in clip.prompts:
                digest.update(repr((prompt["type"], prompt["points"].tolist())).encode())
    assert digest.hexdigest() == CLIPS[layout]
