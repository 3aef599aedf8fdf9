"""When objects show, and how large they are, counted by hand."""

import pytest
from conftest import load, make_coco

from sam2train import presence


def test_masks_and_presence(tmp_path):
    # Object 1 is always there, 2 appears late and vanishes, 3 goes and comes back.
    absent = [(1, 0, 2), (1, 5, 2), (1, 2, 3)]
    videos = load(make_coco(tmp_path, num_objects=3, absent=absent)).videos
    masks = presence.mask_table(videos)
    assert len(masks) == 18
    assert masks.loc[masks["area"] == 0, ["object_id", "frame"]].values.tolist() == [
        ["2", 0],
        ["3", 2],
        ["2", 5],
    ]
    assert masks["area"].max() == pytest.approx(14 * 16 / (48 * 64))
    counts = {"objects": 3, "late": 1, "vanish": 2, "return": 1}
    assert presence.presence_counts(masks) == counts
    text = presence.presence_text(masks)
    assert "Of 3 objects, 1 appear after the first frame, 2 vanish, and 1 of these" in text
    assert "Half of the masks cover less than 7.3% of" in text
