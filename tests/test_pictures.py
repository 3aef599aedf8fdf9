import io
import itertools
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2train import pictures
from sam2train.pictures import (
    ERRORS,
    NEGATIVE,
    POSITIVE,
    as_jpeg,
    colour,
    comparison,
    draw_errors,
    draw_masks,
    id_mask,
    object_colours,
    paint_prompts,
    pick_frames,
    save_picture,
    to_uint8,
)
from sam2train.transforms import normalise


def square(height, width, top, left, side):
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def prompt(object_id=1, frame_index=0, points=(), labels=(), box=None, mask=None):
    kind = "bbox" if box is not None else "mask" if mask is not None else "point"
    return {
        "object_id": object_id,
        "frame_index": frame_index,
        "type": kind,
        "points": np.array(points, np.float32).reshape(-1, 2),
        "labels": np.array(labels, np.int32),
        "box": None if box is None else np.array(box, np.float32),
        "mask": mask,
    }


def count(picture, rgb):
    return int((picture == np.array(rgb)).all(-1).sum())


def grey(height, width, *, frames=None):
    shape = (height, width, 3) if frames is None else (frames, height, width, 3)
    return np.full(shape, 100, np.uint8)


# Colours


def test_palette_is_distinct_and_fixed_per_index():
    colours = object_colours(24)
    assert colours.shape == (24, 3)
    assert colours.dtype == np.uint8
    assert tuple(colours[1]) == colour(1) == (86, 180, 233)  # Okabe-Ito's sky blue
    np.testing.assert_array_equal(object_colours(5), colours[:5])
    distances = [np.abs(a - b).sum() for a, b in itertools.combinations(colours.astype(int), 2)]
    assert min(distances) >= 30
    assert object_colours(0).shape == (0, 3)


def test_first_objects_differ_for_deuteranopes():
    # Viénot, Brettel and Mollon (1999): linear RGB -> LMS, M replaced, back.
    lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    blind = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    linear = (object_colours(7) / 255) ** 2.2
    seen = np.clip(linear @ (np.linalg.inv(lms) @ blind @ lms).T, 0, 1) ** (1 / 2.2) * 255
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 25


# Arrays


def test_to_uint8_returns_every_pixel_value():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(to_uint8(normalise(pixels).numpy()), pixels)


def test_to_uint8_by_hand_and_clipped():
    images = np.zeros((2, 3, 1, 2), np.float32)
    images[1] = 99.0
    images[0, :, 0, 1] = -99.0
    result = to_uint8(images)
    assert result[0, 0, 0].tolist() == [124, 116, 104]  # 255 * mean
    assert result[0, 0, 1].tolist() == [0, 0, 0]
    assert (result[1] == 255).all()
    with pytest.raises(AssertionError):
        to_uint8(np.zeros((2, 8, 8, 3), np.float32))


def test_id_mask_numbers_by_order_and_first_wins():
    masks = {7: np.array([[1, 1, 0, 0]], bool), 3: np.array([[0, 1, 1, 0]], bool)}
    assert id_mask(masks, [7, 3], (1, 4)).tolist() == [[1, 1, 2, 0]]
    assert id_mask(masks, [3, 7], (1, 4)).tolist() == [[2, 1, 1, 0]]
    assert id_mask(masks, [3], (1, 4)).tolist() == [[0, 1, 1, 0]]
    assert id_mask(masks, [7, 3], (1, 4)).dtype == np.uint8
    with pytest.raises(AssertionError):
        id_mask({1: np.zeros((2, 2), bool), 2: np.zeros((2, 3), bool)}, [1, 2], (2, 2))


# Masks


