"""An index in a file: mapped by processes, and no trouble where it cannot be written."""

import multiprocessing
import pickle

import pytest
from conftest import load, make_coco, same

from sam2train import data_coco_index, data_index
from sam2train.data_coco import CocoVideos


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Every file is large, and indices lie in a folder of the test."""
    monkeypatch.setattr(data_coco_index, "PACKED_FROM", 0)
    monkeypatch.setattr(data_index, "INDEX_FOLDER", tmp_path / "index")


def test_a_folder_that_takes_no_index_is_no_trouble(packed, tmp_path, monkeypatch):
    path = make_coco(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data_index, "INDEX_FOLDER", tmp_path / "file" / "index")
    source = load(path).source
    assert source.videos == CocoVideos(path).videos
    assert pickle.loads(pickle.dumps(source)).videos == source.videos


def test_a_process_that_is_started_anew_maps_the_index(packed, tmp_path):
    """What is sent there does not grow with the annotations."""
    sizes = []
    for number in (2, 20):
        data = load(make_coco(tmp_path / str(number), num_frames=number))
        sizes.append(len(pickle.dumps(data)))
    assert sizes[1] - sizes[0] < 50
    expected = data[0, 0]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert same(pool.apply(first_clip, (data,)), expected)


def first_clip(data):
    return data[0, 0]
