"""The start of a run reads nothing twice: annotations are opened once, headers read once."""

import io
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import edit, make_coco
from rich.console import Console
from small_run import small_experiments
from test_data_cvat import TRUTH, make_frames_beside, on_frame, track, write_xml
from test_data_layouts import both, make_burst, make_tasks, make_youtube_vis
from test_data_vos import make_vos

from sam2train import data_coco_files, data_coco_index, data_masks, data_videos
from sam2train.trainer import Trainer

_counts: list[list[str]] = []  # of the blocks of `opened` that are open


def _hook(event, arguments):
    if event == "open" and _counts and isinstance(arguments[0], str | Path):
        _counts[-1].append(str(arguments[0]))  # of threads: to append is one step


_has_hook: list[bool] = []  # a hook of Python cannot be taken away


@contextmanager
def opened():
    """The paths of all files that are opened in the block."""
    if not _has_hook:
        sys.addaudithook(_hook)
        _has_hook.append(True)
    _counts.append([])
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


@pytest.fixture
def headers(monkeypatch):
    """The pictures whose headers are read, and the masks whose values are looked at."""
    found = []

    def counted(read):
        return lambda path, *rest: (found.append(str(path)), read(path, *rest))[1]

    for module in (data_coco_files, data_coco_index, data_videos):
        monkeypatch.setattr(module, "read_header", counted(module.read_header))
    monkeypatch.setattr(data_masks, "read_facts", counted(data_masks.read_facts))
    return found


def start(folder, experiments, **dataset):
    Trainer(
        experiments(dataset=dataset),
        folder / "run",
        run_id="one",
        name="small",
        console=Console(file=io.StringIO()),
    )


def make_cvat(folder):
    make_frames_beside(folder)
    tracks = [track(k, [on_frame("mask", t, k) for t in range(len(TRUTH))]) for k in (0, 1)]
    return write_xml(folder, "".join(tracks))


def make_marked(folder):
    path = make_coco(folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def make_large(folder):
    return edit(make_coco(folder), lambda content: content.update(info="x" * (1 << 20)))


MAKERS = {
    "coco": make_coco,
    "marked": make_marked,
    "large": make_large,
    "youtube_vis": make_youtube_vis,
    "burst": make_burst,
    "label_studio": lambda folder: make_tasks(folder, both()),
    "cvat": make_cvat,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("splits", [1, 2])
def test_annotations_are_opened_once_and_headers_read_once(
    tmp_path, monkeypatch, headers, kind, splits
):
    monkeypatch.chdir(tmp_path)  # where the index of a large file goes
    experiments = small_experiments(tmp_path)
    places = [tmp_path / f"split {k}" for k in range(splits)]
    for place in places:
        place.mkdir()
    paths = [MAKERS[kind](place) for place in places]
    with opened() as files:
        start(tmp_path, experiments, data_path=str(paths[0]), val_path=str(paths[-1]))
    # A large file is hashed, which names its index, and parsed where there is no index yet.
    times = 2 if kind == "large" else 1
    assert [files.count(str(path)) for path in paths] == [times] * splits
    pictures = [str(p) for place in places for p in place.rglob("*.png")]
    if kind != "large":
        assert Counter(headers) == dict.fromkeys(pictures, 1)
        return
    assert not headers  # sizes come from the first bytes of the files, without Pillow
    with opened() as files:
        start(tmp_path / "again", experiments, data_path=str(paths[0]), val_path=str(paths[-1]))
    assert [files.count(str(path)) for path in paths] == [1] * splits


@pytest.mark.parametrize("splits", [1, 2])
def test_each_mask_picture_is_looked_at_once(tmp_path, headers, splits):
    experiments = small_experiments(tmp_path)
    places = [tmp_path / f"split {k}" for k in range(splits)]
    for place in places:
        make_vos(place)
    paths = {"data_path": str(places[0]), "val_path": str(places[-1])}
    start(tmp_path, experiments, dataset_type="vos", **paths)
    pictures = [
        str(p) for place in places for p in place.rglob("*") if p.suffix in (".png", ".jpg")
    ]
    assert Counter(headers) == dict.fromkeys(pictures, 1)
    assert len(pictures) > 10
