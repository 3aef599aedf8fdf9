"""J, F and the frames that count: by hand, against reference numbers, against a plain version."""

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sam2train.errors import UserError
from sam2train.metrics import (
    ObjectScores,
    VideoScores,
    boundary_f,
    counted_frames,
    decay,
    iou,
    jaccard,
    join,
    mean_scores,
    measure,
    recall,
    score_video,
)


def frame(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """(1, H, W) bool with boxes (top, left, bottom, right), ends exclusive."""
    mask = np.zeros((1, height, width), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[0, top:bottom, left:right] = True
    return mask


def plain_f(prediction: np.ndarray, ground_truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of one (H, W) frame the straightforward way: whole frame, float maps, one disk kernel."""
    radius = int(np.ceil(tolerance * np.linalg.norm(prediction.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    outlines = []
    for mask in (prediction, ground_truth):
        right, down, diagonal = (np.zeros_like(mask) for _ in range(3))
        right[:, :-1], down[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        outline = mask ^ right | mask ^ down | mask ^ diagonal
        outline[-1] = mask[-1] ^ right[-1]
        outline[:, -1] = mask[:, -1] ^ down[:, -1]
        outline[-1, -1] = False
        outlines.append(outline.astype(np.uint8))
    predicted, truth = outlines
    if not predicted.sum() or not truth.sum():
        return float(predicted.sum() == truth.sum())
    precision = (predicted * cv2.dilate(truth, disk)).sum() / predicted.sum()
    recall = (truth * cv2.dilate(predicted, disk)).sum() / truth.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# --- values by hand ---------------------------------------------------------------------------


def test_jaccard_of_a_shifted_square():
    # 10 x 10, moved by 5: 50 shared pixels of 150.
    square, moved = frame(40, 40, (10, 10, 20, 20)), frame(40, 40, (10, 15, 20, 25))
    assert jaccard(square, moved) == pytest.approx([1 / 3])


def test_empty_masks():
    empty, box = frame(40, 40), frame(40, 40, (10, 10, 20, 20))
    prediction = np.concatenate([empty, box, empty])
    ground_truth = np.concatenate([empty, empty, box])
    for scores in (jaccard(prediction, ground_truth), boundary_f(prediction, ground_truth)):
        assert scores.tolist() == [1, 0, 0]
        assert scores.dtype == np.float64


def test_a_stack_without_frames_has_no_scores():
    none = np.zeros((0, 5, 5), dtype=bool)
    assert jaccard(none, none).shape == boundary_f(none, none).shape == (0,)


def test_one_pixel():
    # The outline of pixel (y, x) is the 2 x 2 block that ends there; 30 x 40 has a tolerance of 1.
    pixel = frame(30, 40, (10, 10, 11, 11))
    assert boundary_f(pixel, frame(30, 40, (10, 11, 11, 12))) == 1  # one aside: everything matches
    # Two aside, facing columns are 1 apart: half of each outline matches.
    assert boundary_f(pixel, frame(30, 40, (10, 12, 11, 13))) == pytest.approx(0.5)
    assert boundary_f(pixel, frame(30, 40, (10, 13, 11, 14))) == 0
    # Diagonally by (2, 2), the nearest pixels are sqrt(2) apart: outside a disk of radius 1.
    assert boundary_f(pixel, frame(30, 40, (12, 12, 13, 13))) == 0
    assert jaccard(pixel, frame(30, 40, (10, 11, 11, 12))) == 0


def test_precision_and_recall_of_an_extra_box():
    box, extra = (10, 10, 20, 20), (60, 60, 70, 70)
    truth, prediction = frame(90, 120, box), frame(90, 120, box, extra)
    # Half of the predicted outline is right (precision 1/2), all of the truth is found (recall 1).
    assert boundary_f(prediction, truth) == pytest.approx([2 / 3])
    assert boundary_f(truth, prediction) == pytest.approx([2 / 3])


def test_tolerance_is_a_fraction_of_the_diagonal_rounded_up():
    # 300 x 400: a diagonal of 500, so 0.008 is 4 pixels exactly and a little more is 5. A line one
    # pixel high and as wide as the frame has the outline rows y - 1 and y.
    line, moved = frame(300, 400, (100, 0, 101, 400)), frame(300, 400, (105, 0, 106, 400))
    assert boundary_f(line, moved, 0.008) == pytest.approx([0.5])  # row y against row y + 4
    assert boundary_f(line, moved, 0.0081) == pytest.approx([1.0])


def test_a_full_frame_has_no_outline():
    full, empty, box = frame(40, 40, (0, 0, 40, 40)), frame(40, 40), frame(40, 40, (5, 5, 9, 9))
    assert boundary_f(full, full) == 1
    assert boundary_f(full, box) == 0
    # As in the DAVIS code: neither has an outline, so nothing is wrong with it. J tells.
    assert boundary_f(full, empty) == 1
    assert jaccard(full, empty) == 0


def test_outline_at_the_border_of_the_frame():
    # Standing on the border, a box has no outline there: 11 pixels above it and 10 on either side.
    # Lifted by a row it has one below as well: 11 + 11 pixels, and 9 on either side.
    low, lifted = frame(30, 40, (20, 10, 30, 20)), frame(30, 40, (19, 10, 29, 20))
    # A tolerance of 1 reaches 2 pixels of the lower line from each side, and misses 7.
    precision, sensitivity = (40 - 7) / 40, 31 / 31
    expected = 2 * precision * sensitivity / (precision + sensitivity)
    assert boundary_f(lifted, low) == pytest.approx([expected])


def test_recall_counts_strictly_above_a_half():
    assert recall(np.array([0.5, 0.50001, 1.0, 0.0])) == 0.5


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.7], 0.0),
        ([0.9, 0.4], 0.5),
        ([1.0, 0.8, 0.0], 0.9),  # 1.5 goes up to 2 and 2.5 to 3: two frames against one
        ([1.0, 0.8, 0.6, 0.4, 0.2], 0.6),  # the second frame belongs to the first two quarters
        (np.linspace(1, 0, 401), 300 / 400),  # quarters of 101 frames, beyond what 8 bits hold
    ],
)
def test_decay(scores, expected):
    assert decay(np.array(scores)) == pytest.approx(expected)


def test_iou_of_a_video_weighs_pixels():
    # Frame 0: 100 of 100 pixels; frame 1: 0 of 100. Frame 2 empty.
    truth = np.concatenate(
        [frame(40, 40, (0, 0, 10, 10)), frame(40, 40, (0, 0, 5, 10)), frame(40, 40)]
    )
    prediction = np.concatenate([truth[:1], frame(40, 40, (20, 0, 25, 10)), frame(40, 40)])
    assert iou(prediction, truth) == 0.5
    assert jaccard(prediction, truth).mean() == pytest.approx(2 / 3)
    assert iou(truth[2:], prediction[2:]) == 1


# --- the frames that count --------------------------------------------------------------------

ON = frame(6, 6, (1, 1, 4, 4))[0]
OFF = np.zeros_like(ON)


@pytest.mark.parametrize(
    ("prediction", "ground_truth", "expected"),
    [
        # Seen all along.
        ("11111", "11111", {"all": "01234", "davis": "123", "sav": "123", "after_prompt": "1234"}),
        # Enters on frame 2.
        ("00111", "00111", {"all": "01234", "davis": "123", "sav": "23", "after_prompt": "34"}),
        # The prediction shows it earlier: SA-V counts from there.
        ("01111", "00111", {"all": "01234", "davis": "123", "sav": "123", "after_prompt": "34"}),
        # Leaves and comes back: counts while it is away.
        ("10010", "10010", {"all": "01234", "davis": "123", "sav": "3", "after_prompt": "1234"}),
        # Only where nothing is counted.
        ("00001", "00001", {"all": "01234", "davis": "123", "sav": "", "after_prompt": ""}),
        ("10000", "10000", {"all": "01234", "davis": "123", "sav": "", "after_prompt": "1234"}),
        # Never there, and predicted all the same.
        ("11111", "00000", {"all": "01234", "davis": "123", "sav": "", "after_prompt": ""}),
        # Too short for a first, a last and another frame.
        ("11", "11", {"all": "01", "davis": "", "sav": "", "after_prompt": "1"}),
        ("1", "1", {"all": "0", "davis": "", "sav": "", "after_prompt": ""}),
    ],
)
def test_frames_that_count(prediction, ground_truth, expected):
    stacks = [
        np.stack([ON if c == "1" else OFF for c in row]) for row in (prediction, ground_truth)
    ]
    for policy, frames in expected.items():
        assert counted_frames(measure(*stacks), policy).tolist() == [int(c) for c in frames], policy


def test_measures_frame_by_frame_are_those_of_the_stack():
    """What is scored as it comes equals what is scored at the end, bit for bit."""
    rng = np.random.default_rng(0)
    prediction, truth = rng.random((2, 5, 12, 17)) > 0.7
    prediction[2], truth[3] = False, False
    whole = measure(prediction, truth)
    joined = join(measure(p[None], t[None]) for p, t in zip(prediction, truth, strict=True))
    for name in ("intersection", "predicted", "present", "union", "J", "F"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert np.array_equal(whole.J, jaccard(prediction, truth))
    assert whole.predicted[2] == whole.present[3] == 0
    assert [len(values) for values in join([])] == [0, 0, 0, 0]


def test_frames_that_do_not_count_change_nothing():
    truth = np.stack([OFF, ON, ON, ON])
    prediction = np.stack([ON, OFF, ON, OFF])  # wrong before the prompt and on it
    scores = score_video({7: prediction}, {7: truth}, "after_prompt").objects[0]
    assert scores.object_id == 7
    assert scores.frames.tolist() == [2, 3]
    assert scores.J.tolist() == scores.F.tolist() == [1, 0]
    assert scores.J_mean == scores.F_mean == scores.J_and_F == scores.iou == 0.5
    assert scores.J_recall == scores.F_recall == 0.5
    assert scores.J_decay == scores.F_decay == 1


def test_an_object_without_frames_is_counted_and_left_out():
    late, there = np.stack([OFF, OFF, ON]), np.stack([ON, ON, ON])
    video = score_video({2: late, 1: there}, {2: late, 1: there}, "after_prompt")
    assert [scores.object_id for scores in video.objects] == [1]
    assert video.not_scored == (2,)
    assert mean_scores([video])["num_not_scored"] == 1
    with pytest.raises(UserError, match=r"1 videos with 1 objects .* longer videos"):
        mean_scores([score_video({2: late}, {2: late}, "after_prompt")])


def test_means_are_over_objects_not_videos_or_frames():
    def scored(object_id: int, J: list[float], F: list[float], iou: float) -> ObjectScores:
        return ObjectScores(object_id, np.arange(len(J)), np.array(J), np.array(F), iou)

    two = VideoScores((scored(1, [1.0, 0.0], [1.0, 1.0], 0.4), scored(2, [0.2], [0.4], 0.2)), ())
    one = VideoScores((scored(1, [0.8, 0.8, 0.8], [0.4, 0.4, 0.4], 0.9),), (5, 6))
    means = mean_scores([two, one])
    assert means == pytest.approx(
        {
            "J": (0.5 + 0.2 + 0.8) / 3,
            "F": (1.0 + 0.4 + 0.4) / 3,
            "J_and_F": (0.75 + 0.3 + 0.6) / 3,
            "J_recall": (0.5 + 0 + 1) / 3,
            "J_decay": (1 + 0 + 0) / 3,
            "F_recall": 1 / 3,
            "F_decay": 0,
            "mIoU": 0.5,
            "num_objects": 3,
            "num_not_scored": 2,
        }
    )


@pytest.mark.parametrize(
    ("prediction", "ground_truth", "message"),
    [
        (
            np.zeros((1, 4, 5), np.uint8),
            np.zeros((1, 4, 5), bool),
            r"prediction: uint8 \(1, 4, 5\)",
        ),
        (np.zeros((4, 5), bool), np.zeros((4, 5), bool), r"prediction: bool \(4, 5\)"),
        (np.zeros((1, 4, 5), bool), np.zeros((1, 4, 5), float), r"ground truth: float64"),
        (np.zeros((1, 4, 5), bool), np.zeros((2, 4, 5), bool), r"differ in shape"),
    ],
)
@pytest.mark.parametrize("score", [jaccard, boundary_f, iou])
def test_stacks_that_cannot_be_scored(score, prediction, ground_truth, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, ground_truth)


def test_arguments_that_cannot_be_meant():
    masks = np.stack([ON, ON])
    with pytest.raises(ValueError, match=r"objects \[1\] were predicted and \[1, 2\] are in"):
        score_video({1: masks}, {1: masks, 2: masks}, "all")
    with pytest.raises(ValueError, match=r"'first'; it is one of all, davis, sav, after_prompt"):
        score_video({1: masks}, {1: masks}, "first")
    for tolerance in (0, 1, 3):
        with pytest.raises(ValueError, match=rf"tolerance {tolerance}; expected a fraction"):
            boundary_f(masks, masks, tolerance)


# --- numbers of the DAVIS 2017 evaluation code (ac7c43f) ----------------------------------------


@pytest.mark.parametrize(
    ("size", "truth", "prediction", "J", "F"),
    [
        ((64, 96), (20, 30, 44, 60), (21, 31, 45, 61), 0.86287193, 0.99074074),
        ((64, 96), (0, 0, 20, 30), (0, 0, 22, 28), 0.85365854, 0.06122449),
        ((64, 96), (50, 70, 64, 96), (52, 72, 64, 96), 0.79120879, 0),
        ((48, 64), (0, 0, 48, 64), (10, 10, 30, 30), 0.13020833, 0),
        ((7, 5), (2, 1, 5, 4), (2, 2, 5, 4), 0.66666667, 1),
        ((1, 40), (0, 5, 1, 20), (0, 8, 1, 20), 0.8, 0.5),
        ((64, 64), (10, 10, 11, 11), (10, 11, 11, 12), 0, 1),
        ((100, 200), (50, 0, 51, 200), (52, 0, 53, 200), 0, 1),
        ((1280, 720), (200, 100, 900, 500), (210, 108, 905, 490), 0.93497925, 0.9977221),
    ],
)
def test_boxes_score_what_davis_gives_them(size, truth, prediction, J, F):
    pair = frame(*size, prediction), frame(*size, truth)
    assert jaccard(*pair) == pytest.approx([J], abs=1e-8)
    assert boundary_f(*pair) == pytest.approx([F], abs=1e-8)


# J by frame of a mask that drifts off its object, rounded to 5 decimals.
DRIFT = [
    1.0,
    0.97743,
    0.95687,
    0.93521,
    0.9146,
    0.89328,
    0.87436,
    0.85238,
    0.83286,
    0.81209,
    0.79097,
    0.77029,
    0.75204,
    0.73036,
    0.71024,
    0.69083,
    0.67141,
    0.65378,
    0.63792,
    0.61808,
    0.60137,
    0.58639,
    0.57064,
    0.55575,
    0.53988,
    0.52449,
    0.51042,
    0.49406,
    0.47804,
    0.45999,
    0.44359,
    0.42725,
    0.40776,
    0.38908,
    0.37107,
    0.35413,
    0.33492,
    0.31541,
    0.29731,
    0.27617,
]


@pytest.mark.parametrize(
    ("frames", "mean", "share", "fall"),
    [
        (slice(None), 0.62531868, 0.675, 0.52394392),
        (slice(1, -1), 0.62464665, 0.68421053, 0.50395576),
    ],
)
def test_mean_recall_and_decay_are_those_of_davis(frames, mean, share, fall):
    J = np.array(DRIFT)[frames]
    assert (J.mean(), decay(J)) == pytest.approx((mean, fall), abs=1e-5)
    assert recall(J) == pytest.approx(share)


# --- invariances and the plain version --------------------------------------------------------


@st.composite
def mask_pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W) masks: noise, boxes that may touch every border, empty or full."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))

    def mask() -> np.ndarray:
        kind = draw(st.sampled_from(["noise", "boxes"]))
        if kind == "noise":
            return draw(hnp.arrays(bool, shape))
        out = np.zeros(shape, dtype=bool)
        for _ in range(draw(st.integers(0, 3))):
            top, left = (draw(st.integers(0, side - 1)) for side in shape)
            bottom = draw(st.integers(top + 1, shape[0]))
            right = draw(st.integers(left + 1, shape[1]))
            out[top:bottom, left:right] = True
        return out

    return mask(), mask()


CORNER = np.zeros((12, 9), dtype=bool)
CORNER[-1, -1] = True


@settings(deadline=None, max_examples=400)
@given(mask_pairs(), st.sampled_from([0.008, 0.05, 0.1, 0.3, 0.9]))
@example((CORNER, ~CORNER), 0.008)  # the one pixel that never is on an outline
@example((CORNER, np.roll(CORNER, -1, axis=1)), 0.9)  # a disk larger than the crop
def test_crop_equals_the_whole_frame(pair, tolerance):
    prediction, ground_truth = pair
    assert boundary_f(prediction[None], ground_truth[None], tolerance) == plain_f(
        prediction, ground_truth, tolerance
    )


@settings(deadline=None, max_examples=100)
@given(mask_pairs())
def test_memory_layout_is_no_part_of_a_score(pair):
    prediction, ground_truth = (mask[None] for mask in pair)
    fortran, strided = np.asfortranarray(prediction), np.repeat(ground_truth, 2, axis=2)[..., ::2]
    assert boundary_f(fortran, strided, 0.1) == boundary_f(prediction, ground_truth, 0.1)
    assert jaccard(fortran, strided) == jaccard(prediction, ground_truth)


@settings(deadline=None, max_examples=200)
@given(mask_pairs())
def test_symmetries(pair):
    prediction, ground_truth = (mask[None] for mask in pair)
    J, F = jaccard(prediction, ground_truth), boundary_f(prediction, ground_truth, 0.1)
    assert jaccard(ground_truth, prediction) == J
    # Swapping the masks swaps precision and recall.
    assert boundary_f(ground_truth, prediction, 0.1) == pytest.approx(F, abs=1e-12)
    # Transposed, the neighbours right and below change places, and the last row and column too.
    turned = [masks.transpose(0, 2, 1) for masks in (prediction, ground_truth)]
    assert jaccard(*turned) == J
    assert boundary_f(*turned, 0.1) == F
    # A flip is free for J; for F only off the border, as an outline lies half a pixel up and left.
    assert jaccard(prediction[..., ::-1], ground_truth[..., ::-1]) == J
    room = ((0, 0), (2, 2), (2, 2))
    roomy = [np.pad(masks, room) for masks in (prediction, ground_truth)]
    assert jaccard(*roomy) == J
    F = boundary_f(*roomy, 0.1)
    for axis in (1, 2):
        flipped = [np.flip(masks, axis) for masks in roomy]
        assert boundary_f(*flipped, 0.1) == pytest.approx(F, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(mask_pairs(), st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_where_in_the_frame_does_not_matter_off_the_border(pair, offset):
    # One canvas, so that the tolerance stays the same; two places that leave a border.
    scores = []
    for top, left in ((1, 1), (1 + offset[0], 1 + offset[1])):
        canvas = np.zeros((2, 1, 32, 32), dtype=bool)
        height, width = pair[0].shape
        canvas[:, 0, top : top + height, left : left + width] = pair
        scores.append(boundary_f(*canvas, 0.05)[0])
    assert scores[0] == scores[1]
