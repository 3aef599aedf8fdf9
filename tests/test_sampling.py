from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE

from sam2train.sampling import draw_frames
from sam2train.videos import Annotation, Frame, Video

# Which frames


def make_video(visible):
    """A video without files; `visible[t]` are the objects on frame t."""
    frames = [Frame(Path(f"{t}"), {o: Annotation(0, None, 1) for o in v}) for t, v in visible]
    return Video(1, SIZE, frames, sorted({o for _, v in visible for o in v}))


def video_of(num_frames, shown):
    return make_video([(t, [1] if t in shown else []) for t in range(num_frames)])


def draws(video, clip_length, max_stride, num=200):
    rng = np.random.default_rng(0)
    return [draw_frames(video, clip_length, max_stride, rng) for _ in range(num)]


def test_every_place_and_stride_of_a_clip_is_drawn():
    drawn = draws(video_of(10, range(10)), 4, 3)
    assert {padding for _, padding in drawn} == {0}
    assert {tuple(np.diff(frames)) for frames, _ in drawn} == {(s,) * 3 for s in (1, 2, 3)}
    ones = {frames[0] for frames, _ in drawn if frames[1] - frames[0] == 1}
    assert ones == set(range(7))
    assert {frames[0] for frames, _ in drawn if frames[1] - frames[0] == 3} == {0}


def test_a_video_too_short_for_the_stride_lowers_it():
    assert {tuple(frames) for frames, _ in draws(video_of(4, range(4)), 4, 5)} == {(0, 1, 2, 3)}
    assert {(tuple(f), p) for f, p in draws(video_of(3, range(3)), 5, 5)} == {((0, 1, 2), 2)}
    assert {(tuple(f), p) for f, p in draws(video_of(1, [0]), 3, 2)} == {((0,), 2)}


def test_a_clip_of_one_frame():
    drawn = {tuple(frames) for frames, _ in draws(video_of(5, [1, 3]), 1, 3)}
    assert drawn == {(1,), (3,)}


def test_a_clip_begins_with_an_object():
    drawn = {frames[0] for frames, _ in draws(video_of(12, [2, 3, 9]), 4, 1)}
    assert drawn == {2, 3}  # 9 leaves no room for four frames


def test_a_late_object_is_reached_all_the_same():
    drawn = {tuple(frames) for frames, _ in draws(video_of(8, [7]), 4, 1)}
    assert drawn == {(4, 5, 6, 7)}


@pytest.mark.parametrize("shown", range(9))
def test_an_object_of_one_frame_is_in_every_clip(shown):
    for frames, _ in draws(video_of(9, [shown]), 3, 4, num=50):
        assert shown in frames
        assert frames[-1] < 9
