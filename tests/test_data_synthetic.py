import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam2train.config import ConfigError, build
from sam2train.data_synthetic import (
    MIN_RADIUS,
    Layer,
    Scene,
    SyntheticConfig,
    coverage,
    cut_out,
    hump,
    outline,
    sample_num_objects,
    sample_scene,
    sway,
    view,
)

SIZE = (120, 160)
GREY = np.full((*SIZE, 3), 128, np.uint8)
CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / np.sqrt(2)
COLOURS = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)], np.uint8)


def square(centre, half_side, colour=None, object_id=1, angle=0.0):
    """One frame of a square, (x, y) of its centre."""
    patch = None if colour is None else np.full((9, 9, 3), colour, np.uint8)
    return Layer(
        CORNERS,
        np.array([centre], float),
        np.array([half_side * np.sqrt(2)]),
        np.array([angle]),
        object_id,
        patch,
    )


def draw(seed=0, num_frames=8, num_objects=3, background=GREY, **settings):
    rng = np.random.default_rng(seed)
    pictures = np.random.default_rng(99).integers(0, 256, (60, 70, 3), np.uint8)
    config = SyntheticConfig(**settings)
    return sample_scene(background, num_frames, num_objects, config, lambda rng: pictures, rng)


def tables(scene, num_frames):
    """(T, N) px of each object on each frame."""
    return np.stack([scene.masks(t).sum(axis=(1, 2)) for t in range(num_frames)])


# Shapes


def test_coverage_counts_the_part_of_each_pixel():
    # 8 px wide and 4.5 px high, from (10, 20). On the grid of quarters, edges count as inside.
    box = np.array([(0.0, 0.0), (7.75, 0.0), (7.75, 4.25), (0.0, 4.25)])
    alpha = coverage(box, 1.0, 0.0, np.array([10.0, 20.0]), (40, 30))
    expected = np.zeros((40, 30))
    expected[20:24, 10:18] = 1
    expected[24, 10:18] = 0.5
    np.testing.assert_allclose(alpha, expected, atol=0.003)


def test_a_moved_shape_covers_moved_pixels():
    points = outline(np.random.default_rng(3))
    alpha = coverage(points, 12.3, 0.4, np.array([30.2, 25.7]), (60, 60))
    moved = coverage(points, 12.3, 0.4, np.array([37.2, 20.7]), (60, 60))
    np.testing.assert_array_equal(moved[:-5, 7:], alpha[5:, :-7])


def test_a_view_puts_the_middle_of_the_picture_at_its_target():
    picture = np.zeros((21, 21, 3), np.uint8)
    picture[8:13, 8:13] = 255
    seen = view(picture, 1.0, np.pi / 4, np.array([40.0, 15.0]), (30, 60))
    bright = np.argwhere(seen[8:23, 33:48, 0] > 128)  # beyond, the border is mirrored
    np.testing.assert_allclose(bright.mean(axis=0)[::-1], (40 - 33, 15 - 8), atol=1.0)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 30))
def test_a_path_keeps_its_speed(seed, max_speed):
    path = sway(np.random.default_rng(seed), 40, max_speed)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() <= max_speed * 1.001


# Composing


def test_a_square_is_where_it_was_put():
    picture, masks = Scene(SIZE, [square((50, 40), 10, (250, 0, 0))]).compose(GREY, 0)
    expected = np.zeros(SIZE, bool)
    expected[30:50, 40:60] = True
    assert masks.shape == (1, *SIZE)
    wrong = masks[0] != expected
    assert wrong.sum() <= 41  # a drawn edge may take one more row and column
    assert not cv2.erode(wrong.astype(np.uint8), np.ones((3, 3), np.uint8)).any()
    assert (picture[32:48, 42:58] == (250, 0, 0)).all()
    assert (
        picture[~cv2.dilate(masks[0].astype(np.uint8), np.ones((3, 3))).astype(bool)] == 128
    ).all()


