"""What one mask picture holds: counts by hand, and pictures that are no mask."""

import json
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_frames
from PIL import Image

from sam2train import data_masks
from sam2train.data_masks import FactsCache, MaskCache, read_facts
from sam2train.data_source import Frame, Video
from sam2train.data_vos import VosVideos
from sam2train.errors import UserError

# A block of 4 x 5 pixels, and a pixel with a line of two below it, on 8 x 10.
IDS = np.zeros((8, 10), np.uint8)
IDS[1:5, 1:6] = 1
IDS[6, 8], IDS[7, 8:10] = 2, 3


def facts_of(tmp_path, pixels, palette=None):
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(tmp_path / "mask.png")
    return read_facts(tmp_path / "mask.png")


def test_counts_of_a_grey_picture(tmp_path):
    facts = facts_of(tmp_path, IDS)
    assert (facts.kind, facts.size) == ("grey", (8, 10))
    assert facts.areas == {0: 57, 1: 20, 2: 1, 3: 2}
    # The border has 2 * 10 + 2 * 6 pixels, of which the line takes two.
    assert facts.border == {0: 30, 3: 2}
    assert facts.interior[1] == 2 * 3
    assert not {2, 3} & facts.interior.keys()
    assert facts.alone[2] == 1
    assert 3 not in facts.alone
    assert facts.touching[2] == 1
    assert facts.touching[3] == 1


def test_a_palette_is_kept_and_counts_by_colour_follow(tmp_path):
    colours = [0, 0, 0, 200, 10, 0, 0, 100, 20, 9, 9, 90]
    facts = facts_of(tmp_path, IDS, palette=colours)
    assert facts.kind == "palette"
    red, green, blue = 200 + 256 * 10, 256 * 100 + 65536 * 20, 9 + 256 * 9 + 65536 * 90
    assert facts.palette == {0: 0, 1: red, 2: green, 3: blue}
    by_colour = facts.by_colour()
    assert by_colour.kind == "colour"
    assert by_colour.areas == {0: 57, red: 20, green: 1, blue: 2}
    assert by_colour.interior[red] == facts.interior[1]
    assert by_colour.by_colour() is by_colour


def test_the_colours_of_an_rgb_picture_are_counted_as_those_of_a_palette(tmp_path):
    colours = np.array([(0, 0, 0), (200, 10, 0), (0, 100, 20), (9, 9, 90)], np.uint8)
    palette = facts_of(tmp_path, IDS, palette=colours.ravel().tolist()).by_colour()
    rgb = facts_of(tmp_path, colours[IDS])
    assert rgb.kind == "colour"
    for name in ("areas", "border", "interior", "alone", "touching"):
        assert getattr(rgb, name) == getattr(palette, name), name


def test_an_empty_mask(tmp_path):
    facts = facts_of(tmp_path, np.zeros((6, 7), np.uint8))
    assert (facts.areas, facts.border) == ({0: 42}, {0: 22})
    assert not facts.touching


def test_a_picture_of_many_colours_is_no_mask(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    with pytest.raises(UserError, match=r"mask\.png: .*has 400 colours"):
        facts_of(tmp_path, pixels)


SIZE = (24, 32)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_masks, "WRITTEN_FROM", 1)


@pytest.fixture
def decoded(monkeypatch):
    """The masks that are decoded."""
    found = []

    def counted(path, *raw):
        found.append(path.name)
        return read_facts(path, *raw)

    monkeypatch.setattr(data_masks, "read_facts", counted)
    return found


def ids(t):
    pixels = np.zeros(SIZE, np.uint8)
    pixels[2 + t : 9 + t, 3:12] = 1
    pixels[12:20, 14 + t : 22 + t] = 2
    pixels[12 + t, 5] = 77  # a value that lies alone
    return pixels


def make_masks(folder, kind, number=4):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for t in range(number):
        picture = Image.fromarray(ids(t))
        if kind == "palette":
            picture.putpalette([0, 0, 0, 255, t, 0, 0, 255, 9])
        elif kind == "colour":
            picture = Image.fromarray(np.stack([ids(t), 3 * ids(t), 5 + ids(t)], axis=2))
        paths.append(folder / f"{t:05d}.png")
        picture.save(paths[-1])
    return paths


