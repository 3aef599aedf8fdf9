import ast
import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import make_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from sam2train import cli, prompts
from sam2train.clips import is_empty
from sam2train.config import ConfigError, build
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.prompts import (
    DEFAULT_TYPES,
    NOISE,
    PROMPTS,
    PromptGenerator,
    PromptType,
    jitter_box,
    mask_center,
    mask_to_box,
    move_point,
    sample_points,
    stretch_mask,
    types_like,
)

MASKS = st.tuples(st.integers(1, 16), st.integers(1, 16)).flatmap(
    lambda shape: arrays(bool, shape, elements=st.booleans())
)
SIZE = (64, 64)
SEEDS = st.integers(0, 2**32 - 1)


def rectangle(size, top, left, bottom, right):
    """(H, W) bool: rows top to bottom and columns left to right, all included."""
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def u_shape():
    mask = rectangle((30, 30), 2, 2, 26, 26)
    mask[2:20, 8:21] = False
    return mask


def generate(mask, kind, seed=0, **options):
    generator = PromptGenerator([kind], **options)
    return generator.generate(mask, np.random.default_rng(seed), object_id=7, frame_index=3)


# The centre


def test_centre_of_a_square_by_hand():
    assert mask_center(rectangle((20, 20), 4, 6, 8, 10)).tolist() == [8, 6]


def test_centre_of_a_long_rectangle_lies_on_its_middle_line():
    x, y = mask_center(rectangle((20, 40), 5, 3, 9, 30))
    assert y == 7  # 3 px from either long side
    assert 3 + 2 <= x <= 30 - 2


def test_centre_of_a_u_shape_lies_inside_where_the_centroid_does_not():
    mask = u_shape()
    y, x = np.argwhere(mask).mean(axis=0).round().astype(int)
    assert not mask[y, x]
    x, y = mask_center(mask).astype(int)
    assert mask[y, x]
    assert y >= 20  # the bottom bar is 7 px thick, the arms are 6


def test_centre_of_two_parts_lies_in_the_thicker_one():
    mask = rectangle((20, 40), 2, 2, 6, 6) | rectangle((20, 40), 4, 25, 14, 35)
    assert mask_center(mask).tolist() == [30, 9]


def test_the_border_of_the_frame_counts_as_boundary():
    assert mask_center(np.ones((9, 9), bool)).tolist() == [4, 4]


def test_centre_of_one_pixel():
    assert mask_center(rectangle((5, 6), 4, 5, 4, 5)).tolist() == [5, 4]


# The box


def test_box_by_hand_has_x_first_and_includes_its_last_pixels():
    assert mask_to_box(rectangle((20, 30), 4, 6, 8, 25)).tolist() == [6, 4, 25, 8]
    assert mask_to_box(rectangle((20, 30), 4, 6, 4, 6)).tolist() == [6, 4, 6, 4]
    assert mask_to_box(np.ones((20, 30), bool)).tolist() == [0, 0, 29, 19]


def test_box_of_two_parts_spans_both():
    mask = rectangle((20, 40), 2, 3, 4, 5) | rectangle((20, 40), 10, 30, 12, 33)
    assert mask_to_box(mask).tolist() == [3, 2, 33, 12]


class Extreme:
    """Stands in for a generator, and always draws the bound."""

    def __init__(self, sign):
        self.sign = sign

    def uniform(self, low, high, size):
        return np.full(size, high if self.sign > 0 else low, float)


def test_jitter_reaches_a_tenth_of_the_side_and_20_px_as_in_sam2():
    box = np.array([100, 100, 200, 400], np.float32)  # 100 wide: 10 px; 300 high: 30, so 20 px
    size = (1000, 1000)
    assert jitter_box(box, size, 0.1, Extreme(1)).tolist() == [110, 120, 210, 420]
    assert jitter_box(box, size, 0.1, Extreme(-1)).tolist() == [90, 80, 190, 380]


def test_jitter_stays_inside_the_frame():
    box = np.array([0, 0, 99, 49], np.float32)
    assert jitter_box(box, (50, 100), 0.1, Extreme(1)).tolist()[2:] == [99, 49]
    assert jitter_box(box, (50, 100), 0.1, Extreme(-1)).tolist()[:2] == [0, 0]


