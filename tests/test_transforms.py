import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from sam2train.config import ConfigError, build
from sam2train.transforms import (
    MEAN,
    STD,
    AugmentConfig,
    augment,
    normalise,
    resize_frame,
    resize_image,
    resize_mask,
    resize_mask_smoothly,
    resize_mask_to_paint,
)

GEOMETRY = {
    "horizontal_flip": {"horizontal_flip": 1.0},
    "vertical_flip": {"vertical_flip": 1.0},
    "degrees": {"degrees": 40.0},
    "shear": {"shear": 20.0},
    "crop": {"crop_scale": 0.4},
    "all": {"horizontal_flip": 0.5, "degrees": 25.0, "shear": 20.0, "crop_scale": 0.6},
}


def clip(num_frames=3, size=(64, 64)):
    """Frames whose red channel is the first object and whose green one is the second.

    Frames differ by nothing, so that whatever is done to them alike leaves them alike.
    """
    masks = np.zeros((num_frames, 2, *size), bool)
    masks[:, 0, 12:34, 10:30] = True
    masks[:, 1, 30:54, 28:58] = True
    images = np.zeros((num_frames, *size, 3), np.uint8)
    images[..., :2] = masks.transpose(0, 2, 3, 1) * 255
    return images, masks


def run(seed=0, images_and_masks=None, **settings):
    images, masks = images_and_masks or clip()
    return augment(images, masks, AugmentConfig(**settings), np.random.default_rng(seed))


