"""Against the reference files of ../shared/oracles; without them this file is not collected.

Some of their numbers stand in the tests of each module, with inputs made there.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam2train.clips import FramePrediction
from sam2train.losses import LossConfig, compute_losses, mask_iou, mask_losses
from sam2train.metrics import ObjectScores, mean_scores, score_video
from sam2train.prompts import mask_center, mask_to_box, next_click

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
CASES = sorted(path.stem for path in (ORACLES / "oracle_inputs").glob("*.json"))


@pytest.fixture(scope="module")
def j_and_f():
    return json.loads((ORACLES / "oracle_jf.json").read_text())


@pytest.fixture(scope="module")
def losses():
    return torch.load(ORACLES / "oracle_losses.pt", weights_only=True)


@pytest.fixture(scope="module")
def points():
    return torch.load(ORACLES / "oracle_points.pt", weights_only=True)


# -- J and F


def oracle_case(name: str) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Prediction and ground truth of a reference case: object_id -> (T, H, W) bool."""
    case = json.loads((ORACLES / "oracle_inputs" / f"{name}.json").read_text())
    empty = np.zeros((case["height"], case["width"]), dtype=bool)

    def stacks(side: str) -> dict[int, np.ndarray]:
        return {
            int(object_id): np.stack(
                [empty if rle is None else coco_mask.decode(rle).astype(bool) for rle in frames]
            )
            for object_id, frames in case[side].items()
        }

    with warnings.catch_warnings():
        # pycocotools 2.0 under NumPy 2: "__array__ implementation doesn't accept a copy keyword".
        warnings.simplefilter("ignore", DeprecationWarning)
        return stacks("pred"), stacks("gt")


def check_sav(scores: ObjectScores | None, expected: dict | None) -> None:
    """Compare with the SA-V evaluator; None where an object is not scored."""
    assert (scores is None) == (expected is None)
    if expected is not None:
        assert len(scores.frames) == expected["frames_counted"]
        assert scores.J_mean == pytest.approx(expected["J_mean"], abs=1e-6)
        assert scores.F_mean == pytest.approx(expected["F_mean"], abs=1e-6)
        assert scores.J_and_F == pytest.approx(expected["J&F"], abs=1e-6)


def test_every_reference_case_is_here(j_and_f):
    assert sorted(j_and_f["cases"]) == CASES


@pytest.mark.parametrize("name", CASES)
def test_against_davis_and_sav(j_and_f, name):
    case = j_and_f["cases"][name]
    prediction, ground_truth = oracle_case(name)
    scored = {policy: score_video(prediction, ground_truth, policy) for policy in ("all", "davis")}
    for key, policy in (("all_frames", "all"), ("skip_first_last", "davis")):
        means = mean_scores([scored[policy]])
        for scores in scored[policy].objects:
            reference = case["objects"][str(scores.object_id)]
            for letter in "JF":
                # The reference keeps 8 decimals.
                per_frame = np.array(reference[f"davis_{letter}_per_frame"])[scores.frames]
                np.testing.assert_allclose(getattr(scores, letter), per_frame, rtol=0, atol=1e-6)
            for column, value in reference[key]["davis"].items():
                mine = getattr(scores, column.replace("&", "_and_"))
                assert mine == pytest.approx(value, abs=1e-6), column
        assert {str(scores.object_id) for scores in scored[policy].objects} == set(case["objects"])
        for name, theirs in (("J", "J_mean"), ("F", "F_mean"), ("J_and_F", "J&F")):
            assert means[name] == pytest.approx(case[key][theirs], abs=1e-6)

    for key in ("all_frames", "skip_first_last"):
        if key == "all_frames":  # two empty frames more, for `sav` to leave out
            both = (
                {
                    object_id: np.pad(masks, ((1, 1), (0, 0), (0, 0)))
                    for object_id, masks in side.items()
                }
                for side in (prediction, ground_truth)
            )
        else:
            both = (prediction, ground_truth)
        by_id = {scores.object_id: scores for scores in score_video(*both, "sav").objects}
        for object_id, reference in case["objects"].items():
            for layout in ("sav", "sav_per_object_folder"):
                check_sav(by_id.get(int(object_id)), reference[key][layout])


@pytest.mark.parametrize("method", ["osvos", "rvos"])
def test_against_a_whole_davis_evaluation(j_and_f, method):
    reference = j_and_f["end_to_end"][f"davis2017_{method}"]
    videos = {
        video: score_video(*oracle_case(f"real_{method}_{video}"), "davis")
        for video in ("car-shadow", "dog")
    }
    for video, scores in videos.items():
        J, F = reference["J_per_object"][f"{video}_1"], reference["F_per_object"][f"{video}_1"]
        assert (scores.objects[0].J_mean, scores.objects[0].F_mean) == pytest.approx(
            (J, F), abs=1e-6
        )
    means = mean_scores(videos.values())
    assert means["J"] == pytest.approx(reference["J-Mean"], abs=1e-6)
    assert means["F"] == pytest.approx(reference["F-Mean"], abs=1e-6)
    assert means["J_and_F"] == pytest.approx(reference["J&F-Mean"], abs=1e-6)


# -- losses


