import json
import os
import pickle

import cv2
import numpy as np
import pytest
from conftest import SIZE, encode, moving_masks
from PIL import Image
from torch.utils.data import DataLoader

from sam2train.build import build_dataset
from sam2train.config import build
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.sav import Film, SAVDataset
from sam2train.vos import VOSDataset

NUM_FRAMES = 10  # of which 0, 4 and 8 are labelled
MASKS = moving_masks(NUM_FRAMES, 2, SIZE)


def level(t):
    """The grey of frame t."""
    return 20 + 20 * t


def write_json(path, *, rows=(0, 4, 8), ids=(3, 5), change=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "video_id": path.stem.rsplit("_", 1)[0],
        "masklet": [[encode(mask) for mask in MASKS[t]] for t in rows],
        "masklet_id": list(ids),
    }
    if change is not None:
        change(content)
    path.write_text(json.dumps(content))


def write_frames(folder, frames=range(NUM_FRAMES)):
    folder.mkdir(parents=True, exist_ok=True)
    for t in frames:
        Image.fromarray(np.full((*SIZE, 3), level(t), np.uint8)).save(folder / f"{t:05d}.png")


def write_film(path, num_frames=NUM_FRAMES):
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, SIZE[::-1])
    for t in range(num_frames):
        film.write(np.full((*SIZE, 3), level(t), np.uint8))
    film.release()


def dataset_of(path, **options):
    return SAVDataset(path, **({"image_size": SIZE, "video_clip_length": 2} | options))


def fails(path):
    with pytest.raises(UserError) as caught:
        dataset_of(path)
    return str(caught.value)


@pytest.fixture(params=["JPEGImages_24fps/sav_1", "sav_1", "film"])
def root(request, tmp_path):
    """One video in each of the forms it may have."""
    write_json(tmp_path / "sav_1_manual.json")
    if request.param == "film":
        write_film(tmp_path / "sav_1.mp4")
    else:
        write_frames(tmp_path / request.param)
    return tmp_path


def test_every_fourth_frame_is_labelled(root):
    dataset = dataset_of(root)
    assert dataset.warnings == []
    (video,) = dataset.videos
    assert (video.video_id, video.size, len(video.frames)) == ("sav_1", SIZE, NUM_FRAMES)
    assert video.object_ids == [3, 5]
    assert video.labelled == [0, 4, 8]
    for t in range(NUM_FRAMES):
        assert abs(dataset.read_frame(video, t).astype(int) - level(t)).max() <= 6
        for k, object_id in enumerate(video.object_ids):
            truth = MASKS[t, k] & (t in video.labelled)
            np.testing.assert_array_equal(dataset.read_mask(video, t, object_id), truth)


def test_clips_have_labelled_frames_only(root):
    dataset = dataset_of(root, prompt_types=["mask"])
    assert {tuple(dataset[epoch, 0].frame_indices) for epoch in range(20)} == {(0, 4), (4, 8)}
    sample = dataset[0]
    np.testing.assert_array_equal(sample.masks.numpy(), MASKS[sample.frame_indices])
    assert [prompt["object_id"] for prompt in sample.prompts] == [3, 5]


def test_pictures_of_labelled_frames_alone_will_do(tmp_path):
    write_json(tmp_path / "sav_1_manual.json")
    write_frames(tmp_path / "JPEGImages" / "sav_1", [0, 4, 8])
    dataset = dataset_of(tmp_path)
    (video,) = dataset.videos
    assert video.labelled == [0, 1, 2]
    assert dataset.read_frame(video, 2)[0, 0, 0] == level(8)
    np.testing.assert_array_equal(dataset.read_mask(video, 2, 3), MASKS[8, 0])


def test_a_label_for_every_frame_is_taken_as_that(tmp_path):
    write_json(tmp_path / "sav_1_manual.json", rows=range(NUM_FRAMES))
    write_frames(tmp_path / "sav_1")
    dataset = dataset_of(tmp_path)
    assert dataset.videos[0].labelled == list(range(NUM_FRAMES))
    np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], 7, 5), MASKS[7, 1])


def test_null_is_unlabelled_and_an_empty_mask_absent(tmp_path):
    def change(content):
        content["masklet"][1][0] = None
        content["masklet"][2][1] = encode(np.zeros(SIZE, bool))

    write_json(tmp_path / "sav_1_manual.json", change=change)
    write_frames(tmp_path / "sav_1")
    (video,) = dataset_of(tmp_path).videos
    assert video.labelled == [0, 8]
    assert video.visible(8) == [3]


def test_manual_masklets_come_before_automatic_ones(tmp_path):
    write_json(tmp_path / "sav_1_manual.json")
    for name in ("sav_1", "sav_2"):
        write_json(tmp_path / f"{name}_auto.json", ids=(8, 9))
        write_frames(tmp_path / "JPEGImages_24fps" / name)
    dataset = dataset_of(tmp_path)
    assert [video.object_ids for video in dataset.videos] == [[3, 5], [8, 9]]
    assert dataset.warnings == ["sav_2: automatic masklets, there are no manual ones"]


def test_a_list_chooses_videos_that_may_lie_deeper(tmp_path):
    for name in ("sav_1", "sav_2", "sav_3"):
        write_json(tmp_path / "sav_000" / f"{name}_manual.json")
        write_film(tmp_path / "sav_000" / f"{name}.mp4")
    (tmp_path / "train.txt").write_text("sav_3\nsav_1\n")
    videos = dataset_of(tmp_path / "train.txt").videos
    assert [video.video_id for video in videos] == ["sav_3", "sav_1"]
    (tmp_path / "train.txt").write_text("sav_4\n")
    assert "sav_4: no sav_4_manual.json" in fails(tmp_path / "train.txt")


