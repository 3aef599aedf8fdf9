"""What the videos of the demo show: objects, events, look-alikes."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from sam2train import demo, demo_videos

# pycocotools 2 decodes without the `copy` keyword that NumPy 2 asks of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HARD = dataclasses.replace(demo.SPLITS["val"], num_videos=10)  # every event; video 10 is late


class Video:
    """One video read back from disk: frames (T, H, W, 3), masks (T, N, H, W) bool, events."""

    def __init__(self, folder, content, video_id):
        images = [image for image in content["images"] if image["video_id"] == video_id]
        assert [image["order_in_video"] for image in images] == list(range(len(images)))
        self.frames = np.stack([cv2.imread(str(folder / image["path"])) for image in images])
        frame_of = {image["id"]: t for t, image in enumerate(images)}
        mine = [a for a in content["annotations"] if a["image_id"] in frame_of]
        shape = (len(images), max(a["track_id"] for a in mine), demo_videos.SIZE, demo_videos.SIZE)
        self.masks = np.zeros(shape, bool)
        for a in mine:
            self.masks[frame_of[a["image_id"]], a["track_id"] - 1] = rle.decode(a["segmentation"])
        self.areas = self.masks.sum((2, 3))

    def centre(self, frame_idx, track_id):
        return np.argwhere(self.masks[frame_idx, track_id - 1]).mean(0)

    def colour(self, track_id):
        return self.frames[0][self.masks[0, track_id - 1]].mean(0)


def read(folder):
    content = json.loads((folder / "annotations.json").read_text())
    return content, [
        (entry["events"], Video(folder, content, entry["video_id"]))
        for entry in content["info"]["videos"]
    ]


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    demo.generate(HARD, folder)
    return folder


@pytest.fixture(scope="module")
def hard(hard_folder):
    return read(hard_folder)


def test_a_video_does_not_depend_on_the_number_of_videos_or_on_its_neighbours(hard_folder):
    frames, masks, events = demo_videos.make_video(demo.SPLITS["val"], 7)
    _, videos = read(hard_folder)
    assert videos[7][0] == list(events)
    assert (videos[7][1].masks == masks).all()
    # JPEG at quality 88 changes a pixel by a few grey values, no more on average.
    assert np.abs(videos[7][1].frames.astype(int) - frames).mean() < 4


def test_annotations_are_coco_and_their_numbers_follow_from_the_masks(hard, hard_folder):
    content, _ = hard
    assert [image["id"] for image in content["images"]] == list(range(1, 241))
    assert content["images"][24]["path"] == "video_data/video_002/frame_001.jpg"
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert content["categories"] == [{"id": 1, "name": "shape"}]
    for image in content["images"]:
        picture = cv2.imread(str(hard_folder / image["path"]))
        assert picture.shape == (image["height"], image["width"], 3) == (128, 128, 3)
    for a in content["annotations"]:
        mask = rle.decode(a["segmentation"])
        ys, xs = np.nonzero(mask)
        assert a["area"] == mask.sum() >= demo_videos.MIN_AREA
        assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_objects_of_a_frame_share_no_pixel_and_have_sensible_sizes(hard):
    for _, video in hard[1]:
        assert video.masks.sum(1).max() == 1
        assert (video.areas.max(0) > 0.008 * 128**2).all()
        assert video.areas.max() < 0.25 * 128**2


def test_alpha_of_a_square_is_exact():
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / np.sqrt(2)
    still = np.zeros(2)
    layer = demo_videos.DemoLayer(
        corners, np.array([(40.0, 60.0)] * 2), still + 10 * np.sqrt(2), np.array([0, np.pi / 2])
    )
    np.testing.assert_allclose(layer.full_area(), 400, rtol=1e-5)
    mask = layer.alpha(0) >= 0.5
    ys, xs = np.nonzero(mask)
    assert (xs.min(), ys.min()) == (30, 50)  # centre 40 (x) and 60 (y), half a side 10
    assert abs(mask.sum() - 400) <= 41  # a drawn edge may take one more row and column
    np.testing.assert_allclose(layer.alpha(1), layer.alpha(0), atol=0.3)  # a quarter turn


@pytest.mark.parametrize("video_index", [0, 1, 2, 3])
def test_masks_are_the_visible_pixels_of_the_picture(monkeypatch, video_index):
    """With one flat colour a layer, black elsewhere, the picture itself says what is on top."""
    flat = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250)]
    handed_out = []

    def plain(rng, size, colours, repeats):
        is_backdrop = size != demo_videos.PATCH or repeats == 6.0
        colour = (0, 0, 0) if is_backdrop else flat[len(handed_out)]
        if not is_backdrop:
            handed_out.append(colour)
        return np.full((size, size, 3), colour, np.float32)

    monkeypatch.setattr(demo_videos, "texture", plain)
    # A look-alike shares its double's texture, so of a pair only the union could be told.
    monkeypatch.setattr(demo_videos, "EVENTS", (("occlusion",), ("crossing",)))
    split = demo.SPLITS["val"]
    frames, masks, _ = demo_videos.make_video(split, video_index)
    known = np.array([(0, 0, 0), *handed_out])
    away = np.linalg.norm(frames[..., None, :].astype(float) - known, axis=-1)
    label = away.argmin(-1)  # (T, H, W), 0 is the background
    for i in range(masks.shape[1]):
        colour = np.bincount(label[masks[:, i]]).argmax()
        assert colour > 0
        wrong = masks[:, i] != (label == colour)
        # Doubtful are only half-covered pixels, where two outlines blend: few, and in thin lines.
        assert wrong.sum() < 0.03 * masks[:, i].sum()
        for frame in wrong.astype(np.uint8):
            assert not cv2.erode(frame, np.ones((3, 3), np.uint8)).any()


def test_every_event_is_scheduled_and_every_hard_video_has_one(hard):
    listed = [events for events, _ in hard[1]]
    assert all(listed)
    assert {name for events in listed for name in events} == {
        "occlusion",
        "leaves",
        "lookalike",
        "crossing",
        "lookalike_unannotated",
        "late",
    }
    assert ["late" in events for events in listed] == [False] * 9 + [True]


def test_an_object_that_leaves_is_gone_for_2_to_8_frames_and_comes_back(hard):
    for events, video in hard[1]:
        gone = np.flatnonzero(video.areas[:, 0] == 0)
        if "leaves" in events:
            assert 2 <= len(gone) <= 8
            assert gone[0] > 0
            assert gone[-1] < len(video.areas) - 1
            assert (np.diff(gone) == 1).all()
            # It goes over a border: its last visible rest touches the edge of the frame.
            rest = video.masks[gone[0] - 1, 0]
            edge = np.r_[rest[0], rest[-1], rest[:, 0], rest[:, -1]]
            assert edge.any()
        elif "occlusion" not in events and "crossing" not in events:
            assert len(gone) == 0


def test_a_hidden_object_loses_most_of_its_area_and_regains_it(hard):
    for events, video in hard[1]:
        if {"occlusion", "crossing"} & set(events):
            area = video.areas[:, 0]
            lowest = int(area.argmin())
            limit = 0.35 if "occlusion" in events else 0.5
            # Radii change by a factor of up to 1.6 within a video.
            assert area[lowest] < limit * area[: lowest + 1].max() * 1.3
            assert area[-3:].max() > 0.6 * area[0] / 1.6**2
        if "crossing" in events:
            # Whatever hides it is annotated: another object covers the place.
            others = video.masks[lowest, 1:].any(0)
            here = video.centre(lowest - 3, 1)
            ys, xs = np.nonzero(others)
            assert np.hypot(ys - here[0], xs - here[1]).min() < 20


def test_look_alikes_look_alike_and_meet(hard):
    seen = 0
    for events, video in hard[1]:
        if "lookalike" not in events:
            continue
        seen += 1
        assert np.linalg.norm(video.colour(1) - video.colour(2)) < 20
        ratio = video.areas[0, 0] / video.areas[0, 1]
        assert 0.5 < ratio < 2
        both = np.flatnonzero((video.areas[:, :2] > 0).all(1))
        apart = [np.linalg.norm(video.centre(t, 1) - video.centre(t, 2)) for t in both]
        diameter = 2 * np.sqrt(video.areas[0, :2].max() / np.pi)
        assert min(apart) < 1.5 * diameter
        assert min(apart) < 0.8 * apart[0]
    assert seen == 3


def test_a_late_object_is_missing_first_and_then_stays(hard):
    events, video = hard[1][9]
    assert "late" in events
    there = video.areas[:, -1] > 0
    first = int(there.argmax())
    assert 2 <= first <= 12
    assert there[first:].all()
    assert (video.areas[0, :-1] > 0).all()


def test_easy_videos_show_every_object_on_every_frame_and_a_third_is_almost_still():
    split, speeds = demo.SPLITS["easy"], {True: [], False: []}
    for video_index in range(12):
        _, masks, events = demo_videos.make_video(split, video_index)
        assert events == ()
        assert 1 <= masks.shape[1] <= 3
        assert masks.any((2, 3)).all()
        for i in range(masks.shape[1]):
            first, last = (np.argwhere(masks[t, i]).mean(0) for t in (0, -1))
            speeds[video_index % 3 == 0].append(np.linalg.norm(last - first) / 5)
    assert max(speeds[True]) < 0.5 < np.median(speeds[False])
    assert max(speeds[False]) < 4.5


def test_one_spell():
    flags = np.zeros(12, bool)
    flags[4:7] = True
    assert demo_videos.one_spell(flags, 3, 3)
    assert not demo_videos.one_spell(flags, 4, 8)
    assert not demo_videos.one_spell(np.roll(flags, -4), 2, 8)  # from the first frame on
    assert not demo_videos.one_spell(np.roll(flags, 3), 2, 8)  # until two frames before the end
    flags[9] = True
    assert not demo_videos.one_spell(flags, 2, 8)  # twice
    assert not demo_videos.one_spell(flags & False, 2, 8)


def test_an_object_of_every_second_motion_video_vanishes_for_good():
    split = demo.SPLITS["motion"]
    for video_index in range(6):
        _, masks, _ = demo_videos.make_video(split, video_index)
        _, unhidden, _ = demo_videos.make_video(
            dataclasses.replace(split, vanish_every=0), video_index
        )
        gone = ~masks.any(axis=(2, 3)) & unhidden.any(axis=(2, 3))  # (T, N)
        assert not gone[0].any()
        assert (np.diff(gone.astype(int), axis=0) >= 0).all()
        assert gone.any(axis=0).sum() == (video_index % 2 == 0)
        assert (masks[~gone] == unhidden[~gone]).mean() > 0.99


def test_an_object_of_every_absence_video_leaves_and_returns():
    for video_index in range(4):
        _, masks, events = demo_videos.make_video(demo.SPLITS["absence"], video_index)
        assert events == ("leaves",)
        absent = masks.sum(axis=(2, 3)) < demo_videos.MIN_AREA  # (T, N)
        assert demo_videos.one_spell(absent[:, 0], 2, 8)
        assert not absent[:, 1:].any()


@pytest.mark.parametrize(
    ("events", "track", "low", "frames", "expected"),
    [
        (("leaves",), 0, 0, range(8, 12), True),
        (("leaves",), 0, 0, range(8, 17), False),  # 9 frames are too long
        (("leaves",), 0, 0, range(20, 24), False),  # does not come back
        (("leaves",), 0, 50, range(8, 12), False),  # half of it stays in view
        (("occlusion",), 0, 30, range(8, 12), True),
        (("occlusion",), 0, 60, range(8, 12), False),
        (("crossing",), 0, 45, range(8, 12), True),
        (("crossing",), 1, 0, range(8, 12), False),  # happens to another object
        (("lookalike",), 0, 0, range(8, 12), False),  # an event that is not listed
        (("lookalike",), 0, 0, range(0), True),
        (("late",), 2, 0, range(5), True),
        (("late",), 2, 0, range(13), False),
        (("late",), 2, 0, range(1, 5), False),  # is there on frame 0
        (("late",), 0, 0, range(5), False),
        ((), 0, 90, range(24), True),
        ((), 0, 80, range(3, 4), False),
    ],
)
def test_events_that_show(events, track, low, frames, expected):
    """Three objects of 100 px in full; one of them shows `low` px on the given frames."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / np.sqrt(2)
    radius, still = np.full(24, 5 * np.sqrt(2)), np.zeros(24)
    layers = [
        demo_videos.DemoLayer(corners, np.zeros((24, 2)), radius, still, i) for i in (1, 2, 3)
    ]
    areas = np.full((24, 3), 100)
    areas[list(frames), track] = low
    assert demo_videos.events_show(layers, areas, events) is expected


def test_a_layout_that_cannot_be_found_is_reported(monkeypatch):
    monkeypatch.setattr(demo_videos, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(demo_videos, "paths_fit", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"video 1 of DemoSplit.*leaves"):
        demo_videos.make_video(HARD, 1)
