import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    OBJECT_COLOURS,
    SIZE,
    assert_workers_change_nothing,
    edit,
    encode,
    load,
    make_coco,
    moving_masks,
    same,
    to_pixels,
)
from guide_blocks import VIDEO
from torch.utils.data import DataLoader

from sam2train import cli, data_coco
from sam2train.clips import collate_fn, is_empty
from sam2train.config import ConfigError, apply_overrides, build, to_yaml
from sam2train.config_yaml import load_yaml
from sam2train.data_loader import ClipSampler
from sam2train.data_source import Annotation, Frame, Video, VideoSource
from sam2train.data_synthetic import SyntheticConfig
from sam2train.datasets import (
    FORMATS,
    COCODataset,
    DatasetConfig,
    Format,
    build_dataset,
)
from sam2train.errors import UserError
from sam2train.transforms import AugmentConfig

# A sample


def test_a_sample_has_what_the_specification_names(coco):
    sample = load(coco)[0]
    assert sample["images"].shape == (4, 3, *SIZE)
    assert sample["images"].dtype == torch.float32
    assert sample["masks"].shape == (4, 2, *SIZE)
    assert sample["masks"].dtype == torch.bool
    assert sample["frame_valid"].tolist() == [True] * 4
    assert sample["video_id"] == 1
    assert sample["object_ids"] == [1, 2]
    assert len(sample["frame_indices"]) == 4
    assert sample["frame_size"] == SIZE
    for prompt, object_id in zip(sample["prompts"], [1, 2], strict=True):
        assert prompt["object_id"] == object_id
        assert prompt["frame_index"] == 0
        assert prompt["points"].dtype == np.float32
        assert prompt["labels"].dtype == np.int32
        assert not is_empty(prompt)


def test_frames_and_masks_of_a_sample_are_those_on_disk(coco):
    sample = load(coco)[0]
    truth = moving_masks(6, 2, SIZE)
    assert sample.frame_indices == list(
        range(sample.frame_indices[0], sample.frame_indices[-1] + 1)
    )
    np.testing.assert_array_equal(sample.masks.numpy(), truth[sample.frame_indices])
    pixels = to_pixels(sample.images)
    for t in range(4):
        for k in range(2):
            assert (pixels[t][sample.masks[t, k].numpy()] == OBJECT_COLOURS[k]).all()


def test_the_guides_arguments_by_position(coco):
    dataset = COCODataset(str(coco), (32, 32), 3, ["point"], 2, True, 1)
    sample = dataset[0]
    assert sample.images.shape == (3, 3, 32, 32)
    assert {p["type"] for p in sample.prompts} == {"point"}
    assert sample.prompts[0]["labels"].tolist() == [1, 1, 1, 0]


def test_prompts_are_in_pixels_of_the_resized_frame(coco):
    dataset = load(coco, image_size=(96, 256), prompt_types=["bbox"])
    sample = dataset[0]
    for k, prompt in enumerate(sample.prompts):
        y, x = np.nonzero(sample.masks[0, k].numpy())
        assert prompt["box"].tolist() == [x.min(), y.min(), x.max(), y.max()]


def test_frames_are_stretched_to_the_image_size(coco):
    sample = load(coco, image_size=(24, 32))[0]
    truth = moving_masks(6, 2, SIZE)[sample.frame_indices]
    covered = truth.reshape(4, 2, 24, 2, 32, 2).mean(axis=(3, 5))
    np.testing.assert_array_equal(sample.masks.numpy(), covered >= 0.5)
    pixels = to_pixels(sample.images)
    assert (pixels[0, 6][sample.masks[0, 0, 6]][2:-2] == OBJECT_COLOURS[0]).all()
    assert sample.frame_size == SIZE


def test_a_short_video_is_padded_and_marked(tmp_path):
    sample = load(make_coco(tmp_path, num_frames=3), video_clip_length=5)[0]
    assert sample.frame_valid.tolist() == [True, True, True, False, False]
    assert sample.frame_indices == [0, 1, 2, 2, 2]
    assert sample.images.shape[0] == sample.masks.shape[0] == 5
    assert torch.equal(sample.images[3], sample.images[2])
    assert torch.equal(sample.images[4], sample.images[2])
    assert not sample.masks[3:].any()
    assert sample.masks[2].flatten(1).any(dim=1).all()


