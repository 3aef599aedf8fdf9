import shutil

import pytest
from conftest import SHARED, make_frames
from PIL import Image

from sam2train.data_videos import VideoFolders
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
