"""The generated data set: same bytes twice, exact masks, events that take place, repair on disk."""

import dataclasses
import json
import os
import threading
import time

import numpy as np
import pytest
from test_demo_videos import read

from sam2train import demo, demo_videos
from sam2train.errors import UserError

# pycocotools 2 decodes without the `copy` keyword that NumPy 2 asks of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TINY = dataclasses.replace(demo.SPLITS["stills"], num_videos=2, num_frames=3)


@pytest.fixture
def stills_path(tmp_path, monkeypatch):
    """A path below a fresh root, with a split small enough to draw many times."""
    monkeypatch.setitem(demo.SPLITS, "stills", TINY)
    return tmp_path / "demo" / "stills" / "annotations.json"


def count_generations(monkeypatch):
    calls, generate = [], demo.generate

    def counting(split, folder):
        calls.append(folder)
        generate(split, folder)

    monkeypatch.setattr(demo, "generate", counting)
    return calls


def test_same_split_same_bytes_other_seed_other_bytes(tmp_path):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        demo.generate(dataclasses.replace(TINY, seed=seed), tmp_path / name)
        digests.append(demo.digest(tmp_path / name))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_splits_as_published():
    assert {name: (split.num_videos, split.num_frames) for name, split in demo.SPLITS.items()} == {
        "stills": (4000, 1),
        "clips": (400, 22),
        "scenes": (400, 24),
        "train": (60, 24),
        "val": (16, 24),
        "test": (48, 24),
    }
    assert len({split.seed for split in demo.SPLITS.values()}) == len(demo.SPLITS)
    knobs = [dataclasses.astuple(demo.SPLITS[name])[2:] for name in ("train", "val", "test")]
    assert knobs[0] == knobs[1] == knobs[2]  # the same difficulty
    assert set(demo.DIGESTS) == set(demo.SPLITS)


def test_the_validation_videos_are_those_that_were_published(tmp_path):
    path = demo.ensure(tmp_path / "demo/val/annotations.json")
    assert demo.matches_recorded(path)
    content = json.loads(path.read_text())
    objects = {(a["image_id"] // 24, a["track_id"]) for a in content["annotations"]}
    assert len(objects) >= 60


def test_splits_share_no_picture():
    firsts = [demo_videos.make_video(split, 0)[0][0] for split in demo.SPLITS.values()]
    for i, a in enumerate(firsts):
        for b in firsts[:i]:
            assert np.abs(a.astype(int) - b).mean() > 5


def test_is_demo_path(tmp_path):
    assert demo.is_demo_path("data/demo/stills/annotations.json")
    assert demo.is_demo_path(tmp_path / "demo/val/annotations.json")
    for path in ("demo/all/annotations.json", "demo/val", "x/val/annotations.json", "", "demo"):
        assert not demo.is_demo_path(path)


def test_ensure_generates_once_and_leaves_nothing_else(stills_path, monkeypatch):
    calls = count_generations(monkeypatch)
    assert demo.ensure(str(stills_path)) == stills_path
    assert len(read(stills_path.parent)) == 2
    assert sorted(os.listdir(stills_path.parent)) == [
        "annotations.json",
        "attributes.csv",
        "manifest.json",
        "video_data",
    ]
    assert os.listdir(stills_path.parents[1]) == ["stills"]
    demo.ensure(stills_path)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "damage", ["byte", "missing", "extra", "json", "attributes", "manifest", "recipe"]
)
def test_ensure_repairs(stills_path, monkeypatch, damage):
    demo.ensure(stills_path)
    before = demo.digest(stills_path.parent)
    frame = stills_path.parent / "video_data/video_002/frame_003.jpg"
    if damage == "byte":
        content = bytearray(frame.read_bytes())
        content[-20] ^= 1
        frame.write_bytes(content)
    elif damage == "missing":
        frame.unlink()
    elif damage == "extra":
        frame.with_name("frame_004.jpg").write_bytes(frame.read_bytes())
    elif damage == "json":
        stills_path.write_text(stills_path.read_text()[:-5])
    elif damage == "attributes":
        stills_path.with_name("attributes.csv").unlink()
    elif damage == "manifest":
        stills_path.with_name("manifest.json").write_text("[]")
    else:
        monkeypatch.setitem(demo.SPLITS, "stills", dataclasses.replace(TINY, seed=5))
    calls = count_generations(monkeypatch)
    demo.ensure(stills_path)
    assert len(calls) == 1
    assert (demo.digest(stills_path.parent) == before) == (damage != "recipe")
    assert os.listdir(stills_path.parents[1]) == ["stills"]


@pytest.mark.parametrize("present", [False, True])
def test_an_interrupted_generation_changes_nothing(stills_path, monkeypatch, present):
    if present:
        demo.ensure(stills_path)
        stills_path.write_text("damaged")
    make_video = demo.make_video

    def interrupted(split, video_index):
        if video_index == 1:
            raise KeyboardInterrupt
        return make_video(split, video_index)

    monkeypatch.setattr(demo, "make_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure(stills_path)
    assert os.listdir(stills_path.parents[1]) == (["stills"] if present else [])
    if present:
        assert stills_path.read_text() == "damaged"


def test_what_a_killed_process_left_is_removed_after_an_hour(stills_path):
    root = stills_path.parents[1]
    for name, age in ((".stills-old", 3700), (".stills-new", 60)):
        (root / name / "new").mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    demo.ensure(stills_path)
    assert sorted(os.listdir(root)) == [".stills-new", "stills"]


def test_several_at_once_end_with_one_whole_split(stills_path):
    errors = []

    def work():
        try:
            demo.ensure(stills_path)
            assert demo.is_intact(stills_path, TINY)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(stills_path.parents[1]) == ["stills"]


def test_a_split_that_another_process_finished_meanwhile_stays(stills_path, monkeypatch):
    generate, inodes = demo.generate, []

    def slow(split, folder):
        generate(split, folder)
        if not inodes:
            inodes.append(0)
            demo.ensure(stills_path)  # the other process
            inodes[0] = stills_path.stat().st_ino

    monkeypatch.setattr(demo, "generate", slow)
    demo.ensure(stills_path)
    assert stills_path.stat().st_ino == inodes[0]


def test_matches_recorded(stills_path, monkeypatch):
    demo.ensure(stills_path)
    assert not demo.matches_recorded(stills_path)  # the digest is that of the full split
    monkeypatch.setitem(demo.DIGESTS, "stills", demo.digest(stills_path.parent))
    assert demo.matches_recorded(str(stills_path))


def test_errors_of_the_user(tmp_path, stills_path):
    with pytest.raises(
        UserError, match=r"demo/all/annotations\.json.*stills, clips, scenes, train"
    ):
        demo.ensure(tmp_path / "demo/all/annotations.json")
    (tmp_path / "demo").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"demo.stills: .*cannot be written.*make room"):
        demo.ensure(stills_path)