def test_mask_is_tinted_inside_outlined_and_untouched_outside():
    frame, mask = grey(20, 20), square(20, 20, 5, 5, 10)
    picture = draw_masks(frame, {1: mask}, alpha=0.5)
    assert picture.dtype == np.uint8
    assert (picture[~mask] == 100).all()
    assert tuple(picture[5, 5]) == colour(1)  # the rim: full colour
    assert picture[10, 10].tolist() == [93, 140, 166]  # half of 100 + half of (86, 180, 233)
    assert count(picture, colour(1)) == 4 * 9  # 1 px rim of a 10 x 10 square
    assert (frame == 100).all()
    assert count(draw_masks(frame, {1: mask}, contour=False), colour(1)) == 0


def test_the_outline_has_a_dark_line_inside():
    picture = draw_masks(grey(20, 20), {1: square(20, 20, 5, 5, 10)})
    assert tuple(picture[10, 5]) == colour(1)
    assert max(picture[10, 6]) < 40
    assert min(picture[10, 7]) > 90  # the tint


def test_no_object_has_the_colour_of_an_error():
    """Distances in CIELAB: 2.3 can just be told apart."""

    def lab(colours):
        pixels = np.array(colours, np.float32).reshape(-1, 1, 3) / 255
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[:, 0]

    objects, errors = lab(object_colours(40)), lab(list(ERRORS.values()))
    apart = np.linalg.norm(objects[:, None] - errors[None], axis=-1)
    assert apart.min() > 25
    assert apart[:7].min() > 35  # Okabe and Ito's
    of_errors = np.linalg.norm(errors[:, None] - errors[None], axis=-1)
    assert of_errors[~np.eye(4, dtype=bool)].min() > 50


def test_outline_is_open_at_the_border_and_single_pixels_show():
    picture = draw_masks(grey(20, 20), {2: square(20, 20, 0, 5, 10)})
    assert tuple(picture[0, 8]) != colour(2)
    assert tuple(picture[9, 8]) == colour(2)
    assert count(draw_masks(grey(20, 20), {2: square(20, 20, 3, 3, 1)}), colour(2)) == 1


def test_each_object_keeps_its_colour_and_absent_ones_change_nothing():
    empty = np.zeros((20, 20), bool)
    picture = draw_masks(grey(20, 20), {4: empty, 9: square(20, 20, 2, 2, 5)})
    assert tuple(picture[2, 2]) == colour(9)
    assert (draw_masks(grey(20, 20), {4: empty}) == 100).all()
    assert (draw_masks(grey(20, 20), {}) == 100).all()


def test_wrong_mask_size_or_float_frame_fails():
    with pytest.raises(AssertionError):
        draw_masks(grey(20, 20), {1: np.zeros((20, 21), bool)})
    with pytest.raises(AssertionError):
        draw_masks(np.zeros((20, 20, 3), np.float32), {})


# Prompts


@pytest.mark.parametrize(("label", "ink"), [(1, POSITIVE), (0, NEGATIVE)])
def test_click_is_drawn_at_its_point(label, ink):
    picture = paint_prompts(grey(90, 120), [prompt(points=[(70, 30)], labels=[label])])
    assert tuple(picture[30, 70]) == ink
    changed = np.argwhere((picture != 100).any(-1))
    assert np.abs(changed.mean(0) - (30, 70)).max() < 0.6
    assert np.ptp(changed, axis=0).max() <= 2 * (3 + 4) + 2  # radius, rings, soft edge


def test_positive_and_negative_differ_by_shape_too():
    cross = paint_prompts(grey(450, 450), [prompt(points=[(225, 225)], labels=[0])])
    disc = paint_prompts(grey(450, 450), [prompt(points=[(225, 225)], labels=[1])])
    for dx, dy in ((7, 0), (0, 7)):  # between the arms of the cross, inside the disc
        assert tuple(cross[225 + dy, 225 + dx]) == (255, 255, 255)
        assert tuple(disc[225 + dy, 225 + dx]) == POSITIVE
    for picture in (cross, disc):
        assert count(picture, colour(1)) > 0


def test_click_lands_on_the_enlarged_pixel():
    # Pixel 10 of the frame covers 40..43 after scaling by 4.
    picture = paint_prompts(grey(200, 200), [prompt(points=[(10, 20)], labels=[1])], scale=4.0)
    centre = np.argwhere((picture == np.array(POSITIVE)).all(-1)).mean(0)
    assert np.abs(centre - (81.5, 41.5)).max() <= 0.5


