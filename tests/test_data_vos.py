import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OBJECT_COLOURS, SIZE, load, moving_masks, same, to_pixels
from PIL import Image, ImageFilter

from sam2train import data_vos
from sam2train.config import build
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_pictures import read_id_mask
from sam2train.data_source import only_prompts
from sam2train.data_vos import MotsVideos, VosVideos
from sam2train.datasets import DatasetConfig, build_dataset
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.transforms import AugmentConfig

MASKS = moving_masks(6, 2, SIZE)  # (T, N, H, W)
PALETTE = [0, 0, 0, 236, 95, 103, 249, 145, 87] + [7] * (3 * 253)


def save_ids(path, ids, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids.astype(np.uint8))
    if mode == "P":
        picture = Image.fromarray(ids.astype(np.uint8)).convert("L")
        picture.putpalette(PALETTE)
    elif mode != "L":
        picture = picture.convert(mode)
    picture.save(path)


def make_vos(root, *, below="", names=("bear", "swan"), every=1, mode="P", change=None):
    """Videos of 6 frames with the objects 1 and 2 of `moving_masks`; returns the root.

    Args:
        below: folder between JPEGImages and the videos.
        every: one frame in so many has a mask.
        change: gets the ids of each mask, (H, W) uint8, and may return others.
    """
    for name in names:
        for t in range(6):
            pixels = np.full((*SIZE, 3), 90, np.uint8)
            ids = np.zeros(SIZE, np.uint8)
            for k in range(2):
                pixels[MASKS[t, k]] = OBJECT_COLOURS[k]
                ids[MASKS[t, k]] = k + 1
            frame = root / "JPEGImages" / below / name / f"{t:05d}.png"
            frame.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(frame)
            if t % every == 0:
                ids = ids if change is None else change(ids)
                save_ids(root / "Annotations" / below / name / f"{t:05d}.png", ids, mode)
    return root


def dataset_of(path, **options):
    settings = clip_settings(**({"image_size": SIZE, "video_clip_length": 4} | options))
    return ClipDataset(VosVideos(path), settings)


def fails(path):
    with pytest.raises(UserError) as caught:
        dataset_of(path)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "LA"])
def test_masks_and_frames_are_those_on_disk(tmp_path, mode):
    dataset = dataset_of(make_vos(tmp_path, mode=mode))
    assert dataset.warnings == []
    assert [video.video_id for video in dataset.videos] == ["bear", "swan"]
    video = dataset.videos[1]
    assert video.size == SIZE
    assert video.object_ids == [1, 2]
    assert video.labelled == list(range(6))
    for t in range(6):
        for k in range(2):
            mask = dataset.read_mask(video, t, k + 1)
            np.testing.assert_array_equal(mask, MASKS[t, k])
            assert (dataset.read_frame(video, t)[mask] == OBJECT_COLOURS[k]).all()
            assert video.frames[t].annotations[k + 1].area == MASKS[t, k].sum()


def test_a_sample_is_that_of_the_coco_data_set(tmp_path, coco):
    """The same frames and masks in either form are the same clips, prompts included."""
    dataset = dataset_of(make_vos(tmp_path / "vos", names=["1"]), max_objects=1)
    other = load(coco, max_objects=1)
    for epoch in range(3):
        ours, theirs = dataset[epoch, 0], other[epoch, 0]
        assert torch.equal(ours.masks, theirs.masks)
        assert (ours.frame_indices, ours.object_ids) == (theirs.frame_indices, theirs.object_ids)
        np.testing.assert_array_equal(ours.prompts[0]["points"], theirs.prompts[0]["points"])
        assert ours.frame_size == SIZE


def test_a_mask_file_is_decoded_once_for_all_its_objects(tmp_path, monkeypatch):
    dataset = dataset_of(make_vos(tmp_path), image_size=(24, 32))
    read = []
    monkeypatch.setattr(
        data_vos, "read_id_mask", lambda path: read.append(path) or read_id_mask(path)
    )
    first = dataset[0]
    assert len(read) == 4
    assert same(dataset[0], first)
    assert len(read) == 4


