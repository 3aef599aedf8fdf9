import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import SIZE, edit, encode, load, make_coco, make_frames
from PIL import Image
from rich.console import Console
from test_data_pictures import write_film
from test_data_sav import write_json
from test_data_vos import make_vos

from sam2train import cli, data_report, data_source
from sam2train.config import build
from sam2train.data_pictures import read_image as whole
from sam2train.data_report import check_data, shared_split_warning
from sam2train.datasets import DatasetConfig


def check(path, kind="coco", **keys):
    """The report on an experiment that trains on a path, with clips of 4 frames."""
    keys = {name: str(value) if name.endswith("path") else value for name, value in keys.items()}
    raw = {"dataset_type": kind, "data_path": str(path), "video_clip_length": 4} | keys
    return check_data(build(DatasetConfig, raw, "dataset"))


def training(report):
    json.loads(report.to_json())
    return report.splits["training"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("kind", ["coco", "vos"])
def test_a_path_of_two_splits_is_read_once(tmp_path, monkeypatch, kind):
    """Indexed once, and each picture is decoded once."""
    path = make_coco(tmp_path) if kind == "coco" else make_vos(tmp_path)
    path = path if kind == "coco" else tmp_path
    opened = []
    monkeypatch.setattr(
        data_source, "read_image", lambda path, *rest: (opened.append(path), whole(path, *rest))[1]
    )
    alone = check(path, kind)
    once = sorted(opened)
    opened.clear()
    both = check(path, kind, val_path=path, test_path=path)
    assert sorted(opened) == once
    assert len(once) == len({*once}) > 0
    assert both.splits["test"].statistics == training(alone).statistics
    assert "pictures of validation are also in training" in " ".join(both.errors)


# Statistics


def test_figures_by_hand(tmp_path):
    path = make_coco(tmp_path, num_videos=2, absent={(2, 0, 1), (2, 1, 1), (2, 5, 1)})
    report = check(path)
    assert (report.verdict, report.exit_code) == ("ok", 0)
    found = training(report).statistics
    # A rectangle of `moving_masks` is 16 wide and 22 high, in a frame of 64 x 48.
    share = round(16 * 22 / (64 * 48), 6)
    assert found == {
        "videos": 2,
        "frames": 12,
        "labelled_frames": 12,
        "labelled_frames_of_a_video": dict.fromkeys(["min", "p05", "median", "p95", "max"], 6),
        "videos_shorter_than_a_clip": 0,
        "frame_sizes": ["64x48"],
        "objects": 4,
        "masks": 21,
        "share_of_absent_frames": 0.125,
        "mask_area_as_share_of_frame": dict.fromkeys(["min", "p05", "median", "p95", "max"], share),
    }


def test_unlabelled_frames_are_counted_apart(tmp_path):
    found = training(check(make_vos(tmp_path, every=2), "vos")).statistics
    assert (found["frames"], found["labelled_frames"], found["masks"]) == (12, 6, 12)
    assert found["videos_shorter_than_a_clip"] == 2


def test_made_up_objects_have_no_figures(tmp_path):
    make_frames(tmp_path / "a", [f"{t}.png" for t in range(5)])
    report = check(tmp_path, "video")
    assert report.verdict == "ok"
    found = training(report).statistics
    assert (found["frames"], found["objects"], found["masks"]) == (5, 0, 0)
    assert found["share_of_absent_frames"] is found["mask_area_as_share_of_frame"] is None


# When objects show


def test_masks_and_presence(tmp_path):
    # Object 1 is always there, 2 appears late and vanishes, 3 goes and comes back.
    absent = [(1, 0, 2), (1, 5, 2), (1, 2, 3)]
    videos = load(make_coco(tmp_path, num_objects=3, absent=absent)).videos
    masks = data_report.mask_table(videos)
    assert len(masks) == 18
    assert masks.loc[masks["area"] == 0, ["object_id", "frame"]].values.tolist() == [
        ["2", 0],
        ["3", 2],
        ["2", 5],
    ]
    assert masks["area"].max() == pytest.approx(14 * 16 / (48 * 64))
    counts = {"objects": 3, "late": 1, "vanish": 2, "return": 1}
    assert data_report.presence_counts(masks) == counts
    text = data_report.presence_text(masks)
    assert "Of 3 objects, 1 appear after the first frame, 2 vanish, and 1 of these" in text
    assert "Half of the masks cover less than 7.3% of" in text


# Errors


def test_all_broken_files_are_found_together(tmp_path):
    """Headers and pixels, in one report, where the message of a run stops at twelve."""
    path = make_coco(tmp_path, num_videos=2, num_frames=20)
    for t in range(16):
        cut(tmp_path / "video_001" / f"frame_{t:03d}.png")
    (tmp_path / "video_002" / "frame_003.png").unlink()
    (tmp_path / "video_002" / "frame_004.png").write_bytes(b"<html>")

    def change(content):
        content["annotations"][-1]["segmentation"]["counts"] = "@"

    report = check(edit(path, change))
    assert (report.verdict, report.exit_code) == ("error", 2)
    errors = training(report).errors
    assert len(errors) == 16 + 2 + 1
    assert sum("cut short" in error for error in errors) == 16
    assert sum("no such file" in error for error in errors) == 1
    assert sum("HTML page" in error for error in errors) == 1
    assert sum("segmentation: the run lengths" in error for error in errors) == 1
    assert training(report).statistics["frames"] == 38


@pytest.mark.parametrize("part", ["Annotations", "JPEGImages"])
def test_broken_files_of_folders(tmp_path, part):
    make_vos(tmp_path)
    cut(tmp_path / part / "bear" / "00002.png")
    (error,) = training(check(tmp_path, "vos")).errors
    assert "00002.png: is damaged or cut short" in error


def test_a_film_is_read_to_its_end(tmp_path):
    write_json(tmp_path / "sav_1_manual.json")
    write_film(tmp_path / "sav_1.mp4")
    report = check(tmp_path, "sav", video_clip_length=2)
    assert report.verdict == "ok"
    assert training(report).statistics["labelled_frames"] == 3
    film = tmp_path / "sav_1.mp4"
    content = bytearray(film.read_bytes())
    place = content.index(b"mdat") + 4
    half = place + (content.index(b"moov") - place) // 2
    content[half : content.index(b"moov")] = bytes(content.index(b"moov") - half)
    film.write_bytes(bytes(content))
    report = check(tmp_path, "sav", video_clip_length=2)
    assert any("sav_1.mp4: ends or is damaged" in error for error in training(report).errors)


def test_a_path_that_is_not_there_is_one_error(tmp_path):
    good = make_coco(tmp_path)
    report = check(good, val_path=tmp_path / "nowhere.json", test_path=tmp_path)
    assert report.verdict == "error"
    assert not training(report).errors
    assert "no such file" in report.splits["validation"].errors[0]
    assert "is a folder" in report.splits["test"].errors[0]


# Oddities


def test_objects_that_hardly_show_and_short_videos(tmp_path):
    path = make_coco(tmp_path, num_frames=3, absent={(1, 1, 2), (1, 2, 2)})

    def change(content):
        empty = encode(np.zeros(SIZE, bool))
        third = {"id": 99, "image_id": 1, "track_id": 3, "segmentation": empty}
        content["annotations"].append(third)

    report = check(edit(path, change))
    assert (report.verdict, report.exit_code) == ("warning", 0)
    warnings = "\n".join(training(report).warnings)
    assert "1 x on a single frame: nothing to track: object 2 of video 1" in warnings
    assert "1 x annotated, but never with a pixel: object 3 of video 1" in warnings
    assert "1 x fewer labelled frames than dataset.video_clip_length (4)" in warnings
    assert "1 annotations have no pixel" in warnings


def test_copies_within_a_split(tmp_path):
    make_frames(tmp_path / "a", [f"{t}.png" for t in range(5)])
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "a" / "3.png")
    (warning,) = training(check(tmp_path, "video")).warnings
    a = tmp_path / "a"
    assert warning == f"1 frames are copies of others: {a / '3.png'} = {a / '1.png'}"


