import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZE, assert_workers_change_nothing, make_frames, same, to_pixels
from PIL import Image
from test_data_pictures import level, write_film

from sam2train.clips import collate_fn, is_empty
from sam2train.config import build
from sam2train.data_pictures import read_image
from sam2train.data_synthetic import SyntheticConfig
from sam2train.data_videos import MadeUpVideos, VideoFolders
from sam2train.datasets import DatasetConfig, VideoDataset
from sam2train.errors import UserError
from sam2train.transforms import AugmentConfig


def names(video):
    return [frame.path.name for frame in video.frames]


def fails(path):
    with pytest.raises(UserError) as caught:
        VideoFolders(path)
    message = str(caught.value)
    assert str(path) in message
    return message


# What is a video


def test_each_folder_is_a_video_of_its_pictures_in_order(tmp_path):
    for number in (1, 2, 10):
        make_frames(tmp_path / f"video_{number}", [f"frame_{t}.png" for t in (1, 2, 10, 11)])
    source = VideoFolders(tmp_path)
    videos, warnings = source.videos, source.warnings
    assert warnings == []
    assert [video.video_id for video in videos] == ["video_1", "video_2", "video_10"]
    for video in videos:
        assert names(video) == ["frame_1.png", "frame_2.png", "frame_10.png", "frame_11.png"]
        assert video.size == (48, 64)
        assert video.object_ids == []
        assert all(video.visible(t) == [] for t in range(4))


def test_a_folder_of_frames_is_one_video(tmp_path, monkeypatch):
    make_frames(tmp_path / "clip", ["b.png", "a.png"])
    (tmp_path / "clip" / "empty").mkdir()
    source = VideoFolders(tmp_path / "clip")
    (video,), warnings = source.videos, source.warnings
    assert video.video_id == "clip"
    assert names(video) == ["a.png", "b.png"]
    assert warnings == []
    monkeypatch.chdir(tmp_path / "clip")
    assert VideoFolders(type(tmp_path)(".")).videos[0].video_id == "clip"


def test_what_is_no_frame_is_passed_over(tmp_path):
    folder = tmp_path / "video_001"
    make_frames(folder, ["frame_001.JPG", "frame_002.Png"])
    make_frames(folder / "masks", ["frame_001.png"])
    make_frames(folder / "frame_003.png", ["inside.png"])  # a folder with a picture's name
    make_frames(tmp_path / ".thumbnails", ["frame_001.png"])
    for junk in (".DS_Store", "._frame_001.jpg", "Thumbs.db", "notes.txt", ".frame_009.png"):
        (folder / junk).write_bytes(b"junk")
    (tmp_path / "readme.txt").write_text("text")
    source = VideoFolders(tmp_path)
    (video,), warnings = source.videos, source.warnings
    assert names(video) == ["frame_001.JPG", "frame_002.Png"]
    assert warnings == []


