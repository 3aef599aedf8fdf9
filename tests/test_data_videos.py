import shutil

import numpy as np
import pytest
from conftest import SHARED, make_frames
from PIL import Image
from test_data_pictures import level, write_film

from sam2train.config import build
from sam2train.data_videos import MadeUpVideos, VideoFolders
from sam2train.datasets import DatasetConfig
from sam2train.errors import UserError

FRAME_DIRS = SHARED / "bad" / "frame_dirs"


def names(video):
    return [frame.path.name for frame in video.frames]


def fails(path):
    with pytest.raises(UserError) as caught:
        VideoFolders(path)
    message = str(caught.value)
    assert str(path) in message
    return message


# What is a video


def test_each_folder_is_a_video_of_its_pictures_in_order(tmp_path):
    for number in (1, 2, 10):
        make_frames(tmp_path / f"video_{number}", [f"frame_{t}.png" for t in (1, 2, 10, 11)])
    source = VideoFolders(tmp_path)
    videos, warnings = source.videos, source.warnings
    assert warnings == []
    assert [video.video_id for video in videos] == ["video_1", "video_2", "video_10"]
    for video in videos:
        assert names(video) == ["frame_1.png", "frame_2.png", "frame_10.png", "frame_11.png"]
        assert video.size == (48, 64)
        assert video.object_ids == []
        assert all(video.visible(t) == [] for t in range(4))


def test_a_folder_of_frames_is_one_video(tmp_path, monkeypatch):
    make_frames(tmp_path / "clip", ["b.png", "a.png"])
    (tmp_path / "clip" / "empty").mkdir()
    source = VideoFolders(tmp_path / "clip")
    (video,), warnings = source.videos, source.warnings
    assert video.video_id == "clip"
    assert names(video) == ["a.png", "b.png"]
    assert warnings == []
    monkeypatch.chdir(tmp_path / "clip")
    assert VideoFolders(type(tmp_path)(".")).videos[0].video_id == "clip"


def test_what_is_no_frame_is_passed_over(tmp_path):
    folder = tmp_path / "video_001"
    make_frames(folder, ["frame_001.JPG", "frame_002.Png"])
    make_frames(folder / "masks", ["frame_001.png"])
    make_frames(folder / "frame_003.png", ["inside.png"])  # a folder with a picture's name
    make_frames(tmp_path / ".thumbnails", ["frame_001.png"])
    for junk in (".DS_Store", "._frame_001.jpg", "Thumbs.db", "notes.txt", ".frame_009.png"):
        (folder / junk).write_bytes(b"junk")
    (tmp_path / "readme.txt").write_text("text")
    source = VideoFolders(tmp_path)
    (video,), warnings = source.videos, source.warnings
    assert names(video) == ["frame_001.JPG", "frame_002.Png"]
    assert warnings == []


