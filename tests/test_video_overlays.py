"""Pictures of tracked videos: which frames, which masks, and that few of them are kept."""

import numpy as np
import pytest
from conftest import edit, make_coco
from PIL import Image
from test_data_vos import make_vos

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_vos import VosVideos
from sam2train.datasets import COCODataset
from sam2train.evaluate import EvaluationConfig, copy_first_mask, score_tracks
from sam2train.video_overlays import MAX_FRAMES, OverlayDrawer

SIZE = (48, 64)


def draw(path, folder, *, most=2, **settings) -> OverlayDrawer:
    data = COCODataset(path, SIZE, prompt_types=["mask"])
    drawer = OverlayDrawer(data, folder, "step_000010", most)
    score_tracks(
        copy_first_mask,
        data,
        EvaluationConfig(**settings),
        seed=0,
        on_frame=drawer.see_frame,
        on_video=drawer.see_video,
    )
    return drawer


def test_the_first_videos_are_drawn(tmp_path):
    path = make_coco(tmp_path, num_videos=3, num_frames=30)
    drawer = draw(path, tmp_path / "overlays")
    assert [overlay.name for overlay in drawer.overlays] == ["video_1", "video_2"]
    for overlay in drawer.overlays:
        assert overlay.path.parent == tmp_path / "overlays"
        assert overlay.path.name == f"step_000010_{overlay.name}.png"
        with Image.open(overlay.path) as picture:
            assert picture.width > 500


def test_only_what_is_drawn_is_kept(tmp_path):
    drawer = draw(make_coco(tmp_path, num_videos=2, num_frames=30), tmp_path / "overlays")
    kept = [seen.frame_idx for _, seen in drawer._kept]  # of the second video
    assert len(kept) <= MAX_FRAMES + 1
    assert {0, 15, 29} <= set(kept)


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
    assert len(drawer.overlays) == 2
    assert not drawer.overlays[empty - 1].ground_truth.any()


def test_frames_that_nobody_labelled_are_not_drawn(tmp_path):
    """What is right there is not known: a prediction would be painted as an error."""
    root = make_vos(tmp_path, names=["bear"], every=3)  # of 6 frames, 0 and 3
    data = ClipDataset(VosVideos(root), clip_settings(SIZE))
    drawer = OverlayDrawer(data, tmp_path / "overlays", "val", 1)
    score_tracks(
        copy_first_mask,
        data,
        EvaluationConfig(),
        seed=0,
        on_frame=drawer.see_frame,
        on_video=drawer.see_video,
    )
    assert [seen.frame_idx for _, seen in drawer._kept] == [0, 3]
    assert drawer.overlays[0].ground_truth.any()


def test_more_objects_than_a_mask_of_wandb_holds(tmp_path):
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
    overlays = draw(edit(make_coco(tmp_path, num_videos=2), rename), folder).overlays
    assert len(overlays) == 2
    assert {overlay.path for overlay in overlays} == set(folder.iterdir())
    assert len({overlay.name.casefold() for overlay in overlays}) == 2
    for overlay in overlays:
        assert overlay.name.isprintable()
        assert not set(overlay.name) & set("/:\\")