@pytest.mark.parametrize("kind", ["grey", "palette", "colour"])
def test_facts_come_back_equal_and_nothing_is_decoded(tmp_path, decoded, kind):
    paths = make_masks(tmp_path / "masks", kind)
    first = FactsCache(tmp_path)
    expected = [first.read(path) for path in paths]
    first.write()
    assert len(decoded) == 4
    assert all(isinstance(key, int) for facts in expected for key in facts.areas)
    second = FactsCache(tmp_path)
    found = [second.read(path) for path in paths]
    assert len(decoded) == 4
    assert found == expected == [read_facts(path) for path in paths]
    assert all(type(facts.alone) is Counter for facts in found)
    assert FactsCache(tmp_path / "masks").read(paths[0]) == expected[0]  # of another data set
    assert len(decoded) == 5


def test_a_changed_mask_is_decoded_also_if_its_size_and_time_are_the_same(tmp_path, decoded):
    path = tmp_path / "a.bmp"  # as long whatever is in it
    Image.fromarray(ids(0)).save(path)
    cache = FactsCache(tmp_path)
    before = cache.read(path)
    cache.write()
    stat = path.stat()
    Image.fromarray(ids(1)).save(path)
    import os

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = FactsCache(tmp_path).read(path)
    assert len(decoded) == 2
    assert after == read_facts(path) != before


@pytest.mark.parametrize("damage", ["cut", "flipped", "version", "empty", "folder"])
def test_a_damaged_cache_is_made_anew(tmp_path, decoded, damage):
    (path,) = make_masks(tmp_path / "masks", "grey", 1)
    cache = FactsCache(tmp_path)
    expected = cache.read(path)
    cache.write()
    raw = cache.file.read_bytes()
    changed = {"cut": raw[:-9], "empty": b"", "version": raw.replace(b"facts 1", b"facts 0", 1)}
    changed["flipped"] = raw.replace(b"[24,32]", b"[24,33]", 1)
    if damage == "folder":
        cache.file.unlink()
        cache.file.mkdir()
    else:
        assert changed[damage] != raw
        cache.file.write_bytes(changed[damage])
    again = FactsCache(tmp_path)
    assert again.read(path) == expected
    assert len(decoded) == 2
    again.write()  # no error where a folder has its place
    if damage != "folder":
        assert json.loads(again.file.read_bytes().split(b"\n", 1)[1])["facts"]


def test_facts_that_are_no_longer_used_go_and_few_new_ones_are_not_written(
    tmp_path, monkeypatch, decoded
):
    paths = make_masks(tmp_path / "masks", "grey")
    cache = FactsCache(tmp_path)
    for path in paths[:2]:
        cache.read(path)
    cache.write()
    cache = FactsCache(tmp_path)
    cache.read(paths[2])
    cache.write()
    assert len(json.loads(cache.file.read_bytes().split(b"\n", 1)[1])["facts"]) == 1
    monkeypatch.setattr(data_masks, "WRITTEN_FROM", 2)
    before = cache.file.read_bytes()
    cache = FactsCache(tmp_path)
    cache.read(paths[3])
    cache.write()
    assert cache.file.read_bytes() == before


def test_damaged_and_missing_masks_are_named_each_time(tmp_path):
    (path,) = make_masks(tmp_path / "masks", "grey", 1)
    path.write_bytes(path.read_bytes()[:-30])
    for _ in range(2):
        cache = FactsCache(tmp_path)
        with pytest.raises(UserError, match=r"00000\.png"):
            cache.read(path)
        with pytest.raises(UserError, match=r"no\.png"):
            cache.read(tmp_path / "no.png")
        cache.write()


def test_a_data_set_has_the_same_videos_from_its_cache(tmp_path, decoded):
    make_frames(tmp_path / "JPEGImages" / "a", [f"{t:05d}.jpg" for t in range(4)], size=SIZE)
    make_masks(tmp_path / "Annotations" / "a", "palette")
    first, second = VosVideos(tmp_path), VosVideos(tmp_path)
    assert len(decoded) == 4
    assert (second.videos, second.notes, second.warnings) == (
        first.videos,
        first.notes,
        first.warnings,
    )


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
            stored[(id(key[0]), *key[1:], size)] = key, mask
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
