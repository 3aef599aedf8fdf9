"""What the videos of the demo show: objects, events, look-alikes, changing looks."""

import csv
import dataclasses
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from sam2train import demo, demo_videos
from sam2train.demo_videos import MIN_AREA, SIZE, DemoSplit, make_video

# pycocotools 2 decodes without the `copy` keyword that NumPy 2 asks of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HARD = dataclasses.replace(demo.SPLITS["val"], num_videos=6)


def read(folder):
    """Frames (T, H, W, 3), masks (T, N, H, W) bool and attributes of each video on disk."""
    content = json.loads((folder / "annotations.json").read_text())
    with open(folder / "attributes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    videos = []
    for video_id in sorted({image["video_id"] for image in content["images"]}):
        images = [image for image in content["images"] if image["video_id"] == video_id]
        assert [image["order_in_video"] for image in images] == list(range(len(images)))
        frames = np.stack([cv2.imread(str(folder / image["path"])) for image in images])
        frame_of = {image["id"]: t for t, image in enumerate(images)}
        mine = [a for a in content["annotations"] if a["image_id"] in frame_of]
        masks = np.zeros((len(images), max(a["track_id"] for a in mine), SIZE, SIZE), bool)
        for a in mine:
            masks[frame_of[a["image_id"]], a["track_id"] - 1] = rle.decode(a["segmentation"])
        attributes = [
            {r["attribute"] for r in rows if (r["video"], r["object"]) == (video_id, str(n))}
            for n in range(1, masks.shape[1] + 1)
        ]
        videos.append((frames, masks, attributes))
    return videos


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    demo.generate(HARD, folder)
    return folder


@pytest.fixture(scope="module")
def hard(hard_folder):
    return read(hard_folder)


def seen_of(masks):
    """(T, N) bool: where an object has enough pixels for an annotation."""
    return masks.sum((2, 3)) >= MIN_AREA


def test_a_video_does_not_depend_on_the_number_of_videos_or_on_its_neighbours(hard):
    frames, masks, attributes = make_video(demo.SPLITS["val"], 4)
    assert (hard[4][1][seen_of(masks)] == masks[seen_of(masks)]).all()
    assert hard[4][2] == [set(names) for names in attributes]
    # JPEG at quality 88 changes a pixel by a few grey values, no more on average.
    assert np.abs(hard[4][0].astype(int) - frames).mean() < 5


def test_annotations_are_coco_and_their_numbers_follow_from_the_masks(hard_folder):
    content = json.loads((hard_folder / "annotations.json").read_text())
    assert [image["id"] for image in content["images"]] == list(range(1, 6 * 24 + 1))
    assert content["images"][24]["path"] == "video_data/video_002/frame_001.jpg"
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert content["categories"] == [{"id": 1, "name": "shape"}]
    for a in content["annotations"][::7]:
        mask = rle.decode(a["segmentation"])
        ys, xs = np.nonzero(mask)
        assert a["area"] == mask.sum() >= MIN_AREA
        assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_objects_share_no_pixel_and_are_seen_well_at_first(hard):
    for _, masks, _ in hard:
        assert masks.sum(1).max() == 1
        assert 5 <= masks.shape[1] <= 6
        areas, seen = masks.sum((2, 3)), seen_of(masks)
        first = seen.argmax(0)
        assert (seen.mean(0) >= 1 / 3).all()
        assert (areas[first, np.arange(len(first))] > 50).all()
        assert areas.max() < 0.25 * SIZE**2


@pytest.mark.parametrize(
    ("name", "low", "high"), [("train", 0.15, 0.22), ("test", 0.15, 0.22), ("clips", 0.13, 0.21)]
)
def test_objects_are_absent_for_a_good_part_of_the_frames(name, low, high):
    """Of the frames from an object's first on."""
    absent = []
    for video_index in range(12):
        seen = seen_of(make_video(demo.SPLITS[name], video_index)[1])
        absent += [1 - seen[seen[:, n].argmax() :, n].mean() for n in range(seen.shape[1])]
    assert low < np.mean(absent) < high


def test_attributes_say_what_happens(hard):
    listed = set().union(*(names for _, _, attributes in hard for names in attributes))
    assert listed == set(demo_videos.ATTRIBUTES)
    for _, masks, attributes in hard:
        seen = seen_of(masks)
        for n, names in enumerate(attributes):
            first = int(seen[:, n].argmax())
            assert ("late" in names) == (first > 0)
            assert ("absence" in names) == (not seen[first:, n].all())


def test_a_look_alike_has_the_colours_of_another_shape():
    rng = np.random.default_rng(0)
    split = dataclasses.replace(HARD, twins=1.0)
    objects, shapes = demo_videos.sample_layout(rng, split)
    twins = [s for s in shapes if s is not objects[0] and s.pattern is objects[0].pattern]
    assert len(twins) == 1
    x = y = np.zeros((1, 1))
    for t in (0, 11, 23):
        np.testing.assert_array_equal(twins[0].colour(t, x, y), objects[0].colour(t, x, y))


def test_looks_change_with_the_split_s_setting():
    """The colour at a shape's middle, on the last frame against the first."""

    def change(looks):
        rng = np.random.default_rng(1)
        split = dataclasses.replace(HARD, looks=looks)
        shapes = [demo_videos.sample_shape(rng, split, []) for _ in range(40)]
        x = y = np.zeros((1, 1))
        return np.mean([np.abs(s.colour(23, x, y) - s.colour(0, x, y)).mean() for s in shapes])

    assert change(0.0) == 0
    assert change(0.3) > 5
    assert change(1.0) > 2 * change(0.3)


@pytest.mark.parametrize(
    ("event", "first", "last"), [("leaves", 8, 13), ("gone", 15, 46), ("late", -23, 4)]
)
def test_a_shape_that_is_moved_out_is_outside_from_the_first_to_the_last_frame(event, first, last):
    rng = np.random.default_rng(3)
    for _ in range(10):
        shape = demo_videos.sample_shape(rng, HARD, [])
        demo_videos.move_out(shape, first, last, 3.0)
        masks, _ = demo_videos.cover([shape], [shape], range(24))
        shown = masks.any((1, 2, 3))
        assert not shown[max(first, 0) : last + 1].any()
        assert shown[: max(first - 3, 0)].all()
        assert shown[last + 4 :].all()


def test_a_bar_hides_the_shape_it_passes():
    rng = np.random.default_rng(4)
    hidden = 0
    for _ in range(10):
        shape = demo_videos.sample_shape(rng, HARD, [])
        bar = demo_videos.hide(shape, rng, HARD, 12.0)
        _, shares = demo_videos.cover([shape, bar], [shape], range(24))
        hidden += shares[12, 0] < 0.1
    assert hidden >= 9  # an outline with a high wave may stick out


def test_the_visible_share_of_a_whole_object_is_one():
    rng = np.random.default_rng(5)
    for _ in range(10):
        shape = demo_videos.sample_shape(rng, HARD, [])
        shape.centre[:] = SIZE / 2
        _, shares = demo_videos.cover([shape], [shape], [0, 9])
        np.testing.assert_allclose(shares, 1, atol=0.08)


def test_masks_are_the_visible_pixels_of_the_picture(monkeypatch):
    """With one flat colour a shape, the picture itself says what is on top."""
    flat = iter([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250)] * 400)

    def plain(shape, frame_idx, x, y):
        return np.broadcast_to(np.array(shape.colours, float), (*x.shape, 3))

    monkeypatch.setattr(demo_videos, "sample_colours", lambda rng, taken: next(flat))
    monkeypatch.setattr(demo_videos.Shape, "colour", plain)
    monkeypatch.setattr(
        demo_videos, "sample_backdrop", lambda rng, split: np.zeros((24, SIZE, SIZE, 3))
    )
    frames, masks, _ = make_video(DemoSplit(7, 1, 24, 3, 3, 6.0, 0.0, 1.0, 0.0), 0)
    for n in range(masks.shape[1]):
        colour = np.median(frames[masks[:, n]], axis=0)
        near = np.abs(frames.astype(int) - colour).max(-1) < 60
        # Doubtful are only half-covered pixels, where two outlines blend: thin lines.
        for wrong in (masks[:, n] & ~near).astype(np.uint8):
            assert not cv2.erode(wrong, np.ones((3, 3), np.uint8)).any()


def test_a_layout_that_cannot_be_found_is_reported(monkeypatch):
    monkeypatch.setattr(demo_videos, "MAX_DRAWS", 3)
    monkeypatch.setattr(demo_videos, "is_clear", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"video 1 of DemoSplit"):
        make_video(HARD, 1)
