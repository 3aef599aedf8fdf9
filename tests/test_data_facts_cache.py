import json
from collections import Counter

import numpy as np
import pytest
from conftest import make_frames
from PIL import Image

from sam2train import data_facts_cache
from sam2train.data_facts_cache import FactsCache
from sam2train.data_mask_facts import read_facts
from sam2train.data_vos import VosVideos
from sam2train.errors import UserError

SIZE = (24, 32)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_facts_cache, "WRITTEN_FROM", 1)


@pytest.fixture
def decoded(monkeypatch):
    """The masks that are decoded."""
    found = []

    def counted(path, *raw):
        found.append(path.name)
        return read_facts(path, *raw)

    monkeypatch.setattr(data_facts_cache, "read_facts", counted)
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
    monkeypatch.setattr(data_facts_cache, "WRITTEN_FROM", 2)
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
