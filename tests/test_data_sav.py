import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, encode, moving_masks
from PIL import Image
from test_data_pictures import level, write_film
from torch.utils.data import DataLoader

from sam2train import cli
from sam2train.config import build
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_sav import SavVideos
from sam2train.data_vos import VosVideos
from sam2train.datasets import build_dataset
from sam2train.errors import UserError
from sam2train.experiment import Experiment

NUM_FRAMES = 10  # of which 0, 4 and 8 are labelled
MASKS = moving_masks(NUM_FRAMES, 2, SIZE)


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


def dataset_of(path, *, annotation_stride=None, **options):
    settings = clip_settings(**({"image_size": SIZE, "video_clip_length": 2} | options))
    return ClipDataset(SavVideos(path, annotation_stride), settings)


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


@pytest.mark.parametrize(
    ("num_frames", "num_rows", "stride"),
    [(40, 8, 5), (40, 10, 4), (36, 12, 3), (41, 21, 2), (9, 9, 1)],
)
def test_the_distance_of_labels_follows_from_the_counts(tmp_path, num_frames, num_rows, stride):
    """Every fifth read as every fourth would put masks beside their objects."""
    masks = moving_masks(num_frames, 1, SIZE)

    def change(content):
        content["masklet"] = [[encode(masks[r * stride, 0])] for r in range(num_rows)]
        content |= {"masklet_id": [7], "video_frame_count": float(num_frames)}
        content["masklet_frame_count"] = [num_rows]

    write_json(tmp_path / "sav_1_manual.json", change=change)
    write_frames_of(tmp_path / "sav_1", num_frames)
    dataset = dataset_of(tmp_path)
    (video,) = dataset.videos
    assert video.labelled == list(range(0, num_frames, stride))[:num_rows]
    for t in video.labelled:
        np.testing.assert_array_equal(dataset.read_mask(video, t, 7), masks[t, 0])
    assert "labelled" in dataset.source.notes[0]


def write_frames_of(folder, num_frames):
    folder.mkdir(parents=True)
    for t in range(num_frames):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / f"{t:05d}.png")


def test_a_distance_that_is_not_sure_is_asked_for(tmp_path):
    write_json(tmp_path / "sav_1_manual.json", rows=[0, 4])
    write_frames(tmp_path / "sav_1")
    message = fails(tmp_path)
    assert "2 labelled frames of 10: every n-th is labelled, but n may be 5, 6, 7, 8, 9" in message
    assert "set dataset.annotation_stride" in message
    dataset = dataset_of(tmp_path, annotation_stride=4)
    assert dataset.videos[0].labelled == [0, 4]
    assert "dataset.annotation_stride" in dataset.source.notes[0]
    with pytest.raises(UserError, match="2 labelled frames do not fit 10 frames with"):
        dataset_of(tmp_path, annotation_stride=10)


def test_one_frame_more_than_was_counted_changes_nothing(tmp_path):
    masks = moving_masks(40, 1, SIZE)

    def change(content):
        content["masklet"] = [[encode(masks[4 * r, 0])] for r in range(10)]
        content["masklet_id"] = [7]

    write_json(tmp_path / "sav_1_manual.json", change=change)
    write_frames_of(tmp_path / "sav_1", 41)
    assert dataset_of(tmp_path).videos[0].labelled == list(range(0, 40, 4))


def test_another_film_than_the_one_that_was_annotated_is_told(tmp_path):
    write_json(
        tmp_path / "sav_1_manual.json", change=lambda content: content.update(video_frame_count=36)
    )
    write_film(tmp_path / "sav_1.mp4")
    message = fails(tmp_path)
    assert "`video_frame_count` is 36, but its film shows 10 frames" in message
    assert dataset_of(tmp_path, annotation_stride=4).videos[0].labelled == [0, 4, 8]


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


def test_a_worker_opens_a_film_of_its_own(tmp_path):
    write_json(tmp_path / "sav_1_manual.json")
    write_film(tmp_path / "sav_1.mp4")
    dataset = dataset_of(tmp_path)
    dataset.read_frame(dataset.videos[0], 5)  # open in this process, when the worker is forked
    loader = DataLoader(dataset, None, sampler=[(e, 0) for e in range(4)], num_workers=1)
    for epoch, clip in enumerate(loader):
        assert (clip.images == dataset[epoch, 0].images).all()


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("masklet"), "`masklet` is missing"),
        (lambda c: c["masklet"][1].pop(), r"have \[1, 2\] entries"),
        (lambda c: c["masklet_id"].append(1), r"have \[2, 3\] entries"),
        (lambda c: c.update(masklet_id=[5, 5]), r"`masklet_id` is \[5, 5\]; .* all different"),
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
    sections = experiment.dataset, experiment.augment, experiment.trainer.seed
    train, val = (
        build_dataset(*sections, path, training=False, say=lambda text: None)
        for path in (raw["data_path"], raw["val_path"])
    )
    assert isinstance(train.source, SavVideos)
    assert isinstance(val.source, VosVideos)
    assert val.read_mask(val.videos[0], 0, 0).sum() == MASKS[0, 0].sum()


def test_smoke_on_every_fourth_frame_labelled(tmp_path):
    """The short video of --smoke has four labelled frames, however many lie between them."""
    write_json(tmp_path / "sav_1_manual.json")
    write_film(tmp_path / "sav_1.mp4")
    words = [
        str(Path(__file__).parents[1] / "experiments" / "coco_point_bbox.yaml"),
        "dataset.dataset_type=sav",
        f"dataset.data_path={tmp_path}",
        f"dataset.val_path={tmp_path}",
        "tracking.mode=disabled",
        "trainer.device=cpu",
    ]
    assert cli.main([*words, "--smoke", "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
