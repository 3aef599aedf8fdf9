"""The files of a tracked video; `test_predict` has the COCO JSON and the film."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2train.data_source import Frame, Video
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame
from sam2train.video_files import MaskFolder


def write(folder, video_id, masks, *, names=None) -> None:
    """A video with the predictions `masks`, object id -> (T, H, W) bool, frame by frame."""
    shape = next(iter(masks.values())).shape
    names = names or [f"{t:05d}.jpg" for t in range(shape[0])]
    frames = [Frame(Path(name), {}) for name in names]
    video = Video(video_id, shape[1:], frames, list(masks))
    for t in range(shape[0]):
        folder.write(SeenFrame(video, [], t, {o: stack[t] for o, stack in masks.items()}, {}))


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def two_objects(first, second):
    masks = {first: np.zeros((3, 8, 9), bool), second: np.zeros((3, 8, 9), bool)}
    masks[first][:, :4] = True
    masks[second][1:, 4:, 2:] = True  # it appears on frame 1
    return masks


def test_a_pixel_is_the_number_of_its_object(tmp_path):
    masks = two_objects(3, 7)
    write(MaskFolder(tmp_path / "out"), "dog", masks)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
    for t in range(3):
        ids = read(tmp_path / "out" / "dog" / f"{t:05d}.png")
        assert ids.shape == (8, 9)
        for object_id, mask in masks.items():
            assert ((ids == object_id) == mask[t]).all()
    with Image.open(tmp_path / "out" / "dog" / "00001.png") as picture:
        colours = np.array(picture.convert("RGB"))
    assert (colours[4, 0] == 0).all()  # the background is black
    assert len({tuple(colours[y, x]) for y, x in ((4, 0), (0, 0), (4, 2))}) == 3
    assert not (tmp_path / "out" / "objects.json").exists()


def test_other_ids_are_counted_and_written_down(tmp_path):
    write(MaskFolder(tmp_path), "a/b", two_objects("cat", 300))
    assert json.loads((tmp_path / "objects.json").read_text()) == {
        "a_b": {"1": "cat", "2": "300"},
    }
    assert np.unique(read(tmp_path / "a_b" / "00001.png")).tolist() == [0, 1, 2]


def test_frames_of_a_film_are_named_by_their_position(tmp_path):
    write(MaskFolder(tmp_path), 1, two_objects(1, 2), names=["film.mp4"] * 3)
    assert sorted(path.name for path in tmp_path.rglob("*.png"))[-1] == "00002.png"


def test_names_that_repeat_give_way_to_positions(tmp_path):
    names = ["a/1.jpg", "b/1.jpg", "b/2.jpg"]
    write(MaskFolder(tmp_path), 1, two_objects(1, 2), names=names)
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_a_film_of_one_frame_is_a_film(tmp_path):
    masks = {1: np.ones((1, 8, 9), bool)}
    write(MaskFolder(tmp_path), 1, masks, names=["film.mp4"])
    assert [path.name for path in tmp_path.rglob("*.png")] == ["00000.png"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--save-masks .* something already"):
        MaskFolder(tmp_path)
    with pytest.raises(UserError, match="--save-masks"):
        MaskFolder(tmp_path / "note.txt")


def test_a_palette_ends_at_255(tmp_path):
    masks = {number: np.zeros((1, 2, 2), bool) for number in range(1, 257)}
    with pytest.raises(UserError, match="256 objects"):
        write(MaskFolder(tmp_path), 1, masks)


def test_folders_of_videos_are_safe_and_apart(tmp_path):
    folder = MaskFolder(tmp_path / "masks")
    ids = ["a/b", "a_b", "A_B", "..", "", "x" * 300, "a\x00b", "con", 1, "1", "objects.json", "dog"]
    for video_id in ids:
        write(folder, video_id, two_objects(1, 2))
    names = sorted(path.name for path in (tmp_path / "masks").iterdir() if path.is_dir())
    assert len({name.casefold() for name in names}) == len(ids)
    assert {"a_b", "1", "dog"} <= set(names)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
    renamed = json.loads((tmp_path / "masks" / "videos.json").read_text())
    assert set(renamed.values()) == {str(i) for i in ids} - {"dog", "a_b"} | {"a_b"}
    assert renamed["a_b"] == "a/b"


def test_frames_whose_names_differ_in_capitals_only_give_way_to_positions(tmp_path):
    write(MaskFolder(tmp_path), 1, two_objects(1, 2), names=["a.jpg", "A.jpg", "b.jpg"])
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
