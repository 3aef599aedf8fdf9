"""The files of a tracked video; `test_predict` has the COCO JSON and the film."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam2train.data_source import Frame, Video
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame
from sam2train.video_files import MaskFolder


def write(folder, video_id, masks, *, names=None, asked=None) -> None:
    """A video with the predictions `masks`, object id -> (T, H, W) bool, frame by frame."""
    shape = next(iter(masks.values())).shape
    names = names or [f"{t:05d}.jpg" for t in range(shape[0])]
    frames = [Frame(Path(name), {}) for name in names]
    video = Video(video_id, shape[1:], frames, list(masks), asked)
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


def files(path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def zipped(path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {n: np.array(Image.open(io.BytesIO(archive.read(n)))) for n in archive.namelist()}


def test_the_zip_of_a_server_has_what_the_folder_has(tmp_path):
    masks = two_objects(1, 2)
    for place in (tmp_path / "out", tmp_path / "out.zip"):
        with MaskFolder(place) as folder:
            write(folder, "dog", masks)
            assert place.is_dir() or not place.exists()  # a zip appears whole
    inside = zipped(tmp_path / "out.zip")
    assert sorted(inside) == files(tmp_path / "out") == [f"dog/0000{t}.png" for t in range(3)]
    for name, ids in inside.items():
        assert np.array_equal(ids, read(tmp_path / "out" / name))
    with pytest.raises(UserError, match=r"out\.zip: there is something already"):
        MaskFolder(tmp_path / "out.zip")


def test_a_zip_that_was_not_finished_is_none(tmp_path):
    folder = MaskFolder(tmp_path / "out.zip")
    with contextlib.suppress(KeyError), folder:
        write(folder, "dog", two_objects(1, 2))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_youtube_vos_gets_the_frames_it_asks_for(tmp_path):
    masks = two_objects(1, 2)
    with MaskFolder(tmp_path / "out.zip", "youtube_vos") as folder:
        write(folder, "0a8c467cc3", masks, asked=frozenset({0, 2}))
        write(folder, "lvos", masks)  # nothing is said: all
    inside = zipped(tmp_path / "out.zip")
    names = [f"0a8c467cc3/0000{t}.png" for t in (0, 2)] + [f"lvos/0000{t}.png" for t in range(3)]
    assert sorted(inside) == [f"Annotations/{name}" for name in names]
    last = inside["Annotations/0a8c467cc3/00002.png"]
    assert np.array_equal(last, masks[1][2] + 2 * masks[2][2])


def test_sav_has_a_folder_for_each_object(tmp_path):
    masks = two_objects(0, 12)
    masks[12][:] |= masks[0]  # the whole and a part of it
    write(MaskFolder(tmp_path, "sav"), "sav_000001", masks)
    assert files(tmp_path) == [
        f"sav_000001/{o}/0000{t}.png" for o in ("000", "012") for t in range(3)
    ]
    for object_id, name in ((0, "000"), (12, "012")):
        for t in range(3):
            pixels = read(tmp_path / "sav_000001" / name / f"0000{t}.png")
            assert np.array_equal(pixels, masks[object_id][t].astype(np.uint8))


def test_sav_takes_any_number_and_any_name_of_objects(tmp_path):
    masks = {o: np.zeros((1, 2, 2), bool) for o in (*range(300), "a/b", "A_B")}
    write(MaskFolder(tmp_path, "sav"), "many", masks)
    names = [path.name for path in (tmp_path / "many").iterdir()]
    assert len({name.casefold() for name in names}) == 302
    assert {"000", "299"} <= set(names)