def test_without_jitter_nothing_is_drawn():
    box = np.array([3, 4, 5, 6], np.float32)
    rng = np.random.default_rng(0)
    assert jitter_box(box, (10, 10), 0.0, rng).tolist() == [3, 4, 5, 6]
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "mask",
    [
        u_shape(),
        rectangle((40, 50), 10, 15, 29, 39),
        rectangle((40, 50), 0, 0, 11, 11),
        rectangle((40, 50), 20, 7, 20, 7),
        rectangle((40, 50), 0, 30, 39, 49) | rectangle((40, 50), 3, 2, 9, 8),
    ],
    ids=["u", "box", "corner", "pixel", "two parts"],
)
def test_the_middle_and_the_box_of_a_mask_are_those_of_sam2(mask):
    sam2_utils = pytest.importorskip("sam2.modeling.sam2_utils")
    stack = torch.from_numpy(mask)[None, None]
    points, labels = sam2_utils.get_next_point(stack, None, "center")
    assert (mask_center(mask).tolist(), labels.tolist()) == (points[0, 0].tolist(), [[1]])
    assert mask_to_box(mask).tolist() == sam2_utils.mask_to_box(stack)[0, 0].tolist()


def test_jitter_matches_the_distribution_of_sam2():
    """Mean and spread of each corner, against SAM 2's sampler on the same mask."""
    sam2_utils = pytest.importorskip("sam2.modeling.sam2_utils")
    mask = rectangle((160, 200), 30, 50, 130, 110)
    rng = np.random.default_rng(0)
    box = mask_to_box(mask)
    ours = np.stack([jitter_box(box, mask.shape, 0.1, rng) for _ in range(1000)])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        theirs, labels = sam2_utils.sample_box_points(
            torch.from_numpy(mask)[None, None].expand(1000, -1, -1, -1), noise=0.1
        )
    theirs = theirs.reshape(-1, 4).numpy()
    assert labels[0].tolist() == [2, 3]
    reach = np.array([6, 10, 6, 10])
    for boxes in (ours, theirs):  # uniform on +-reach: the standard deviation is reach / sqrt(3)
        assert (np.abs(boxes - box) <= reach + 1e-4).all()
        np.testing.assert_allclose(boxes.mean(axis=0), box, atol=0.6)
        np.testing.assert_allclose(boxes.std(axis=0), reach / np.sqrt(3), rtol=0.06)


# Prompts


@pytest.mark.parametrize("kind", DEFAULT_TYPES)
def test_a_prompt_has_all_its_fields(kind):
    prompt = generate(rectangle((10, 12), 2, 3, 7, 9), kind)
    assert list(prompt) == ["object_id", "frame_index", "type", "points", "labels", "box", "mask"]
    assert (prompt["object_id"], prompt["frame_index"], prompt["type"]) == (7, 3, kind)
    assert prompt["points"].dtype == np.float32
    assert prompt["labels"].dtype == np.int32
    assert prompt["points"].shape == (len(prompt["labels"]), 2)
    assert (prompt["box"] is None) == (kind != "bbox")
    assert (prompt["mask"] is None) == (kind != "mask")
    assert not is_empty(prompt)


@pytest.mark.parametrize("clicks", [np.array(3), np.int64(3), np.array([3, 3]), [3, 3]])
def test_numbers_of_numpy_are_numbers(clicks):
    assert PromptGenerator(num_of_pos_points=clicks).num_of_pos_points == (3, 3)