def test_the_one_object_of_davis_2016_is_0_and_255(tmp_path):
    dataset = dataset_of(make_vos(tmp_path, mode="L", change=lambda ids: (ids > 0) * 255))
    assert dataset.warnings == []
    assert dataset.videos[0].object_ids == [1]
    np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], 3, 1), MASKS[3].any(axis=0))


def test_void_pixels_belong_to_no_object(tmp_path):
    def corner(ids):
        ids[:2, :3] = 255
        return ids

    dataset = dataset_of(make_vos(tmp_path, names=["bear"], change=corner))
    (warning,) = dataset.warnings
    assert "6 masks with void pixels (255)" in warning
    video = dataset.videos[0]
    assert video.object_ids == [1, 2]
    truth = MASKS[0, 0].copy()
    truth[:2, :3] = False
    np.testing.assert_array_equal(dataset.read_mask(video, 0, 1), truth)


def test_objects_that_appear_late_and_numbers_with_gaps(tmp_path):
    make_vos(tmp_path, names=["bear"], change=lambda ids: ids * 7)
    for t in range(3):
        save_ids(tmp_path / "Annotations" / "bear" / f"{t:05d}.png", MASKS[t, 0] * 7)
    dataset = dataset_of(tmp_path)
    video = dataset.videos[0]
    assert video.object_ids == [7, 14]
    assert [video.visible(t) for t in (0, 3)] == [[7], [7, 14]]
    assert not dataset.read_mask(video, 0, 14).any()


def test_frames_without_a_mask_are_unlabelled_not_empty(tmp_path):
    """As YouTube-VOS labels every fifth: clips skip the others, evaluation sees them."""
    dataset = dataset_of(make_vos(tmp_path, every=2), video_clip_length=2)
    video = dataset.videos[0]
    assert len(video.frames) == 6
    assert video.labelled == [0, 2, 4]
    assert {tuple(dataset[epoch, 0].frame_indices) for epoch in range(20)} == {(0, 2), (2, 4)}
    sample = dataset[0]
    np.testing.assert_array_equal(sample.masks.numpy(), MASKS[sample.frame_indices])
    pixels = to_pixels(sample.images)
    assert (pixels[1][MASKS[sample.frame_indices[1], 0]] == OBJECT_COLOURS[0]).all()
    padded = dataset_of(tmp_path, video_clip_length=5)[0]
    assert padded.frame_indices == [0, 2, 4, 4, 4]
    assert padded.frame_valid.tolist() == [True] * 3 + [False] * 2


def test_objects_in_folders_of_their_own_may_overlap(tmp_path):
    """As SA-V's validation set has them, with its names of folders."""
    make_vos(tmp_path, names=["sav_1"])
    (tmp_path / "JPEGImages").rename(tmp_path / "JPEGImages_24fps")
    shutil.rmtree(tmp_path / "Annotations")
    masks = tmp_path / "Annotations_6fps" / "sav_1"
    for t in (0, 4):
        save_ids(masks / "000" / f"{t:05d}.png", MASKS[t, 0] * 255, "L")
    whole = np.ones(SIZE, np.uint8)
    save_ids(masks / "001" / "00004.png", whole, "L")
    dataset = dataset_of(tmp_path)
    video = dataset.videos[0]
    assert video.object_ids == [0, 1]
    assert video.labelled == [0, 4]
    np.testing.assert_array_equal(dataset.read_mask(video, 4, 0), MASKS[4, 0])
    assert dataset.read_mask(video, 4, 1).all()
    assert not dataset.read_mask(video, 0, 1).any()


