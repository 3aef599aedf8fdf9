import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SIZE as FILM_SIZE
from PIL import Image

from sam2train import data_pictures
from sam2train.data_pictures import (
    Film,
    count_pages,
    read_film_header,
    read_header,
    read_image,
    read_levels,
)
from sam2train.errors import UserError
from sam2train.transforms import resize_image

ORIENTATION = 0x0112


def ramp(height=6, width=10):
    """(H, W, 3) uint8 in which every pixel differs."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 20
    pixels[..., 1] = np.arange(height)[:, None] * 30
    return pixels


def save(path, pixels, orientation=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    image.save(path, **options)
    return path


# Pictures


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", ramp(), **options)
    np.testing.assert_array_equal(read_image(path), ramp())
    assert read_header(path) == ((6, 10), (6, 10), False)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_close(tmp_path, progressive):
    pixels = np.full((16, 24, 3), (200, 60, 30), np.uint8)
    path = save(tmp_path / "a.jpg", pixels, progressive=progressive, quality=95)
    assert np.abs(read_image(path).astype(int) - pixels).max() <= 3


def test_one_grey_becomes_three_equal_channels(tmp_path):
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
    for mode in ("L", "LA"):
        pixels = read_image(save(tmp_path / f"{mode}.png", Image.fromarray(grey).convert(mode)))
        np.testing.assert_array_equal(pixels, np.stack([grey] * 3, axis=-1))
    bilevel = read_image(save(tmp_path / "1.png", Image.fromarray(grey >= 120)))
    np.testing.assert_array_equal(bilevel[..., 0], (grey >= 120) * 255)


def test_transparency_is_dropped(tmp_path):
    image = Image.fromarray(ramp()).convert("RGBA")
    image.putalpha(128)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", image)), ramp())


def test_palette_with_transparent_entries_is_read_without_a_warning(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (250, 10, 40)
    image = Image.fromarray(pixels).quantize(2)
    path = save(tmp_path / "a.png", image, transparency=bytes([0, 128]))
    np.testing.assert_array_equal(read_image(path), pixels)


def test_16_bit_grey_keeps_its_shades(tmp_path):
    grey = np.linspace(0, 65535, 60).reshape(6, 10).astype(np.uint16)
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(grey)))
    np.testing.assert_allclose(pixels[..., 1], grey / 257, atol=0.5)


def test_a_dark_16_bit_frame_stays_dark_among_its_neighbours(tmp_path):
    dark = np.full((4, 4), 200, np.uint16)  # of 65535: a fade to black
    assert read_image(save(tmp_path / "a.png", Image.fromarray(dark))).max() == 1


def test_cmyk_is_converted(tmp_path):
    pixels = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    path = save(tmp_path / "a.jpg", Image.fromarray(pixels).convert("CMYK"), quality=95)
    assert np.abs(read_image(path).astype(int) - pixels).max() <= 6


# EXIF: orientation 6 is "turn by 90 degrees clockwise to show"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_header_has_the_size_before_and_after_the_orientation(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", ramp(), orientation=6)
    assert read_header(path) == ((6, 10), (10, 6), True)


def test_a_tiff_is_turned_by_pillow_and_has_one_size(tmp_path):
    path = save(tmp_path / "a.tiff", ramp(), orientation=6)
    assert read_header(path) == ((10, 6), (10, 6), False)
    np.testing.assert_array_equal(read_image(path, (10, 6)), np.rot90(ramp(), -1))


def test_orientations_that_keep_the_size_are_told_too(tmp_path):
    assert read_header(save(tmp_path / "a.jpg", ramp(), orientation=3)) == ((6, 10), (6, 10), True)
    assert read_header(save(tmp_path / "b.jpg", ramp(), orientation=1)) == ((6, 10), (6, 10), False)


def test_the_expected_size_decides_whether_a_picture_is_turned(tmp_path):
    path = save(tmp_path / "a.png", ramp(), orientation=6)
    np.testing.assert_array_equal(read_image(path, (6, 10)), ramp())
    np.testing.assert_array_equal(read_image(path, (10, 6)), np.rot90(ramp(), -1))
    np.testing.assert_array_equal(read_image(path), np.rot90(ramp(), -1))


def test_a_header_is_read_without_decoding_a_png(tmp_path):
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8"))
    path.write_bytes(path.read_bytes()[:200])
    assert read_header(path).stored == (64, 64)
    with pytest.raises(UserError, match="damaged or cut short"):
        read_image(path)


# Broken pictures


def test_another_size_than_expected_is_an_error(tmp_path):
    path = save(tmp_path / "a.png", ramp())
    with pytest.raises(UserError, match=r"a\.png: the picture is 10x6, expected 9x6"):
        read_image(path, (6, 9))


def test_a_truncated_jpeg_is_an_error_not_half_a_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")
    path = save(tmp_path / "a.jpg", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_header(path).stored == (64, 64)
    with pytest.raises(UserError, match=r"a\.jpg: is damaged or cut short"):
        read_image(path)


@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_a_jpeg_is_decoded_no_larger_than_it_must_be(tmp_path, orientation):
    """At a fraction of its size that still has enough pixels, turned as the whole one is."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((328, 203), Image.Resampling.BICUBIC))
    path = save(tmp_path / "a.jpg", pixels, orientation=orientation)
    for size in (None, (203, 328), (328, 203) if orientation == 6 else (203, 328)):
        whole = read_image(path, size)
        for least in ((60, 90), (102, 160), (30, 30), (300, 300), (203, 328)):
            small = read_image(path, size, least=least)
            scale = next(
                k for k in (8, 4, 2, 1) if k == 1 or min(np.array(whole.shape[:2]) // least) >= k
            )
            assert small.shape[:2] == tuple(-(-side // scale) for side in whole.shape[:2])
            difference = resize_image(whole, small.shape[:2]).astype(int) - small
            assert np.abs(difference).mean() < 1.5


def test_a_reduced_jpeg_is_checked_like_a_whole_one(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")
    path = save(tmp_path / "a.jpg", noise)
    with pytest.raises(UserError, match=r"the picture is 64x64, expected 65x64"):
        read_image(path, (64, 65), least=(8, 8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.jpg: is damaged or cut short"):
        read_image(path, (64, 64), least=(8, 8))


@pytest.mark.parametrize("read", [read_header, read_image])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>404</title>", "is an HTML page"),
        (b"<HTML><body>", "is an HTML page"),
        (b"track 1, frame 2", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00", "is (damaged|not a picture)"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "is (damaged|not a picture)"),
    ],
)
def test_what_is_no_picture_says_what_it_is(tmp_path, read, content, message):
    path = tmp_path / "frame.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"frame\.jpg: .*{message}"):
        read(path)


@pytest.mark.parametrize("read", [read_header, read_image])
def test_missing_files_and_folders_are_named(tmp_path, read):
    with pytest.raises(UserError, match=r"a\.jpg: no such file"):
        read(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", ramp())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"a\.png: cannot be read \(Permission denied\)"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "bmp"])
def test_whatever_damages_a_file_is_a_users_error(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", ramp(), orientation=None if suffix == "bmp" else 6)
    good = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        bad = good.copy()
        # Half of the damage in the first bytes, where headers are.
        places = rng.integers(0, rng.choice([64, len(bad)]), size=3)
        bad[places] = rng.integers(0, 256, size=3)
        path.write_bytes(bad.tobytes())
        try:
            pixels = read_image(path)
        except (UserError, UserWarning):  # Pillow warns of odd EXIF data
            refused += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
    assert refused > 5


# Films


def level(t):
    """The grey of frame t of `write_film`."""
    return 20 + 20 * t


def write_film(path, num_frames=10):
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, FILM_SIZE[::-1])
    for t in range(num_frames):
        film.write(np.full((*FILM_SIZE, 3), level(t), np.uint8))
    film.release()


def test_frames_of_a_film_in_any_order(tmp_path):
    write_film(tmp_path / "a.mp4", 12)
    write_film(tmp_path / "b.mp4", 3)
    film = Film()
    for name, t in [("a", 0), ("a", 1), ("a", 7), ("a", 3), ("b", 2), ("a", 11), ("a", 11)]:
        pixels = film.read(tmp_path / f"{name}.mp4", t)
        assert pixels.shape == (*FILM_SIZE, 3)
        assert abs(pixels.astype(int) - level(t)).max() <= 6
    with pytest.raises(UserError, match=r"b\.mp4: ends or is damaged at frame 3"):
        film.read(tmp_path / "b.mp4", 5)
    assert pickle.loads(pickle.dumps(film)).read(tmp_path / "a.mp4", 2)[0, 0, 0] > 0


@pytest.mark.parametrize("kind", ["mp4", "avi", "wrong"])
def test_a_frame_costs_the_same_wherever_it_lies(tmp_path, monkeypatch, kind):
    """The wanted frame to the last bit, in any order; in an MP4 after a few decoded frames."""
    suffix = "avi" if kind == "avi" else "mp4"
    path, rng = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    code = cv2.VideoWriter_fourcc(*("MJPG" if kind == "avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), code, 24, FILM_SIZE[::-1])
    for t in range(240):
        picture = np.full((*FILM_SIZE, 3), t, np.uint8)
        picture[: t % 40 + 1, : t % 50 + 1] = rng.integers(0, 256, 3)
        writer.write(picture)
    writer.release()
    if kind == "wrong":  # the head of the file and the decoder do not agree
        times = data_pictures._frame_times(path)
        monkeypatch.setattr(data_pictures, "_frame_times", lambda path: times * 1.5)
    whole = Film()
    expected = [whole.read(path, t) for t in range(240)]
    grabs = []

    class Counting:
        def __init__(self, *arguments):
            self.capture = VideoCapture(*arguments)

        def grab(self):
            grabs.append(1)
            return self.capture.grab()

        def __getattr__(self, name):
            return getattr(self.capture, name)

    VideoCapture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    film, most = Film(), 0
    for t in (200, 30, 239, 0, 100, 104, 108, 99, 17, 16, 15, 231):
        grabs.clear()
        np.testing.assert_array_equal(film.read(path, t), expected[t])
        most = max(most, len(grabs))
    assert (most < 40) == (kind == "mp4")


def test_threads_read_different_films_at_the_same_time(tmp_path):
    for name in "abcd":
        write_film(tmp_path / f"{name}.mp4", 12)
    film = Film()

    def read(name):
        return [film.read(tmp_path / f"{name}.mp4", t)[0, 0, 0] for t in range(12)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, "abcd" * 5):
            assert np.abs(np.array(found, int) - level(np.arange(12))).max() <= 6


def test_the_header_of_a_film(tmp_path):
    write_film(tmp_path / "a.mp4", 12)
    assert read_film_header(tmp_path / "a.mp4") == (FILM_SIZE, 12)
    (tmp_path / "b.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"b\.mp4: is no film that OpenCV can read"):
        read_film_header(tmp_path / "b.mp4")


def hide_frames(path, num_hidden, num_frames, fps=24):
    """Give an MP4 an edit list that hides its first frames, as cutting without encoding does."""
    content = bytearray(path.read_bytes())
    moov = content.rindex(b"moov") - 4
    assert moov + int.from_bytes(content[moov : moov + 4], "big") == len(content)  # at the end
    film_scale = int.from_bytes(content[content.index(b"mvhd") + 16 :][:4], "big")
    scale = int.from_bytes(content[content.index(b"mdhd") + 16 :][:4], "big")
    edit = struct.pack(
        ">IIIiI",
        0,
        1,
        round((num_frames - num_hidden) / fps * film_scale),
        round(num_hidden / fps * scale),
        0x00010000,
    )
    elst = struct.pack(">I4s", 8 + len(edit), b"elst") + edit
    new = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    old = content.find(b"edts")
    trak = content.index(b"trak") - 4
    if old >= 0:
        old -= 4
        size = int.from_bytes(content[old : old + 4], "big")
        content[old : old + size] = new
        grown = len(new) - size
    else:
        after = trak + 8 + int.from_bytes(content[trak + 8 : trak + 12], "big")  # behind tkhd
        content[after:after] = new
        grown = len(new)
    for box in (moov, trak):
        size = int.from_bytes(content[box : box + 4], "big")
        content[box : box + 4] = (size + grown).to_bytes(4, "big")
    path.write_bytes(content)


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    path = tmp_path / "a.mp4"
    write_film(path, 12)
    hide_frames(path, 4, 12)
    capture = cv2.VideoCapture(str(path))
    shown = 0
    while capture.grab():
        shown += 1
    assert shown == 8
    assert read_film_header(path) == (FILM_SIZE, 8)
    assert abs(Film().read(path, 0).astype(int) - level(4)).max() <= 6
    hide_frames(path, 0, 12)  # an edit list that hides nothing, as most films have
    assert read_film_header(path) == (FILM_SIZE, 12)


def test_other_containers_are_counted(tmp_path):
    film = cv2.VideoWriter(
        str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 24, FILM_SIZE[::-1]
    )
    for t in range(7):
        film.write(np.full((*FILM_SIZE, 3), level(t), np.uint8))
    film.release()
    content = (tmp_path / "a.avi").read_bytes()
    at = content.index(b"avih") + 8 + 16  # how many frames the head says there are
    (tmp_path / "a.avi").write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
    assert read_film_header(tmp_path / "a.avi") == (FILM_SIZE, 7)


def test_pages_and_levels(tmp_path):
    pages = [Image.fromarray(np.full((6, 10), 1000 + 100 * k, np.uint16)) for k in range(3)]
    path = tmp_path / "a.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert count_pages(path) == 3
    assert count_pages(save(tmp_path / "b.png", Image.fromarray(ramp()))) == 1
    found = [read_image(path, page=k, levels=(1000, 1200))[0, 0, 0] for k in range(3)]
    assert np.abs(np.array(found, int) - [0, 127.5, 255]).max() <= 0.5
    assert read_levels(path, 2).max() == 1200
    assert read_levels(tmp_path / "b.png") is None
    mixed = [pages[0], pages[1].resize((4, 4))]  # a picture and its thumbnail
    mixed[0].save(tmp_path / "c.tif", save_all=True, append_images=mixed[1:])
    assert count_pages(tmp_path / "c.tif") == 1


def test_colours_of_a_film_are_in_the_right_order(tmp_path):
    film = cv2.VideoWriter(
        str(tmp_path / "red.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 24, FILM_SIZE[::-1]
    )
    film.write(np.full((*FILM_SIZE, 3), (0, 0, 250), np.uint8))  # OpenCV's order: blue, green, red
    film.release()
    red, green, blue = Film().read(tmp_path / "red.mp4", 0).mean(axis=(0, 1))
    assert red > 200
    assert max(green, blue) < 50