def test_a_mask_is_that_of_one_object():
    with pytest.raises(UserError, match=r"a mask of shape \(1, 5, 6\)"):
        PromptGenerator().generate(np.ones((1, 5, 6), bool), np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
@pytest.mark.parametrize("kind", DEFAULT_TYPES)
def test_masks_of_numbers_are_those_above_0(kind, dtype):
    mask = np.zeros((20, 30), bool)
    mask[5:9, 6:20] = True
    generator = PromptGenerator([kind], 5, num_of_neg_points=5)
    plain, numbers = (
        generator.generate(m, np.random.default_rng(0)) for m in (mask, mask.astype(dtype) * 200)
    )
    for name, value in plain.items():
        assert np.array_equal(numbers[name], value), name


@pytest.mark.parametrize("kind", DEFAULT_TYPES)
def test_an_empty_mask_gives_an_empty_prompt(kind):
    prompt = generate(np.zeros((8, 9), bool), kind, include_center=True, num_of_neg_points=3)
    assert is_empty(prompt)
    assert prompt["points"].shape == (0, 2)
    assert prompt["labels"].shape == (0,)
    assert prompt["points"].dtype == np.float32
    assert prompt["labels"].dtype == np.int32
    assert prompt["box"] is None
    assert prompt["mask"] is None


def test_a_box_prompt_is_two_points_with_labels_2_and_3():
    prompt = generate(rectangle((10, 12), 2, 3, 7, 9), "bbox")
    assert prompt["points"].tolist() == [[3, 2], [9, 7]]
    assert prompt["labels"].tolist() == [2, 3]
    assert prompt["box"].tolist() == [3, 2, 9, 7]
    assert prompt["box"].dtype == np.float32


def test_a_mask_prompt_is_a_copy():
    mask = rectangle((10, 12), 2, 3, 7, 9)
    prompt = generate(mask, "mask")
    np.testing.assert_array_equal(prompt["mask"], mask)
    assert prompt["mask"].dtype == bool
    assert len(prompt["points"]) == len(prompt["labels"]) == 0
    prompt["mask"][:] = False
    assert mask.any()


def test_the_centre_comes_first_then_positive_then_negative_points():
    mask = rectangle((20, 20), 4, 6, 8, 10)
    options = {"num_of_pos_points": 2, "include_center": True, "num_of_neg_points": 3}
    prompt = generate(mask, "point", **options)
    assert prompt["labels"].tolist() == [1, 1, 1, 0, 0, 0]
    assert prompt["points"][0].tolist() == [8, 6]


def test_the_centre_alone_is_enough():
    prompt = generate(
        rectangle((20, 20), 4, 6, 8, 10), "point", num_of_pos_points=0, include_center=True
    )
    assert prompt["points"].tolist() == [[8, 6]]
    assert prompt["labels"].tolist() == [1]


def test_a_mask_that_fills_the_frame_has_no_negative_points():
    prompt = generate(np.ones((8, 9), bool), "point", num_of_pos_points=2, num_of_neg_points=3)
    assert prompt["labels"].tolist() == [1, 1]


def test_a_range_of_points_is_drawn_with_both_ends():
    mask = rectangle((20, 20), 4, 6, 8, 10)
    counts = {
        len(generate(mask, "point", seed, num_of_pos_points=(1, 3))["points"]) for seed in range(40)
    }
    assert counts == {1, 2, 3}


def test_every_pixel_of_a_region_can_be_drawn():
    mask = rectangle((4, 5), 1, 1, 2, 3)
    points = sample_points(mask, 300, np.random.default_rng(0))
    assert {tuple(point) for point in points} == {(x, y) for x in (1, 2, 3) for y in (1, 2)}


def test_the_types_are_drawn_evenly():
    generator = PromptGenerator()
    mask = rectangle((10, 12), 2, 3, 7, 9)
    rng = np.random.default_rng(0)
    kinds = [generator.generate(mask, rng)["type"] for _ in range(600)]
    assert all(150 < kinds.count(kind) < 250 for kind in DEFAULT_TYPES)


def test_the_types_are_drawn_as_often_as_asked():
    """SAM 2's recipe: half masks, a quarter points, a quarter boxes."""
    generator = PromptGenerator(["mask", "point", "bbox"], weights=(50, 25, 25))
    mask = rectangle((10, 12), 2, 3, 7, 9)
    rng = np.random.default_rng(0)
    kinds = [generator.generate(mask, rng)["type"] for _ in range(800)]
    counts = [kinds.count(kind) for kind in ("mask", "point", "bbox")]
    np.testing.assert_allclose(np.array(counts) / 800, [0.5, 0.25, 0.25], atol=0.05)
    clicks = [generator.generate(mask, rng, among=["point", "bbox"])["type"] for _ in range(400)]
    assert clicks.count("point") + clicks.count("bbox") == 400
    assert 160 < clicks.count("point") < 240


def same(a, b):
    return all(
        np.array_equal(a[key], b[key]) if isinstance(a[key], np.ndarray) else a[key] == b[key]
        for key in a
    )


def test_the_same_generator_state_gives_the_same_prompts():
    generator = PromptGenerator(num_of_pos_points=(1, 4), num_of_neg_points=2, box_jitter=0.1)
    mask = u_shape()
    first, second, other = (
        [generator.generate(mask, rng) for _ in range(20)]
        for rng in map(np.random.default_rng, (5, 5, 6))
    )
    assert all(map(same, first, second))
    assert not all(map(same, first, other))


def test_prompts_leave_the_global_generators_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    for kind in DEFAULT_TYPES:
        generate(u_shape(), kind, box_jitter=0.1)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@settings(max_examples=60)
@given(MASKS, SEEDS, st.integers(1, 5), st.integers(0, 5), st.booleans())
def test_points_lie_where_their_labels_say(mask, seed, num_positive, num_negative, center):
    prompt = generate(
        mask,
        "point",
        seed,
        num_of_pos_points=num_positive,
        num_of_neg_points=num_negative,
        include_center=center,
    )
    x, y = prompt["points"].astype(int).T
    np.testing.assert_array_equal(mask[y, x], prompt["labels"] == 1)
    assert (prompt["labels"] == 1).sum() == (num_positive + center if mask.any() else 0)
    assert (prompt["labels"] == 0).sum() == (0 if mask.all() or not mask.any() else num_negative)
    assert prompt["points"].dtype == np.float32
    assert prompt["labels"].dtype == np.int32


@settings(max_examples=60)
@given(MASKS.filter(np.any), SEEDS, st.floats(0, 0.5))
def test_a_box_contains_its_mask_and_a_noisy_one_keeps_its_corners_in_order(mask, seed, jitter):
    x0, y0, x1, y1 = box = mask_to_box(mask).astype(int)
    outside = mask.copy()
    outside[y0 : y1 + 1, x0 : x1 + 1] = False
    assert not outside.any()
    assert mask[y0].any()
    assert mask[y1].any()
    assert mask[:, x0].any()
    assert mask[:, x1].any()
    noisy = jitter_box(box.astype(np.float32), mask.shape, jitter, np.random.default_rng(seed))
    assert noisy.dtype == np.float32
    assert (noisy >= 0).all()
    assert noisy[0] <= noisy[2] <= mask.shape[1] - 1
    assert noisy[1] <= noisy[3] <= mask.shape[0] - 1


@settings(max_examples=60)
@given(MASKS.filter(np.any))
def test_the_centre_is_inside_and_no_pixel_lies_deeper(mask):
    x, y = mask_center(mask).astype(int)
    assert mask[y, x]
    outside = np.argwhere(~np.pad(mask, 1)) - 1  # with a rim around the frame
    pixels = np.argwhere(mask)
    depths = np.linalg.norm(pixels[:, None] - outside[None], axis=2).min(axis=1)
    depth = np.linalg.norm(np.array([y, x]) - outside, axis=1).min()
    assert depth == pytest.approx(depths.max(), rel=1e-5)


@settings(max_examples=60)
@given(MASKS.filter(np.any))
def test_flipping_the_mask_flips_the_box(mask):
    x0, y0, x1, y1 = mask_to_box(mask)
    width = mask.shape[1] - 1
    assert mask_to_box(mask[:, ::-1]).tolist() == [width - x1, y0, width - x0, y1]


# Moved prompts


def test_noise_is_a_share_of_the_object_and_stays_in_the_frame():
    rng = np.random.default_rng(0)
    mask = rectangle(SIZE, 20, 10, 30, 50)  # sides of 40 and 10
    moved = np.stack(
        [move_point(np.array([30, 25]), mask_to_box(mask), SIZE, 0.2, rng) for _ in range(500)]
    )
    reach = np.abs(moved - [30, 25]).max(axis=0)
    assert (reach <= [8, 2]).all()
    assert (reach > [7.5, 1.9]).all()
    edge = np.stack(
        [move_point(np.array([0, 63]), mask_to_box(mask), SIZE, 0.4, rng) for _ in range(50)]
    )
    assert edge.min() >= 0
    assert edge.max() <= 63


def test_large_boxes_move_as_far_as_they_should():
    """Training's bound of 20 px would make the noise of large objects weaker than it is called."""
    mask = rectangle((512, 512), 50, 50, 450, 450)
    prompt = generate(mask, "bbox")
    rng = np.random.default_rng(1)
    moved = np.stack([PROMPTS["bbox"].move(prompt, mask, 0.1, rng)["box"] for _ in range(200)])
    assert 35 < np.abs(moved - prompt["box"]).max() <= 40


def test_a_mask_is_stretched_as_its_box_is():
    mask = rectangle(SIZE, 20, 10, 39, 29)
    box = mask_to_box(mask)
    moved = stretch_mask(mask, box, np.array([12, 10, 51, 29], np.float32))
    np.testing.assert_array_equal(mask_to_box(moved), [12, 10, 51, 29])
    assert moved.sum() == 40 * 20
    np.testing.assert_array_equal(stretch_mask(mask, box, box), mask)
    assert stretch_mask(mask, box, np.array([70, 70, 80, 80], np.float32)).any()  # never empty


# A user's mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_types": ["points"]}, "prompt_types.0.: got .points.*did you mean point"),
        ({"prompt_types": ["box"]}, "expected one of point, bbox, mask; did you mean bbox"),
        ({"prompt_types": "point"}, r"prompt_types: got .point.*a list.*write \[point\]"),
        ({"prompt_types": []}, r"prompt_types: got \[\]; expected a list"),
        ({"num_of_pos_points": (3, 1)}, r"num_of_pos_points is \[3, 1\]; expected \[lowest"),
        ({"num_of_pos_points": (1, 2, 3)}, r"num_of_pos_points: got \[1, 2, 3\]"),
        ({"num_of_pos_points": -1}, "num_of_pos_points: got -1; expected .* at least 0"),
        ({"num_of_pos_points": 1.5}, "num_of_pos_points: got 1.5"),
        ({"num_of_neg_points": -2}, "num_of_neg_points: got -2"),
        ({"num_of_neg_points": True}, "num_of_neg_points: got true"),
        ({"num_of_pos_points": 0}, "without a positive point"),
        ({"num_of_pos_points": (0, 2)}, "without a positive point"),
        ({"box_jitter": 0.6}, "box_jitter: got 0.6; expected a number of .* at most 0.5"),
        ({"box_jitter": -0.1}, "box_jitter: got -0.1"),
        ({"weights": [1.0]}, "prompt_weights has 1 numbers for 3 prompt_types"),
        ({"weights": [1.0, 0.0, 1.0]}, r"prompt_weights\[1\]: got 0.0; expected a number above 0"),
    ],
)
def test_settings_that_make_no_prompt_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PromptGenerator(**options)


