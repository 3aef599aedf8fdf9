"""Areas of many RLE texts at once; what is read of whole files is in test_data_coco_index."""

import numpy as np
from pycocotools import mask as rle

from sam2train.data_coco_plain import rle_areas
from sam2train.data_index import as_bytes, ends


def test_areas_are_those_of_the_masks_and_damage_is_told():
    rng = np.random.default_rng(0)
    texts, areas, pixels = [], [], []
    for _ in range(120):
        mask = rng.random(rng.integers(1, 50, 2)) < rng.choice([0, 0.1, 0.5, 1.0])
        texts.append(rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
        areas.append(mask.sum())
        pixels.append(mask.size)
    place, text, pixels = ends(list(map(len, texts))), as_bytes(b"".join(texts)), np.array(pixels)
    np.testing.assert_array_equal(rle_areas(text, place, pixels), areas)
    for _ in range(50):
        broken = text.copy()
        broken[rng.integers(len(broken))] ^= rng.integers(1, 64)
        assert rle_areas(broken, place, pixels) is None
    assert rle_areas(text, place, pixels + 1) is None