def grown(mask):
    """A mask with a rim of two pixels."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


# Resize


def test_a_mask_shrinks_by_area():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = True  # a quarter of the first pixel
    mask[0:2, 2] = True  # half of the second
    mask[2:4, 0:2] = True  # the third
    expected = [[False, True], [True, False]]
    np.testing.assert_array_equal(resize_mask(mask, (2, 2)), expected)


@settings(max_examples=100)
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda shape: arrays(bool, shape)),
    st.data(),
)
def test_a_mask_shrinks_by_the_area_in_fractions(mask, data):
    """Exactly half is set, whatever the two sizes; worked out with whole numbers."""
    size = tuple(data.draw(st.integers(1, side)) for side in mask.shape)
    fine = np.kron(mask, np.ones(size, int))  # both grids fit this one
    cells = fine.reshape(size[0], mask.shape[0], size[1], mask.shape[1]).sum(axis=(1, 3))
    expected = 2 * cells >= mask.size
    resized = resize_mask(mask, size)
    if expected.any():
        np.testing.assert_array_equal(resized, expected)
    else:
        assert resized.sum() == mask.any()
        assert not mask.any() or cells[resized] == cells.max()


def test_each_side_is_resized_in_its_own_way():
    mask = np.zeros((2, 40), bool)
    mask[1, ::8] = True  # 1 pixel of 8: below one half wherever it falls
    mask[0, 16:] = True
    expected = np.zeros((8, 5), bool)  # each row four times, 8 columns in one
    expected[:4, 2:] = True
    np.testing.assert_array_equal(resize_mask(mask, (8, 5)), expected)


def test_a_mask_grows_with_straight_edges_and_without_the_tips_of_its_corners():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    expected = np.kron(mask, np.ones((3, 3))) > 0
    expected[np.ix_([3, 8], [6, 14])] = False
    np.testing.assert_array_equal(resize_mask(mask, (12, 18)), expected)


def test_a_thin_object_keeps_a_pixel():
    mask = np.zeros((90, 160), bool)
    mask[70, 130:133] = True
    resized = resize_mask(mask, (9, 16))
    assert np.argwhere(resized).tolist() == [[7, 13]]
    assert not resize_mask(np.zeros((90, 160), bool), (9, 16)).any()


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(lambda shape: arrays(bool, shape)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_a_resized_mask_has_its_size_and_is_empty_or_full_where_the_mask_is(mask, size):
    resized = resize_mask(mask, size)
    assert resized.shape == size
    assert resized.dtype == bool
    assert resized.any() == mask.any()
    assert resized.all() or not mask.all()


def test_a_mask_of_its_size_is_left_alone():
    mask = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(resize_mask(mask, (5, 5)), mask)


def test_frames_are_stretched_as_by_the_video_predictor_of_sam2():
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((16, 16)))
    np.testing.assert_array_equal(resize_image(image, (16, 16)), expected)
    np.testing.assert_array_equal(resize_image(image, (20, 33)), image)


@pytest.mark.parametrize("size", [(64, 64), (100, 200), (119, 90)])
def test_frames_of_the_loader_are_those_of_the_predictor_but_for_rounding(size):
    image = photograph((120, 214))
    found, expected = resize_frame(image, size).astype(int), resize_image(image, size)
    assert found.shape == (*size, 3)
    assert 0 <= np.abs(found - expected).max() <= 2
    assert (found != expected).mean() < 0.02


def test_frames_that_grow_or_stay_are_those_of_the_predictor():
    image = photograph((60, 80))
    for size in ((60, 80), (61, 40), (90, 200)):
        np.testing.assert_array_equal(resize_frame(image, size), resize_image(image, size))


def photograph(size):
    """Smooth shapes, edges and a little noise."""
    rng = np.random.default_rng(4)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)).copy()
    cv2.circle(image, (size[1] // 2, size[0] // 2), size[0] // 4, (250, 20, 30), -1)
    return np.clip(image.astype(int) + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)


def test_frame_and_mask_stay_together_when_resized():
    mask = cv2.circle(np.zeros((120, 214), np.uint8), (90, 50), 35, 1, -1).astype(bool)
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    for size in ((64, 64), (200, 96), (300, 300)):
        assert overlap(resize_image(image, size)[..., 0] > 127, resize_mask(mask, size)) > 0.97


# Normalise


def test_normalise_by_hand():
    images = np.zeros((2, 4, 6, 3), np.uint8)
    images[1, 2, 5] = (255, 128, 0)
    normalised = normalise(images)
    assert normalised.shape == (2, 3, 4, 6)
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous()
    expected = (np.array([1, 128 / 255, 0]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalised[1, :, 2, 5], expected, rtol=1e-5)
    np.testing.assert_allclose(normalised[0, :, 0, 0], -MEAN / STD, rtol=1e-5)


# Augment


def test_off_changes_nothing_and_draws_nothing():
    images, masks = clip()
    rng = np.random.default_rng(0)
    out = augment(images, masks, AugmentConfig(), rng)
    assert out[0] is images
    assert out[1] is masks
    assert rng.random() == np.random.default_rng(0).random()


def test_a_chance_of_one_flips_exactly():
    images, masks = clip()
    flipped, flipped_masks = run(horizontal_flip=1.0)
    np.testing.assert_array_equal(flipped, images[:, :, ::-1])
    np.testing.assert_array_equal(flipped_masks, masks[..., ::-1])
    flipped, flipped_masks = run(vertical_flip=1.0)
    np.testing.assert_array_equal(flipped, images[:, ::-1])
    np.testing.assert_array_equal(flipped_masks, masks[:, :, ::-1])


def test_half_a_chance_flips_about_half_of_the_clips():
    _, masks = clip(1)
    flips = sum((run(seed, horizontal_flip=0.5)[1][0] != masks[0]).any() for seed in range(60))
    assert 15 < flips < 45


@pytest.mark.parametrize("settings", GEOMETRY.values(), ids=GEOMETRY.keys())
@pytest.mark.parametrize("seed", range(3))
def test_frames_and_masks_move_together(settings, seed):
    images, masks = run(seed, **settings)
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == np.uint8
    assert masks.shape == (3, 2, 64, 64)
    assert masks.dtype == bool
    for channel in (0, 1):
        shown, mask = images[0, ..., channel] > 127, masks[0, channel]
        assert not (shown & ~grown(mask)).any()  # they agree up to 2 px
        assert not (mask & ~grown(shown)).any()


@pytest.mark.parametrize("settings", GEOMETRY.values(), ids=GEOMETRY.keys())
def test_all_frames_of_a_clip_move_alike(settings):
    images, masks = run(1, **settings)
    before = clip()[1]
    assert (masks != before).any()
    assert all((image == images[0]).all() for image in images)
    assert all((mask == masks[0]).all() for mask in masks)


def test_colours_of_the_clip_change_alike_and_masks_do_not():
    shades = np.full((3, 8, 8, 3), (90, 140, 60), np.uint8)
    masks = np.ones((3, 1, 8, 8), bool)
    settings = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5}
    images, after = run(3, (shades, masks), **settings)
    assert (images[0] != shades[0]).any()
    assert all((image == images[0]).all() for image in images)
    np.testing.assert_array_equal(after, masks)


def test_colours_of_each_frame_change_apart():
    shades = np.full((3, 8, 8, 3), (90, 140, 60), np.uint8)
    masks = np.ones((3, 1, 8, 8), bool)
    images, after = run(3, (shades, masks), frame_brightness=0.5)
    assert len({image.tobytes() for image in images}) == 3
    np.testing.assert_array_equal(after, masks)


def test_greyscale_is_for_the_whole_clip():
    shades = np.full((3, 8, 8, 3), (90, 140, 60), np.uint8)
    images, _ = run(0, (shades, np.ones((3, 1, 8, 8), bool)), greyscale=1.0)
    assert (images == images[..., :1]).all()


def test_the_same_draw_gives_the_same_clip():
    settings = GEOMETRY["all"] | {"brightness": 0.3, "frame_contrast": 0.2}
    first, second, other = (run(seed, **settings) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != other[0]).any()


def test_the_global_generators_are_untouched(monkeypatch):
    def refuse(*args):
        raise AssertionError("a CUDA generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    run(0, **GEOMETRY["all"], brightness=0.3, frame_brightness=0.3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_the_global_generators_have_no_say():
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            results.append(run(7, **GEOMETRY["all"]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_input_is_not_written_to():
    images, masks = clip()
    copies = images.copy(), masks.copy()
    augment(
        images,
        masks,
        AugmentConfig(horizontal_flip=1.0, brightness=0.5, frame_brightness=0.5),
        np.random.default_rng(0),
    )
    np.testing.assert_array_equal(images, copies[0])
    np.testing.assert_array_equal(masks, copies[1])


@pytest.mark.parametrize(
    "key", ["horizontal_flip", "degrees", "shear", "brightness", "greyscale", "reverse"]
)
@pytest.mark.parametrize("value", [-0.1, 181.0])
def test_ranges_are_checked(key, value):
    with pytest.raises(ConfigError, match=key):
        build(AugmentConfig, {key: value}, "augment")


def test_what_a_turn_leaves_free_is_filled_as_in_sam2():
    """With the mean colour (123, 116, 103), and with no object."""
    images = np.full((2, 32, 32, 3), 200, np.uint8)
    masks = np.ones((2, 1, 32, 32), bool)
    turned, left = augment(images, masks, AugmentConfig(degrees=45.0), np.random.default_rng(0))
    free = (turned == (123, 116, 103)).all(-1)
    assert 20 < free.sum() < free.size / 2
    assert not left[:, 0][free].any()
    assert (turned[left[:, 0]] >= 103).all()


def test_masks_for_pictures_keep_their_corners_or_become_smooth():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    grown = np.zeros((8, 8), bool)
    grown[2:6, 2:6] = True
    np.testing.assert_array_equal(resize_mask_to_paint(mask, (8, 8)), grown)
    np.testing.assert_array_equal(resize_mask_to_paint(mask, (2, 2)), np.full((2, 2), True))
    np.testing.assert_array_equal(resize_mask_to_paint(grown, (4, 4)), mask)
    pixel = np.zeros((4, 4), bool)
    pixel[1, 1] = True
    square = np.zeros((16, 16), bool)
    square[4:8, 4:8] = True
    np.testing.assert_array_equal(resize_mask_to_paint(pixel, (16, 16)), square)
    smooth = resize_mask_smoothly(pixel, (16, 16))
    assert (smooth & ~square).sum() == 0
    assert smooth[5:8, 5:8].all()
    assert not smooth[4, 4]  # bicubic rounds a corner off
    np.testing.assert_array_equal(resize_mask_smoothly(mask, (4, 4)), mask)


def test_an_object_that_would_vanish_stays_in_the_picture():
    mask = np.zeros((90, 160), bool)
    mask[40, 80] = True
    expected = np.zeros((9, 16), bool)
    expected[4, 8] = True
    np.testing.assert_array_equal(resize_mask_to_paint(mask, (9, 16)), expected)
    assert not resize_mask_to_paint(np.zeros((90, 160), bool), (9, 16)).any()