def test_a_folder_of_a_resolution_may_lie_between(tmp_path):
    make_vos(tmp_path, below="480p")
    assert len(dataset_of(tmp_path)) == 2
    make_vos(tmp_path, below="1080p")
    dataset = dataset_of(tmp_path)
    assert "of 480p, 1080p, 480p is read" in dataset.warnings[0]
    assert dataset.videos[0].frames[0].path.parts[-3] == "480p"
    for top in ("JPEGImages", "Annotations"):
        (tmp_path / top / "480p").rename(tmp_path / top / "720p")
    assert "several resolutions (720p, 1080p); keep one" in fails(tmp_path)


def test_a_list_chooses_videos(tmp_path):
    make_vos(tmp_path, names=["bear", "swan", "cat"], below="480p")
    path = tmp_path / "ImageSets" / "2017" / "train.txt"
    path.parent.mkdir(parents=True)
    path.write_text("swan\n\nbear\n")
    assert [video.video_id for video in dataset_of(path).videos] == ["swan", "bear"]
    line = "/JPEGImages/480p/cat/0000{t}.jpg /Annotations/480p/cat/0000{t}.png\n"
    path.write_text("".join(line.format(t=t) for t in range(6)))
    assert [video.video_id for video in dataset_of(path).videos] == ["cat"]
    path.write_text("swan\nwolf\n")
    assert "wolf: no such folder, but" in fails(path)


def test_names_in_a_list_may_have_dots_spaces_and_folders(tmp_path):
    names = ["cam1.2023-05-01", "cam2.2023-05-01", "my video", "HACS/clip.1", "plain"]
    make_vos(tmp_path, names=names)
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    dataset = dataset_of(path)
    assert [video.video_id for video in dataset.videos] == names
    assert dataset.warnings == []
    folder = dataset.videos[3].frames[0].path.parent
    assert folder == tmp_path / "JPEGImages" / "HACS" / "clip.1"
    np.testing.assert_array_equal(dataset.read_mask(dataset.videos[3], 2, 1), MASKS[2, 0])
    path.write_text("plain 12 3\nmy video\n")  # a list with more columns
    assert [video.video_id for video in dataset_of(path).videos] == ["plain", "my video"]
    path.write_text("HACS/clip.1/00000.png\nHACS/clip.1/00001.png\nmy video/00000.png x.png\n")
    assert [v.video_id for v in dataset_of(path).videos] == ["HACS/clip.1", "my video"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../other/bear", "leads upwards"),
        ("bear/../../other", "leads upwards"),
        ("..\\other", "leads upwards"),
        ("/etc", "is an absolute path"),
        ("C:\\videos\\bear", "is an absolute path"),
        ("linked", "is a link to"),
    ],
)
def test_a_list_stays_below_its_root(tmp_path, name, fault):
    make_vos(tmp_path / "data")
    make_vos(tmp_path / "elsewhere", names=["linked"])
    for top in ("JPEGImages", "Annotations"):
        (tmp_path / "data" / top / "linked").symlink_to(tmp_path / "elsewhere" / top / "linked")
    path = tmp_path / "data" / "list.txt"
    path.write_text(f"bear\n{name}\n")
    message = fails(path)
    assert repr(name) in message
    assert fault in message


def test_frames_named_by_seconds_are_in_the_order_of_time(tmp_path):
    make_vos(tmp_path, names=["a"])
    stamps = ["9.25", "9.375", "9.5", "10.0", "10.125", "10.5"]
    for top in ("JPEGImages", "Annotations"):
        for t, stamp in enumerate(stamps):
            (tmp_path / top / "a" / f"{t:05d}.png").rename(tmp_path / top / "a" / f"{stamp}.png")
    dataset = dataset_of(tmp_path)
    for t in range(6):
        np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], t, 1), MASKS[t, 0])