# Films


def test_frames_of_a_film_in_any_order(tmp_path):
    write_film(tmp_path / "a.mp4", 12)
    write_film(tmp_path / "b.mp4", 3)
    film = Film()
    for name, t in [("a", 0), ("a", 1), ("a", 7), ("a", 3), ("b", 2), ("a", 11), ("a", 11)]:
        pixels = film.read(tmp_path / f"{name}.mp4", t)
        assert pixels.shape == (*SIZE, 3)
        assert abs(pixels.astype(int) - level(t)).max() <= 6
    with pytest.raises(UserError, match=r"b\.mp4: ends or is damaged at frame 3"):
        film.read(tmp_path / "b.mp4", 5)
    assert pickle.loads(pickle.dumps(film)).read(tmp_path / "a.mp4", 2)[0, 0, 0] > 0


def test_colours_of_a_film_are_in_the_right_order(tmp_path):
    film = cv2.VideoWriter(
        str(tmp_path / "red.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 24, SIZE[::-1]
    )
    film.write(np.full((*SIZE, 3), (0, 0, 250), np.uint8))  # OpenCV's order: blue, green, red
    film.release()
    red, green, blue = Film().read(tmp_path / "red.mp4", 0).mean(axis=(0, 1))
    assert red > 200
    assert max(green, blue) < 50


def test_a_worker_opens_a_film_of_its_own(tmp_path):
    write_json(tmp_path / "sav_1_manual.json")
    write_film(tmp_path / "sav_1.mp4")
    dataset = dataset_of(tmp_path)
    dataset.read_frame(dataset.videos[0], 5)  # open in this process, when the worker is forked
    loader = DataLoader(dataset, None, sampler=[(e, 0) for e in range(4)], num_workers=1)
    for epoch, clip in enumerate(loader):
        assert (clip.images == dataset[epoch, 0].images).all()
    assert dataset._film._open[0] == os.getpid()


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("masklet"), "`masklet` is missing"),
        (lambda c: c["masklet"][1].pop(), r"have \[1, 2\] entries"),
        (lambda c: c["masklet_id"].append(1), r"have \[2, 3\] entries"),
        (lambda c: c.update(masklet_id=[5, 5]), r"`masklet_id` is \[5, 5\]; .* each another one"),
        (lambda c: c.update(masklet_id=["a", None]), "expected a number or text for each"),
        (lambda c: c.update(masklet_id=[[1], {}]), "expected a number or text for each"),
        (lambda c: c["masklet"].extend(c["masklet"]), "6 labelled frames do not fit 10 frames"),
        (
            lambda c: c["masklet"][1].__setitem__(0, {"size": [4, 4], "counts": [16]}),
            r"masklet\[1\]\[0\]: the RLE has size \[4, 4\]",
        ),
    ],
)
def test_masklets_that_do_not_fit(tmp_path, change, message):
    write_json(tmp_path / "sav_1_manual.json", change=change)
    write_frames(tmp_path / "sav_1")
    with pytest.raises(UserError, match=message):
        dataset_of(tmp_path)


def test_all_problems_come_together(tmp_path):
    for name in ("sav_1", "sav_2", "sav_3", "sav_4"):
        write_json(tmp_path / f"{name}_manual.json")
    (tmp_path / "sav_2.mp4").write_bytes(b"no film")
    write_frames(tmp_path / "sav_3")
    (tmp_path / "sav_3" / "00002.png").write_bytes(b"<html>")
    (tmp_path / "sav_4_manual.json").write_text("{")
    message = fails(tmp_path)
    assert "4 problems" in message
    for part in (
        "sav_1_manual.json: no frames; expected",
        "sav_2.mp4: is no film that OpenCV can read",
        "00002.png: is an HTML page",
        "sav_4_manual.json: the file is not valid JSON",
    ):
        assert part in message


def test_paths_that_are_something_else(tmp_path):
    assert "no such folder" in fails(tmp_path / "nowhere")
    assert "no such file in it" in fails(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    assert "is a file" in fails(tmp_path / "a.mp4")


def test_an_experiment_takes_masklets_and_the_pngs_of_the_validation_set(tmp_path):
    write_json(tmp_path / "train" / "sav_1_manual.json")
    write_frames(tmp_path / "train" / "sav_1")
    write_frames(tmp_path / "val" / "JPEGImages_24fps" / "sav_2")
    masks = tmp_path / "val" / "Annotations_6fps" / "sav_2" / "000"
    masks.mkdir(parents=True)
    Image.fromarray(MASKS[0, 0]).save(masks / "00000.png")
    raw = {"dataset_type": "sav", "data_path": str(tmp_path / "train")}
    raw["val_path"] = str(tmp_path / "val")
    experiment = build(Experiment, {"dataset": raw}, "experiment")
    train, val = (
        build_dataset(experiment, path, training=False, say=lambda text: None)
        for path in (raw["data_path"], raw["val_path"])
    )
    assert isinstance(train, SAVDataset)
    assert isinstance(val, VOSDataset)
    assert val.read_mask(val.videos[0], 0, 0).sum() == MASKS[0, 0].sum()
