"""Pictures and films of tracked videos: which videos, frames and masks."""

import cv2
import numpy as np
import pytest
from conftest import edit, make_coco
from PIL import Image
from test_data_vos import make_vos

from sam2train import overlays
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_vos import VosVideos
from sam2train.datasets import COCODataset
from sam2train.evaluate import EvaluationConfig, copy_first_mask, track_videos
from sam2train.overlays import MAX_SHOWN, OverlayDrawer, pick_videos

SIZE = (48, 64)


def see_all(drawer, data, config):
    """Show a drawer the copied first masks of a data set."""
    videos = track_videos(copy_first_mask, data, config, seed=0, on_frame=drawer.see_frame)
    for index, video in enumerate(videos):
        drawer.see_video(index, video)
    drawer.draw()


def draw(path, folder, *, most=2, **settings) -> OverlayDrawer:
    data = COCODataset(path, SIZE, prompt_types=["mask"])
    drawer = OverlayDrawer(data, folder, "step_000010", most)
    see_all(drawer, data, EvaluationConfig(**settings))
    return drawer


def test_pictures_and_films_lie_on_disk(tmp_path):
    path = make_coco(tmp_path, num_videos=2, num_frames=30)
    drawer = draw(path, tmp_path / "overlays")
    assert {overlay.name for overlay in drawer.overlays} == {"video_1", "video_2"}
    for overlay in drawer.overlays:
        assert overlay.path.parent == overlay.film.parent == tmp_path / "overlays"
        assert overlay.path.name == f"step_000010_{overlay.name}.jpg"
        with Image.open(overlay.path) as picture:
            assert (picture.format, picture.width > 500) == ("JPEG", True)
        assert overlay.film.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # a WebM
        film = cv2.VideoCapture(str(overlay.film))
        assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 30
        height, width = (film.get(k) for k in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        assert width / height == 2 * SIZE[1] / SIZE[0]  # side by side


@pytest.mark.parametrize(
    ("most", "chosen"), [(0, []), (1, [4]), (2, [3, 1]), (3, [3, 4, 1]), (9, [3, 2, 4, 0, 1, 5])]
)
def test_the_best_the_median_and_the_worst_are_drawn(most, chosen):
    values = {0: -0.1, 1: -0.5, 2: 0.2, 3: 0.9, 4: 0.0, 5: np.nan}
    assert pick_videos(values, most) == chosen


def test_videos_are_chosen_by_their_change_and_drawn_as_before_too(tmp_path):
    """The first step saw all videos, and drew those with the highest, lowest and median score."""
    data = COCODataset(make_coco(tmp_path, num_videos=5, num_frames=4), SIZE, prompt_types=["mask"])
    first, second = (
        OverlayDrawer(data, tmp_path / "overlays", f"step_{step:06d}", 3) for step in (0, 5)
    )
    see_all(first, data, EvaluationConfig())
    videos = track_videos(
        copy_first_mask, data, EvaluationConfig(), seed=0, on_frame=second.see_frame
    )
    for index, video in enumerate(videos):
        second.see_video(index, video)
    for index, change in enumerate((0.3, -0.1, 0.0, 0.1, -0.2)):
        second.kept[index].score = first.kept[index].score + change
    drawn = {overlay.name for overlay in first.overlays}
    second.draw(first)
    assert [overlay.name for overlay in second.overlays] == ["video_1", "video_3", "video_5"]
    names = {path.name for path in (tmp_path / "overlays").glob("step_000000_*.jpg")}
    both = drawn | {"video_1", "video_3", "video_5"}
    assert names == {f"step_000000_{name}.jpg" for name in both}


def test_what_is_kept_of_a_video_is_small_and_its_masks(tmp_path):
    path = make_coco(tmp_path, num_frames=6)
    drawer = draw(path, tmp_path / "overlays")
    kept = drawer.kept[0]
    data = COCODataset(path, SIZE)
    for t in range(6):
        assert len(kept.masks[t]) < 200  # bytes; the masks have 3072 pixels
        for number, mask in kept.prediction(t).items():
            assert np.array_equal(mask, data.read_mask(data.videos[0], 0, number))


def test_a_long_video_keeps_few_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(overlays, "_FILM_LENGTH", 10)
    drawer = draw(make_coco(tmp_path, num_frames=30), tmp_path / "overlays")
    assert {0, 3, 27, 15, 29} <= set(drawer.kept[0].masks)
    assert len(drawer.kept[0].masks) <= 10 + MAX_SHOWN + 1


def test_what_was_drawn_is_kept_for_another_run(tmp_path):
    data = COCODataset(make_coco(tmp_path, num_videos=4, num_frames=4), SIZE, prompt_types=["mask"])
    first, again = (
        OverlayDrawer(data, tmp_path / name, "step_000000", 2) for name in ("one", "two")
    )
    see_all(first, data, EvaluationConfig())
    (tmp_path / "kept").mkdir()
    first.keep(tmp_path / "kept")
    again.restore(tmp_path / "kept", data.videos)
    for left, right in zip(first.overlays, again.overlays, strict=True):
        assert left.path.read_bytes() == right.path.read_bytes()
        assert left.film.read_bytes() == right.film.read_bytes()
        assert np.array_equal(left.prediction, right.prediction)
    later = OverlayDrawer(data, tmp_path / "two", "step_000005", 4)
    see_all(later, data, EvaluationConfig())
    later.overlays.clear()
    later.draw(again)  # the other two as they were, from what was restored
    assert len(list((tmp_path / "two").glob("step_000000_*.webm"))) == 4


def test_the_toggled_masks_are_those_of_the_middle_frame(tmp_path):
    path = make_coco(tmp_path, num_frames=6)
    (overlay,) = draw(path, tmp_path / "overlays").overlays
    data = COCODataset(path, SIZE)
    for number in (1, 2):
        truth, copied = (data.read_mask(data.videos[0], t, number) for t in (3, 0))
        assert np.array_equal(overlay.ground_truth == number, truth)
        assert np.array_equal(overlay.prediction == number, copied)
    assert np.array_equal(overlay.frame, data.read_frame(data.videos[0], 3))
    assert overlay.class_labels == {1: "object 1", 2: "object 2"}


@pytest.mark.parametrize("empty", [1, 2])
def test_a_video_without_objects_is_drawn_all_the_same(tmp_path, empty):
    def clear(content):
        images = {i["id"] for i in content["images"] if i["video_id"] == empty}
        kept = [a for a in content["annotations"] if a["image_id"] not in images]
        content["annotations"] = kept

    path = edit(make_coco(tmp_path, num_videos=2), clear)
    drawer = draw(path, tmp_path / "overlays")
    assert [o.name for o in drawer.overlays] == [f"video_{3 - empty}", f"video_{empty}"]
    assert not drawer.overlays[1].ground_truth.any()


def test_frames_that_nobody_labelled_are_not_drawn(tmp_path):
    """What is right there is not known: a prediction would be painted as an error."""
    root = make_vos(tmp_path, names=["bear"], every=3)  # of 6 frames, 0 and 3
    data = ClipDataset(VosVideos(root), clip_settings(SIZE))
    drawer = OverlayDrawer(data, tmp_path / "overlays", "val", 1)
    see_all(drawer, data, EvaluationConfig())
    assert [*drawer.kept[0].texts] == [0, 3]
    assert drawer.overlays[0].ground_truth.any()


def test_more_objects_than_a_mask_of_wandb_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(overlays, "_FILM_LENGTH", 1)

    def multiply(content):
        first = content["annotations"][0]
        content["annotations"] += [
            {**first, "id": 1000 + number, "track_id": 100 + number} for number in range(300)
        ]

    (overlay,) = draw(edit(make_coco(tmp_path), multiply), tmp_path / "overlays").overlays
    assert len(overlay.class_labels) == 255


@pytest.mark.parametrize(
    "ids", [("../../a", "../../A"), ("\x1b[31mred", "[/red]$a"), ("x" * 300, ""), ("a/b", "a_b")]
)
def test_names_of_pictures_stay_in_their_folder_and_apart(tmp_path, ids):
    def rename(content):
        for image in content["images"]:
            image["video_id"] = ids[image["video_id"] - 1]

    folder = tmp_path / "new" / "overlays"
    drawn = draw(edit(make_coco(tmp_path, num_videos=2), rename), folder).overlays
    assert len(drawn) == 2
    assert {o.path for o in drawn} | {o.film for o in drawn} == set(folder.iterdir())
    assert len({overlay.name.casefold() for overlay in drawn}) == 2
    for overlay in drawn:
        assert overlay.name.isprintable()
        assert not set(overlay.name) & set("/:\\")