def keep_masks(root, kept):
    """Leave the first masks only, as test sets have them: name of a frame -> ids on it."""
    for path in (root / "Annotations").rglob("*.png"):
        if path.stem in kept:
            ids = read_id_mask(path)
            save_ids(path, np.where(np.isin(ids, kept[path.stem]), ids, 0))
        else:
            path.unlink()


def write_meta(root, frames):
    """YouTube-VOS' meta.json for all videos: object id -> names of frames."""
    objects = {o: {"category": "bear", "frames": names} for o, names in frames.items()}
    names = [path.name for path in (root / "Annotations").iterdir()]
    content = {"videos": {name: {"objects": objects} for name in names}}
    (root / "meta.json").write_text(json.dumps(content))


def test_youtube_vos_asks_for_some_frames(tmp_path):
    """All frames lie in a folder of their own, as they come: all_frames/valid_all_frames."""
    valid, every = make_vos(tmp_path / "valid"), tmp_path / "all_frames" / "valid_all_frames"
    keep_masks(valid, {"00000": [1], "00002": [2]})
    write_meta(valid, {"1": ["00000", "00002", "00004"], "2": ["00002", "00004"]})
    every.mkdir(parents=True)
    (valid / "JPEGImages").rename(every / "JPEGImages")
    source = VosVideos(every)
    assert only_prompts(source.videos)
    for video in source.videos:
        assert len(video.frames) == 6
        assert video.asked == {0, 2, 4}
        assert [video.visible(t) for t in range(6)] == [[1], [], [2], [], [], []]
    (every / "JPEGImages" / "bear" / "00004.png").unlink()
    (told,) = [text for text in VosVideos(every).warnings if "meta.json" in text]
    assert told.endswith("asks for frames without a picture: bear/00004")


@pytest.mark.parametrize(
    "content",
    ['{"videos": {"bear": {"objects": {"1": {"frame_range": {}}}}}}', "[]", "{", '{"a": 1}'],
)
def test_another_meta_json_asks_for_all_frames(tmp_path, content):
    root = make_vos(tmp_path)
    (root / "meta.json").write_text(content)
    source = VosVideos(root)
    assert [video.asked for video in source.videos] == [None, None]
    assert ("meta.json" in "".join(source.warnings)) == (content in ("[]", "{"))


def test_prompts_alone_are_told_from_labels(tmp_path):
    assert not only_prompts(VosVideos(make_vos(tmp_path / "all")).videos)
    assert not only_prompts(VosVideos(make_vos(tmp_path / "some", every=3)).videos)
    mose = make_vos(tmp_path / "mose")
    keep_masks(mose, {"00000": [1, 2]})
    videos = VosVideos(mose).videos
    assert only_prompts(videos)
    pictures = [replace(video, frames=video.frames[:1]) for video in videos]
    assert not only_prompts(pictures)  # pictures with all their masks


def test_two_videos_that_are_one_folder_are_an_error(tmp_path):
    make_vos(tmp_path, names=["bear"])
    for top in ("JPEGImages", "Annotations"):
        (tmp_path / top / "swan").symlink_to(tmp_path / top / "bear")
    assert "videos 'bear' and 'swan' share 6 pictures" in fails(tmp_path)


def test_frames_may_lie_in_a_stack(tmp_path):
    make_vos(tmp_path, names=["a"])
    folder = tmp_path / "JPEGImages" / "a"
    pages = [Image.open(path) for path in sorted(folder.iterdir())]
    pages[0].save(folder / "stack.tif", save_all=True, append_images=pages[1:])
    for path in folder.glob("*.png"):
        path.unlink()
    dataset = dataset_of(tmp_path)
    (video,) = dataset.videos
    assert video.labelled == list(range(6))
    for t in (0, 4, 2):
        mask = dataset.read_mask(video, t, 2)
        assert (dataset.read_frame(video, t)[mask] == OBJECT_COLOURS[1]).all()


