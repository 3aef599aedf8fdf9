"""The generated data set: same bytes twice, exact masks, events that take place, repair on disk."""

import dataclasses
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

TINY = dataclasses.replace(demo.SPLITS["easy"], num_videos=2, num_frames=3)


@pytest.fixture
def easy_path(tmp_path, monkeypatch):
    """A path below a fresh root, with a split small enough to draw many times."""
    monkeypatch.setitem(demo.SPLITS, "easy", TINY)
    return tmp_path / "demo" / "easy" / "annotations.json"


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
        "easy": (2400, 6),
        "motion": (600, 6),
        "train": (48, 24),
        "val": (12, 24),
        "test": (12, 24),
        "absence": (20, 32),
        "fresh": (96, 24),
    }
    assert len({split.seed for split in demo.SPLITS.values()}) == len(demo.SPLITS)
    knobs = [dataclasses.astuple(demo.SPLITS[name])[2:] for name in ("train", "val", "test")]
    assert knobs[0] == knobs[1] == knobs[2]  # the same difficulty
    assert dataclasses.astuple(demo.SPLITS["fresh"])[2:] == knobs[0]
    assert set(demo.DIGESTS) == set(demo.SPLITS)


def test_splits_share_no_picture():
    firsts = [demo_videos.make_video(split, 0)[0][0] for split in demo.SPLITS.values()]
    for i, a in enumerate(firsts):
        for b in firsts[:i]:
            assert np.abs(a.astype(int) - b).mean() > 5


def test_is_demo_path(tmp_path):
    assert demo.is_demo_path("data/demo/easy/annotations.json")
    assert demo.is_demo_path(tmp_path / "demo/val/annotations.json")
    for path in ("demo/all/annotations.json", "demo/val", "x/val/annotations.json", "", "demo"):
        assert not demo.is_demo_path(path)


def test_ensure_generates_once_and_leaves_nothing_else(easy_path, monkeypatch):
    calls = count_generations(monkeypatch)
    assert demo.ensure(str(easy_path)) == easy_path
    assert len(read(easy_path.parent)[1]) == 2
    assert sorted(os.listdir(easy_path.parent)) == [
        "annotations.json",
        "manifest.json",
        "video_data",
    ]
    assert os.listdir(easy_path.parents[1]) == ["easy"]
    demo.ensure(easy_path)
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["byte", "missing", "extra", "json", "manifest", "recipe"])
def test_ensure_repairs(easy_path, monkeypatch, damage):
    demo.ensure(easy_path)
    before = demo.digest(easy_path.parent)
    frame = easy_path.parent / "video_data/video_002/frame_003.jpg"
    if damage == "byte":
        content = bytearray(frame.read_bytes())
        content[-20] ^= 1
        frame.write_bytes(content)
    elif damage == "missing":
        frame.unlink()
    elif damage == "extra":
        frame.with_name("frame_004.jpg").write_bytes(frame.read_bytes())
    elif damage == "json":
        easy_path.write_text(easy_path.read_text()[:-5])
    elif damage == "manifest":
        easy_path.with_name("manifest.json").write_text("[]")
    else:
        monkeypatch.setitem(demo.SPLITS, "easy", dataclasses.replace(TINY, seed=5))
    calls = count_generations(monkeypatch)
    demo.ensure(easy_path)
    assert len(calls) == 1
    assert (demo.digest(easy_path.parent) == before) == (damage != "recipe")
    assert os.listdir(easy_path.parents[1]) == ["easy"]


@pytest.mark.parametrize("present", [False, True])
def test_an_interrupted_generation_changes_nothing(easy_path, monkeypatch, present):
    if present:
        demo.ensure(easy_path)
        easy_path.write_text("damaged")
    make_video = demo.make_video

    def interrupted(split, video_index):
        if video_index == 1:
            raise KeyboardInterrupt
        return make_video(split, video_index)

    monkeypatch.setattr(demo, "make_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure(easy_path)
    assert os.listdir(easy_path.parents[1]) == (["easy"] if present else [])
    if present:
        assert easy_path.read_text() == "damaged"


def test_what_a_killed_process_left_is_removed_after_an_hour(easy_path):
    root = easy_path.parents[1]
    for name, age in ((".easy-old", 3700), (".easy-new", 60)):
        (root / name / "new").mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    demo.ensure(easy_path)
    assert sorted(os.listdir(root)) == [".easy-new", "easy"]


def test_several_at_once_end_with_one_whole_split(easy_path):
    errors = []

    def work():
        try:
            demo.ensure(easy_path)
            assert demo.is_intact(easy_path, TINY)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(easy_path.parents[1]) == ["easy"]


def test_a_split_that_another_process_finished_meanwhile_stays(easy_path, monkeypatch):
    generate, inodes = demo.generate, []

    def slow(split, folder):
        generate(split, folder)
        if not inodes:
            inodes.append(0)
            demo.ensure(easy_path)  # the other process
            inodes[0] = easy_path.stat().st_ino

    monkeypatch.setattr(demo, "generate", slow)
    demo.ensure(easy_path)
    assert easy_path.stat().st_ino == inodes[0]


def test_matches_recorded(easy_path, monkeypatch):
    demo.ensure(easy_path)
    assert not demo.matches_recorded(easy_path)  # the digest is that of the full split
    monkeypatch.setitem(demo.DIGESTS, "easy", demo.digest(easy_path.parent))
    assert demo.matches_recorded(str(easy_path))


def test_errors_of_the_user(tmp_path, easy_path):
    with pytest.raises(UserError, match=r"demo/all/annotations\.json.*easy, motion, train"):
        demo.ensure(tmp_path / "demo/all/annotations.json")
    (tmp_path / "demo").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"demo.easy: .*cannot be written.*make room"):
        demo.ensure(easy_path)
