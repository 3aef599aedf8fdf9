import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, make_coco, make_frames, moving_masks, same
from PIL import Image
from test_data_pictures import level, write_film
from test_data_vos import make_vos

from sam2train import cli
from sam2train.config import ConfigError, build
from sam2train.data_source import (
    Annotation,
    DataError,
    Frame,
    Video,
    VideoSource,
    listed,
    tracking_warnings,
)
from sam2train.datasets import DatasetConfig, build_dataset
from sam2train.errors import UserError
from sam2train.transforms import AugmentConfig


def video_of(folder, areas):
    """A video of pictures with one object of these areas; None is a frame without a label."""
    make_frames(folder, [f"{t}.png" for t in range(len(areas))])
    frames = []
    for t, area in enumerate(areas):
        objects = {} if area is None else {1: Annotation(t, None, area)}
        frames.append(Frame(folder / f"{t}.png", objects, is_labelled=area is not None))
    return Video(folder.name, SIZE, frames, [1])


def test_frames_are_pictures_or_pages_of_a_film(tmp_path):
    pictures = video_of(tmp_path / "a", [5, 5])
    write_film(tmp_path / "b.mp4", 3)
    film = Video("b", SIZE, [Frame(tmp_path / "b.mp4", {}, page=t) for t in (2, 0)], [])
    source = pickle.loads(pickle.dumps(VideoSource(tmp_path, [pictures, film])))
    np.testing.assert_array_equal(
        source.read_frame(pictures, 1), np.asarray(Image.open(tmp_path / "a" / "1.png"))
    )
    for t, page in enumerate((2, 0)):
        assert abs(source.read_frame(film, t).astype(int) - level(page)).max() <= 6


def test_the_index_says_where_masks_are(tmp_path):
    video = video_of(tmp_path / "a", [5, 0, None])
    source = VideoSource(tmp_path, [video])
    assert [source.has_mask(video, t, 1) for t in range(3)] == [True, False, False]
    assert not source.has_mask(video, 0, 2)
    assert video.labelled == [0, 1]
    assert [video.visible(t) for t in range(3)] == [[1], [], []]


def test_problems_come_in_one_message_with_what_could_be_read(tmp_path):
    video = video_of(tmp_path / "a", [5])
    problems = [f"problem {k}" for k in range(14)]
    with pytest.raises(DataError) as caught:
        VideoSource(tmp_path, [video], ["a warning"], problems)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: 14 problems\n  - problem 0\n")
    assert message.endswith("problem 11\n  and 2 more")
    assert isinstance(caught.value, UserError)
    assert caught.value.problems == problems
    source = caught.value.source
    assert (source.videos, source.warnings) == ([video], ["a warning"])
    assert source.read_picture(video, 0).shape == (*SIZE, 3)
    with pytest.raises(DataError, match=r"1 problem\n  - the only one$"):
        VideoSource(tmp_path, [], (), ["the only one"])


def test_videos_that_teach_no_tracking_are_told(tmp_path):
    videos = [
        video_of(tmp_path / name, areas)
        for name, areas in (("a", [5, 5]), ("b", [5, 0]), ("c", [0, 0]), ("d", [None, 0]))
    ]
    assert tracking_warnings(videos) == [
        "video 'c', video 'd': no object, so no clip for training",
        "video 'b': no object is on more than one frame: nothing to track",
    ]


def test_a_long_list_of_names_is_cut():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def mixed(data_path, **keys):
    raw = {"data_path": data_path, "image_size": SIZE, "video_clip_length": 4} | keys
    config, said = build(DatasetConfig, raw, "dataset"), []
    path = config.data_path
    data = build_dataset(config, AugmentConfig(), 0, path, training=True, say=said.append)
    return data, said


@pytest.fixture
def two(tmp_path):
    """Data sets of 4 and of 1 video."""
    return [
        str(make_coco(tmp_path / "a", num_videos=4)),
        str(make_coco(tmp_path / "b", num_frames=5)),
    ]


def visits(data, epoch):
    return Counter(data[epoch, k].video_id for k in range(len(data)))


def test_a_list_of_paths_is_one_data_set(two):
    data, said = mixed(two)
    assert visits(data, 0) == dict.fromkeys(["1/1", "1/2", "1/3", "1/4", "2/1"], 1)
    truth = moving_masks(6, 2, SIZE)
    for k in range(5):
        clip = data[k]
        np.testing.assert_array_equal(clip.masks.numpy(), truth[clip.frame_indices])
    assert [line.split(": ")[-1] for line in said] == ["4 videos, weight 1", "1 videos, weight 1"]


def test_weights_say_how_often_an_epoch_visits_a_video(two):
    parts = [{"path": two[0], "weight": 0.5}, {"path": two[1], "weight": 3}]
    data, _ = mixed(parts)
    assert len(data) == 2 + 3
    first, second = visits(data, 0), visits(data, 1)
    assert first == {"1/1": 1, "1/2": 1, "2/1": 3}
    assert second == {"1/3": 1, "1/4": 1, "2/1": 3}


def test_parts_that_share_pictures_are_refused_as_videos_of_one_file_are(two):
    again = Path(two[0]).with_name("again.json")
    again.write_text(Path(two[0]).read_text())
    with pytest.raises(UserError, match=r"videos '1/1' and '2/1' share 6 pictures"):
        mixed([two[0], str(again)])


def test_a_mixture_of_one_is_the_data_set_itself(two):
    (plain, _), (one, _) = mixed(two[0]), mixed([two[0]])
    assert len(plain) == len(one) == 4
    assert all(same(plain[epoch, k], one[epoch, k]) for epoch in range(2) for k in range(4))
    assert plain.fingerprint == one.fingerprint


def test_data_of_several_formats(tmp_path, two):
    make_vos(tmp_path / "vos")
    made_up = make_frames(tmp_path / "frames" / "a", [f"{t}.png" for t in range(5)]).parent
    parts = [
        two[1],
        {"path": str(tmp_path / "vos"), "dataset_type": "vos"},
        {"path": str(made_up), "dataset_type": "video"},
    ]
    data, _ = mixed(parts, synthetic={"paste": True})
    seen = visits(data, 0)
    assert {1, "bear", "a"} <= seen.keys()
    assert all(data[k].masks.any() for k in range(len(data)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data_path"),
        ([{"path": "a.json", "weight": 0}], "weight"),
        ([{"path": "a.json", "wieght": 2}], "wieght"),
        ([{"path": "a.json", "dataset_type": "cocoa"}], "did you mean coco"),
        ([{"weight": 2}], "path"),
    ],
)
def test_a_mixture_that_cannot_be_is_named(value, message):
    with pytest.raises(ConfigError, match=message):
        build(DatasetConfig, {"data_path": value}, "dataset")


def test_a_run_on_a_mixture(tmp_path, two):
    experiment = Path(__file__).parents[1] / "experiments" / "coco_point_bbox.yaml"
    words = [str(experiment), f"dataset.data_path=[{two[0]}, {two[1]}]"]
    words += ["dataset.val_path=null", "tracking.mode=disabled", "trainer.device=cpu"]
    assert cli.main([*words, "--check-data"]) == 0
    assert cli.main([*words, "--dry-run"]) == 0
    assert cli.main([*words, "--smoke", "--run-dir", str(tmp_path / "run")]) == 0