@pytest.mark.parametrize("soft", [False, True])
def test_objects_in_folders_may_have_soft_edges(tmp_path, soft):
    make_vos(tmp_path, names=["a"])
    shutil.rmtree(tmp_path / "Annotations")
    for t in range(6):
        mask = Image.fromarray(MASKS[t, 0] * np.uint8(255))
        mask = mask.filter(ImageFilter.GaussianBlur(1)) if soft else mask
        path = tmp_path / "Annotations" / "a" / "thing" / f"{t:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
    dataset = dataset_of(tmp_path)
    found = dataset.read_mask(dataset.videos[0], 3, "thing")
    assert (found ^ MASKS[3, 0]).sum() <= 8 * soft  # corners


def test_an_experiment_names_the_type_and_the_lists(tmp_path):
    make_vos(tmp_path)
    for name, video in (("train", "bear"), ("val", "swan")):
        (tmp_path / f"{name}.txt").write_text(video)
    raw = {"dataset_type": "vos", "data_path": str(tmp_path / "train.txt")}
    raw |= {"val_path": str(tmp_path / "val.txt"), "max_conditioning_frames": 2}
    experiment = build(Experiment, {"dataset": raw}, "experiment")
    for path, training, video in (("data_path", True, "bear"), ("val_path", False, "swan")):
        path = getattr(experiment.dataset, path)
        sections = experiment.dataset, experiment.augment, experiment.trainer.seed
        dataset = build_dataset(*sections, path, training=training)
        assert isinstance(dataset.source, VosVideos)
        assert [v.video_id for v in dataset.videos] == [video]
        assert dataset.settings.max_conditioning_frames == 2


# What is refused


def test_all_problems_come_together(tmp_path):
    make_vos(tmp_path, names=["a", "b", "c", "d", "e"])
    masks = tmp_path / "Annotations"
    cut = masks / "a" / "00001.png"
    cut.write_bytes(cut.read_bytes()[:60])
    save_ids(masks / "b" / "00002.png", np.ones((5, 6)))
    (masks / "c" / "00003.png").rename(masks / "c" / "3.png")
    colours = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(colours).save(masks / "d" / "00000.png")
    (tmp_path / "JPEGImages" / "e" / "00004.png").write_bytes(b"")
    message = fails(tmp_path)
    assert "5 problems" in message
    for part in (
        "00001.png: is damaged or cut short",
        "00002.png: the mask is 6x5, its frames 64x48",
        "3.png: no frame of this name",
        "00000.png: a picture of mode RGB; expected a palette or grey PNG",
        "00004.png: is empty",
    ):
        assert part in message


def test_masks_that_are_no_png_or_lie_in_two_places(tmp_path):
    make_vos(tmp_path, names=["a", "b"])
    masks = tmp_path / "Annotations"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(masks / "a" / "00001.jpg")
    save_ids(masks / "b" / "thing" / "00001.png", np.ones(SIZE))
    message = fails(tmp_path)
    assert "00001.jpg: a mask that is no PNG; write it as one, or remove it" in message
    assert "masks (00000.png) beside folders of masks (thing)" in message


def test_a_list_that_is_no_text(tmp_path):
    make_vos(tmp_path)
    path = tmp_path / "JPEGImages" / "bear" / "00000.png"
    assert f"{path}: is no text; expected a list of videos" in fails(path)


def test_folders_that_are_something_else(tmp_path):
    assert "no such file or folder" in fails(tmp_path / "nowhere")
    assert "no frames with masks" in fails(tmp_path)
    make_vos(tmp_path)
    shutil.rmtree(tmp_path / "Annotations" / "swan")
    assert dataset_of(tmp_path).warnings == [
        f"swan: no masks in {tmp_path / 'Annotations'}, left out"
    ]
    shutil.rmtree(tmp_path / "Annotations" / "bear")
    assert "no video with masks" in fails(tmp_path)