def test_empty_folders_and_single_frames_are_told(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    make_frames(tmp_path / "b", ["1.png"])
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    source = VideoFolders(tmp_path)
    videos, warnings = source.videos, source.warnings
    assert [video.video_id for video in videos] == ["a", "b"]
    assert warnings == [
        "c, d: no pictures, so no video",
        "b: a single frame: nothing to track",
    ]


def test_the_size_is_that_after_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_frames(tmp_path / "a", ["1.jpg", "2.jpg"], exif=exif)
    (video,) = VideoFolders(tmp_path).videos
    assert video.size == (64, 48)


# Errors


def test_folders_that_are_none(tmp_path):
    assert "no such folder" in fails(tmp_path / "nowhere")
    for name, advice in (("a.json", 'dataset_type: "coco"'), ("a", "")):
        path = tmp_path / name
        path.write_text("x")
        message = fails(path)
        assert "is a file; expected a folder" in message
        assert advice in message


def test_a_folder_without_videos_says_what_it_holds(tmp_path):
    assert "no pictures in it or its sub-folders; expected a folder with one" in fails(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.MP4").write_bytes(b"x")
    assert "a.MP4: is no film that OpenCV can read" in fails(tmp_path)
    shutil.rmtree(tmp_path / "films")
    make_frames(tmp_path / "480p" / "bear", ["00000.jpg"])
    assert fails(tmp_path).endswith(f"its videos seem to lie in {tmp_path / '480p'}")


def test_pictures_above_and_below_are_ambiguous(tmp_path):
    make_frames(tmp_path, ["preview.png"])
    make_frames(tmp_path / "video_001", ["1.png"])
    message = fails(tmp_path)
    assert "in the folder itself (preview.png) and in sub-folders (video_001)" in message


def test_every_problem_of_the_pictures_comes_at_once(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png", "01.png", "3.jpg", "3.png"])
    make_frames(tmp_path / "b", ["1.png"])
    make_frames(tmp_path / "b", ["2.png"], size=(30, 40))
    make_frames(tmp_path / "c", ["1.png"])
    (tmp_path / "c" / "2.png").write_bytes(b"")
    (tmp_path / "c" / "3.jpg").write_text("<html>")
    make_frames(tmp_path / "d", ["1.png"])
    message = fails(tmp_path)
    assert message.split("\n  - ") == [
        f"{tmp_path}: 5 problems",
        f"{tmp_path / 'a'}: 01.png and 1.png have the same place in the order; keep one",
        f"{tmp_path / 'a'}: 3.jpg and 3.png have the same place in the order; keep one",
        f"{tmp_path / 'b'}: frames of different sizes: 64x48 (1.png), 40x30 (2.png); a video has "
        "one size",
        f"{tmp_path / 'c' / '2.png'}: is empty",
        f"{tmp_path / 'c' / '3.jpg'}: is an HTML page, probably a failed download",
    ]


# Real folders


@pytest.mark.skipif(not FRAME_DIRS.is_dir(), reason="needs the awkward folders")
def test_awkward_real_folders():
    videos = {video.video_id: video for video in VideoFolders(FRAME_DIRS).videos}
    assert all(len(video.frames) == 6 and video.size == (240, 427) for video in videos.values())
    assert names(videos["unpadded"]) == [f"frame_{t}.jpg" for t in range(8, 14)]
    assert names(videos["upper_ext"]) == [f"frame_{t:03d}.JPG" for t in range(1, 7)]
    assert names(videos["gap"]) == [f"frame_{t:03d}.jpg" for t in (1, 4, 7, 10, 13, 16)]
    assert names(videos["with_junk"]) == [f"frame_{t:03d}.jpg" for t in range(1, 7)]
    assert names(videos["mixed_ext"])[2:4] == ["frame_003.jpg", "frame_004.png"]
    # Each of them alone is one video of the same frames.
    for video_id, video in videos.items():
        (alone,) = VideoFolders(FRAME_DIRS / video_id).videos
        assert alone == video


@pytest.mark.skipif(not (SHARED / "davis_dev").is_dir(), reason="needs the real videos")
def test_real_videos():
    source = VideoFolders(SHARED / "davis_dev" / "video_data")
    videos, warnings = source.videos, source.warnings
    assert [(v.video_id, v.size, len(v.frames)) for v in videos] == [
        ("video_001", (480, 854), 40),
        ("video_002", (480, 854), 60),
    ]
    assert warnings == []


# Stacks, films, pictures of more than 8 bits


def write_stack(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(np.full((6, 10), v, np.uint8)) for v in values]
    first.save(path, save_all=True, append_images=rest)


def test_a_stack_is_a_video_of_its_pages(tmp_path):
    write_stack(tmp_path / "movie0" / "stack.tif", [10, 20, 30])
    write_stack(tmp_path / "movie1" / "stack.tiff", [40, 50])
    source = VideoFolders(tmp_path)
    assert [(v.video_id, len(v.frames)) for v in source.videos] == [("movie0", 3), ("movie1", 2)]
    assert source.warnings == []
    assert "stack.tif" in source.notes[0]
    found = [source.read_picture(source.videos[0], t)[0, 0, 0] for t in (2, 0, 1)]
    assert found == [30, 10, 20]


def test_stacks_side_by_side_are_a_video_each(tmp_path):
    for name in ("b", "a"):
        write_stack(tmp_path / f"{name}.tif", [10, 20])
    assert [v.video_id for v in VideoFolders(tmp_path).videos] == ["a", "b"]
    (video,) = VideoFolders(tmp_path / "a.tif").videos
    assert (video.video_id, len(video.frames)) == ("a", 2)
    make_frames(tmp_path, ["c.tif"], size=(6, 10))
    assert "files of many pages (a.tif, b.tif) beside other pictures" in fails(tmp_path)


def test_films_are_videos(tmp_path):
    write_film(tmp_path / "b.mp4", 5)
    write_film(tmp_path / "a.mp4", 3)
    make_frames(tmp_path / "pictures", ["1.png", "2.png"])
    source = VideoFolders(tmp_path)
    assert [(v.video_id, len(v.frames)) for v in source.videos] == [
        ("pictures", 2),
        ("a", 3),
        ("b", 5),
    ]
    assert abs(source.read_picture(source.videos[2], 4).astype(int) - level(4)).max() <= 6
    (video,) = VideoFolders(tmp_path / "a.mp4").videos
    assert video.video_id == "a"
    data = MadeUpVideos(tmp_path / "b.mp4")  # and with objects over them
    assert data.read_masks(data.videos[0], 0, 1)[1].any()


def test_one_scale_for_all_frames_of_a_video(tmp_path):
    """The same value is the same grey on each frame, and a narrow range becomes a wide one."""
    rng = np.random.default_rng(0)
    for name, low in (("a", 7000), ("b", 20000)):
        (tmp_path / name).mkdir()
        for t in range(4):
            values = rng.integers(low, low + 100, (40, 40)).astype(np.uint16)
            values[:8] = low + 200 * t  # brighter from frame to frame
            values[20:24] = low + 600
            Image.fromarray(values).save(tmp_path / name / f"{t}.png")
    source = VideoFolders(tmp_path)
    for video in source.videos:
        pictures = np.stack([source.read_picture(video, t)[..., 0] for t in range(4)])
        assert len(set(pictures[:, 21, 5].tolist())) == 1
        assert pictures[0, 21, 5] - pictures[0, 30].mean() > 200
        assert (np.diff(pictures[:, 3, 3].astype(int)) > 50).all()
    assert len(source.notes) == 2
    assert "more than 8 bits, 7000 is black and 7600 white" in source.notes[0]
    assert "dataset.intensity_range" in source.notes[0]
    source.scale_levels((7000.0, 8000.0))
    assert source.read_picture(source.videos[0], 0)[21, 5, 0] == 153
    assert ["8000 white" in note for note in source.notes] == [True]
    source.scale_levels("full")
    assert source.read_picture(source.videos[0], 0)[21, 5, 0] == round(7600 / 257)
    assert source.notes == []


def test_a_scale_can_be_set_and_must_be_one(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    raw = {"dataset_type": "video", "data_path": str(tmp_path), "intensity_range": [7000, 8000]}
    assert build(DatasetConfig, raw, "dataset").intensity_range == (7000, 8000)
    for wrong in ([5, 5], "none", [1]):
        with pytest.raises(UserError, match="intensity_range"):
            build(DatasetConfig, raw | {"intensity_range": wrong}, "dataset")


# The order of frames


@pytest.mark.parametrize(
    "ordered",
    [
        ["760577.25", "760577.375", "760577.5", "760578.0", "760578.125"],
        ["f_9.5", "f_10", "f_10.25"],
        ["0.9", "0.95", "1.0", "1.05"],
        ["1.8", "1.9", "1.10", "1.11", "2.1"],  # the tenth frame of shot 1
        ["a1.5", "a1.25", "b1.1"],  # other names: as people count
        ["frame_2", "frame_10"],
    ],
)
def test_numbers_with_a_fraction_are_numbers(tmp_path, ordered):
    if ordered[0] == "a1.5":
        ordered = ["a1.5", "a1.25", "b1.1"]
    make_frames(tmp_path / "a", [f"{name}.png" for name in reversed(ordered)])
    (video,) = VideoFolders(tmp_path).videos
    assert [frame.path.stem for frame in video.frames] == ordered


def test_the_same_number_in_two_spellings_is_told(tmp_path):
    make_frames(tmp_path / "a", ["1.5.png", "1.50.png", "1.75.png"])
    assert "1.5.png and 1.50.png have the same place in the order" in fails(tmp_path)


def test_two_videos_do_not_share_files(tmp_path):
    make_frames(tmp_path / "a", ["1.png", "2.png"])
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "videos 'a' and 'b' share 2 pictures" in fails(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    assert "videos 'a' and 'b' share 2 pictures" in fails(tmp_path)