def test_an_index_beyond_the_end_is_an_index_error(coco):
    dataset = load(coco)
    assert len(dataset) == 1
    assert same(dataset[-1], dataset[0])
    with pytest.raises(IndexError):
        dataset[1]
    with pytest.raises(IndexError):
        dataset[0, -2]


# Randomness


def test_seed_epoch_and_index_decide_a_clip(tmp_path):
    path = make_coco(tmp_path, num_videos=2, num_frames=20)
    one, two, other = load(path), load(path), load(path, seed=1)
    assert same(one[3, 1], two[3, 1])
    assert same(one[1], one[0, 1])
    assert not same(one[3, 1], one[4, 1])
    assert not same(one[3, 1], other[3, 1])
    starts = {one[epoch, 0].frame_indices[0] for epoch in range(25)}
    assert len(starts) > 8


def test_what_was_read_before_has_no_say(tmp_path):
    path = make_coco(tmp_path, num_videos=2, num_frames=8)
    dataset = load(path, augment=AugmentConfig(horizontal_flip=0.5, degrees=10.0))
    first = dataset[2, 1]
    for epoch in range(3):
        dataset[epoch, 0]
    assert same(dataset[2, 1], first)
    assert same(load(path, augment=dataset.settings.augment, mask_cache_mb=0)[2, 1], first)


def test_the_global_generators_are_neither_used_nor_changed(coco):
    dataset = load(coco, augment=AugmentConfig(horizontal_flip=0.5, brightness=0.2))
    clips = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            before = torch.get_rng_state()
            clips.append(dataset[0])
            assert torch.equal(torch.get_rng_state(), before)
    assert same(*clips)


def only(clips):
    (clip,) = clips
    return clip


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
def test_two_workers_load_what_none_load(tmp_path):
    path = make_coco(tmp_path, num_videos=3, num_frames=8)
    augment = AugmentConfig(horizontal_flip=0.5, frame_brightness=0.2)
    assert_workers_change_nothing(load(path, augment=augment))


def test_clips_of_a_dataset_make_a_batch(tmp_path):
    path = make_coco(tmp_path, num_videos=2, absent={(2, t, 2) for t in range(6)})
    dataset = load(path, video_clip_length=3)
    batch = collate_fn([dataset[0], dataset[1]])
    assert batch.object_masks.shape == (2, 3, 2, *SIZE)
    assert batch.object_valid.tolist() == [[True, True], [True, False]]
    assert batch.names[0].startswith("video 1 frames ")


# Objects that come and go


def test_a_late_object_is_prompted_where_it_first_shows(tmp_path):
    path = make_coco(tmp_path, num_frames=5, absent={(1, 0, 2), (1, 1, 2), (1, 2, 2)})
    sample = load(path, video_clip_length=5)[0]
    assert sample.object_ids == [1, 2]
    assert [prompt["frame_index"] for prompt in sample.prompts] == [0, 3]
    assert sample.masks[:, 1].flatten(1).any(dim=1).tolist() == [False] * 3 + [True] * 2


def test_an_object_that_leaves_has_empty_masks(tmp_path):
    path = make_coco(tmp_path, num_frames=5, absent={(1, 2, 1), (1, 4, 1)})
    sample = load(path, video_clip_length=5)[0]
    shown = sample.masks[:, sample.object_ids.index(1)].flatten(1).any(dim=1)
    assert shown.tolist() == [True, True, False, True, False]


def test_an_object_without_a_frame_in_the_clip_is_left_out(tmp_path):
    path = make_coco(tmp_path, num_frames=12, absent={(1, t, 2) for t in range(1, 12)})
    dataset = load(path, video_clip_length=3)
    clips = [dataset[epoch, 0] for epoch in range(30)]
    for sample in clips:
        assert sample.object_ids == ([1, 2] if sample.frame_indices[0] == 0 else [1])
        assert sample.masks.shape[1] == len(sample.object_ids)
    assert len({len(sample.object_ids) for sample in clips}) == 2


def test_a_video_without_objects_is_for_evaluation_only(tmp_path):
    absent = {(2, t, o) for t in range(6) for o in (1, 2)}
    dataset = load(make_coco(tmp_path, num_videos=3, absent=absent))
    assert len(dataset.videos) == 3
    assert len(dataset) == 2
    assert {dataset[i].video_id for i in range(2)} == {1, 3}
    assert dataset.warnings == ["video 2: no object, so no clip for training"]


