"""What pixel values of masks mean: the same two objects, written in the ways people write them."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_mask_values import decide
from sam2train.data_masks import read_facts
from sam2train.data_vos import VosVideos
from sam2train.errors import UserError

SIZE = (64, 96)
NUM_FRAMES = 4
DAVIS = [0, 0, 0, 128, 0, 0, 0, 128, 0]
DAVIS_COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
COLOURS = np.array([(0, 0, 0), (230, 20, 60), (30, 200, 255)], np.uint8)
ON_WHITE = np.array([(255, 255, 255), (230, 20, 60), (30, 200, 255)], np.uint8)


def make_ids(t):
    """(H, W) uint8: 1 on a box of 22x18, 2 on an ellipse, moving apart."""
    ids = np.zeros(SIZE, np.uint8)
    ids[8:26, 30 - 3 * t : 52 - 3 * t] = 1
    rows, columns = np.indices(SIZE)
    ids[(rows - 46) ** 2 / 100 + (columns - 50 - 3 * t) ** 2 / 150 < 1] = 2
    return ids


TRUTH = np.array([make_ids(t) for t in range(NUM_FRAMES)])


def write(root, change, frames=range(NUM_FRAMES)):
    """A video whose masks are what `change` makes of (H, W) ids and the frame."""
    for t in range(NUM_FRAMES):
        for top in ("JPEGImages", "Annotations"):
            (root / top / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / f"JPEGImages/a/{t:05d}.png")
        if t in frames:
            mask = change(TRUTH[t], t)
            mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            mask.save(root / f"Annotations/a/{t:05d}.png")
    return root


def load(root, **options):
    return ClipDataset(VosVideos(root, **options), clip_settings(SIZE))


def masks_of(data):
    """Object id -> (T, H, W) bool."""
    (video,) = data.videos
    return {
        o: np.array([data.read_mask(video, t, o) for t in range(NUM_FRAMES)])
        for o in video.object_ids
    }


def palette(ids, colours):
    image = Image.fromarray(ids).convert("L")
    image.putpalette(colours)
    return image


def lut(*values, kind=np.uint8):
    return lambda ids, t: np.array(values, kind)[ids]


def jpeg(image, quality=90):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).copy()


def blurred(image):
    """Drawn at four times the size with soft edges, and made small: edges of many levels."""
    large = image.resize((4 * SIZE[1], 4 * SIZE[0]), Image.Resampling.NEAREST)
    return large.filter(ImageFilter.GaussianBlur(3)).resize(SIZE[::-1], Image.Resampling.BILINEAR)


PACKED = {k: int(COLOURS[k].astype(int) @ [1, 256, 65536]) for k in (1, 2)}


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        pytest.param(lambda ids, t: palette(ids, DAVIS), (1, 2), id="palette"),
        pytest.param(lambda ids, t: ids, (1, 2), id="grey ids"),
        pytest.param(lut(0, 127, 255), (127, 255), id="127 and 255"),
        pytest.param(lut(0, 128, 255), (128, 255), id="128 and 255"),
        pytest.param(lut(0, 85, 170), (85, 170), id="85 and 170"),
        pytest.param(lut(0, 85, 255), (85, 255), id="85 and 255"),
        pytest.param(lut(0, 64, 255), (64, 255), id="64 and 255"),
        pytest.param(lut(0, 254, 255), (254, 255), id="ids that leave no room for void"),
        pytest.param(lut(0, 300, 600, kind=np.uint16), (300, 600), id="16 bits"),
        pytest.param(lut(0, 32767, 65535, kind=np.uint16), (32767, 65535), id="16 bits, spread"),
        pytest.param(lut(0, 1001, 255, kind=np.uint16), (1001, 255), id="255 among large ids"),
        pytest.param(lambda ids, t: DAVIS_COLOURS[ids], (1, 2), id="colours of DAVIS"),
        pytest.param(lambda ids, t: COLOURS[ids], tuple(PACKED.values()), id="other colours"),
        pytest.param(
            lambda ids, t: Image.fromarray(COLOURS[ids]).convert("RGBA"),
            tuple(PACKED.values()),
            id="with transparency",
        ),
        pytest.param(lambda ids, t: ON_WHITE[ids], tuple(PACKED.values()), id="on white"),
        pytest.param(
            lambda ids, t: np.array([(0, 0, 0), (7, 3, 0), (9, 3, 0)], np.uint8)[ids],
            (7 + 256 * 3, 9 + 256 * 3),
            id="panoptic ids",
        ),
        pytest.param(
            lambda ids, t: Image.fromarray(DAVIS_COLOURS[ids]).quantize(3, dither=0),
            (1, 2),
            id="quantize",
        ),
        pytest.param(
            lambda ids, t: palette(np.roll([0, 1, 2], t).astype(np.uint8)[ids], _rolled(t)),
            (1, 2),
            id="palettes in another order on each frame",
        ),
        pytest.param(
            lambda ids, t: palette(lut(2, 0, 1)(ids, t), [128, 0, 0, 0, 128, 0, 0, 0, 0]),
            (1, 2),
            id="index 2 is the background",
        ),
        pytest.param(
            lambda ids, t: palette(ids, [255, 255, 255, 128, 0, 0, 0, 128, 0]),
            (1, 2),
            id="a white index 0",
        ),
        pytest.param(lambda ids, t: ids + 1, (2, 3), id="grey, 1 is the background"),
        pytest.param(lut(255, 1, 2), (1, 2), id="grey, 255 is the background"),
        pytest.param(
            lambda ids, t: palette(ids, [0, 0, 0] + [7] * 765), (1, 2), id="one colour for all"
        ),
    ],
)
def test_two_objects_however_they_are_written(tmp_path, change, ids):
    data = load(write(tmp_path, change))
    found = masks_of(data)
    assert set(found) == set(ids)
    assert all(type(object_id) is int for object_id in found)
    for number, object_id in enumerate(ids, start=1):
        np.testing.assert_array_equal(found[object_id], number == TRUTH)
    assert data.warnings == []
    assert len(data.source.notes) == 1
    assert data.source.notes[0].startswith("a: ")
    for t in range(NUM_FRAMES):
        annotations = data.videos[0].frames[t].annotations
        assert [annotations[o].area for o in ids] == [(TRUTH[t] == k).sum() for k in (1, 2)]


def _rolled(t):
    """The palette in which index `np.roll([0, 1, 2], t)[k]` has the colour of object k."""
    colours = np.zeros((3, 3), np.uint8)
    colours[np.roll([0, 1, 2], t)] = DAVIS_COLOURS
    return colours.ravel().tolist()


def test_an_object_that_vanishes_moves_no_other_to_its_palette_index(tmp_path):
    def change(ids, t):
        return Image.fromarray(COLOURS[ids * ((ids != 1) | (t < 2))]).quantize(3, dither=0)

    found = masks_of(load(write(tmp_path, change)))
    np.testing.assert_array_equal(found[PACKED[2]], TRUTH == 2)
    np.testing.assert_array_equal(found[PACKED[1]][:2], TRUTH[:2] == 1)
    assert not found[PACKED[1]][2:].any()


@pytest.mark.parametrize(
    "soften",
    [
        blurred,
        lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        jpeg,
        lambda image: jpeg(image, 98),
    ],
    ids=["drawn large", "blurred", "JPEG", "fine JPEG"],
)
def test_soft_edges_of_one_object_are_cut_at_half(tmp_path, soften):
    soft = [soften(Image.fromarray((TRUTH[t] > 0) * np.uint8(255))) for t in range(NUM_FRAMES)]
    found = masks_of(load(write(tmp_path, lambda ids, t: soft[t])))
    assert list(found) == [1]
    for t in range(NUM_FRAMES):
        np.testing.assert_array_equal(found[1][t], np.asarray(soft[t]) > 127.5)


@pytest.mark.parametrize(
    "colours", [DAVIS_COLOURS, COLOURS, ON_WHITE], ids=["DAVIS", "own", "white"]
)
def test_soft_edges_of_colours_go_to_the_nearer_side(tmp_path, colours):
    found = masks_of(load(write(tmp_path, lambda ids, t: blurred(Image.fromarray(colours[ids])))))
    assert len(found) == 2
    for number, masks in enumerate(found.values(), start=1):
        truth = number == TRUTH
        assert (masks & truth).sum() / (masks | truth).sum() > 0.97


def _void_ring(ids, width):
    grown = cv2.dilate(ids, np.ones((2 * width + 1,) * 2, np.uint8))
    return np.where((grown > 0) & (ids == 0), 255, ids).astype(np.uint8)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("mode", ["grey", "palette", "colours"])
def test_a_ring_of_255_is_void(tmp_path, width, mode):
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = DAVIS_COLOURS, (224, 224, 192)  # that of index 255 in DAVIS

    def change(ids, t):
        ring = _void_ring(ids, width)
        if mode == "palette":
            return palette(ring, table.ravel().tolist())
        return ring if mode == "grey" else table[ring]

    data = load(write(tmp_path, change))
    found = masks_of(data)
    assert list(found) == [1, 2]
    (warning,) = data.warnings
    assert "4 masks with void pixels" in warning
    for t in range(NUM_FRAMES):
        void = _void_ring(TRUTH[t], width) == 255
        np.testing.assert_array_equal(data.read_ignore(data.videos[0], t), void)


def test_10000_beside_ids_of_mots_is_ignored(tmp_path):
    def change(ids, t):
        out = np.array([0, 2001, 1003], np.uint16)[ids]
        out[-6:, -20:] = 10000
        return out

    data = load(write(tmp_path, change))
    assert sorted(masks_of(data)) == [1003, 2001]
    assert data.read_ignore(data.videos[0], 2).sum() == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lut(0, 100, 255), "values 100, 255: 255 may be an object or void"),
        (lut(255, 0, 0), "value 255 lie along the border of all masks"),
        (
            lambda ids, t: Image.fromarray(DAVIS_COLOURS[ids]).convert("P"),
            "dithered masks.*without dithering",
        ),
        (
            lambda ids, t: Image.fromarray(COLOURS[ids]).convert("P"),
            "dithered masks.*without dithering",
        ),
        (
            lambda ids, t: blurred(Image.fromarray(lut(0, 127, 255)(ids, t))),
            "smoothed edges between several levels",
        ),
        (
            lambda ids, t: blurred(Image.fromarray(lut(0, 4, 9)(ids, t))),
            "resized with interpolation",
        ),
        (lambda ids, t: jpeg(Image.fromarray(COLOURS[ids]), 100), "saved as JPEG"),
        (
            lambda ids, t: palette(
                ids, [0, 0, 0, *np.random.default_rng(t).integers(1, 256, 6).tolist()]
            ),
            "palettes differ between frames",
        ),
    ],
    ids=[
        *("100 and 255", "inverted", "dithered", "dithered more", "soft levels", "resized ids"),
        *("JPEG", "random palettes"),
    ],
)
def test_what_may_mean_two_things_is_refused_with_the_setting_that_helps(tmp_path, change, message):
    write(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "Annotations" / "a") in str(caught.value)
    assert "dataset.mask_values" in str(caught.value)


def test_a_photograph_is_no_mask(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, *SIZE, 3), np.uint8)
    write(tmp_path, lambda ids, t: noise[t])
    with pytest.raises(UserError, match=r"mode RGB; .*at most 256 colours.*this one has \d{4}"):
        load(tmp_path)


def test_a_white_line_round_colours_is_void(tmp_path):
    table = np.full((256, 3), 255, np.uint8)
    table[:3] = DAVIS_COLOURS
    data = load(write(tmp_path, lambda ids, t: table[_void_ring(ids, 1)]))
    assert list(masks_of(data)) == [1, 2]
    np.testing.assert_array_equal(
        data.read_ignore(data.videos[0], 1), _void_ring(TRUTH[1], 1) == 255
    )


def test_an_id_that_was_resized_with_interpolation_is_one_object(tmp_path):
    soft = [blurred(Image.fromarray((TRUTH[t] == 1) * np.uint8(5))) for t in range(NUM_FRAMES)]
    found = masks_of(load(write(tmp_path, lambda ids, t: soft[t])))
    assert list(found) == [5]
    for t in range(NUM_FRAMES):
        np.testing.assert_array_equal(found[5][t], np.asarray(soft[t]) > 2.5)


def test_ids_near_white_are_ids(tmp_path):
    def change(ids, t):
        ids = np.array([0, 240, 248], np.uint8)[ids]
        ids[2:6, -12:] = 252
        return ids

    found = masks_of(load(write(tmp_path, change)))
    assert list(found) == [240, 248, 252]
    np.testing.assert_array_equal(found[240], TRUTH == 1)


def test_small_objects_beside_others_stay_objects(tmp_path):
    def change(ids, t):
        ids = ids.copy()
        ids[15:17, 35 - 3 * t : 37 - 3 * t] = 3  # a button on a coat
        return ids

    assert list(masks_of(load(write(tmp_path, change)))) == [1, 2, 3]


@pytest.mark.parametrize(
    ("setting", "change", "areas"),
    [
        ("ids", lut(0, 100, 255), {100: 1}),
        ("colours", lut(0, 100, 255), {100: 1, 255: 2}),
        ("binary", lut(0, 60, 255), {1: 2}),
        ("ids", lambda ids, t: DAVIS_COLOURS[ids], {128: 1, 256 * 128: 2}),
        ("ids", lambda ids, t: palette(lut(1, 0, 2)(ids, t), DAVIS), {1: 0, 2: 2}),
        ("ids", lut(255, 0, 0), {1: 0}),
    ],
)
def test_the_setting_decides(tmp_path, setting, change, areas):
    """The values of `areas` are the ids in TRUTH that an object covers."""
    data = load(write(tmp_path, change), mask_values=setting)
    found = masks_of(data)
    assert set(found) == set(areas)
    for object_id, number in areas.items():
        np.testing.assert_array_equal(found[object_id], number == TRUTH)
    assert "dataset.mask_values" in data.source.notes[0] or setting == "binary"


def test_one_object_of_any_colour(tmp_path):
    data = load(write(tmp_path, lambda ids, t: palette(ids, DAVIS)), mask_values="binary")
    np.testing.assert_array_equal(masks_of(data)[1], TRUTH > 0)


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("ids", [(1,), (1, 2), (3, 5)])
def test_ids_in_a_jpeg_are_refused_whatever_its_name(tmp_path, quality, ids):
    """They come out with other values and on other pixels."""
    mask = np.zeros((96, 128), np.uint8)
    for place, value in enumerate(ids):
        cv2.circle(mask, (35 + 40 * place, 45), 14, value, -1)
    Image.fromarray(mask).save(tmp_path / "00000.png", "JPEG", quality=quality)
    with pytest.raises(UserError, match=r"00000\.png: a JPEG, in which small ids"):
        read_facts(tmp_path / "00000.png")
    Image.fromarray(mask).save(tmp_path / "00000.png")
    assert sorted(decide([read_facts(tmp_path / "00000.png")]).objects) == list(ids)
    Image.fromarray((mask > 0).astype(np.uint8) * 255).save(tmp_path / "00000.png", "JPEG")
    assert len(decide([read_facts(tmp_path / "00000.png")]).objects) == 1
