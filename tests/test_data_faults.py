"""Files that are no files, and files that lie elsewhere, in every format of data."""

import os
import shutil
import signal
import time

import numpy as np
import pytest
import test_data_cvat
import test_data_layouts
import test_data_sav
import test_data_vos
from conftest import make_coco, make_frames
from test_data_layouts import make_burst, make_youtube_vis
from test_data_vos import make_vos

from sam2train import data_source
from sam2train.config import build
from sam2train.data_pictures import read_film_header
from sam2train.datasets import FORMATS, DatasetConfig, build_dataset
from sam2train.errors import MachineFault, UserError
from sam2train.machine import time_limit
from sam2train.transforms import AugmentConfig


def make_video(root):
    for name in ("a", "b"):
        make_frames(root / name, [f"{t:03d}.png" for t in range(4)], seed=ord(name))
    return root


def make_sav(root):
    test_data_sav.write_json(root / "sav_1_manual.json")
    test_data_sav.write_frames(root / "JPEGImages_24fps" / "sav_1")
    return root


def make_mots(root):
    test_data_vos.write(root / "images" / "0001", root / "instances" / "0001")
    return root


def make_cvat(root):
    test_data_cvat.make_frames_beside(root)
    shapes = [test_data_cvat.on_frame("mask", t, 0) for t in range(6)]
    return test_data_cvat.write_xml(root, test_data_cvat.track(0, shapes))


def make_label_studio(root):
    return test_data_layouts.make_tasks(root, test_data_layouts.both())


# The data set of a format, and files of it: a frame, and what holds masks.
MAKERS = {
    "coco": (make_coco, "video_001/frame_001.png", "annotations.json"),
    "youtube_vis": (make_youtube_vis, "JPEGImages/video_001/frame_001.png", "annotations.json"),
    "burst": (make_burst, "frames/HACS/video_001/frame_001.png", "annotations.json"),
    "video": (make_video, "a/001.png", None),
    "vos": (make_vos, "JPEGImages/bear/00001.png", "Annotations/bear/00001.png"),
    "sav": (make_sav, "JPEGImages_24fps/sav_1/00001.png", "sav_1_manual.json"),
    "mots": (make_mots, "images/0001/frame_000001.png", "instances/0001/frame_000001.png"),
    "mevis": (test_data_layouts.write, "JPEGImages/a/00001.png", "mask_dict.json"),
    "cvat": (make_cvat, "images/frame_000001.png", "annotations.xml"),
    "label_studio": (make_label_studio, "frames/frame_001.png", "annotations.json"),
}
FILES = [(kind, at) for kind, row in MAKERS.items() for at in (1, 2) if row[at]]
# Without the files that an experiment names itself: they give the folder.
BELOW = [(kind, at) for kind, at in FILES if "/" in MAKERS[kind][at] or kind == "sav"]


def test_every_format_is_here():
    assert MAKERS.keys() == FORMATS.keys()


def make(kind, root, at):
    """(data_path, the file) of a new data set."""
    root.mkdir(parents=True)
    path = MAKERS[kind][0](root)
    return path, root / MAKERS[kind][at]


def read(kind, path, **keys):
    """What is said of a data set, of which one clip is read."""
    raw = {"dataset_type": kind, "data_path": str(path), "image_size": [48, 64], **keys}
    config, said = build(DatasetConfig, raw, "dataset"), []
    data = build_dataset(config, AugmentConfig(), 0, str(path), training=True, say=said.append)
    for place in range(len(data)):
        data[place]
    return "\n".join(said)


@pytest.fixture
def soon():
    """Nothing here waits: what does ends after some seconds, with an error."""
    with time_limit(60, lambda: "it waits for ever"):
        yield


@pytest.mark.parametrize(("kind", "at"), FILES)
def test_a_pipe_in_the_place_of_a_file_is_an_error_and_not_a_hang(tmp_path, soon, kind, at):
    path, file = make(kind, tmp_path / "data", at)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError) as caught:
        read(kind, path)
    if kind == "mevis" and at == 2:  # is not recognised by this file
        assert f"{path}: expected a folder with mask_dict.json" in str(caught.value)
        return
    assert str(file) in str(caught.value)
    assert "a pipe or a device" in str(caught.value) or "no regular file" in str(caught.value)


@pytest.mark.parametrize("kind", ["vos", "sav"])
def test_a_list_of_videos_that_is_a_pipe(tmp_path, soon, kind):
    path, _ = make(kind, tmp_path / "data", 1)
    os.mkfifo(path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt: .* is a pipe or a device"):
        read(kind, path / "list.txt")


def test_a_film_that_is_a_pipe(tmp_path, soon):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a\.mp4: .* is a pipe"):
        read_film_header(tmp_path / "a.mp4")


@pytest.mark.parametrize(("kind", "at"), BELOW)
def test_files_outside_the_folder_are_told_and_refused_where_that_is_asked_for(tmp_path, kind, at):
    """A link in the place of a file, or of the folder that holds it."""
    for name in ("file", "folder"):
        path, file = make(kind, tmp_path / name / "data", at)
        assert "restrict_to_root" not in read(kind, path, restrict_to_root=True)
        moved = file if name == "file" else file.parent
        if moved == path:
            continue
        elsewhere = tmp_path / name / "elsewhere"
        shutil.move(moved, elsewhere)
        moved.symlink_to(elsewhere)
        with pytest.raises(UserError) as caught:
            read(kind, path, restrict_to_root=True)
        assert f"{file}: lies outside of " in str(caught.value)
        assert str(elsewhere) in str(caught.value)
        said = read(kind, path)
        if name == "folder":  # a link in the place of one file is not looked for
            assert "dataset.restrict_to_root refuses such files" in said


def test_image_root_is_inside(tmp_path):
    path = make_coco(tmp_path / "data")
    shutil.move(tmp_path / "data" / "video_001", tmp_path / "frames" / "video_001")
    keys = {"image_root": str(tmp_path / "frames")}
    assert "outside" not in read("coco", path, restrict_to_root=True, **keys)


def test_a_frame_that_does_not_come_is_named(coco, monkeypatch):
    monkeypatch.setattr(data_source, "FRAME_TIMEOUT", 0.2)
    config = build(DatasetConfig, {"data_path": str(coco), "image_size": [48, 64]}, "dataset")
    data = build_dataset(config, AugmentConfig(), 0, str(coco), training=False)
    monkeypatch.setattr(data.source, "read_frame", lambda *_: time.sleep(9))
    monkeypatch.setattr(data.source, "read_masks", lambda *_: time.sleep(9))
    video = data.videos[0]
    for wait in (
        lambda: data.read_frame(video, 2),
        lambda: data.read_mask(video, 2, video.object_ids[0]),
    ):
        began = time.monotonic()
        with pytest.raises(MachineFault, match=r"frame 2 of video 1 was not .*frame_002\.png"):
            wait()
        assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    monkeypatch.undo()
    assert np.asarray(data.read_frame(video, 2)).shape == (48, 64, 3)