def test_max_objects_draws_some_of_them_in_order(tmp_path):
    dataset = load(make_coco(tmp_path, num_objects=4), max_objects=2)
    drawn = Counter(tuple(dataset[epoch, 0].object_ids) for epoch in range(60))
    assert len(drawn) == 6
    assert all(a < b for a, b in drawn)
    assert dataset[0].masks.shape[1] == len(dataset[0].prompts) == 2


def test_max_objects_above_their_number_takes_all(coco):
    assert load(coco, max_objects=9)[0].object_ids == [1, 2]


def test_overlapping_objects_stay_apart(coco):
    full = encode(np.ones(SIZE, bool))

    def cover(content):
        content["annotations"][1]["segmentation"] = full  # object 2 on frame 0

    dataset = load(edit(coco, cover))
    video = dataset.videos[0]
    assert dataset.read_mask(video, 0, 2).all()
    np.testing.assert_array_equal(dataset.read_mask(video, 0, 1), moving_masks(6, 2, SIZE)[0, 0])


# Augmentation


def test_augmented_frames_and_masks_of_a_clip_move_together(coco):
    dataset = load(coco, augment=AugmentConfig(horizontal_flip=1.0, vertical_flip=1.0))
    sample, plain = dataset[0], load(coco)[0]
    assert torch.equal(sample.images, plain.images.flip(2, 3))
    assert torch.equal(sample.masks, plain.masks.flip(2, 3))


def test_a_clip_played_backwards(coco):
    dataset = load(coco, augment=AugmentConfig(reverse=1.0), prompt_types=["mask"])
    sample = dataset[0]
    first, last = sample.frame_indices[0], sample.frame_indices[-1]
    assert sample.frame_indices == list(range(first, last - 1, -1))
    assert first == last + 3
    truth = moving_masks(6, 2, SIZE)[sample.frame_indices]
    np.testing.assert_array_equal(sample.masks.numpy(), truth)
    for k, prompt in enumerate(sample.prompts):
        assert prompt["frame_index"] == 0
        np.testing.assert_array_equal(prompt["mask"], truth[0, k])
        assert (to_pixels(sample.images)[0][truth[0, k]] == OBJECT_COLOURS[k]).all()


def test_a_short_clip_played_backwards_is_padded_at_its_end(tmp_path):
    path = make_coco(tmp_path, num_frames=3)
    sample = load(path, video_clip_length=5, augment=AugmentConfig(reverse=1.0))[0]
    assert sample.frame_indices == [2, 1, 0, 0, 0]
    assert sample.frame_valid.tolist() == [True] * 3 + [False] * 2
    assert sample.masks[0].any()
    assert not sample.masks[3:].any()


def test_a_clip_is_not_reversed_to_begin_with_nothing(tmp_path):
    absent = {(1, t, o) for t in (4, 5) for o in (1, 2)}
    path = make_coco(tmp_path, num_frames=6, absent=absent)
    sample = load(path, video_clip_length=6, augment=AugmentConfig(reverse=1.0))[0]
    assert sample.frame_indices == [0, 1, 2, 3, 4, 5]
    assert [prompt["frame_index"] for prompt in sample.prompts] == [0, 0]


def corner_object(content):
    """Object 1 becomes a pixel in the corner, and there is no other."""
    mask = np.zeros(SIZE, bool)
    mask[0, 0] = True
    content["annotations"] = [a for a in content["annotations"] if a["track_id"] == 1]
    for annotation in content["annotations"]:
        annotation["segmentation"] = encode(mask)


def test_an_augmentation_that_loses_every_object_is_not_applied(coco):
    augment = AugmentConfig(crop_scale=0.2, horizontal_flip=1.0)
    dataset = load(edit(coco, corner_object), augment=augment)
    clips = [dataset[epoch, 0] for epoch in range(8)]
    assert all(sample.masks.any() for sample in clips)
    assert any(sample.masks[0, 0, 0, 0] for sample in clips)


def test_a_tiny_object_survives_the_resize(coco):
    sample = load(edit(coco, corner_object), image_size=(16, 16))[0]
    assert sample.masks.sum(dim=(1, 2, 3)).tolist() == [1] * 4
    assert not is_empty(sample.prompts[0])


# The sampler


