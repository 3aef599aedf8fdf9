"""`--predict`: what the scored tracker finds for a user's prompts, and the files of it."""

import csv
import json
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import make_coco
from PIL import Image
from small_run import CONFIG, fails

from sam2train import cli
from sam2train.clips import empty_prompt
from sam2train.data_source import Frame, Video
from sam2train.datasets import COCODataset
from sam2train.errors import UserError
from sam2train.evaluate import TrackedFrame
from sam2train.predict import (
    Footage,
    GivenPrompt,
    Written,
    make_prompts,
    parse_prompt,
    read_prompts,
)
from sam2train.pretrained import build_sam2, resolve_config
from sam2train.prompts import mask_to_box
from sam2train.run_folder import RunFolder

SIDE = 64


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with small.yaml, a video of 6 frames whose object 2 comes late, and weights that
    call objects present."""
    root = tmp_path_factory.mktemp("own")
    data = make_coco(root / "data", size=(SIDE, SIDE), absent=[(1, 0, 2), (1, 1, 2)])
    torch.manual_seed(0)
    sam2 = build_sam2(resolve_config(CONFIG), image_size=SIDE, num_maskmem=3)
    with torch.no_grad():
        sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    torch.save({"model": sam2.state_dict()}, root / "w.pt")
    (root / "small.yaml").write_text(
        f"""\