def test_without_point_prompts_no_point_is_needed():
    prompt = generate(rectangle((10, 12), 2, 3, 7, 9), "bbox", num_of_pos_points=0)
    assert len(prompt["points"]) == 2


def test_the_sections_of_an_experiment_say_the_same():
    """One rule for a number, whether it comes by the constructor or by the file."""
    boxes = {"data_path": "a.json", "num_of_pos_points": 0, "prompt_types": ["bbox"]}
    build(Experiment, {"dataset": boxes}, "an experiment")
    points = {"prompt_types": ["point"]}
    for sections in ({"dataset": boxes | points}, {"dataset": boxes, "evaluation": points}):
        with pytest.raises(ConfigError, match="without a positive point"):
            build(Experiment, sections, "an experiment")


# A new type from outside


class Scribble(PromptType):
    """Positive clicks along a line, from the leftmost pixel of the object to the rightmost."""

    painted: list = []  # noqa: RUF012

    def check(self, config):
        if config.num_of_neg_points:
            raise ValueError("a scribble has no negative points; set num_of_neg_points to 0")

    def sample(self, mask, config, rng):
        y, x = np.nonzero(mask)
        along = np.argsort(x)[np.linspace(0, len(x) - 1, 4).astype(int)]
        points = np.stack([x[along], y[along]], axis=1).astype(np.float32)
        return {"points": points, "labels": np.ones(4, np.int32)}

    def paint(self, prompt, canvas):
        line = np.array([canvas.place(point) for point in prompt["points"]], np.int32)
        cv2.polylines(canvas.picture, [line], False, (1, 2, 3), 3)
        self.painted.append(len(line))


