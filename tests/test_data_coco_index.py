"""Large COCO files: the quick way reads what the careful way reads, and once."""

import json
import os

import numpy as np
import pytest
from conftest import SIZE, edit, encode, load, make_coco
from pycocotools import mask as rle

from sam2train import data_coco_index, data_index
from sam2train.data_coco import CocoVideos, read_coco
from sam2train.data_coco_index import IndexedVideos, plain_index, rle_areas
from sam2train.data_index import as_bytes, ends, fingerprint
from sam2train.errors import UserError


def test_areas_are_those_of_the_masks_and_damage_is_told():
    rng = np.random.default_rng(0)
    texts, areas, pixels = [], [], []
    for _ in range(120):
        mask = rng.random(rng.integers(1, 50, 2)) < rng.choice([0, 0.1, 0.5, 1.0])
        texts.append(rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
        areas.append(mask.sum())
        pixels.append(mask.size)
    place, text, pixels = ends(list(map(len, texts))), as_bytes(b"".join(texts)), np.array(pixels)
    np.testing.assert_array_equal(rle_areas(text, place, pixels), areas)
    for _ in range(50):
        broken = text.copy()
        broken[rng.integers(len(broken))] ^= rng.integers(1, 64)
        assert rle_areas(broken, place, pixels) is None
    assert rle_areas(text, place, pixels + 1) is None


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Every file is large, and indices lie in a folder of the test."""
    monkeypatch.setattr(data_coco_index, "PACKED_FROM", 0)
    monkeypatch.setattr(data_index, "INDEX_FOLDER", tmp_path / "index")


def plain(content):
    """Nothing is changed."""


def late_and_gone(content):
    """Objects that appear late or leave, and frames without any."""
    keep = [
        a for k, a in enumerate(content["annotations"]) if k % 5 and a["image_id"] not in (2, 3)
    ]
    content["annotations"] = keep


def every_second(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 2]


def empty_masks(content):
    for annotation in content["annotations"][:3]:
        annotation["segmentation"] = encode(np.zeros(SIZE, bool))


def other_order(content):
    for image in content["images"]:
        image["frame_id"] = 50 - image.pop("order_in_video")
    content["annotations"].reverse()


def video_names(content):
    for image in content["images"]:
        image["video_id"] = f"video {image['video_id']}"


def counts_first(content):
    for annotation in content["annotations"]:
        segmentation = annotation["segmentation"]
        annotation["segmentation"] = {k: segmentation[k] for k in ("counts", "size")}


def crowd(content):
    content["annotations"][0]["iscrowd"] = 1


def polygons(content):
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    content["annotations"][0]["segmentation"] = square


def names_as_ids(content):
    for annotation in content["annotations"]:
        annotation["track_id"] = f"car {annotation['track_id']}"


def labels(content):
    for image in content["images"]:
        image["is_annotated"] = image["order_in_video"] % 2 == 0


def restarted(content):
    for annotation in content["annotations"]:
        annotation["category_id"], annotation["track_id"] = annotation["track_id"], 1


def twice(content):
    content["annotations"].append({**content["annotations"][0], "id": 1000})


QUICK = [plain, late_and_gone, every_second, empty_masks, other_order, video_names, counts_first]
CAREFUL = [crowd, polygons, names_as_ids, labels, restarted, twice]


@pytest.mark.parametrize("change", QUICK + CAREFUL)
def test_an_index_has_what_the_file_has(packed, tmp_path, change):
    path = edit(make_coco(tmp_path, num_videos=3), change)
    expected = CocoVideos(path, content=read_coco(path, []))
    assert (plain_index(read_coco(path, []), tmp_path) is not None) == (change in QUICK)
    for _ in range(2):  # made, and then read
        found = load(path).source
        assert isinstance(found, IndexedVideos)
        assert found.videos == expected.videos
        assert (found.warnings, found.notes) == (expected.warnings, expected.notes)
        assert fingerprint(found) == fingerprint(expected)
        for video in expected.videos:
            assert found.is_trainable(video) == expected.is_trainable(video)
            assert found.has_ignored(video) == expected.has_ignored(video)


def damaged(content):
    content["annotations"][4]["segmentation"]["counts"] += "1"


def no_image(content):
    content["annotations"][4]["image_id"] = 999


def no_picture(content):
    content["images"][3]["path"] = "nowhere.png"


def same_picture(content):
    content["images"][8]["path"] = content["images"][2]["path"]


@pytest.mark.parametrize("change", [damaged, no_image, no_picture, same_picture])
def test_what_is_wrong_with_a_large_file_is_said_in_the_same_words(packed, tmp_path, change):
    path = edit(make_coco(tmp_path, num_videos=2), change)
    with pytest.raises(UserError) as expected:
        CocoVideos(path, content=read_coco(path, []))
    with pytest.raises(UserError) as found:
        load(path)
    assert str(found.value) == str(expected.value)
    assert not (tmp_path / "index").exists()


def test_a_file_is_parsed_once_and_again_when_something_changed(packed, tmp_path, monkeypatch):
    path, parsed = make_coco(tmp_path), []

    def counting(*arguments):
        parsed.append(1)
        return read_coco(*arguments)

    monkeypatch.setattr("sam2train.data_layouts.read_coco", counting)

    def number():
        parsed.clear()
        load(path)
        return len(parsed)

    assert [number(), number(), number()] == [1, 0, 0]
    picture = sorted(tmp_path.rglob("*.png"))[2]
    os.utime(picture, (1, 1))
    assert [number(), number()] == [1, 0]
    edit(path, lambda content: content["annotations"].pop())
    assert [number(), number()] == [1, 0]
    index = max((tmp_path / "index").iterdir(), key=os.path.getmtime)
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1  # torn
    index.write_bytes(content)
    assert [number(), number()] == [1, 0]
    index.write_bytes(b"")
    assert [number(), number()] == [1, 0]
    picture.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(path)


def test_a_large_json_is_read_as_a_small_one(tmp_path, monkeypatch):
    """NaN, which orjson refuses, and numbers, text and order."""
    path = tmp_path / "a.json"
    monkeypatch.setattr("sam2train.files._LARGE_JSON", 0)
    for content in ({"b": [1, 2.5, "\u00e9\ud800", None, True], "a": {}}, {"a": float("inf")}):
        path.write_text(json.dumps(content))
        assert read_coco(path, []) == content
        assert list(read_coco(path, [])) == list(content)
    path.write_text('{"a": ')
    with pytest.raises(UserError, match="not valid JSON"):
        read_coco(path, [])