dataset: {{data_path: "{data}", val_path: "{data}", image_size: [64, 64], prompt_types: [bbox]}}
model: {{checkpoint_path: "{root / "w.pt"}", config_path: {CONFIG}, image_size: 64, num_maskmem: 3}}
features: {{folder: "{root / "features"}"}}
trainer: {{device: cpu}}
tracking: {{mode: disabled}}
"""
    )
    return root


def run(own, source, *words) -> None:
    assert cli.main([str(own / "small.yaml"), "--predict", str(source), *map(str, words)]) == 0


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def predicted(own, tmp_path_factory):
    """The folder of a prediction from the boxes that evaluation draws."""
    data = COCODataset(own / "data" / "annotations.json", (SIDE, SIDE))
    words = []
    for object_id, t in ((1, 0), (2, 2)):
        box = mask_to_box(data.read_mask(data.videos[0], t, object_id)).astype(int)
        words += ["--prompt", f"{object_id}: box {' '.join(map(str, box))} @{t}"]
    out = tmp_path_factory.mktemp("predicted") / "out"
    run(own, own / "data" / "video_001", *words, "--run-dir", out)
    return out


def test_masks_are_those_that_evaluation_scores(own, predicted, tmp_path):
    """Bit for bit, for the same prompts: it is the same tracker."""
    words = ("--evaluate", "base", "--run-dir", tmp_path / "e", "--save-masks", tmp_path / "masks")
    assert cli.main([str(own / "small.yaml"), *map(str, words)]) == 0
    scored, found = pictures(tmp_path / "masks" / "1"), pictures(predicted / "masks" / "video_001")
    assert set(np.unique(found)) == {0, 1, 2}
    assert (found == scored).all()
    assert not (found[:2] == 2).any()
    with Image.open(next((predicted / "masks" / "video_001").iterdir())) as picture:
        assert picture.mode == "P"


def test_the_coco_file_is_read_back(predicted):
    data = COCODataset(predicted / "predictions.json", (SIDE, SIDE))
    (video,) = data.videos
    found = pictures(predicted / "masks" / "video_001")
    assert video.labelled == list(range(6))
    for t, object_id in ((t, o) for t in range(6) for o in (1, 2)):
        assert (data.read_mask(video, t, object_id) == (found[t] == object_id)).all()


def test_scores_of_every_frame(predicted):
    rows = table(predicted / "scores.csv")
    found = pictures(predicted / "masks" / "video_001")
    assert [(r["frame"], r["object_id"]) for r in rows if r["prompted"] == "1"] == [
        ("0", "1"),
        ("2", "2"),
    ]
    assert len(rows) == 6 + 4
    for row in rows:
        t, number = int(row["frame"]), int(row["object_id"])
        assert int(row["area"]) == (found[t] == number).sum()
        assert row["name"] == f"frame_{t:03d}"
        assert 0 <= float(row["predicted_iou"]) <= 1
        assert float(row["object_score"]) > 0


def test_the_overlay_and_the_prompts_again(own, predicted, tmp_path):
    film = cv2.VideoCapture(str(predicted / "overlay.mp4"))
    frames = []
    while (read := film.read())[0]:
        frames.append(read[1])
    assert len(frames) == 6
    assert frames[0].shape == (320, 320, 3)
    out = tmp_path / "again"
    words = ("--prompts", predicted / "prompts.json", "--run-dir", out)
    run(own, own / "data" / "video_001", *words)
    assert (pictures(out / "masks/video_001") == pictures(predicted / "masks/video_001")).all()
    assert not list(out.glob(".*"))  # nothing half written


@pytest.mark.parametrize("kind", ["film", "stack"])
def test_films_and_stacks(own, tmp_path, kind, capsys):
    """Their frames are written, too, so that the COCO file can be read; a mask prompt, an object
    with a name, and one that is prompted on two frames."""
    rng = np.random.default_rng(0)
    frames = [cv2.resize(rng.integers(0, 255, (4, 6, 3), np.uint8), (96, 48)) for _ in range(5)]
    if kind == "film":
        source = tmp_path / "cars.avi"
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 12, (96, 48))
        for frame in frames:
            writer.write(frame)
        writer.release()
    else:
        source = tmp_path / "cells.tif"
        pages = [Image.fromarray(frame) for frame in frames]
        pages[0].save(source, save_all=True, append_images=pages[1:])
    mask = np.zeros((48, 96), np.uint8)
    mask[10:30, 20:50], mask[:5, :5] = 7, 3  # of two objects
    Image.fromarray(mask).save(tmp_path / "first.png")
    entries = [
        {"object": 7, "mask": "first.png"},
        {"object": "left car", "frame": 1, "points": [[70, 20], [5, 40]], "labels": [1, 0]},
        {"object": "left car", "frame": 3, "box": [60, 10, 90, 30]},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    run(own, source, "--prompts", tmp_path / "prompts.json", "--run-dir", out)
    assert "5 frames with the weights of" in capsys.readouterr().out
    data = COCODataset(out / "predictions.json", (SIDE, SIDE))
    (video,) = data.videos
    assert set(video.object_ids) == {"7", "left car"}
    assert video.size == (48, 96)
    expected = frames[2][..., ::-1] if kind == "film" else frames[2]
    assert np.abs(data.read_frame(video, 2).astype(int) - expected).mean() < 8
    rows = table(out / "scores.csv")
    assert [r["frame"] for r in rows if r["object_id"] == "left car" and r["prompted"] == "1"] == [
        "1",
        "3",
    ]
    assert json.loads((out / "masks" / "objects.json").read_text()) == {
        source.stem: {"1": "7", "2": "left car"}
    }
    first = data.read_mask(video, 0, "7")  # SAM 2 gives a mask prompt back
    assert (first & (mask == 7)).sum() / (first | (mask == 7)).sum() > 0.8


def test_nothing_of_a_frame_is_kept_once_it_is_written(tmp_path):
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "0.png")
    footage = Footage(tmp_path, (SIDE, SIDE))
    video = Video("long", (60, 80), [Frame(tmp_path / "0.png", {})] * 35, [1, 2])
    held = {}
    tracemalloc.start()
    with Written(RunFolder(tmp_path / "out"), footage, video, [empty_prompt(1, 0)]) as written:
        for t in range(35):
            masks = {o: np.zeros((60, 80), bool) for o in (1, 2)}
            masks[1][: t + 5] = True
            written.add(t, TrackedFrame(masks, {1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}))
            written.film.encoded.result()
            held[t] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # The masks of 30 frames would be 290,000 bytes, the pictures 430,000.
    assert held[34] < held[4] + 100_000


# -- prompts


def test_words_of_a_prompt():
    box = parse_prompt(" 1 : box 10 20 80.5 90 @3")
    assert box == GivenPrompt(object=1, frame=3, box=(10, 20, 80.5, 90))
    clicks = parse_prompt("red car: point 1 2 point 3 4 - point 5 6 + box 0 0 9 9")
    assert (clicks.object, clicks.frame, clicks.labels) == ("red car", 0, (1, 0, 1))
    assert clicks.points == ((1, 2), (3, 4), (5, 6))
    assert clicks.box == (0, 0, 9, 9)
    mask = parse_prompt(r"2: mask C:\my masks\a@b.png @7")
    assert (mask.mask, mask.frame) == (r"C:\my masks\a@b.png", 7)
    assert parse_prompt("2: mask a@b.png").mask == "a@b.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("box 1 2 3 4", "no object before a colon"),
        ("1: box 1 2 3", "box takes 4 numbers"),
        ("1: point 1 x", "point takes 2 numbers"),
        ("1: circle 1 2 3", "'circle' is no kind of prompt"),
        ("1: box 1 2 3 4 @last", "@last names no frame"),
        ("1: mask @2", "no file after mask"),
        ("1: box 1 2 3 4 box 1 2 3 4", "two boxes"),
        ("1: @2", "give a box, points, or both, or else a mask"),
        ("1:", "give a box"),
    ],
)
def test_words_that_are_no_prompt(text, message):
    with pytest.raises(UserError, match="--prompt") as caught:
        parse_prompt(text)
    assert message in str(caught.value)


def test_files_that_are_no_prompts(tmp_path):
    path = tmp_path / "p.json"
    for content, message in (
        ("{}", "expected a list of prompts"),
        ("[1]", "expected a list of prompts"),
        ('[{"object": 1, "bxo": [1, 2, 3, 4]}]', "did you mean `box`"),
        ('[{"object": 1, "box": [1, 2, 3]}]', "box"),
        ('[{"object": 1, "points": [[1, 2]], "labels": [1, 1]}]', "2 labels for 1 points"),
        ('[{"object": 1, "frame": -1, "box": [1, 2, 3, 4]}]', "frame"),
    ):
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            read_prompts([], path)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="no object to track"):
        read_prompts([], None)


def test_prompts_that_do_not_fit_the_video_are_told_together(tmp_path):
    Image.new("L", (8, 8), 1).save(tmp_path / "small.png")
    Image.new("L", (40, 30), 0).save(tmp_path / "empty.png")
    two = np.zeros((30, 40), np.uint8)
    two[:15], two[15:] = 4, 5
    Image.fromarray(two).save(tmp_path / "two.png")
    video = Video("v", (30, 40), [Frame(Path("x.png"), {})] * 5, [])
    texts = [
        "1: box 1 2 30 40 @0",
        "1: point 5 5 @9",
        "2: box 9 9 3 12",
        "3: point 4 4",
        "3: point 5 5",
        *(f"{6 + k}: mask {tmp_path}/{name}.png" for k, name in enumerate(("small", "empty"))),
        f"8: mask {tmp_path}/two.png",
        f"9: mask {tmp_path}/none.png",
    ]
    with pytest.raises(UserError) as caught:
        make_prompts(read_prompts(texts, None), video, SIDE)
    lines = str(caught.value).splitlines()
    expected = (
        "(30, 40) lies outside of the video, 40x30",
        "frame 9 of a video with the frames 0 to 4",
        "the box is empty",
        "object 3 has a prompt on frame 0 already",
        "the mask is 8x8, the video 40x30",
        "the mask is empty",
        "holds the values 4, 5",
        "none.png: no such file",
    )
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith('--prompt "')
        assert text in line
    (prompt,) = make_prompts(read_prompts(["4: mask " + str(tmp_path / "two.png")], None), video, 8)
    assert prompt["mask"].tolist() == [[True] * 8] * 4 + [[False] * 8] * 4
    (prompt,) = make_prompts(read_prompts(["4: box 10 15 20 30 point 20 15 -"], None), video, 80)
    assert prompt["box"].tolist() == [20, 40, 40, 80]
    assert prompt["points"].tolist() == [[20, 40], [40, 80], [40, 40]]
    assert prompt["labels"].tolist() == [2, 3, 0]
    many = [f"{k}: point 1 1" for k in range(256)]
    with pytest.raises(UserError, match="256 objects; a palette PNG holds 255"):
        make_prompts(read_prompts(many, None), video, SIDE)


# -- mistakes on the command line


def test_mistakes(own, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [own / "small.yaml", "--predict"]
    prompt = ["--prompt", "1: box 1 2 30 40"]
    video = own / "data" / "video_001"
    assert "no such folder" in fails(capsys, *words, tmp_path / "none.mp4", *prompt)
    (tmp_path / "text.mp4").write_text("no film")
    assert "is no film that OpenCV can read" in fails(capsys, *words, "text.mp4", *prompt)
    for name in ("one", "two"):
        make_coco(tmp_path / "many" / name, num_frames=2)
        (tmp_path / "many" / name / "video_001").rename(tmp_path / "many" / f"v_{name}")
    assert "holds 2 videos (v_one, v_two); name one" in fails(capsys, *words, "many", *prompt)
    assert "no object to track" in fails(capsys, *words, video)
    assert "expected a run, a checkpoint" in fails(
        capsys, *words, video, *prompt, "--weights", tmp_path
    )
    assert "no such checkpoint" in fails(capsys, *words, video, *prompt, "--weights", "no.pt")
    assert "there is something already" in fails(
        capsys, *words, video, *prompt, "--run-dir", tmp_path
    )
    assert not (tmp_path / "runs").exists()  # no mistake leaves a folder