def test_elementary_losses_equal_sam2(losses):
    seen = set()
    for case in losses["elementary"]:
        if not case["loss_on_multimask"]:
            continue  # another reduction of the same elements; nothing of ours does it
        data = losses["elementary_inputs"][case["data"]]
        logits = data["inputs"].clone().requires_grad_()
        target = data["targets"][:, 0].bool()  # the same for each candidate
        if case["fn"] == "dice_loss":
            ours = mask_losses(logits, target, 0.25, 2.0)[1]
        elif case["fn"] == "sigmoid_focal_loss":
            # SAM 2 reads a negative alpha as "no weighting": twice alpha = 1/2.
            alpha, scale = (case["alpha"], 1) if case["alpha"] >= 0 else (0.5, 2)
            ours = scale * mask_losses(logits, target, alpha, case["gamma"])[0]
        else:
            difference = data["pred_ious"] - mask_iou(data["inputs"], data["targets"])
            ours = difference.abs() if case["use_l1_loss"] else difference**2
        torch.testing.assert_close(ours / case["num_objects"], case["out"], rtol=1e-5, atol=1e-6)
        if "grad_inputs" in case and ours.requires_grad:
            (ours / case["num_objects"]).sum().backward()
            torch.testing.assert_close(logits.grad, case["grad_inputs"], rtol=1e-4, atol=1e-7)
            seen.add((case["fn"], case["data"]))
    assert len(seen) == 6  # two functions with gradients on three sets of inputs


NAMES = {"focal": "mask", "dice": "dice", "iou": "iou", "object_score": "class"}


def test_combined_loss_equals_sam2(losses):
    inputs, checked = losses["multi_inputs"], 0
    for case in losses["multi"]:
        settings = inputs["configs"][case["config"]]
        targets = inputs["targets"][case["targets"]]
        all_present = bool(targets.flatten(2).any(-1).all())
        if not settings.get("pred_obj_scores", False) and not all_present:
            continue  # without object scores SAM 2 counts absent objects as present; ours never
        weights = settings["weight_dict"]
        config = LossConfig(
            **{name: weights.get(f"loss_{theirs}", 0) for name, theirs in NAMES.items()},
            supervise_all_iou=settings.get("supervise_all_iou", False),
            iou_l1=settings.get("iou_use_l1_loss", False),
        )
        frames, leaves = [], []
        for frame in inputs["outs_batch"][case["outs"]][: len(targets)]:
            steps = [
                [value.clone().requires_grad_() for value in frame[f"multistep_{name}"]]
                for name in (
                    "pred_multimasks_high_res",
                    "pred_ious",
                    "object_score_logits",
                )
            ]
            leaves.append(steps)
            frames.append(
                [FramePrediction(torch.arange(3), *step) for step in zip(*steps, strict=True)]
            )
        ours = compute_losses(frames, targets, config)
        plain_score = settings.get("focal_gamma_obj_score", 0.0) == 0
        for name, theirs in NAMES.items():
            if name == "object_score" and not (
                plain_score and settings.get("pred_obj_scores", False)
            ):
                continue  # ours is plain cross entropy, SAM 2.1's setting
            expected = case["losses"][f"loss_{theirs}"]
            torch.testing.assert_close(
                ours[f"loss/{name}"], torch.as_tensor(expected), rtol=1e-5, atol=1e-6
            )
        if plain_score and settings.get("pred_obj_scores", False):
            torch.testing.assert_close(
                ours["loss"], case["losses"]["core_loss"], rtol=1e-5, atol=1e-6
            )
            ours["loss"].backward()
            for steps, norms in zip(leaves, case["grad_norms"], strict=True):
                for values, expected in zip(steps, norms.values(), strict=True):
                    for value, norm in zip(values, expected, strict=True):
                        assert value.grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7)
        checked += 1
    assert checked == 27  # three of the four settings; the fourth has absent objects everywhere


# -- prompts


def test_centres_and_boxes_equal_those_of_sam2(points):
    cases = points["cases"]
    compared = 0
    for case in cases.values():
        if case["pred_masks"] is not None:
            continue  # SAM 2 then clicks on errors, not on the object
        for row, mask in enumerate(case["gt_masks"][:, 0].numpy()):
            if not mask.any():
                continue
            expected = case["center_padding_True"]["points"][row, 0].numpy()
            np.testing.assert_array_equal(mask_center(mask), expected)
            np.testing.assert_array_equal(mask_to_box(mask), case["mask_to_box"][row, 0].numpy())
            compared += 1
    assert compared >= 5


def test_clicks_equal_those_of_sam2(points):
    compared = 0
    for case in points["cases"].values():
        expected = case["get_next_point_center"]
        predicted = case["pred_masks"]
        for row, mask in enumerate(case["gt_masks"][:, 0].numpy()):
            guess = np.zeros_like(mask) if predicted is None else predicted[row, 0].numpy()
            click = next_click(mask, guess)
            if click is None:
                continue  # SAM 2 then clicks on the corner of the picture
            np.testing.assert_array_equal(click[0], expected["points"][row, 0].numpy())
            assert click[1] == expected["labels"][row, 0]
            compared += 1
    assert compared >= 10