def test_a_video_without_an_object_is_for_evaluation_only(tmp_path):
    make_vos(tmp_path)
    for t in range(6):
        save_ids(tmp_path / "Annotations" / "swan" / f"{t:05d}.png", np.zeros(SIZE))
    dataset = dataset_of(tmp_path)
    assert dataset.warnings == ["video 'swan': no object, so no clip for training"]
    assert (len(dataset.videos), len(dataset)) == (2, 1)
    for t in range(6):
        save_ids(tmp_path / "Annotations" / "bear" / f"{t:05d}.png", np.zeros(SIZE))
    assert "no annotation has a mask" in fails(tmp_path)


def test_a_mask_that_changed_is_named(tmp_path):
    dataset = dataset_of(make_vos(tmp_path))
    save_ids(tmp_path / "Annotations" / "bear" / "00000.png", np.ones((5, 6)))
    with pytest.raises(UserError, match=r"00000\.png: the mask is 6x5.*did it change"):
        dataset.read_mask(dataset.videos[0], 0, 1)


INSTANCES = moving_masks(4, 2, SIZE)


def write(frames, masks, ids=(2001, 1003)):
    """Frames of the two objects, and their ids with a region to ignore at the lower right."""
    for folder in (frames, masks):
        folder.mkdir(parents=True, exist_ok=True)
    (masks.parent / "labels.txt").write_text("tool\n")
    for t in range(4):
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        values = np.zeros(SIZE, np.uint16)
        values[-6:, -20:] = 10000
        for k in range(2):
            pixels[INSTANCES[t, k]] = OBJECT_COLOURS[k]
            values[INSTANCES[t, k]] = ids[k]
        Image.fromarray(pixels).save(frames / f"frame_{t:06d}.png")
        Image.fromarray(values).save(masks / f"frame_{t:06d}.png")


def load_folder(path, name="mots"):
    raw = {"dataset_type": name, "data_path": str(path), "image_size": SIZE}
    config = build(DatasetConfig, raw, "dataset")
    said = []
    data = build_dataset(config, AugmentConfig(), 0, str(path), training=True, say=said.append)
    return data, said


LAYOUTS = {
    "one video": [("images", "instances")],
    "one task a folder": [("a/images", "a/instances"), ("b/images", "b/instances")],
    "one folder a video": [("images/a", "instances/a"), ("images/b", "instances/b")],
    "KITTI": [("image_02/0000", "instances/0000"), ("image_02/0001", "instances/0001")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mots", "vos"])
def test_layouts(tmp_path, layout, name):
    root = tmp_path / "train"
    for frames, masks in LAYOUTS[layout]:
        write(root / frames, root / masks)
    data, said = load_folder(root, name)
    assert len(data.videos) == len(LAYOUTS[layout])
    assert len({video.video_id for video in data.videos}) == len(data.videos)
    assert ("read as dataset_type: mots" in said[0]) == (name == "vos")
    for video in data.videos:
        assert video.object_ids == [1003, 2001]
        assert len(video.frames) == 4
        for k, object_id in enumerate((2001, 1003)):
            np.testing.assert_array_equal(data.read_mask(video, 2, object_id), INSTANCES[2, k])
        free = 120 - INSTANCES[1, :, -6:, -20:].sum()
        assert data.read_ignore(video, 1).sum() == free


def test_what_is_missing_or_has_plain_ids_is_told(tmp_path):
    with pytest.raises(UserError, match="no images with instances; expected images/"):
        MotsVideos(tmp_path)
    with pytest.raises(UserError, match="no such folder; expected images/"):
        MotsVideos(tmp_path / "nowhere")
    write(tmp_path / "images", tmp_path / "instances", ids=(1, 2))
    with pytest.raises(UserError, match=r"ids \[1, 2.*class \* 1000.*dataset_type: vos"):
        MotsVideos(tmp_path)
    (tmp_path / "instances" / "frame_000003.png").rename(tmp_path / "instances" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: no frame of this name"):
        MotsVideos(tmp_path)