def test_one_file_for_two_frames(tmp_path):
    path = make_coco(tmp_path)

    def change(content):
        content["images"][4]["path"] = content["images"][2]["path"]

    (warning,) = training(check(edit(path, change))).warnings
    assert warning == "1 frames are files that are used more than once"


# Between the splits


def recolour(folder):
    """Other pictures with the same names."""
    for path in folder.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path)


def test_pictures_of_training_in_validation_are_an_error(tmp_path):
    path = make_coco(tmp_path / "a")
    same = check(path, val_path=path)
    assert (same.verdict, same.exit_code) == ("error", 2)
    (error,) = same.errors
    assert error.startswith("6 pictures of validation are also in training: ")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = check(path, test_path=tmp_path / "b" / "annotations.json")
    assert copied.errors[0].startswith("6 pictures of test are also in training: ")
    recolour(tmp_path / "b")
    other = check(path, val_path=tmp_path / "b" / "annotations.json")
    assert (other.verdict, other.errors, other.warnings) == ("ok", [], [])


def test_videos_of_one_name_with_other_pictures_are_a_warning(tmp_path):
    make_vos(tmp_path / "a")
    make_vos(tmp_path / "b", names=["swan", "wolf"])
    recolour(tmp_path / "b" / "JPEGImages")
    report = check(tmp_path / "a", "vos", val_path=tmp_path / "b")
    assert report.verdict == "warning"
    assert "training and validation have videos of the same names (swan)" in report.warnings[0]


# The command


def test_the_command_prints_a_report_or_one_json_document(tmp_path, capsys):
    path = make_coco(tmp_path)
    cut(tmp_path / "video_001" / "frame_002.png")
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"dataset:\n  data_path: {path}\n  val_path: {path}\n")
    assert cli.main([str(experiment), "--check-data", "--json"]) == 2
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == ""
    assert list(report) == ["verdict", "splits", "errors", "warnings"]
    assert "frame_002.png" in report["splits"]["training"]["errors"][0]
    assert cli.main([str(experiment), "--check-data"]) == 2
    printed = capsys.readouterr().out
    assert "labelled frames" in printed
    assert "frame_002.png: is damaged or cut short" in printed
    assert "this data needs a repair" in printed
    assert cli.main([str(experiment), "--json"]) == 2
    assert "--check-data" in capsys.readouterr().err


def test_a_long_list_is_cut_for_people_alone(tmp_path):
    path = make_coco(tmp_path, num_frames=50)
    for t in range(50):
        cut(tmp_path / "video_001" / f"frame_{t:03d}.png")
    report = check(path)
    console = Console(width=300, record=True, file=io.StringIO())
    report.show(console)
    shown = console.export_text()
    assert shown.count("error:") == 40
    assert "and 10 more of these; --json lists all" in shown
    assert report.to_json().count("cut short") == 50


def test_one_split_for_both_is_warned_of():
    build = partial(DatasetConfig, data_path="train.json", val_path="a/val.json")
    assert shared_split_warning(build(test_path=None)) is None
    assert shared_split_warning(build(test_path="a/test.json")) is None
    assert "too high" in shared_split_warning(build(test_path="a/../a/val.json"))