def read_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def scribble(monkeypatch):
    monkeypatch.setitem(PROMPTS, "scribble", Scribble())
    monkeypatch.setattr(Scribble, "painted", [])


def test_a_new_type_trains_is_evaluated_and_painted(scribble, tmp_path, monkeypatch):
    """One class and one entry of `PROMPTS`; clicks correct it as they correct points."""
    monkeypatch.chdir(tmp_path)
    data = make_coco(tmp_path / "data", num_frames=5, size=(64, 64))
    (tmp_path / "small.yaml").write_text(
        f"dataset: {{data_path: {data}, val_path: {data}, image_size: [64, 64], "
        "video_clip_length: 3, prompt_types: [scribble], max_conditioning_frames: 2}\n"
        "model: {config_path: sam2train/configs/sam2.1_hiera_demo.yaml, image_size: 64}\n"
        "interaction: {num_correction_pt_per_frame: 1, num_frames_to_correct: 2}\n"
        "trainer: {num_steps: 1, val_every: 1, device: cpu}\n"
        "tracking: {mode: disabled}\n"
    )
    assert cli.main(["small.yaml", "--run-dir", "run"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    rows = read_rows(tmp_path / "run/scores.csv")
    assert {row["prompt"] for row in rows} == {"scribble"}
    picture = np.asarray(Image.open(next((tmp_path / "run/overlays").glob("*.jpg"))))
    assert (np.abs(picture.astype(int) - (1, 2, 3)).max(axis=-1) < 12).any()  # a JPEG
    assert set(Scribble.painted) == {4}

    last = "run/checkpoints/last.pt"
    assert cli.main(["small.yaml", "--evaluate", last, "--run-dir", "scored", "--no-base"]) == 0
    scored = read_rows(tmp_path / "scored/scores.csv")
    assert {row["prompt"] for row in scored} == {"scribble"}
    assert cli.main(["small.yaml", "--prompt-matrix", last, "--run-dir", "m", "--no-base"]) == 0
    matrix = read_rows(tmp_path / "m/prompt_matrix.csv")
    noises = [float(row["noise"]) for row in matrix if row["prompt"] == "scribble"]
    assert noises == list(NOISE)


def test_a_new_type_is_known_by_name_and_checked(scribble):
    with pytest.raises(UserError, match="did you mean scribble"):
        PromptGenerator(["scribbel"])
    with pytest.raises(UserError, match="a scribble has no negative points"):
        PromptGenerator(["scribble"], num_of_neg_points=1)
    rng = np.random.default_rng(0)
    prompt = PromptGenerator(["scribble"]).generate(u_shape(), rng, object_id=3)
    assert (prompt["type"], prompt["object_id"], len(prompt["points"])) == ("scribble", 3, 4)
    assert (prompt["box"], prompt["mask"]) == (None, None)
    assert PromptGenerator().prompt_types == list(DEFAULT_TYPES)  # old experiments do not get it


@pytest.mark.parametrize(
    ("first", "after"), [("mask", {"mask"}), ("scribble", {"point", "bbox", "scribble"})]
)
def test_what_may_follow_a_prompt_hangs_on_what_it_gives(scribble, first, after):
    assert set(types_like(first)) == after


def test_no_other_module_spells_the_types():
    """`mask` is a field of a prompt as well, so that the other two must do."""
    allowed = {
        *(("demo", "bbox"), ("video_files", "bbox")),  # COCO's name of a field
        ("predict", "point"),  # a word of `--prompt`
        ("ablation", "point"),  # the value that a sweep's others are compared with
        # what speeds are measured with
        *(("speed_data", "point"), ("speed_step", "point"), ("speed_step", "bbox")),
    }
    found = {
        (path.stem, node.value)
        for path in Path(prompts.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("point", "bbox")
    }
    assert {entry for entry in found if entry[0] != "prompts"} <= allowed
