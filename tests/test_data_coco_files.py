"""Where the pictures that a COCO file names are."""

import shutil
from pathlib import Path

import pytest
from conftest import (
    edit,
    fails,
    load,
    make_coco,
    make_frames,
    same,
)
from test_data_coco import names


def set_paths(path, rename, key="path"):
    def change(content):
        for image in content["images"]:
            image[key] = rename(image.pop("path"))

    return edit(path, change)


def test_file_name_stands_in_for_path(coco):
    assert same(load(coco)[0], load(set_paths(coco, str, "file_name"))[0])


def test_relative_paths_start_at_the_annotations_wherever_one_stands(coco, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(Path("..") / coco.name)[0].masks.any()


def test_absolute_paths(coco, tmp_path):
    path = set_paths(coco, lambda name: str(tmp_path / name))
    moved = tmp_path / "elsewhere" / "annotations.json"
    moved.parent.mkdir()
    shutil.move(path, moved)
    assert load(moved)[0].masks.any()


def test_paths_under_image_root(coco, tmp_path):
    moved = tmp_path / "elsewhere" / "annotations.json"
    moved.parent.mkdir()
    shutil.move(coco, moved)
    assert load(moved, image_root=tmp_path)[0].masks.any()
    message = fails(moved)
    assert "elsewhere/video_001/frame_000.png: no such file" in message


FOREIGN = ["/mnt/theirs/data", "D:/theirs/data", "\\\\server\\share\\data"]


@pytest.mark.parametrize("prefix", FOREIGN)
def test_absolute_paths_of_another_machine_are_found_under_image_root(coco, tmp_path, prefix):
    separator = "\\" if "\\" in prefix else "/"
    path = set_paths(coco, lambda name: f"{prefix}/{name}".replace("/", separator))
    assert "set dataset.image_root to the folder that holds the frames" in fails(path)
    dataset = load(path, image_root=tmp_path)
    assert names(dataset) == [f"frame_{t:03d}.png" for t in range(6)]
    empty = tmp_path / "empty"
    empty.mkdir()
    message = fails(path, image_root=empty)
    assert f"no end of this path exists under dataset.image_root ({empty})" in message


def test_an_image_root_inside_one_video_does_not_stand_for_all(tmp_path):
    path = set_paths(make_coco(tmp_path, num_videos=2), lambda name: f"/mnt/theirs/{name}")
    message = fails(path, image_root=tmp_path / "video_001")
    assert "/mnt/theirs/video_002/frame_000.png and /mnt/theirs/video_001/frame_000.png" in message
    assert "both lead to" in message
    assert "the folder that holds all videos" in message


def test_an_image_root_that_is_no_folder_is_an_error(coco, tmp_path):
    assert fails(coco, image_root=tmp_path / "nowhere").endswith("nowhere is no folder")


def test_a_missing_relative_path_is_said_with_where_it_begins(coco):
    def change(content):
        content["images"][4]["path"] = "video_001/frame_999.png"

    message = fails(edit(coco, change))
    assert f"frame_999.png: no such file; relative paths begin at {coco.parent}" in message


def test_backslashes_are_folders_and_told(coco):
    dataset = load(set_paths(coco, lambda name: name.replace("/", "\\")))
    assert names(dataset)[0] == "frame_000.png"
    assert dataset.warnings == [
        "image 1, image 2, image 3 and 3 more: backslashes in the path; read as folders"
    ]


def test_names_with_spaces_and_other_alphabets(coco, tmp_path):
    folder = tmp_path / "vidéo 測試 😀"
    (tmp_path / "video_001").rename(folder)
    path = set_paths(coco, lambda name: f"{folder.name}/{Path(name).name}")
    assert load(path)[0].masks.any()


@pytest.mark.parametrize(
    "prefix",
    [
        "..\\..\\label-studio\\media\\upload\\4\\",
        "/data/upload/1/",
        "/data/upload/1/abcd-",
        "/data/upload/1/0f3a9c21-",
        "C:\\clips\\",
        "upload/4/",
        "/data/local-files/?d=",
        "/data/local-files/?d=clips/",
    ],
)
@pytest.mark.parametrize("space", ["_", " ", "%20"])
def test_paths_of_an_upload_are_found_under_image_root(coco, tmp_path, prefix, space):
    frames = tmp_path / "video_001"
    for file in frames.iterdir():
        file.rename(frames / file.name.replace("_", space.replace("%20", " ")))

    path = set_paths(
        coco, lambda name: prefix + Path(name).name.replace("_", space), key="file_name"
    )
    dataset = load(path, image_root=frames)
    assert len(dataset.videos[0].frames) == 6
    assert dataset[0].masks.any()
    assert any("the end of the path" in line or "?d=" in line for line in dataset.warnings)
    assert "image_root" in fails(path)


def test_a_name_is_taken_as_it_is_written_first(coco, tmp_path):
    for t in range(6):
        shutil.copy(tmp_path / f"video_001/frame_{t:03d}.png", tmp_path / f"a%20{t}.png")
    make_frames(tmp_path, [f"a {t}.png" for t in range(6)])
    dataset = load(set_paths(coco, lambda name: f"a%20{int(name[-7:-4])}.png"))
    assert names(dataset)[0] == "a%200.png"
    assert dataset.warnings == []


def test_frames_in_a_usual_folder_beside_the_file_keep_their_folders(tmp_path):
    path = make_coco(tmp_path, num_videos=2)
    (tmp_path / "JPEGImages/train").mkdir(parents=True)
    for video in ("video_001", "video_002"):
        (tmp_path / video).rename(tmp_path / "JPEGImages/train" / video)
    dataset = load(set_paths(path, lambda name: f"train/{name}", "file_name"))
    assert dataset.videos[1].frames[0].path == (
        tmp_path / "JPEGImages/train/video_002/frame_000.png"
    )


def test_a_relative_path_to_the_file_itself_is_no_reason_to_warn(coco, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(Path("..") / coco.name).warnings == []
    up = set_paths(coco, lambda name: f"video_001/../{name}")
    assert "`..` in the path" in load(Path("..") / up.name).warnings[0]


@pytest.mark.parametrize("name", [None, 7, "", ["a.png"]])
def test_an_image_without_a_path_is_an_error(coco, name):
    def change(content):
        content["images"][1]["path"] = name

    assert "image 2: `path` (or `file_name`) is missing or no text" in fails(edit(coco, change))
