"""Masks that processes keep for each other."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from sam2train.data_mask_cache import MaskCache
from sam2train.data_source import Frame, Video

OWN, CLIP_SIZE = (16, 15), (8, 8)  # 240 pixels: 30 bytes, 64: 8 bytes
CACHED = [
    Video("a", OWN, [Frame(Path("a"), {})] * 3, [1, 2]),
    Video("b", OWN, [Frame(Path("b"), {})] * 2, ["x"]),
]
TABLE = 8 * (1 + 2 * (3 * 2 + 2 * 1))  # a word for the end, then one for each mask and size
KEYS = [(CACHED[0], t, o) for t in range(3) for o in (1, 2)] + [(CACHED[1], t, "x") for t in (0, 1)]


def some_masks(num, size=OWN):
    return np.random.default_rng(0).random((num, *size)) < 0.5


def test_each_mask_comes_back_at_both_sizes():
    cache = MaskCache(2**16, CACHED, CLIP_SIZE)
    stored = {}
    for size in (OWN, CLIP_SIZE):
        for key, mask in zip(KEYS, some_masks(len(KEYS), size), strict=True):
            assert cache.get(*key, size) is None
            cache.put(*key, mask)
            stored[id(key[0]), *key[1:], size] = key, mask
    assert len(stored) == 16
    for (*_, size), (key, mask) in stored.items():
        np.testing.assert_array_equal(cache.get(*key, size), mask)
    assert cache.num_bytes == TABLE + 8 * (30 + 8)


def test_other_sizes_are_not_kept():
    cache = MaskCache(2**16, CACHED, CLIP_SIZE)
    cache.put(*KEYS[0], np.ones((5, 5), bool))
    assert cache.get(*KEYS[0], (5, 5)) is None
    assert cache.num_bytes == TABLE


def test_a_full_cache_keeps_what_it_has():
    cache = MaskCache(TABLE + 3 * 30 + 29, CACHED, CLIP_SIZE)
    masks = some_masks(len(KEYS))
    for key, mask in zip(KEYS, masks, strict=True):
        cache.put(*key, mask)
    kept = [cache.get(*key, OWN) is not None for key in KEYS]
    assert kept == [True] * 3 + [False] * 5
    assert cache.num_bytes == TABLE + 3 * 30
    np.testing.assert_array_equal(cache.get(*KEYS[2], OWN), masks[2])
    cache.put(*KEYS[3], np.ones(CLIP_SIZE, bool))  # a smaller one still fits
    assert cache.get(*KEYS[3], CLIP_SIZE).all()


@pytest.mark.parametrize("max_bytes", [0, TABLE])
def test_a_cache_without_room_keeps_nothing(max_bytes):
    cache = MaskCache(max_bytes, CACHED, CLIP_SIZE)
    cache.put(*KEYS[0], some_masks(1)[0])
    assert cache.get(*KEYS[0], OWN) is None
    assert cache.num_bytes == 0


def test_putting_a_mask_twice_takes_its_room_once():
    cache = MaskCache(2**16, CACHED, CLIP_SIZE)
    for _ in range(3):
        cache.put(*KEYS[0], some_masks(1)[0])
    assert cache.num_bytes == TABLE + 30


def fill(cache, masks, start):
    for place in np.roll(np.arange(len(KEYS)), start):
        cache.put(*KEYS[place], masks[place])
        for other, key in enumerate(KEYS):
            found = cache.get(*key, OWN)
            assert found is None or np.array_equal(found, masks[other])


def test_forked_processes_fill_one_block():
    cache = MaskCache(TABLE + 6 * 30, CACHED, CLIP_SIZE)
    masks = some_masks(len(KEYS))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(cache, masks, k)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    found = [cache.get(*key, OWN) for key in KEYS]
    assert sum(mask is not None for mask in found) == 6
    assert all(f is None or np.array_equal(f, m) for f, m in zip(found, masks, strict=True))
    assert cache.num_bytes == TABLE + 6 * 30


def test_a_copy_for_a_process_that_is_not_forked_keeps_nothing():
    cache = MaskCache(2**16, CACHED, CLIP_SIZE)
    cache.put(*KEYS[0], some_masks(1)[0])
    copy = pickle.loads(pickle.dumps(cache))
    copy.put(*KEYS[0], some_masks(1)[0])
    assert copy.get(*KEYS[0], OWN) is None
    assert copy.num_bytes == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_the_cache_however_they_are_started(method):
    """What one has put there is read by the others, without another copy."""
    context = multiprocessing.get_context(method)
    cache = MaskCache(TABLE + 6 * 30, CACHED, CLIP_SIZE)
    masks = some_masks(6)
    cache.put(*KEYS[5], masks[5])
    worker = context.Process(target=put_and_get, args=(cache, masks))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    np.testing.assert_array_equal(cache.get(*KEYS[0], OWN), masks[0])
    assert cache.num_bytes == TABLE + 2 * 30


def put_and_get(cache, masks):
    np.testing.assert_array_equal(cache.get(*KEYS[5], OWN), masks[5])
    cache.put(*KEYS[0], masks[0])


def test_the_ignore_mask_of_a_frame_is_kept_beside_its_objects():
    cache = MaskCache(2**16, CACHED, CLIP_SIZE, {video.video_id for video in CACHED})
    video, masks = CACHED[0], some_masks(3)
    objects = video.object_ids[:2]
    for object_id, mask in zip([*objects, None], masks, strict=False):
        cache.put(video, 1, object_id, mask)
    for object_id, mask in zip([*objects, None], masks, strict=False):
        np.testing.assert_array_equal(cache.get(video, 1, object_id, OWN), mask)
    assert cache.get(video, 0, None, OWN) is None


# Versions of a video
