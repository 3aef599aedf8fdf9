from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, load, make_coco, same

from sam2train.clips import collate_fn
from sam2train.data_clips import clip_settings, sample_frames, sample_prompts
from sam2train.data_source import Annotation, Frame, Video
from sam2train.model_inputs import group_objects
from sam2train.transforms import AugmentConfig

# Which frames


def make_video(visible):
    """A video without files; `visible[t]` are the objects on frame t."""
    frames = [Frame(Path(f"{t}"), {o: Annotation(0, None, 1) for o in v}) for t, v in visible]
    return Video(1, SIZE, frames, sorted({o for _, v in visible for o in v}))


def video_of(num_frames, shown):
    return make_video([(t, [1] if t in shown else []) for t in range(num_frames)])


def draws(video, clip_length, max_stride, num=200):
    rng = np.random.default_rng(0)
    return [sample_frames(video, clip_length, max_stride, rng) for _ in range(num)]


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


def test_a_clip_has_labelled_frames_only():
    """Strides count labelled frames, here every third one of ten."""
    frames = [Frame(Path(f"{t}"), {1: Annotation(0, None, 1)}, t % 3 == 0) for t in range(10)]
    video = Video(1, SIZE, frames, [1])
    drawn = {(tuple(frames), padding) for frames, padding in draws(video, 2, 2)}
    assert drawn == {((a, b), 0) for a, b in [(0, 3), (3, 6), (6, 9), (0, 6), (3, 9)]}
    assert {tuple(draw) for draw, _ in draws(video, 6, 1, num=20)} == {(0, 3, 6, 9)}
    assert {padding for _, padding in draws(video, 6, 1, num=20)} == {2}


def test_a_labelled_frame_without_an_object_is_drawn_too():
    frames = [
        Frame(Path(f"{t}"), {1: Annotation(0, None, 1)} if t == 0 else {}, t % 2 == 0)
        for t in range(5)
    ]
    drawn = {tuple(frames) for frames, _ in draws(Video(1, SIZE, frames, [1]), 3, 1, num=20)}
    assert drawn == {(0, 2, 4)}


# Which frames are prompted


def prompted(shown, most, num=300):
    """Conditioning frames of each object, draw by draw; `shown[o]` are its frames of 6."""
    masks = np.zeros((6, len(shown), 4, 4), bool)
    for place, frames in enumerate(shown):
        masks[list(frames), place, 1:3, 1:3] = True
    settings = clip_settings(SIZE, 6, ["mask"], max_conditioning_frames=most)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(num):
        prompts = sample_prompts(masks, list(range(len(shown))), settings, rng)
        assert all((p["mask"] == masks[p["frame_index"], p["object_id"]]).all() for p in prompts)
        frames = [
            [p["frame_index"] for p in prompts if p["object_id"] == o] for o in range(len(shown))
        ]
        drawn.append(tuple(map(tuple, frames)))
    return drawn


def test_one_conditioning_frame_is_where_an_object_shows_first():
    assert set(prompted([range(6), [2, 4], [5]], 1)) == {((0,), (2,), (5,))}


def test_up_to_three_conditioning_frames():
    drawn = [frames for (frames,) in prompted([range(6)], 3, num=1200)]
    assert all(frames[0] == 0 and list(frames) == sorted(set(frames)) for frames in drawn)
    counts = np.bincount([len(frames) for frames in drawn])
    np.testing.assert_allclose(counts[1:] / len(drawn), 1 / 3, atol=0.05)
    later = np.bincount([t for frames in drawn for t in frames[1:]])
    np.testing.assert_allclose(later[1:] / later.sum(), 1 / 5, atol=0.05)


def test_an_object_has_masks_on_all_its_conditioning_frames_or_on_none():
    """As SAM 2 trains it: only objects given by clicks and boxes are corrected by clicks."""
    masks = np.ones((6, 2, 4, 4), bool)
    settings = clip_settings(SIZE, 6, max_conditioning_frames=6)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        prompts = sample_prompts(masks, [0, 1], settings, rng)
        for o in (0, 1):
            kinds = {p["type"] for p in prompts if p["object_id"] == o}
            assert kinds == {"mask"} or "mask" not in kinds
            seen.add(frozenset(kinds))
    assert frozenset({"mask"}) in seen
    assert frozenset({"point", "bbox"}) in seen


def test_objects_share_the_later_conditioning_frames_where_they_are_visible():
    for every, late, gone in prompted([range(6), [2, 3, 4], [0, 5]], 6):
        assert every[0] == 0
        assert late[0] == 2
        assert gone[0] == 0
        assert set(late[1:]) == set(every) & {3, 4}
        assert set(gone[1:]) == set(every) & {5}


def test_more_conditioning_frames_than_frames():
    assert max(len(frames) for (frames,) in prompted([range(6)], 50)) == 6


def test_a_clip_with_several_conditioning_frames_is_a_batch_for_the_model(tmp_path):
    path = make_coco(tmp_path, num_frames=6, absent={(1, 0, 2)})
    dataset = load(path, max_conditioning_frames=3)
    clips = [dataset[epoch, 0] for epoch in range(8)]
    assert {len(clip.prompts) for clip in clips} > {2}
    assert same(clips[3], load(path, max_conditioning_frames=3)[3, 0])
    groups = group_objects(collate_fn(clips).prompts, [4] * 8)
    assert sum(len(group.objects) for group in groups) == sum(len(c.object_ids) for c in clips)
    assert max(len(group.prompts) for group in groups) > 1


@pytest.mark.parametrize("num_views", [1, 3])
def test_a_video_has_so_many_versions_and_no_more(tmp_path, num_views):
    """Whatever the clip, the epoch and the prompts: what the feature cache needs to find them."""
    changes = AugmentConfig(
        degrees=30, crop_scale=0.7, brightness=0.3, frame_contrast=0.3, num_views=num_views
    )
    path = make_coco(tmp_path, num_frames=6)
    data = load(path, video_clip_length=3, max_frame_stride=2, augment=changes)
    seen: dict[tuple, set[str]] = {}
    for epoch in range(40):
        for place in range(len(data)):
            clip = data[epoch, place]
            for t, key in zip(clip.frame_indices, clip.image_keys, strict=True):
                seen.setdefault((clip.video_id, t), set()).add(key)
    # A frame also comes unchanged where a change would lose every object.
    assert {len(keys) for keys in seen.values()} <= set(range(num_views, num_views + 2))
    other = load(path, video_clip_length=3, augment=changes, seed=1)
    assert not set(other[0].image_keys) & set.union(*seen.values())


def test_clips_whose_pixels_never_come_again_have_no_keys(tmp_path):
    path = make_coco(tmp_path, num_frames=4)
    assert load(path, augment=AugmentConfig(brightness=0.2))[0].image_keys is None
    flips = AugmentConfig(horizontal_flip=0.5, vertical_flip=0.5, greyscale=0.5, reverse=0.5)
    clip = load(path, video_clip_length=6, augment=flips)[0]
    assert len(clip.image_keys) == len(clip.images) == 6  # the padding, too
    assert collate_fn([clip, clip]).image_keys == clip.image_keys * 2
