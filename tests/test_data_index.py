"""An index in a file: mapped by processes, and no trouble where it cannot be written."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import SIZE, edit, encode, load, make_coco, moving_masks, same
from PIL import Image
from test_data_sav import write_film, write_json
from test_data_vos import make_vos

from sam2train import cli, data_coco_index, data_index
from sam2train.data_coco import CocoVideos
from sam2train.data_index import fingerprint
from sam2train.data_sav import SavVideos
from sam2train.data_vos import VosVideos


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Every file is large, and indices lie in a folder of the test."""
    monkeypatch.setattr(data_coco_index, "PACKED_FROM", 0)
    monkeypatch.setattr(data_index, "INDEX_FOLDER", tmp_path / "index")


def test_a_folder_that_takes_no_index_is_no_trouble(packed, tmp_path, monkeypatch):
    path = make_coco(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data_index, "INDEX_FOLDER", tmp_path / "file" / "index")
    source = load(path).source
    assert source.videos == CocoVideos(path).videos
    assert pickle.loads(pickle.dumps(source)).videos == source.videos


def test_a_process_that_is_started_anew_maps_the_index(packed, tmp_path):
    """What is sent there does not grow with the annotations."""
    sizes = []
    for number in (2, 20):
        data = load(make_coco(tmp_path / str(number), num_frames=number))
        sizes.append(len(pickle.dumps(data)))
    assert sizes[1] - sizes[0] < 50
    expected = data[0, 0]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert same(pool.apply(first_clip, (data,)), expected)


def first_clip(data):
    return data[0, 0]


def test_moved_data_is_the_same_and_changed_data_is_not(tmp_path):
    path = make_coco(tmp_path / "a", num_videos=2)
    first = fingerprint(load(path).source)
    assert len(first) == 64
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "b" / path.name
    assert fingerprint(load(moved).source) == first == fingerprint(load(path).source)

    seen = {first}
    frame = tmp_path / "b/video_002/frame_003.png"
    pixels = np.array(Image.open(frame))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(frame)
    seen.add(fingerprint(load(moved).source))

    def change(content):
        mask = moving_masks(6, 2, SIZE)[2, 0]
        content["annotations"][4]["segmentation"] = encode(np.roll(mask, 1, axis=1))

    seen.add(fingerprint(load(edit(moved, change)).source))  # as many pixels as before
    edit(moved, lambda content: content["images"][0].update(is_annotated=False))
    edit(moved, lambda content: content["images"][1].update(is_annotated=True))
    seen.add(fingerprint(load(moved).source))
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["vos", "sav"])
def test_masks_in_files_of_their_own(tmp_path, kind):
    if kind == "vos":
        make_vos(tmp_path)
        masks = sorted((tmp_path / "Annotations").rglob("*.png"))[0]
        read = VosVideos
    else:
        write_json(tmp_path / "sav_1_manual.json")
        write_film(tmp_path / "sav_1.mp4")
        masks, read = tmp_path / "sav_1_manual.json", SavVideos
    first = fingerprint(read(tmp_path))
    assert fingerprint(read(tmp_path)) == first
    if kind == "vos":
        image = Image.open(masks)
        ids = np.roll(np.array(image), 1, axis=1)
        moved = Image.fromarray(ids)
        if image.mode == "P":
            moved.putpalette(image.getpalette())
        moved.save(masks)
    else:
        edit(masks, lambda content: content["masklet"][0].reverse())
    assert fingerprint(read(tmp_path)) != first


def test_a_large_frame_is_sampled(tmp_path):
    path = make_coco(tmp_path, num_frames=2, size=(300, 400))
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    frame = tmp_path / "video_001/frame_001.png"
    cv2.imwrite(str(frame), noise)
    first = fingerprint(load(path).source)
    content = bytearray(frame.read_bytes())
    assert len(content) > 300_000
    content[len(content) // 2] ^= 1
    frame.write_bytes(bytes(content))
    assert fingerprint(load(path).source) != first


def test_of_many_frames_some_are_read_and_all_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data_index, "MAX_READ", 2)
    path = make_coco(tmp_path, num_videos=1, num_frames=4)
    opened = []
    sample = data_index._sample

    def watch(file, **options):
        opened.append(options.get("read_bytes", True))
        return sample(file, **options)

    monkeypatch.setattr(data_index, "_sample", watch)
    first = fingerprint(load(path).source)
    assert sorted(opened) == [False, False, True, True]
    with (tmp_path / "video_001" / "frame_002.png").open("ab") as file:
        file.write(b"x")  # a frame that is not read, of another size
    assert fingerprint(load(path).source) != first


def test_a_run_and_an_evaluation_of_the_same_data_say_so(tmp_path, monkeypatch):
    experiment = Path(__file__).parents[1] / "experiments" / "coco_point_bbox.yaml"
    train, val = (make_coco(tmp_path / name) for name in ("train", "val"))
    words = [str(experiment), f"dataset.data_path={train}", f"dataset.val_path={val}", "--smoke"]
    words += ["tracking.mode=disabled", "trainer.device=cpu"]
    run = tmp_path / "run"
    assert cli.main([*words, "--run-dir", str(run)]) == 0
    data = json.loads((run / "summary.json").read_text())["data"]
    expected = {"train": fingerprint(load(train).source), "val": fingerprint(load(val).source)}
    assert data == expected
    assert torch.load(run / "checkpoints/best.pt", weights_only=True)["data"] == expected
    scored = tmp_path / "scored"
    command = ["--evaluate", str(run), "--no-base", "--run-dir", str(scored)]
    assert cli.main([*words, *command]) == 0
    assert json.loads((scored / "summary.json").read_text())["data"] == {"val": expected["val"]}

    assert json.loads((run / "summary.json").read_text())["warnings"] == []
    edit(val, lambda content: content["annotations"].pop())
    assert cli.main([*words, "--resume", str(run)]) == 0
    (warning,) = json.loads((run / "summary.json").read_text())["warnings"]
    assert warning.startswith("the val data changed since this run saved")