@pytest.mark.parametrize("xy", [(0, 0), (99, 0), (0, 79), (99, 79), (100, 80), (-3, 500)])
@pytest.mark.parametrize("label", [0, 1])
def test_clicks_on_the_border_stay_visible(xy, label):
    ink = POSITIVE if label else NEGATIVE
    whole = paint_prompts(grey(80, 100), [prompt(points=[(50, 40)], labels=[label])])
    border = paint_prompts(grey(80, 100), [prompt(points=[xy], labels=[label])])
    assert count(border, ink) == count(whole, ink) > 0


def test_box_is_a_rectangle_in_the_colour_of_the_object():
    corners = [(20, 10), (60, 40)]
    box = prompt(object_id=3, points=corners, labels=[2, 3], box=(20, 10, 60, 40))
    picture = paint_prompts(grey(90, 120), [box])
    for x, y in ((20, 10), (60, 40), (40, 10), (20, 30)):
        assert tuple(picture[y, x]) == colour(3)
    assert tuple(picture[25, 40]) == (100, 100, 100)
    assert count(picture, POSITIVE) == count(picture, NEGATIVE) == 0  # corners are no clicks


def test_box_of_the_whole_frame_stays_visible():
    picture = paint_prompts(grey(80, 100), [prompt(box=(0, 0, 100, 80))])
    assert all(tuple(picture[y, x]) == colour(1) for x, y in ((0, 40), (99, 40), (50, 0), (50, 79)))


def test_mask_prompt_is_hatched_and_outlined_inside_the_mask():
    mask = square(40, 40, 10, 10, 20)
    picture = paint_prompts(grey(80, 80), [prompt(mask=mask)], scale=2.0)
    inside = square(80, 80, 20, 20, 40)
    assert (picture[~inside] == 100).all()
    assert tuple(picture[20, 20]) == colour(1)
    striped = (picture[24:56, 24:56] != 100).any(-1).mean()
    assert 0.25 < striped < 0.42  # one pixel of three


def test_empty_prompts_change_nothing():
    empty = [prompt(), prompt(mask=np.zeros((20, 20), bool))]
    assert (paint_prompts(grey(20, 20), empty) == 100).all()
    assert (paint_prompts(grey(20, 20), iter([])) == 100).all()


def test_prompts_draw_on_the_transposed_frames_of_to_uint8():
    frame = to_uint8(np.zeros((1, 3, 40, 40), np.float32))[0]
    picture = paint_prompts(draw_masks(frame, {}), [prompt(points=[(9, 9)], labels=[1])])
    assert tuple(picture[9, 9]) == POSITIVE
    assert frame[9, 9].tolist() == [124, 116, 104]


# Errors


def test_errors_by_hand():
    def row(*bits):
        return np.array([bits], bool)

    truth = {1: row(1, 1, 0, 0, 1), 2: row(0, 0, 0, 0, 0)}
    found = {1: row(1, 0, 1, 0, 0), 2: row(0, 0, 0, 0, 1)}
    picture = draw_errors(np.zeros((1, 5, 3), np.uint8), found, truth)
    weights = {"correct": 0.5, "missed": 0.85, "false positive": 0.85, "wrong object": 0.85}
    names = ["correct", "missed", "false positive", None, "wrong object"]
    for pixel, name in zip(picture[0], names, strict=True):
        expected = np.rint(np.array(ERRORS[name]) * weights[name]) if name else np.zeros(3)
        np.testing.assert_array_equal(pixel, expected)


# Sheets