def test_an_epoch_can_be_set_for_other_loaders(coco):
    dataset = load(coco, prompt_types=["point"])
    first = dataset[0]
    dataset.set_epoch(1)
    assert same(dataset[0], dataset[1, 0])
    assert not same(dataset[0], first)


def test_what_shows_on_the_last_frame_alone_fills_up_only(tmp_path):
    absent = [(1, t, k) for t in range(3) for k in (2, 3)]
    path = make_coco(tmp_path, num_frames=4, num_objects=3, absent=absent)
    drawn = {tuple(load(path, max_objects=2)[epoch, 0].object_ids) for epoch in range(20)}
    assert drawn == {(1, 2), (1, 3)}


def test_what_shows_on_the_last_frame_alone_is_chosen_last(tmp_path):
    """Of two objects one is drawn: not the one that leaves nothing to track."""
    absent = [(1, t, 2) for t in range(3)]
    dataset = load(make_coco(tmp_path, num_frames=4, absent=absent), max_objects=1)
    assert {tuple(dataset[epoch, 0].object_ids) for epoch in range(20)} == {(1,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_clip_length": 0}, "video_clip_length: 0; expected a whole number of at least 1"),
        ({"image_size": 512}, r"image_size: 512; expected \(height, width\)"),
        ({"max_objects": 0}, "max_objects: 0"),
        ({"seed": -1}, "seed: -1; expected a whole number of at least 0"),
        ({"num_of_pos_points": "1"}, "num_of_pos_points: got .1.; expected a whole number"),
        ({"prompt_types": "point"}, "prompt_types: got .point.; expected a list"),
    ],
)
def test_arguments_that_cannot_be_meant(coco, settings, message):
    with pytest.raises(UserError, match=message):
        load(coco, **settings)


def test_numbers_of_numpy_will_do(coco):
    dataset = load(coco, prompt_types=["point"], num_of_pos_points=np.int64(2))
    assert {len(prompt["points"]) for prompt in dataset[0].prompts} == {2}


# The cache of masks


def test_a_cached_mask_is_the_decoded_one_of_its_frame_object_and_size(coco, monkeypatch):
    plain, dataset = load(coco, mask_cache_mb=0), load(coco, image_size=(20, 31))
    video = dataset.videos[0]
    keys = [(t, o, size) for t in range(6) for o in (1, 2) for size in (SIZE, (20, 31))]
    fresh = {key: plain.read_mask(plain.videos[0], *key) for key in keys}
    for key, mask in fresh.items():
        np.testing.assert_array_equal(dataset.read_mask(video, *key), mask)

    def refuse(*args):
        raise AssertionError("decoded twice")

    monkeypatch.setattr(data_coco, "decode_segmentation", refuse)
    for (t, o, size), mask in fresh.items():
        cached = dataset.read_mask(video, t, o, size)
        np.testing.assert_array_equal(cached, mask)
        assert cached.dtype == bool
        cached[:] = True  # a caller's change stays the caller's
        np.testing.assert_array_equal(dataset.read_mask(video, t, o, size), mask)


def test_what_a_worker_decoded_the_others_need_not(tmp_path, monkeypatch):
    dataset = load(make_coco(tmp_path, num_videos=2))
    sampler = ClipSampler(2, shuffle=False, seed=0)
    loader = DataLoader(dataset, 1, sampler=sampler, num_workers=1, collate_fn=only)
    first = list(islice(loader, 2))

    def refuse(*args):
        raise AssertionError("decoded in this process, too")

    monkeypatch.setattr(data_coco, "decode_segmentation", refuse)
    assert same(dataset[0, 0], first[0])
    assert same(dataset[0, 1], first[1])


# A format from outside