def test_a_half_covered_pixel_is_a_blend():
    layer = square((50.3, 40.6), 10, (250, 0, 60), angle=0.3)
    picture, _ = Scene(SIZE, [layer]).compose(GREY, 0)
    alpha = coverage(CORNERS, layer.radius[0], 0.3, layer.centre[0], SIZE)[..., None]
    assert ((alpha > 0.2) & (alpha < 0.8)).any()
    np.testing.assert_allclose(picture, 128 + (layer.patch[0, 0] - 128.0) * alpha, atol=0.51)


@pytest.mark.parametrize("x", [50, 3])
def test_the_texture_moves_with_the_shape(x):
    """Left half dark, right half bright: the border between them is at the centre."""
    layer = square((x, 40), 10, (0, 0, 0))
    layer.patch.resize((28, 28, 3), refcheck=False)
    layer.patch[:, 14:] = 250
    row = Scene(SIZE, [layer]).compose(GREY, 0)[0][40, :, 0]
    assert (row[max(x - 9, 0) : x] < 100).all()
    assert (row[x : x + 9] > 200).all()


def test_the_topmost_shape_wins_annotated_or_not():
    layers = [
        square((50, 40), 10, COLOURS[0], 2),
        square((60, 40), 10, COLOURS[1], 1),
        square((55, 50), 5, COLOURS[2], 0),
    ]
    picture, masks = Scene(SIZE, layers).compose(GREY, 0)
    assert masks.shape == (2, *SIZE)
    assert not (masks[0] & masks[1]).any()
    assert masks[1, 40, 45]  # object 2, free
    assert masks[0, 40, 55]  # object 1 covers it here
    assert not masks[:, 50, 55].any()  # the third hides both
    assert (picture[40, 45] == COLOURS[0]).all()
    assert (picture[40, 55] == COLOURS[1]).all()
    assert (picture[48, 55] == COLOURS[2]).all()


def test_shapes_beyond_the_border_are_cut_or_gone():
    inside = Scene(SIZE, [square((50, 40), 10, COLOURS[0])]).masks(0)[0]
    for centre, shown in (((0, 40), 0.5), ((159, 119), 0.25), ((50, -11), 0), ((500, 40), 0)):
        picture, masks = Scene(SIZE, [square(centre, 10, COLOURS[0])]).compose(GREY, 0)
        assert abs(masks.sum() / inside.sum() - shown) < 0.1
        assert (picture != GREY).any() == (shown > 0)


def test_the_picture_handed_in_stays_as_it_is():
    background = GREY.copy()
    Scene(SIZE, [square((50, 40), 10, (250, 0, 0))]).compose(background, 0)
    assert (background == 128).all()


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_the_visible_pixels_of_the_picture(seed, monkeypatch):
    """With one flat colour a layer, the picture itself says what is on top."""
    colours = iter(COLOURS)
    monkeypatch.setattr(
        "sam2train.data_synthetic.cut_out",
        lambda *args: np.full((20, 20, 3), next(colours), np.uint8),
    )
    scene = draw(seed, prob_occlusion=1.0, prob_leave=0.5, max_speed=0.1)
    flat = np.array([layer.patch[0, 0] for layer in scene.layers])
    ids = np.array([0, *(layer.object_id for layer in scene.layers)])
    known = np.array([(128, 128, 128), *flat], float)
    for t in range(8):
        picture, masks = scene.compose(GREY, t)
        np.testing.assert_array_equal(masks, scene.masks(t))
        label = ids[np.linalg.norm(picture[..., None, :] - known, axis=-1).argmin(-1)]
        for place, mask in enumerate(masks):
            wrong = (mask != (label == place + 1)).astype(np.uint8)
            # Doubtful are only blended pixels on the outlines.
            assert not cv2.erode(wrong, np.ones((3, 3), np.uint8)).any()
            assert wrong.sum() <= 0.1 * mask.sum() + 20


# Scenes


