"""Batches from processes that load data: errors arrive as they were, and nothing waits for ever."""

import os
import pickle
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, edit, encode, load, make_coco

from sam2train import data_loader
from sam2train.clips import MEAN, STD, collate_fn, normalise_pixels
from sam2train.data_loader import ClipSampler, LeftOut, load_batches
from sam2train.datasets import DatasetConfig
from sam2train.errors import MachineFault, UserError


def batches(dataset, workers, say=print):
    config = DatasetConfig(data_path="x", num_workers=workers, shuffle=False)
    return load_batches(dataset, config, 0, start=0, pin_memory=False, say=say)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(data_loader, "num_cores", lambda: 2)


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [UserError("frame 3 is broken"), FileNotFoundError(2, "x", "y")])
def test_an_error_arrives_as_it_was(coco, two_cores, monkeypatch, workers, error):
    dataset = load(coco)

    def broken(*_):
        raise error

    monkeypatch.setattr(dataset, "read_frame", broken)
    with pytest.raises(type(error)) as caught:
        next(batches(dataset, workers))
    assert str(caught.value) == str(error)
    assert bool(workers) == ("in broken" in "".join(getattr(caught.value, "__notes__", [])))


def test_an_error_that_cannot_travel_is_a_text(coco, two_cores, monkeypatch):
    dataset = load(coco)

    def broken(*_):
        raise Unpicklable("by hand")

    monkeypatch.setattr(dataset, "read_frame", broken)
    with pytest.raises(RuntimeError, match="Unpicklable: by hand"):
        next(batches(dataset, 1))