class Arrays(VideoSource):
    """Videos as .npz files: `frames` (T, H, W, 3) uint8 and `ids` (T, H, W) uint8, 0 for none."""

    def __init__(self, path):
        videos = []
        for file in sorted(path.glob("*.npz")):
            ids = np.load(file)["ids"]
            frames = []
            for t, on_frame in enumerate(ids):
                objects = {o: Annotation(t, None, int((on_frame == o).sum())) for o in (1, 2)}
                frames.append(Frame(file, objects, page=t))
            videos.append(Video(file.stem, ids.shape[1:], frames, [1, 2]))
        super().__init__(path, videos, ["read from arrays"])

    def read_picture(self, video, frame_idx):
        return np.load(video.frames[frame_idx].path)["frames"][frame_idx]

    def read_masks(self, video, frame_idx, object_id):
        return {object_id: np.load(video.frames[frame_idx].path)["ids"][frame_idx] == object_id}


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """A folder of two such videos, and the one line that makes the format known."""
    masks = moving_masks(6, 2, SIZE)
    ids = (masks * np.array([1, 2], np.uint8)[:, None, None]).sum(1).astype(np.uint8)
    for split, grey in (("train", 90), ("val", 100)):
        (tmp_path / split).mkdir()
        for name in ("a", "b"):
            frames = np.full((6, *SIZE, 3), grey + ord(name), np.uint8)
            frames[ids > 0] = OBJECT_COLOURS[0]
            frames[:, 0, 0, 0] = np.arange(6)  # no two frames are the same
            np.savez(tmp_path / split / f"{name}.npz", frames=frames, ids=ids)
    reads = Format("frames and ids in .npz files", lambda path, config: Arrays(path))
    monkeypatch.setitem(FORMATS, "arrays", reads)
    return tmp_path


def test_a_format_from_outside_is_a_class_and_a_line(arrays):
    raw = {"dataset_type": "arrays", "data_path": str(arrays / "train"), "image_size": SIZE}
    config = build(DatasetConfig, raw, "dataset")
    assert config.num_of_pos_points == 1
    said = []
    data = build_dataset(
        config, AugmentConfig(), 0, config.data_path, training=True, say=said.append
    )
    assert said == [f"{arrays / 'train'}: read from arrays"]
    truth = moving_masks(6, 2, SIZE)
    for epoch in range(3):
        clip = data[epoch, 1]
        np.testing.assert_array_equal(clip.masks.numpy(), truth[clip.frame_indices])
        assert (to_pixels(clip.images)[clip.masks.any(1).numpy()] == OBJECT_COLOURS[0]).all()
    with pytest.raises(ConfigError, match='image_root is for dataset_type "coco" or '):
        build(DatasetConfig, raw | {"image_root": "frames"}, "dataset")
    with pytest.raises(ConfigError, match=r"got \"array\"; .*burst, arrays; did you mean arrays\?"):
        build(DatasetConfig, raw | {"dataset_type": "array"}, "dataset")


