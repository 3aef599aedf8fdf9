import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SHARED, SIZE, make_frames, same, to_pixels
from PIL import Image
from torch.utils.data import DataLoader

from sam2train.clips import collate_fn, is_empty
from sam2train.config import ConfigError, apply_overrides, build, to_yaml
from sam2train.config_yaml import load_yaml
from sam2train.data_pictures import read_image
from sam2train.data_synthetic import SyntheticConfig
from sam2train.data_videos import MadeUpVideos
from sam2train.datasets import ClipSampler, DatasetConfig, VideoDataset
from sam2train.errors import UserError
from sam2train.transforms import AugmentConfig


@pytest.fixture
def folder(tmp_path):
    """Two videos of 8 frames."""
    for number in (1, 2):
        names = [f"frame_{t:03d}.png" for t in range(1, 9)]
        make_frames(tmp_path / f"video_{number:03d}", names, seed=number)
    return tmp_path


def load(path, **options):
    return VideoDataset(path, **({"image_size": SIZE, "video_clip_length": 4} | options))


# A sample


def test_a_sample_has_what_the_specification_names(folder):
    sample = load(folder, synthetic=SyntheticConfig(min_objects=2, max_objects=2))[0]
    assert sample["images"].shape == (4, 3, *SIZE)
    assert sample["images"].dtype == torch.float32
    assert sample["masks"].shape == (4, 2, *SIZE)
    assert sample["masks"].dtype == torch.bool
    assert sample["frame_valid"].tolist() == [True] * 4
    assert sample["video_id"] == "video_001"
    assert sample["object_ids"] == [1, 2]
    assert np.diff(sample["frame_indices"]).tolist() == [1, 1, 1]
    assert sample["frame_size"] == SIZE
    assert [prompt["object_id"] for prompt in sample["prompts"]] == [1, 2]
    assert not any(map(is_empty, sample["prompts"]))


def test_the_guides_arguments_by_position(folder):
    dataset = VideoDataset(str(folder), (32, 40), 3, ["point"], (2, 4), True, 1)
    counts = set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        assert sample.images.shape == (3, 3, 32, 40)
        for prompt in sample.prompts:
            assert prompt["type"] == "point"
            labels = prompt["labels"].tolist()
            counts.add(labels.count(1))
            assert labels.count(0) == 1
            for (x, y), label in zip(prompt["points"].astype(int), labels, strict=True):
                place = sample.object_ids.index(prompt["object_id"])
                assert sample.masks[prompt["frame_index"], place, y, x] == bool(label)
    assert counts == {3, 4, 5}  # the centre and two to four


def test_an_epoch_can_be_set_for_other_loaders(folder):
    dataset = VideoDataset(folder, SIZE)
    first = dataset[0]
    assert same(dataset[0], first)
    dataset.set_epoch(3)
    assert same(dataset[0], dataset[3, 0])
    assert not same(dataset[0], first)


def test_the_defaults_are_those_of_the_guide(folder):
    dataset = VideoDataset(folder)
    assert dataset.image_size == (512, 512)
    assert dataset.settings.video_clip_length == 5
    assert dataset.prompts.prompt_types == ["point", "bbox", "mask"]
    assert dataset.prompts.num_of_pos_points == (1, 3)
    assert dataset.prompts.num_of_neg_points == 0
    assert dataset.prompts.include_center is False


def test_outside_the_objects_a_frame_is_the_one_on_disk(folder):
    dataset = load(folder, synthetic=SyntheticConfig(prob_occlusion=0.0))
    for epoch in range(6):
        sample = dataset[epoch, 0]
        pixels = to_pixels(sample.images)
        for place, t in enumerate(sample.frame_indices):
            truth = read_image(folder / "video_001" / f"frame_{t + 1:03d}.png").astype(int)
            changed = np.abs(pixels[place] - truth).max(axis=2) > 2
            covered = sample.masks[place].any(dim=0).numpy()
            grown = torch.nn.functional.max_pool2d(
                sample.masks[place].any(dim=0)[None].float(), 3, 1, 1
            )[0].bool()
            assert not (changed & ~grown.numpy()).any()  # a soft edge is one pixel wide
            assert changed[covered].mean() > 0.5  # and inside there is something else


def test_without_pasting_the_frames_are_those_on_disk(folder):
    sample = load(folder, synthetic=SyntheticConfig(paste=False, prob_leave=0.0))[0]
    for place, t in enumerate(sample.frame_indices):
        truth = read_image(folder / "video_001" / f"frame_{t + 1:03d}.png")
        np.testing.assert_array_equal(to_pixels(sample.images)[place], truth)
    assert sample.masks.any(dim=(2, 3)).all()


def test_frames_come_in_natural_order(tmp_path):
    for t in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        level = np.full((*SIZE, 3), 20 * t, np.uint8)
        Image.fromarray(level).save(tmp_path / "a" / f"frame_{t}.png")
    dataset = load(tmp_path, video_clip_length=12, synthetic=SyntheticConfig(paste=False))
    pixels = to_pixels(dataset[0].images)
    assert pixels[:, 0, 0, 0].tolist() == [20 * t for t in range(12)]