def test_a_process_that_is_killed_is_named(coco, two_cores, monkeypatch):
    dataset = load(coco)
    monkeypatch.setattr(dataset, "read_frame", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(MachineFault, match=r"ended.*\(now dataset\.num_workers=1\)"):
        next(batches(dataset, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_does_not_come_is_named(coco, two_cores, monkeypatch, workers):
    monkeypatch.setattr(data_loader, "CLIP_TIMEOUT", 0.3)
    dataset = load(coco)
    monkeypatch.setattr(dataset, "read_frame", lambda *_: time.sleep(60))
    with pytest.raises(MachineFault, match=r"clip of video 1 was not loaded.*video_001"):
        next(batches(dataset, workers))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_full_shared_memory_is_told_and_gone_around(coco, two_cores, monkeypatch):
    """Torch would fail in a thread of the worker, and the run would wait for ever."""
    dataset, said = load(coco), []
    whole = next(batches(dataset, 0))

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    several = batches(dataset, 1, said.append)
    found = [next(several) for _ in range(3)]
    assert torch.equal(found[0].img_batch, whole.img_batch)
    assert torch.equal(found[0].masks, whole.masks)
    assert found[0].names == whole.names
    assert len(said) == 1
    assert "/dev/shm is full" in said[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_data_set_once_they_are_on_the_device(coco, two_cores, workers):
    """Frames, masks, regions to ignore and the masks of prompts, bit for bit."""

    def ignore(content):
        crowd = {**content["annotations"][6], "id": 99, "iscrowd": 1, "track_id": 9}
        content["annotations"].append(crowd | {"segmentation": _corner()})

    dataset = load(edit(coco, ignore), prompt_types=["mask"], video_clip_length=5)
    expected = collate_fn([dataset[0, 0]])
    assert expected.img_batch.dtype == torch.float32
    assert expected.ignore is not None
    batch = next(batches(dataset, workers))
    assert batch.img_batch.dtype == torch.uint8
    batch = batch.to("cpu")
    for name in ("img_batch", "masks", "ignore", "frame_valid", "obj_to_frame_idx"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert getattr(batch, name).dtype == getattr(expected, name).dtype
    for found, wanted in zip(batch.prompts[0], expected.prompts[0], strict=True):
        np.testing.assert_array_equal(found["mask"], wanted["mask"])
        assert found["mask"].dtype == bool
        assert found["mask"].any()


def _corner():
    mask = np.zeros(SIZE, bool)
    mask[-9:, -12:] = True
    return encode(mask)


def test_a_quarter_of_the_bytes_goes_through_the_pipe_of_a_worker(coco):
    dataset = load(coco, prompt_types=["mask"])
    whole = collate_fn([dataset[0, 0]])
    packed = data_loader._Packed.of(collate_fn([dataset.load_clip((0, 0))]))
    assert len(pickle.dumps(packed)) < len(pickle.dumps(whole)) / 4
    pinned = packed.unpack()  # what `pin_memory` pins
    assert torch.equal(pinned.to("cpu").img_batch, whole.img_batch)


def test_frames_are_normalised_as_numpy_does_it():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = (pixels.astype(np.float32) / 255.0 - MEAN) / STD
    found = normalise_pixels(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    assert np.array_equal(found.numpy(), expected.transpose(0, 3, 1, 2))
    assert normalise_pixels(found) is found


# The order of clips


def test_each_epoch_visits_every_clip_once():
    drawn = list(islice(ClipSampler(5, shuffle=True, seed=0), 20))
    for epoch in range(4):
        of_epoch = drawn[5 * epoch : 5 * epoch + 5]
        assert {e for e, _ in of_epoch} == {epoch}
        assert sorted(index for _, index in of_epoch) == list(range(5))
    orders = {tuple(index for _, index in drawn[5 * e : 5 * e + 5]) for e in range(4)}
    assert len(orders) > 1


def test_without_shuffling_the_order_is_that_of_the_videos():
    drawn = list(islice(ClipSampler(3, shuffle=False, seed=0), 5))
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_a_sampler_goes_on_at_its_place(start):
    whole = list(islice(ClipSampler(5, shuffle=True, seed=2), 20))
    rest = ClipSampler(5, shuffle=True, seed=2, start=start)
    assert list(islice(rest, 20 - start)) == whole[start:]
    assert list(islice(rest, 3)) == whole[start : start + 3]  # a second iteration starts anew


def test_another_seed_gives_another_order():
    orders = {tuple(islice(ClipSampler(8, shuffle=True, seed=seed), 8)) for seed in range(5)}
    assert len(orders) == 5


@pytest.fixture
def damaged(tmp_path):
    """A data set of 6 videos, two of which have a frame that is cut short since it was indexed."""
    dataset = load(make_coco(tmp_path, num_videos=6, num_frames=4))
    for video in (2, 5):
        path = tmp_path / f"video_{video:03d}" / "frame_001.png"
        path.write_bytes(path.read_bytes()[:90])
    return dataset


def names(dataset, *, workers=0, start=0, num=18, **keys):
    """What batches from `start` on have, and what they were drawn in the place of."""
    keys = {"data_path": "x", "num_workers": workers, "on_bad_sample": "skip"} | keys
    found = load_batches(dataset, DatasetConfig(**keys), 0, start=start, pin_memory=False)
    return [(batch.names, batch.left_out) for batch in islice(found, num - start)]


def test_another_clip_is_drawn_in_the_place_of_a_bad_one(damaged, two_cores):
    drawn = names(damaged)
    bad = [problems for _, problems in drawn if problems]
    assert len(bad) == 6  # two in each of three epochs
    assert {Path(p.split(": ")[0]).parent.name for one in bad for p in one} == {
        "video_002",
        "video_005",
    }
    assert "damaged or cut short" in bad[0][0]
    assert not any("video 2 " in str(clip) or "video 5 " in str(clip) for clip, _ in drawn)
    for workers in (1, 2):
        assert names(damaged, workers=workers) == drawn, "whatever the number of workers"
    assert names(damaged, start=7) == drawn[7:], "also after a resume"
    with pytest.raises(UserError, match=r"frame_001\.png: is damaged"):
        names(damaged, on_bad_sample="error")


def test_where_nothing_can_be_read_it_ends(tmp_path):
    dataset = load(make_coco(tmp_path, num_videos=2, num_frames=4))
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(UserError, match="is damaged"):
        names(dataset)


def test_too_many_bad_clips_are_an_error_with_the_names_of_the_files():
    said = []
    config = DatasetConfig(data_path="x", on_bad_sample="skip", max_bad_fraction=0.1)
    left_out = LeftOut({"a.png: is empty": 1}, said.append)
    left_out.add(["a.png: is empty", "b.png: is empty"], 30, config)
    assert said == ["left out, and another clip drawn: b.png: is empty"]
    with pytest.raises(UserError) as caught:
        left_out.add(["c.png: is empty"], 39, config)
    message = str(caught.value)
    assert "4 of 39 clips could not be read, more than dataset.max_bad_fraction=0.1" in message
    for name in "abc":
        assert f"- {name}.png: is empty" in message
