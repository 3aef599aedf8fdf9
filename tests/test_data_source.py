import pickle

import numpy as np
import pytest
from conftest import SIZE, make_frames
from PIL import Image
from test_data_pictures import level, write_film

from sam2train.data_source import (
    Annotation,
    DataError,
    Frame,
    Video,
    VideoSource,
    listed,
    tracking_warnings,
)
from sam2train.errors import UserError


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