def test_the_generator_decides_the_scene():
    def all_of(scene):
        return [part for t in range(8) for part in scene.compose(GREY, t)]

    one, again, other = all_of(draw(1)), all_of(draw(1)), all_of(draw(2))
    assert all(map(np.array_equal, one, again))
    assert not all(map(np.array_equal, one, other))


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 6),
    st.tuples(st.integers(16, 90), st.integers(16, 90)),
    st.floats(0.05, 1.0),
)
def test_frame_0_shows_an_object_whatever_is_asked_for(seed, num_frames, num_objects, size, share):
    scene = draw(
        seed,
        num_frames,
        num_objects,
        np.zeros((*size, 3), np.uint8),
        min_size=share / 2,
        max_size=share,
        prob_leave=1.0,
        prob_occlusion=1.0,
        max_speed=0.3,
        paste=False,
    )
    masks = scene.masks(0)
    assert masks.shape == (num_objects, *size)
    assert masks.any()
    assert masks.sum(axis=0).max() == 1
    assert scene.masks(num_frames - 1).shape == masks.shape


def test_where_no_layout_shows_all_objects_the_last_one_has_no_events(monkeypatch):
    monkeypatch.setattr("sam2train.data_synthetic.SHOWN_AT_FIRST", 2.0)
    for seed in range(5):
        scene = draw(seed, prob_occlusion=1.0, prob_leave=1.0)
        assert sorted(layer.object_id for layer in scene.layers) == [1, 2, 3]
        assert all(
            (layer.centre > 0).all() and (layer.centre < 160).all() for layer in scene.layers
        )


def test_as_a_rule_every_object_shows_on_frame_0():
    shown = [(tables(draw(seed, 1), 1) > 0).all() for seed in range(30)]
    assert all(shown)


def test_objects_keep_their_sizes_and_the_frame_without_events():
    settings = {"prob_leave": 0.0, "prob_occlusion": 0.0, "min_size": 0.2, "max_size": 0.3}
    for seed in range(10):
        scene = draw(seed, 30, max_zoom=1.5, **settings)
        assert sorted(layer.object_id for layer in scene.layers) == [1, 2, 3]
        for layer in scene.layers:
            radius = layer.radius / 120  # the shorter side
            assert radius.min() >= 0.1 / 1.5**0.5 - 1e-9
            assert radius.max() <= 0.15 * 1.5**0.5 + 1e-9
            assert layer.radius.max() / layer.radius.min() <= 1.5 + 1e-9
            assert (layer.centre > 0).all()
            assert (layer.centre < SIZE[::-1]).all()
            step = np.linalg.norm(np.diff(layer.centre, axis=0), axis=1)
            assert step.max() <= 0.04 * 120 * 1.001
            turn = np.diff(layer.angle)
            assert np.abs(turn).max() <= np.radians(5) + 1e-9


def test_tiny_objects_are_still_shapes():
    scene = draw(0, 3, min_size=0.001, max_size=0.001)
    assert all(layer.radius.min() == MIN_RADIUS for layer in scene.layers if layer.object_id)


def test_objects_leave_and_come_back():
    gone = returned = 0
    for seed in range(20):
        areas = tables(draw(seed, 24, 1, prob_leave=1.0, prob_occlusion=0.0), 24)[:, 0]
        assert areas[0] > 0
        absent = np.flatnonzero(areas == 0)
        gone += len(absent) > 0
        returned += len(absent) > 0 and areas[absent[-1] :].any()
    assert gone == 20
    assert returned >= 5


def test_in_a_clip_of_five_some_objects_come_back_and_some_do_not():
    ends = [
        tables(draw(seed, 5, 1, prob_leave=1.0, prob_occlusion=0.0), 5)[:, 0] for seed in range(20)
    ]
    assert all((areas == 0).any() for areas in ends)
    assert 0 < sum(areas[-1] > 0 for areas in ends) < 20


def test_something_passes_in_front():
    settings = {"prob_leave": 0.0, "max_turn": 0.0, "max_speed": 0.0, "max_zoom": 1.0}
    for seed in range(12):
        scene = draw(seed, 12, 1, prob_occlusion=1.0, **settings)
        assert [layer.object_id for layer in scene.layers] == [1, 0]
        areas = tables(scene, 12)[:, 0]
        assert areas.min() < 0.5 * areas[0]
        calm = tables(draw(seed, 12, 1, prob_occlusion=0.0, **settings), 12)[:, 0]
        assert (calm == calm[0]).all()