def test_picked_frames():
    assert pick_frames(40, [0], 5) == [0, 9, 19, 29, 39]
    assert pick_frames(40, [20], 5) == [0, 9, 20, 29, 39]
    assert pick_frames(3, [0], 8) == [0, 1, 2]
    assert pick_frames(1, [0, 0], 8) == [0]
    assert pick_frames(40, [], 1) == [39]
    assert pick_frames(40, [7], 1) == [7]
    assert pick_frames(40, [3, 2, 1, 0], 3) == [0, 1, 39]


@pytest.mark.parametrize("num_frames", [1, 2, 7, 40])
@pytest.mark.parametrize("max_frames", [1, 2, 5, 8])
def test_picked_frames_always_hold_prompt_and_end(num_frames, max_frames):
    for prompted in range(num_frames):
        picked = pick_frames(num_frames, [prompted], max_frames)
        assert picked == sorted(set(picked))
        assert len(picked) == min(num_frames, max_frames)
        assert prompted in picked
        assert max_frames == 1 or num_frames - 1 in picked


def scene(num_frames, height, width, num_objects):
    """Frames, prediction (truth moved right by 1/16 of the width), truth, one click an object."""
    frames, truth = grey(height, width, frames=num_frames), {}
    side, step = height // 4, max(1, width // (num_objects + 1))
    for k in range(num_objects):
        mask = square(height, width, (k % 3) * height // 4, k * step, side)
        truth[k + 1] = np.repeat(mask[None], num_frames, axis=0)
    found = {object_id: np.roll(mask, width // 16, axis=2) for object_id, mask in truth.items()}
    clicks = [
        prompt(object_id, points=[np.argwhere(mask[0]).mean(0)[::-1]], labels=[1])
        for object_id, mask in truth.items()
    ]
    return frames, found, truth, clicks


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "num_objects"),
    [
        (1, 128, 128, 1),
        (12, 128, 128, 10),
        (9, 480, 854, 2),
        (4, 1080, 1920, 1),
        (5, 854, 480, 3),
        (3, 40, 900, 1),
        (2, 8, 8, 1),
    ],
)
def test_sheet_fits_and_shows_everything(num_frames, height, width, num_objects):
    frames, found, truth, clicks = scene(num_frames, height, width, num_objects)
    sheet = comparison(frames, found, truth, clicks, title="a title", max_frames=8)
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    assert sheet.shape[1] <= 2000
    assert sheet.shape[0] <= 1800
    for object_id in truth:
        assert count(sheet, colour(object_id)) > 0
    for name, ink in list(ERRORS.items())[: 4 if num_objects > 1 else 3]:
        assert count(sheet, ink) > 150, name  # its swatch in the legend
    assert count(sheet, POSITIVE) > 0


def cells(sheet, side):
    """The pictures of a one-column sheet of a square frame: its three bottom blocks."""
    tops = [sheet.shape[0] - 6 - (3 - row) * (side + 6) for row in range(3)]
    return [sheet[top : top + side, 30 : 30 + side] for top in tops]


def test_names_stand_in_the_legend(monkeypatch):
    legends = []
    header = pictures._header
    monkeypatch.setattr(
        pictures,
        "_header",
        lambda title, legend, width: legends.append(legend) or header(title, legend, width),
    )
    frames, mask = np.zeros((1, 20, 30, 3), np.uint8), np.zeros((1, 20, 30), bool)
    comparison(frames, {1: mask}, {1: mask}, [], title="")
    comparison(frames, {1: mask}, {1: mask}, [], title="", names={1: "cat 11"})
    assert [legend[1][0] for legend in legends] == ["1", "cat 11"]


def test_the_three_rows_of_a_cell():
    mask = square(60, 60, 10, 10, 20)
    found = {1: np.roll(mask, 15, axis=1)[None]}
    click = prompt(points=[(45, 45)], labels=[1])
    sheet = comparison(grey(60, 60, frames=1), found, {1: mask[None]}, [click], title="t")
    truth, prediction, errors = cells(sheet, 240)  # every pixel of the frame is 4 x 4 here
    assert tuple(truth[40, 40]) == tuple(prediction[40, 100]) == colour(1)
    assert tuple(prediction[40, 99]) == (100, 100, 100)  # crisp: nothing smeared over the edge
    assert tuple(truth[182, 182]) == POSITIVE
    assert count(prediction, POSITIVE) == 0
    missed, correct, extra, background = (errors[80, x] for x in (60, 110, 150, 220))
    assert missed[2] > missed[1] == missed[0]  # blue
    assert extra[0] > 2 * extra[2]  # red
    assert np.ptp(correct) == np.ptp(background) == 0
    assert correct[0] > background[0]


def test_object_in_one_mapping_only_is_absent_in_the_other():
    mask = square(60, 60, 10, 10, 20)[None]
    absent = np.zeros_like(mask)
    frames = grey(60, 60, frames=1)
    for with_zeros, without in (({1: absent}, {}), ({}, {1: absent})):
        one = comparison(frames, {**with_zeros, 2: mask}, {1: mask}, [], title="t")
        two = comparison(frames, {**without, 2: mask}, {1: mask}, [], title="t")
        np.testing.assert_array_equal(one, two)


def test_a_tiny_object_survives_reduction():
    mask = np.zeros((1, 1080, 1920), bool)
    mask[0, 500:503, 700:702] = True
    sheet = comparison(grey(1080, 1920, frames=1), {4: mask}, {4: mask}, [], title="t")
    bare = comparison(grey(1080, 1920, frames=1), {4: mask & False}, {4: mask}, [], title="t")
    assert count(sheet, colour(4)) > count(bare, colour(4))


def test_texts_change_their_own_place_and_long_ones_stay_in_their_cell():
    frames, found, truth, clicks = scene(2, 64, 64, 1)
    plain = comparison(frames, found, truth, clicks, title="t")
    named = comparison(frames, found, truth, clicks, title="t", frame_labels=["x" * 90, "frame 1"])
    scored = comparison(frames, found, truth, clicks, title="t", scores=["J 0.83", ""])
    assert named.shape == scored.shape == plain.shape
    rows, columns = np.nonzero((named != plain).any(-1))
    assert columns.max() < 30 + 240 + 6  # cut before the label of the second cell
    assert np.ptp(rows) < 26
    rows, columns = np.nonzero((scored != plain).any(-1))
    assert 30 + 120 < columns.min() <= columns.max() <= 30 + 240
    long_title = comparison(frames, found, truth, clicks, title="many words " * 20)
    assert long_title.shape[0] > plain.shape[0]
    assert long_title.shape[1] == plain.shape[1]


@pytest.mark.parametrize("which", ["prediction", "ground_truth", "frame_labels", "scores"])
def test_sheet_refuses_mismatched_sizes(which):
    frames, found, truth, clicks = scene(2, 64, 64, 1)
    given = {"prediction": found, "ground_truth": truth, "frame_labels": ["a", "b"], "scores": None}
    given[which] = ["only one"] if which in ("frame_labels", "scores") else {1: truth[1][:1]}
    with pytest.raises(AssertionError):
        comparison(frames, prompts=clicks, title="t", **given)


# Files


def test_png_round_trip_creates_the_folder_and_leaves_nothing_else(tmp_path):
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    path = tmp_path / "overlays" / "step 1" / "video.png"
    save_picture(picture, path)
    save_picture(picture, path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.array(image), picture)
    assert os.listdir(path.parent) == ["video.png"]


def test_a_notebook_gets_a_small_jpeg():
    picture = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    shown = as_jpeg(picture)
    assert shown._repr_mimebundle_()[0].keys() == {"image/jpeg"}
    with Image.open(io.BytesIO(shown.data)) as image:
        assert (image.format, image.size) == ("JPEG", (300, 200))
    assert len(shown.data) < picture.nbytes / 2


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_picture(grey(4, 4), path)
    before = path.read_bytes()

    def break_halfway(image, part, **options):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pictures.Image.Image, "save", break_halfway)
    with pytest.raises(OSError, match="disk full"):
        save_picture(grey(8, 8), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
