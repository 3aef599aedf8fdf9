"""Annotations of a COCO file that are no object: crowds and regions to ignore."""

import numpy as np
import pytest
from conftest import SIZE, edit, encode, load, make_coco

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_coco import CocoVideos
from sam2train.errors import UserError


def add_crowd(content, where=slice(0, 6), *, every=True, **more):
    """A region at the top right of each frame, beside the objects."""
    region = np.zeros(SIZE, bool)
    region[where, -20:] = True
    for image in content["images"]:
        content["annotations"].append(
            {"id": 900 + image["id"], "image_id": image["id"], "category_id": 1}
            | {"segmentation": encode(region), "iscrowd": 1}
            | more
        )


def test_crowds_are_ignored_and_no_object(tmp_path):
    data = load(edit(make_coco(tmp_path), add_crowd))
    (video,) = data.videos
    assert video.object_ids == [1, 2]
    for t in range(6):
        expected = np.zeros(SIZE, bool)
        expected[:6, -20:] = True
        for object_id in (1, 2):
            expected &= ~data.read_mask(video, t, object_id)
        np.testing.assert_array_equal(data.read_ignore(video, t), expected)
    assert data[0].ignore.any()
    assert any("6 annotations are regions to ignore" in note for note in data.source.notes)


def test_regions_with_ignore_are_ignored(tmp_path):
    more = {"iscrowd": 0, "ignore": 1}
    data = load(edit(make_coco(tmp_path), lambda content: add_crowd(content, **more)))
    assert data.videos[0].object_ids == [1, 2]
    assert data.read_ignore(data.videos[0], 0).any()


def test_iscrowd_of_all_rles_says_how_they_are_written(tmp_path):
    """As CVAT flags masks: they have tracks, and no RLE is without the flag."""

    def flag(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    path = edit(make_coco(tmp_path), flag)
    data = load(path)
    assert data.videos[0].object_ids == [1, 2]
    assert data.read_ignore(data.videos[0], 0) is None
    assert any("dataset.crowds: ignore" in note for note in data.source.notes)
    with pytest.raises(UserError, match="no annotation has a mask"):
        ClipDataset(CocoVideos(path, crowds="ignore"), clip_settings(SIZE))


def test_crowds_may_be_objects(tmp_path):
    path = edit(make_coco(tmp_path), lambda content: add_crowd(content, track_id=9))
    assert load(path).videos[0].object_ids == [1, 2]
    source = CocoVideos(path, crowds="objects")
    assert source.videos[0].object_ids == [1, 2, 9]


def test_a_frame_with_a_crowd_alone_was_looked_at(tmp_path):
    def thin(content):
        add_crowd(content)
        content["annotations"] = [
            a for a in content["annotations"] if a["id"] > 900 or a["image_id"] in (1, 3, 5)
        ]

    assert load(edit(make_coco(tmp_path), thin)).videos[0].labelled == list(range(6))