def test_objects_hide_each_other_too():
    by_an_object = [
        scene
        for seed in range(20)
        if len((scene := draw(seed, 12, 3, prob_occlusion=1.0, prob_leave=0.0)).layers) == 3
    ]
    assert len(by_an_object) >= 4
    for scene in by_an_object:
        full = np.array(
            [
                [layer.full_area(t) for layer in sorted(scene.layers, key=lambda x: x.object_id)]
                for t in range(12)
            ]
        )
        seen = tables(scene, 12) / full
        assert seen.min() < 0.7
        assert seen[0].min() > 0.4


def test_a_long_video_has_several_events():
    scene = draw(0, 120, 1, prob_occlusion=1.0, prob_leave=0.0)
    assert [layer.object_id for layer in scene.layers] == [1, 0, 0, 0, 0]


def test_an_event_is_over_where_it_says():
    np.testing.assert_array_equal(hump(9, 4, 2), [0, 0, 0, 0.8, 1, 0.8, 0, 0, 0])
    assert (hump(40, 20, 12)[17:24] == 1).all()


def test_without_pasting_frames_stay_untouched_and_nothing_unseen_hides():
    scene = draw(3, 8, 1, paste=False, prob_occlusion=1.0)
    assert [layer.object_id for layer in scene.layers] == [1]
    for t in range(8):
        np.testing.assert_array_equal(scene.compose(GREY, t)[0], GREY)


# Cut-outs


def test_a_cut_out_comes_from_the_picture():
    rng = np.random.default_rng(0)
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, 50:] = (200, 40, 40)
    layer = square((50, 40), 10)
    for _ in range(20):
        patch = cut_out(picture, layer, np.zeros((*SIZE, 3), np.uint8), rng)
        assert patch.shape == (29, 29, 3)
        assert patch.dtype == np.uint8
        red = patch[patch[..., 0] > 150]  # nearly always a place that stands out from black
        assert (red[:, 0] > red[:, 1] + 80).all()


@pytest.mark.parametrize("level", [0, 60, 128, 200, 255])
def test_a_cut_out_can_be_seen_even_where_all_is_one_colour(level):
    background = np.full((*SIZE, 3), level, np.uint8)
    for seed in range(10):
        patch = cut_out(background, square((50, 40), 10), background, np.random.default_rng(seed))
        assert np.linalg.norm(patch.mean(axis=(0, 1)) - level) > 20


def test_a_picture_smaller_than_the_object_does():
    patch = cut_out(GREY[:3, :2], square((50, 40), 30), GREY, np.random.default_rng(0))
    assert patch.shape == (85, 85, 3)


# The section


def test_numbers_of_objects_are_drawn_from_their_range():
    rng = np.random.default_rng(0)
    config = SyntheticConfig(min_objects=2, max_objects=4)
    assert {sample_num_objects(config, None, rng) for _ in range(50)} == {2, 3, 4}
    assert {sample_num_objects(config, 3, rng) for _ in range(50)} == {2, 3}
    assert {sample_num_objects(config, 1, rng) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"min_objects": 0}, "min_objects"),
        ({"min_objects": 4}, "min_objects is 4 and max_objects 3"),
        ({"min_size": 0.5}, "min_size is 0.5 and max_size 0.45"),
        ({"max_size": 1.5}, "max_size"),
        ({"max_zoom": 0.9}, "max_zoom"),
        ({"prob_leave": 1.1}, "prob_leave"),
        ({"max_speed": -1.0}, "max_speed"),
        ({"pasted": False}, "did you mean `paste`"),
    ],
)
def test_the_section_refuses(raw, message):
    with pytest.raises(ConfigError, match=message):
        build(SyntheticConfig, raw, "synthetic")