def test_empty_folders_and_single_frames_are_told(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    make_frames(tmp_path / "b", ["1.png"])
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    source = VideoFolders(tmp_path)
    videos, warnings = source.videos, source.warnings
    assert [video.video_id for video in videos] == ["a", "b"]
    assert warnings == [
        "c, d: no pictures, so no video",
        "b: a single frame: nothing to track",
    ]


def test_the_size_is_that_after_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_frames(tmp_path / "a", ["1.jpg", "2.jpg"], exif=exif)
    (video,) = VideoFolders(tmp_path).videos
    assert video.size == (64, 48)


# Errors


def test_folders_that_are_none(tmp_path):
    assert "no such folder" in fails(tmp_path / "nowhere")
    for name, advice in (("a.json", 'dataset_type: "coco"'), ("a", "")):
        path = tmp_path / name
        path.write_text("x")
        message = fails(path)
        assert "is a file; expected a folder" in message
        assert advice in message


def test_a_folder_without_videos_says_what_it_holds(tmp_path):
    assert "no pictures in it or its sub-folders; expected a folder with one" in fails(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.MP4").write_bytes(b"x")
    assert "a.MP4: is no film that OpenCV can read" in fails(tmp_path)
    shutil.rmtree(tmp_path / "films")
    make_frames(tmp_path / "480p" / "bear", ["00000.jpg"])
    assert fails(tmp_path).endswith(f"its videos seem to lie in {tmp_path / '480p'}")


def test_pictures_above_and_below_are_ambiguous(tmp_path):
    make_frames(tmp_path, ["preview.png"])
    make_frames(tmp_path / "video_001", ["1.png"])
    message = fails(tmp_path)
    assert "in the folder itself (preview.png) and in sub-folders (video_001)" in message


def test_every_problem_of_the_pictures_comes_at_once(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png", "01.png", "3.jpg", "3.png"])
    make_frames(tmp_path / "b", ["1.png"])
    make_frames(tmp_path / "b", ["2.png"], size=(30, 40))
    make_frames(tmp_path / "c", ["1.png"])
    (tmp_path / "c" / "2.png").write_bytes(b"")
    (tmp_path / "c" / "3.jpg").write_text("<html>")
    make_frames(tmp_path / "d", ["1.png"])
    message = fails(tmp_path)
    assert message.split("\n  - ") == [
        f"{tmp_path}: 5 problems",
        f"{tmp_path / 'a'}: 01.png and 1.png have the same place in the order; keep one",
        f"{tmp_path / 'a'}: 3.jpg and 3.png have the same place in the order; keep one",
        f"{tmp_path / 'b'}: frames of different sizes: 64x48 (1.png), 40x30 (2.png); a video has "
        "one size",
        f"{tmp_path / 'c' / '2.png'}: is empty",
        f"{tmp_path / 'c' / '3.jpg'}: is an HTML page, probably a failed download",
    ]


@pytest.fixture
def folder(tmp_path):
    """Two videos of 8 frames."""
    for number in (1, 2):
        names = [f"frame_{t:03d}.png" for t in range(1, 9)]
        make_frames(tmp_path / f"video_{number:03d}", names, seed=number)
    return tmp_path


def load(path, **options):
    return VideoDataset(path, **({"image_size": SIZE, "video_clip_length": 4} | options))


# A sample with made-up objects


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
    assert_workers_change_nothing(load(folder, augment=AugmentConfig(horizontal_flip=0.5)))


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


# Errors of clips


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


# Stacks, films, pictures of more than 8 bits


def write_stack(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(np.full((6, 10), v, np.uint8)) for v in values]
    first.save(path, save_all=True, append_images=rest)


def test_a_stack_is_a_video_of_its_pages(tmp_path):
    write_stack(tmp_path / "movie0" / "stack.tif", [10, 20, 30])
    write_stack(tmp_path / "movie1" / "stack.tiff", [40, 50])
    source = VideoFolders(tmp_path)
    assert [(v.video_id, len(v.frames)) for v in source.videos] == [("movie0", 3), ("movie1", 2)]
    assert source.warnings == []
    assert "stack.tif" in source.notes[0]
    found = [source.read_picture(source.videos[0], t)[0, 0, 0] for t in (2, 0, 1)]
    assert found == [30, 10, 20]


def test_stacks_side_by_side_are_a_video_each(tmp_path):
    for name in ("b", "a"):
        write_stack(tmp_path / f"{name}.tif", [10, 20])
    assert [v.video_id for v in VideoFolders(tmp_path).videos] == ["a", "b"]
    (video,) = VideoFolders(tmp_path / "a.tif").videos
    assert (video.video_id, len(video.frames)) == ("a", 2)
    make_frames(tmp_path, ["c.tif"], size=(6, 10))
    assert "files of many pages (a.tif, b.tif) beside other pictures" in fails(tmp_path)


def test_films_are_videos(tmp_path):
    write_film(tmp_path / "b.mp4", 5)
    write_film(tmp_path / "a.mp4", 3)
    make_frames(tmp_path / "pictures", ["1.png", "2.png"])
    source = VideoFolders(tmp_path)
    assert [(v.video_id, len(v.frames)) for v in source.videos] == [
        ("pictures", 2),
        ("a", 3),
        ("b", 5),
    ]
    assert abs(source.read_picture(source.videos[2], 4).astype(int) - level(4)).max() <= 6
    (video,) = VideoFolders(tmp_path / "a.mp4").videos
    assert video.video_id == "a"
    data = MadeUpVideos(tmp_path / "b.mp4")  # and with objects over them
    assert data.read_masks(data.videos[0], 0, 1)[1].any()


def test_one_scale_for_all_frames_of_a_video(tmp_path):
    """The same value is the same grey on each frame, and a narrow range becomes a wide one."""
    rng = np.random.default_rng(0)
    for name, low in (("a", 7000), ("b", 20000)):
        (tmp_path / name).mkdir()
        for t in range(4):
            values = rng.integers(low, low + 100, (40, 40)).astype(np.uint16)
            values[:8] = low + 200 * t  # brighter from frame to frame
            values[20:24] = low + 600
            Image.fromarray(values).save(tmp_path / name / f"{t}.png")
    source = VideoFolders(tmp_path)
    for video in source.videos:
        pictures = np.stack([source.read_picture(video, t)[..., 0] for t in range(4)])
        assert len(set(pictures[:, 21, 5].tolist())) == 1
        assert pictures[0, 21, 5] - pictures[0, 30].mean() > 200
        assert (np.diff(pictures[:, 3, 3].astype(int)) > 50).all()
    assert len(source.notes) == 2
    assert "more than 8 bits, 7000 is black and 7600 white" in source.notes[0]
    assert "dataset.intensity_range" in source.notes[0]
    source.scale_levels((7000.0, 8000.0))
    assert source.read_picture(source.videos[0], 0)[21, 5, 0] == 153
    assert ["8000 white" in note for note in source.notes] == [True]
    source.scale_levels("full")
    assert source.read_picture(source.videos[0], 0)[21, 5, 0] == round(7600 / 257)
    assert source.notes == []


def test_a_scale_can_be_set_and_must_be_one(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    raw = {"dataset_type": "video", "data_path": str(tmp_path), "intensity_range": [7000, 8000]}
    assert build(DatasetConfig, raw, "dataset").intensity_range == (7000, 8000)
    for wrong in ([5, 5], "none", [1]):
        with pytest.raises(UserError, match="intensity_range"):
            build(DatasetConfig, raw | {"intensity_range": wrong}, "dataset")


# The order of frames


@pytest.mark.parametrize(
    "ordered",
    [
        ["760577.25", "760577.375", "760577.5", "760578.0", "760578.125"],
        ["f_9.5", "f_10", "f_10.25"],
        ["0.9", "0.95", "1.0", "1.05"],
        ["1.8", "1.9", "1.10", "1.11", "2.1"],  # the tenth frame of shot 1
        ["a1.5", "a1.25", "b1.1"],  # other names: as people count
        ["frame_2", "frame_10"],
    ],
)
def test_numbers_with_a_fraction_are_numbers(tmp_path, ordered):
    if ordered[0] == "a1.5":
        ordered = ["a1.5", "a1.25", "b1.1"]
    make_frames(tmp_path / "a", [f"{name}.png" for name in reversed(ordered)])
    (video,) = VideoFolders(tmp_path).videos
    assert [frame.path.stem for frame in video.frames] == ordered


def test_the_same_number_in_two_spellings_is_told(tmp_path):
    make_frames(tmp_path / "a", ["1.5.png", "1.50.png", "1.75.png"])
    assert "1.5.png and 1.50.png have the same place in the order" in fails(tmp_path)


def test_two_videos_do_not_share_files(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "videos 'a' and 'b' share 2 pictures" in fails(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    assert "videos 'a' and 'b' share 2 pictures" in fails(tmp_path)