def test_the_exif_orientation_is_applied_even_where_the_size_stays(tmp_path):
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:20] = 250
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a").mkdir()
    for t in range(2):
        Image.fromarray(picture).save(tmp_path / "a" / f"{t}.png", exif=exif)
    dataset = load(tmp_path, image_size=(40, 40), synthetic=SyntheticConfig(paste=False))
    upright = dataset.read_frame(dataset.videos[0], 0)
    assert upright[0, 0, 0] == 0
    assert upright[-1, 0, 0] == 250
    assert (to_pixels(dataset[0].images)[0] == upright).all()


def test_a_short_video_is_padded_and_marked(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    sample = load(tmp_path, video_clip_length=5)[0]
    assert sample.frame_valid.tolist() == [True, True, False, False, False]
    assert sample.frame_indices == [0, 1, 1, 1, 1]
    assert torch.equal(sample.images[4], sample.images[1])
    assert not sample.masks[2:].any()
    assert sample.masks[0].any()


def test_a_single_frame_is_a_video(tmp_path):
    make_frames(tmp_path / "a", ["1.png"])
    dataset = load(tmp_path)
    assert dataset.warnings == ["a: a single frame: nothing to track"]
    assert dataset[0].frame_valid.tolist() == [True, False, False, False]


def test_the_number_of_objects_varies_within_its_bounds(folder):
    dataset = load(folder, max_objects=3, synthetic=SyntheticConfig(max_objects=5))
    clips = [dataset[epoch, 0] for epoch in range(30)]
    assert {len(sample.object_ids) for sample in clips} == {1, 2, 3}
    for sample in clips:
        assert sample.masks.shape[1] == len(sample.object_ids) == len(sample.prompts)
        assert sample.masks[0].any()
        assert sample.masks.any(dim=(0, 2, 3)).all()
        assert sample.masks.sum(dim=1).max() == 1


def test_objects_move_on_from_frame_to_frame(folder):
    settings = SyntheticConfig(prob_leave=0.0, prob_occlusion=0.0, max_speed=0.1)
    masks = load(folder, synthetic=settings)[0].masks[:, 0]
    changed = [int((masks[0] ^ masks[t]).sum()) for t in range(4)]
    assert 0 == changed[0] < changed[1] < changed[3]


def test_clips_begin_anywhere_and_strides_vary(folder):
    dataset = load(folder, max_frame_stride=2)
    drawn = [dataset[epoch, 0].frame_indices for epoch in range(40)]
    assert {int(np.diff(frames)[0]) for frames in drawn} == {1, 2}
    assert {frames[0] for frames in drawn if frames[1] - frames[0] == 1} == set(range(5))


def test_augmentation_moves_frames_and_masks_together(folder):
    plain = load(folder)[0]
    flipped = load(folder, augment=AugmentConfig(horizontal_flip=1.0))[0]
    assert torch.equal(flipped.images, plain.images.flip(3))
    assert torch.equal(flipped.masks, plain.masks.flip(3))


# Randomness


def test_seed_epoch_and_index_decide_a_clip(folder):
    one, two, other = load(folder), load(folder), load(folder, seed=1)
    two[7, 0]  # what was read before has no say
    two.read_frame(two.videos[0], 3)
    assert same(one[3, 1], two[3, 1])
    assert same(one[1], one[0, 1])
    assert same(one[-1], one[1])
    assert not same(one[3, 1], one[4, 1])
    assert not same(one[3, 1], other[3, 1])
    for beyond in (2, -3, (1, 2)):
        with pytest.raises(IndexError):
            one[beyond]


def only(clips):
    (clip,) = clips
    return clip


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
def test_two_workers_load_what_none_load(folder):
    dataset = load(folder, augment=AugmentConfig(horizontal_flip=0.5))
    epochs = []
    for num_workers in (0, 2):
        sampler = ClipSampler(len(dataset), shuffle=True, seed=3)
        loader = DataLoader(dataset, 1, sampler=sampler, num_workers=num_workers, collate_fn=only)
        epochs.append(list(islice(loader, 6)))
    assert all(map(same, *epochs))


def test_clips_make_a_batch(folder):
    dataset = load(folder)
    batch = collate_fn([dataset[0], dataset[1]])
    assert batch.img_batch.shape == (4, 2, 3, *SIZE)
    assert batch.names[1].startswith("video video_002 frames ")


# Whole videos, for evaluation


def test_a_whole_video_is_the_same_in_any_order_of_reading(folder):
    one, two = load(folder), load(folder, seed=5, mask_cache_mb=0, image_size=(32, 32))
    for video in one.videos:
        assert video.object_ids == list(range(1, len(video.object_ids) + 1))
    again = {video.video_id: video for video in two.videos}
    for video in reversed(one.videos):
        assert again[video.video_id] == video
        for t in (7, 0, 3):
            assert np.array_equal(one.read_frame(video, t), two.read_frame(video, t))
            for o in video.object_ids:
                mask = one.read_mask(video, t, o)
                assert mask.shape == SIZE
                assert mask.dtype == bool
                assert np.array_equal(mask, two.read_mask(video, t, o))
                assert np.array_equal(mask, one.read_mask(video, t, o))


def test_masks_of_a_whole_video_are_where_its_frames_changed(folder):
    dataset = load(folder, synthetic=SyntheticConfig(prob_occlusion=0.0, prob_leave=0.0))
    video = dataset.videos[1]
    for t in range(8):
        frame, truth = dataset.read_frame(video, t), read_image(video.frames[t].path)
        changed = (np.abs(frame.astype(int) - truth) > 2).any(axis=2)
        covered = np.any([dataset.read_mask(video, t, o) for o in video.object_ids], axis=0)
        assert changed[covered].mean() > 0.5
        assert changed[~covered].mean() < 0.15  # soft edges


def test_a_mask_at_another_size_is_the_resized_one(folder):
    dataset = load(folder)
    video = dataset.videos[0]
    full = dataset.read_mask(video, 0, 1)
    half = dataset.read_mask(video, 0, 1, (24, 32))
    covered = full.reshape(24, 2, 32, 2).mean(axis=(1, 3))
    np.testing.assert_array_equal(half, covered >= 0.5)


def test_the_objects_of_a_video_do_not_depend_on_videos_beside_it(folder):
    settings = SyntheticConfig(min_objects=1, max_objects=6)
    both = load(folder, synthetic=settings)
    alone = load(folder / "video_002", synthetic=settings)
    video = both.videos[1]
    assert alone.videos[0].object_ids == video.object_ids
    for o in video.object_ids:
        assert np.array_equal(both.read_mask(video, 5, o), alone.read_mask(alone.videos[0], 5, o))


def test_cutting_a_video_short_changes_no_frame(folder):
    dataset = load(folder)
    video = dataset.videos[0]
    short = replace(video, frames=video.frames[:3])
    assert np.array_equal(dataset.read_frame(short, 2), load(folder).read_frame(video, 2))


def test_masks_of_whole_videos_are_kept(folder, monkeypatch):
    dataset = load(folder)
    masks = [[dataset.read_mask(v, t, 1) for t in range(8)] for v in dataset.videos]
    monkeypatch.setattr(MadeUpVideos, "_stage", None)
    for video, of_video in zip(dataset.videos, masks, strict=True):
        for t, mask in enumerate(of_video):
            assert np.array_equal(dataset.read_mask(video, t, 1), mask)


# Errors


def test_a_picture_cut_short_is_named(folder):
    make_frames(folder / "video_003", ["1.jpg"])
    path = folder / "video_003" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    dataset = load(folder)  # its header is fine
    with pytest.raises(UserError, match=r"1\.jpg: is damaged or cut short"):
        dataset[2]


def test_a_picture_that_changed_is_named(folder):
    dataset = load(folder)
    names = [f"frame_{t:03d}.png" for t in range(1, 9)]
    make_frames(folder / "video_001", names, size=(30, 40))
    with pytest.raises(UserError, match=r"video_001.*: the picture is 40x30, expected 64x48"):
        dataset[0]


def test_folders_and_settings_that_do_not_work(folder):
    with pytest.raises(UserError, match="no such folder"):
        load(folder / "nowhere")
    with pytest.raises(UserError, match=r"expected \[lowest, highest\]"):
        load(folder, number_of_points=(3, 1))
    shutil.rmtree(folder / "video_001")
    shutil.rmtree(folder / "video_002")
    with pytest.raises(UserError, match="no pictures"):
        load(folder)


# The section

GUIDE = """\
dataset:
  dataset_type: "video"
  data_path: "/path/to/video/data"
  image_size: [512, 512]
  video_clip_length: 5
  batch_size: 1
  num_workers: 16
  shuffle: True
  prompt_types: ["point"]
  num_of_pos_points: 1
  include_center_point: True
"""


def section(**raw):
    return build(DatasetConfig, {"dataset_type": "video", "data_path": "videos", **raw}, "dataset")


def test_the_guides_block_builds(tmp_path):
    path = tmp_path / "video.yaml"
    path.write_text(GUIDE)
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
    config = section(**raw)
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
def test_the_section_refuses(raw, message):
    with pytest.raises(ConfigError, match=message):
        section(**raw)


# Real videos


@pytest.mark.skipif(not (SHARED / "davis_dev").is_dir(), reason="needs the real videos")
def test_real_videos():
    dataset = load(SHARED / "davis_dev" / "video_data", image_size=(128, 128))
    for index in range(2):
        sample = dataset[index]
        assert sample.frame_size == (480, 854)
        assert sample.masks[0].any()
    video = dataset.videos[0]
    assert dataset.read_mask(video, 0, 1).shape == (480, 854)
    assert dataset.read_frame(video, 39).shape == (480, 854, 3)


@pytest.mark.skipif(not (SHARED / "bad").is_dir(), reason="needs the awkward folders")
def test_awkward_real_folders():
    dataset = load(SHARED / "bad" / "frame_dirs", video_clip_length=8)
    assert len(dataset) >= 6
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.frame_valid.tolist() == [True] * 6 + [False] * 2
        assert sample.masks[0].any()
