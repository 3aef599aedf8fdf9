"""Pictures of tracked videos: which frames, which masks, and that few of them are kept."""

import numpy as np
import pytest
from conftest import edit, make_coco
from PIL import Image
from test_data_vos import make_vos

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_vos import VosVideos
from sam2train.datasets import COCODataset
from sam2train.evaluate import EvaluationConfig, copy_first_mask, track_videos
from sam2train.score_pictures import (
    MAX_SHOWN,
    OverlayDrawer,
    horizon_figure,
    matrix_figure,
)

SIZE = (48, 64)


def see_all(drawer, data, config):
    """Show a drawer the copied first masks of a data set."""
    videos = track_videos(copy_first_mask, data, config, seed=0, on_frame=drawer.see_frame)
    for index, video in enumerate(videos):
        drawer.see_video(index, video)


def draw(path, folder, *, most=2, **settings) -> OverlayDrawer:
    data = COCODataset(path, SIZE, prompt_types=["mask"])
    drawer = OverlayDrawer(data, folder, "step_000010", most)
    see_all(drawer, data, EvaluationConfig(**settings))
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
    assert len(kept) <= MAX_SHOWN + 1
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
    see_all(drawer, data, EvaluationConfig())
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


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_heat_map_has_its_numbers(tmp_path):
    panels = {"one": [[0.1, 0.2], [0.3, 0.4]], "two": [[0.5, 0.6], [0.7, 0.8]]}
    figure = matrix_figure(["1 click", "mask"], ["clean", "0.1"], panels, title="J&F")
    left, right, _bar = figure.axes
    assert texts(left) == ["0.100", "0.200", "0.300", "0.400"]
    assert texts(right) == ["0.500", "0.600", "0.700", "0.800"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1 click", "mask"]
    limits = {axes.images[0].get_clim() for axes in (left, right)}
    assert limits == {(0.1, 0.8)}  # a colour means the same in both
    figure.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 5000


def rows(values):
    return [
        {"metric": "horizon/J", "at": at, "value": value, "count": 3}
        for at, value in values.items()
    ]


def test_curves_and_what_is_not_asked():
    frames = [{"object_score": None, "visible": 1}]
    figure = horizon_figure({"a": rows({1: 0.9, 2: 0.7})}, {"a": frames})
    held, found, scores = figure.axes
    assert held.lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.7]]
    assert texts(held) == ["n=3", "n=3"]
    for axes in (found, scores):
        assert texts(axes) == ["nothing vanishes in these videos"]


def test_the_object_score_as_a_roc():
    frames = [
        {"object_score": score, "visible": visible}
        for score, visible in [(3, 1), (2, 1), (-1, 1), (1, 0), (-2, 0), (-3, 0)]
    ]
    shares = {"absence_recall": 2 / 3, "false_absences": 1 / 3}
    single = [
        {"metric": f"horizon/{name}", "at": None, "value": value, "count": 3}
        for name, value in shares.items()
    ]
    figure = horizon_figure({"a": rows({1: 0.9}) + single}, {"a": frames})
    curve, mark, _chance = figure.axes[2].lines
    assert "AUC 0.89" in curve.get_label()  # 8 of 9 pairs are in order
    assert "recall of absence 0.667 (n=3)\nfalse absences 0.333 (n=3)" in curve.get_label()
    false, true = np.array(curve.get_xydata()).T
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert mark.get_xydata()[0] == pytest.approx([1 / 3, 2 / 3])


def test_frames_of_one_kind_have_their_share_without_a_curve():
    frames = [{"object_score": score, "visible": 1} for score in (3, 2, -1)]
    share = {"metric": "horizon/false_absences", "at": None, "value": 1 / 3, "count": 3}
    figure = horizon_figure({"a": [*rows({1: 0.9}), share]}, {"a": frames})
    axes = figure.axes[2]
    assert texts(axes) == ["nothing vanishes in these videos"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["a\nfalse absences 0.333 (n=3)"]