def test_a_format_from_outside_is_checked_and_trained_on(arrays, capsys):
    words = [
        str(Path(__file__).parents[1] / "experiments" / "coco_point_bbox.yaml"),
        "dataset.dataset_type=arrays",
        f"dataset.data_path={arrays / 'train'}",
        f"dataset.val_path={arrays / 'val'}",
        "dataset.video_clip_length=6",
        "tracking.mode=disabled",
        "trainer.device=cpu",
    ]
    assert cli.main([*words, "--check-data", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [s["statistics"]["masks"] for s in report["splits"].values()] == [24, 24]
    assert report["splits"]["training"]["warnings"] == ["read from arrays"]
    assert cli.main([*words, "--smoke", "--run-dir", str(arrays / "run")]) == 0
    summary = json.loads((arrays / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)


def test_what_a_format_concluded_is_told_everywhere(arrays, monkeypatch, capsys):
    """Once for each path when data is read, in full in the report, and without a say in it."""
    notes = [f"conclusion {n}" for n in range(8)]

    def read(path, config):
        source = Arrays(path)
        source.notes, source.warnings = notes, []
        return source

    monkeypatch.setitem(FORMATS, "arrays", Format("frames and ids in .npz files", read))
    raw = {"dataset_type": "arrays", "data_path": str(arrays / "train")}
    config, said = build(DatasetConfig, raw, "dataset"), []
    build_dataset(config, AugmentConfig(), 0, config.data_path, training=True, say=said.append)
    assert [line.split(": ", 1)[1] for line in said] == [
        *notes[:5],
        "and 3 more notes; --check-data lists all",
    ]
    words = [str(Path(__file__).parents[1] / "experiments" / "coco_point_bbox.yaml")]
    words += [f"dataset.{key}={value}" for key, value in raw.items()]
    words += ["dataset.val_path=null", "dataset.video_clip_length=5"]
    assert cli.main([*words, "--check-data", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["training"]["notes"] == notes
    assert report["verdict"] == "ok"
    assert cli.main([*words, "--check-data"]) == 0
    assert "note: conclusion 7" in capsys.readouterr().out


# The section


def test_the_section_has_the_guides_defaults_and_both_spellings():
    section = build(DatasetConfig, {"data_path": "a.json"}, "dataset")
    assert section.image_size == (512, 512)
    assert section.video_clip_length == 5
    assert section.prompt_types == ("point", "bbox", "mask")
    assert section.num_of_pos_points == 1
    for key in ("include_center", "include_center_point"):
        raw = {"data_path": "a.json", key: True}
        assert build(DatasetConfig, raw, "dataset").include_center is True
    for key in ("num_of_pos_points", "number_of_points"):
        raw = {"data_path": "a.json", key: [2, 5]}
        assert build(DatasetConfig, raw, "dataset").num_of_pos_points == (2, 5)


def test_a_range_of_clicks_is_drawn_from(coco):
    dataset = load(coco, prompt_types=["point"], num_of_pos_points=(2, 4))
    drawn = {len(p["labels"]) for epoch in range(20) for p in dataset[epoch, 0].prompts}
    assert drawn == {2, 3, 4}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("video_clip_length", 0),
        ("max_frame_stride", 0),
        ("max_objects", 0),
        ("max_conditioning_frames", 0),
        ("batch_size", 0),
        ("num_workers", -1),
        ("prompt_types", ["box"]),
        ("num_of_neg_points", -1),
        ("num_of_pos_points", -1),
        ("num_of_pos_points", [3, 1]),
        ("num_of_pos_points", [1, 2, 3]),
        ("box_jitter", 0.6),
        ("mask_cache_mb", -1),
        ("dataset_type", "yolo"),
        ("dataset_type", ["coco"]),
    ],
)
def test_the_section_refuses_values_out_of_range(key, value):
    with pytest.raises(ConfigError, match=key):
        build(DatasetConfig, {"data_path": "a.json", key: value}, "dataset")


def video_section(**raw):
    return build(DatasetConfig, {"dataset_type": "video", "data_path": "videos", **raw}, "dataset")


def test_the_guides_block_builds(tmp_path):
    path = tmp_path / "video.yaml"
    path.write_text(VIDEO)
    config = build(DatasetConfig, load_yaml(path)["dataset"], "dataset")
    assert config.dataset_type == "video"
    assert config.num_of_pos_points == 1
    assert config.include_center is True
    assert config.num_workers == 16


@pytest.mark.parametrize(
    ("raw", "points"),
    [
        ({}, (1, 3)),
        ({"num_of_pos_points": 2}, 2),
        ({"num_of_pos_points": 0, "include_center": True}, 0),
        ({"number_of_points": [2, 5]}, (2, 5)),
        ({"num_of_pos_points": [2, 5]}, (2, 5)),
    ],
)
def test_clicks_have_two_spellings_and_come_back_from_yaml(tmp_path, raw, points):
    config = video_section(**raw)
    assert config.num_of_pos_points == points
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert build(DatasetConfig, load_yaml(path), "config.yaml") == config


def test_pasting_is_a_key_of_its_own():
    raw = apply_overrides(
        {"dataset_type": "video", "data_path": "videos"}, {"synthetic.paste": False}
    )
    config = build(DatasetConfig, raw, "dataset")
    assert config.synthetic == SyntheticConfig(paste=False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"number_of_points": [2, 5], "num_of_pos_points": 2}, "keep one"),
        ({"number_of_points": [3, 1]}, r"num_of_pos_points is \[3, 1\]"),
        ({"number_of_points": [1, 2, 3]}, "number_of_points: got"),
        ({"num_of_pos_points": "two"}, "num_of_pos_points"),
        ({"num_of_pos_points": True}, "num_of_pos_points"),
        ({"num_of_pos_points": -1}, "num_of_pos_points: got -1"),
        ({"image_root": "frames"}, 'image_root is for dataset_type "coco" or '),
        ({"synthetic": {"paste": "no"}}, r"synthetic\.paste"),
        (
            {"dataset_type": "coco", "synthetic": {"paste": False}},
            'synthetic is for dataset_type "video"; remove it',
        ),
        ({"dataset_type": "coco", "num_of_pos_points": None}, "num_of_pos_points: got null"),
        ({"dataset_type": "films"}, "one of coco, video, vos, sav"),
    ],
)
def test_the_section_of_videos_refuses(raw, message):
    with pytest.raises(ConfigError, match=message):
        video_section(**raw)
