"""The loss: values by hand, SAM 2's reference numbers, and what must not change it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_coco
from rich.console import Console

from sam2train import losses
from sam2train.clips import NO_OBJECT_LOGIT, FramePrediction
from sam2train.experiment import Experiment
from sam2train.losses import (
    LossConfig,
    compute_losses,
    divide_losses,
    mask_iou,
    mask_losses,
    sum_losses,
)
from sam2train.trainer import Trainer

# Far enough from 0 that the sigmoid is 0 or 1 in float32.
SURE = 30.0


def square(top, left, side=4, size=8):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def logits_of(mask):
    return torch.where(mask, SURE, -SURE)


def predict(logits, objects=None, iou=0.5, score=2.0):
    """A decoder pass with (n, M, H, W) logits and the same IoU and score everywhere."""
    n, m = logits.shape[:2]
    objects = torch.arange(n) if objects is None else torch.as_tensor(objects)
    return FramePrediction(objects, logits, torch.full((n, m), iou), torch.full((n, 1), score))


def random_frames(num_frames, num_objects, seed=0, size=8):
    """Random predictions, 3 candidates on odd frames, with targets (T, O, H, W)."""
    rng = torch.Generator().manual_seed(seed)
    frames = []
    for t in range(num_frames):
        m = 3 if t % 2 else 1
        frames.append(
            [
                FramePrediction(
                    torch.arange(num_objects),
                    torch.randn(num_objects, m, size, size, generator=rng),
                    torch.rand(num_objects, m, generator=rng),
                    torch.randn(num_objects, 1, generator=rng),
                )
            ]
        )
    targets = torch.rand(num_frames, num_objects, size, size, generator=rng) > 0.6
    return frames, targets


def dice_loss(logits, target, kept=None):
    """Of one mask (H, W)."""
    kept = None if kept is None else kept[None]
    return mask_losses(logits[None, None], target[None].bool(), 0.25, 2.0, kept)[1][0, 0]


def focal_loss(logits, target, alpha, gamma):
    """Of one mask (H, W), the mean over its pixels."""
    return mask_losses(logits[None, None], target[None].bool(), alpha, gamma)[0][0, 0]


# -- the terms by hand ----------------------------------------------------------------------------


def test_dice_of_half_overlapping_squares():
    logits, target = logits_of(square(0, 0)), square(0, 2)
    # 16 px each, 8 shared: 1 - (2 * 8 + 1) / (16 + 16 + 1), which is 1/2 but for the smoothing.
    assert dice_loss(logits, target.float()).item() == pytest.approx(1 - 17 / 33)
    assert dice_loss(logits, target.float()).item() == pytest.approx(0.5, abs=0.02)


def test_dice_extremes():
    mask = square(0, 0)
    assert dice_loss(logits_of(mask), mask.float()).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(logits_of(mask), (~mask).float()).item() == pytest.approx(1 - 1 / 65)
    empty = torch.zeros(8, 8)
    assert dice_loss(logits_of(empty > 0), empty).item() == pytest.approx(0, abs=1e-6)


def test_focal_at_zero_logit():
    # p = 1/2: (1/2)^2 ln 2, times alpha on the object and 1 - alpha beside it.
    expected = 0.25 * torch.log(torch.tensor(2.0))
    for target, weight in ((1.0, 0.25), (0.0, 0.75)):
        loss = focal_loss(torch.zeros(1, 1), torch.tensor([[target]]), alpha=0.25, gamma=2)
        torch.testing.assert_close(loss, expected * weight)


def focal_and_dice_by_autograd(logits, target, alpha, gamma, kept):
    """The formulas of `mask_losses` as the papers have them."""
    truth = target[:, None].double().expand_as(logits)
    counted = torch.ones_like(truth) if kept is None else kept[:, None].double()
    prob = logits.sigmoid()
    prob_of_target = prob * truth + (1 - prob) * (1 - truth)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    focal = weight * cross_entropy * (1 - prob_of_target) ** gamma * counted
    prob, truth = prob * counted, truth * counted
    overlap = (prob * truth).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (prob.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    pixels = counted.expand_as(focal).sum((-2, -1)).clamp(min=1)
    return focal.sum((-2, -1)) / pixels, dice


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", ["all count", "some count", "none counts", "absent", "certain"])
def test_gradients_of_the_mask_losses_are_those_of_autograd(gamma, case):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 7, generator=rng, dtype=torch.float64) * 4
    target = torch.rand(2, 9, 7, generator=rng) > 0.6
    kept = {
        "some count": torch.rand(2, 9, 7, generator=rng) > 0.3,
        "none counts": torch.zeros(2, 9, 7, dtype=torch.bool),
    }.get(case)
    if case == "absent":
        target[:] = False
    if case == "certain":  # logits as SAM 2 gives them for a mask prompt, and the gate's
        logits = torch.where(logits > 0, 10.0, float(NO_OBJECT_LOGIT)).double()
    weights = torch.randn(2, 2, 3, generator=rng, dtype=torch.float64)
    found = []
    for function in (mask_losses, focal_and_dice_by_autograd):
        leaf = logits.clone().requires_grad_()
        losses = torch.stack(function(leaf, target, 0.3, gamma, kept))
        (losses * weights).sum().backward()
        found.append((losses.detach(), leaf.grad))
    (losses, gradient), (expected, by_autograd) = found
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-9)
    assert gradient.isfinite().all()
    # Autograd has 0 * infinity where a pixel is certain and gamma below 1.
    known = by_autograd.isfinite()
    torch.testing.assert_close(gradient[known], by_autograd[known], rtol=1e-6, atol=1e-9)


def test_what_the_mask_losses_keep_until_the_backward_is_the_logits_alone():
    logits = torch.randn(2, 3, 64, 64, requires_grad=True)
    target = torch.zeros(2, 64, 64, dtype=torch.bool)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mask_losses(logits, target, 0.25, 2.0)
    large = [t for t in kept if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]


def test_iou_of_masks():
    truth = square(0, 0)
    assert mask_iou(logits_of(square(0, 2)), truth).item() == pytest.approx(8 / 24)
    assert mask_iou(logits_of(truth), truth).item() == 1
    assert mask_iou(torch.zeros(8, 8), torch.zeros(8, 8)).item() == 0  # 0 is not above 0


def test_total_by_hand():
    logits, target = logits_of(square(0, 0))[None, None], square(0, 2)[None, None]
    losses = compute_losses([[predict(logits, iou=0.5, score=0.0)]], target, LossConfig())
    dice = 1 - 17 / 33
    # 8 missed px weigh 0.25, 8 invented ones 0.75; their cross entropy is the logit itself.
    focal = (8 * 0.25 + 8 * 0.75) * SURE / 64
    iou = 0.5 - 8 / 24
    score = torch.log(torch.tensor(2.0)).item()
    assert losses["loss/focal"].item() == pytest.approx(focal, rel=1e-5)
    assert losses["loss/dice"].item() == pytest.approx(dice, rel=1e-5)
    assert losses["loss/iou"].item() == pytest.approx(iou, rel=1e-5)
    assert losses["loss/object_score"].item() == pytest.approx(score, rel=1e-5)
    total = 20 * focal + dice + iou + score
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_weights_scale_their_term_alone():
    frames, targets = random_frames(3, 2)
    one = compute_losses(frames, targets, LossConfig(focal=0, dice=0, iou=2.5, object_score=0))
    assert one["loss"].item() == pytest.approx(2.5 * one["loss/iou"].item(), rel=1e-6)


def test_squared_iou_error():
    logits, target = logits_of(square(0, 0))[None, None], square(0, 2)[None, None]
    losses = compute_losses([[predict(logits, iou=0.9)]], target, LossConfig(iou_l1=False))
    assert losses["loss/iou"].item() == pytest.approx((0.9 - 1 / 3) ** 2, rel=1e-5)


# -- best of the candidates -----------------------------------------------------------------------


def test_only_the_best_candidate_learns():
    truth = square(0, 0)
    candidates = torch.stack([logits_of(square(4, 4)), logits_of(square(0, 1)), -logits_of(truth)])
    candidates = (candidates[None] / 10).requires_grad_()
    losses = compute_losses(
        [[predict(candidates)]], truth[None, None], LossConfig(iou=0, object_score=0)
    )
    losses["loss"].backward()
    per_candidate = candidates.grad.abs().sum((-2, -1))[0]
    assert per_candidate[1] > 0
    assert per_candidate[0] == per_candidate[2] == 0


def test_iou_of_all_candidates_or_of_the_best():
    truth = square(0, 0)
    candidates = torch.stack([logits_of(square(0, 2)), logits_of(truth)])[None]  # IoU 1/3 and 1
    frames = [[predict(candidates, iou=0.5)]]
    every = compute_losses(frames, truth[None, None], LossConfig())
    best = compute_losses(frames, truth[None, None], LossConfig(supervise_all_iou=False))
    assert every["loss/iou"].item() == pytest.approx((0.5 - 1 / 3 + 0.5) / 2, rel=1e-5)
    assert best["loss/iou"].item() == pytest.approx(0.5, rel=1e-5)


# -- absence and the gate -------------------------------------------------------------------------


def test_absent_object_costs_only_its_score():
    logits = torch.full((1, 1, 8, 8), 5.0)
    losses = compute_losses(
        [[predict(logits, score=3.0)]], torch.zeros(1, 1, 8, 8, dtype=torch.bool), LossConfig()
    )
    assert losses["loss/focal"] == losses["loss/dice"] == losses["loss/iou"] == 0
    expected = torch.nn.functional.softplus(torch.tensor(3.0)).item()  # -log(1 - sigmoid(3))
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["gate/fraction"] == 0


def test_gate_is_counted_apart():
    """A visible object called absent: 256 x foreground share of focal loss, and no gradient."""
    target = torch.stack([square(0, 0), square(4, 4)])[None]  # (1, 2, 8, 8), a quarter each
    raw = torch.zeros(2, 1, 8, 8, requires_grad=True)
    score = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    logits = torch.where(score[..., None, None] > 0, raw, -1024.0)
    prediction = FramePrediction(torch.arange(2), logits, torch.full((2, 1), 0.5), score)
    losses = compute_losses([[prediction]], target, LossConfig())
    assert losses["gate/fraction"].item() == 0.5
    focal_gated = 0.25 * 1024 * 16 / 64  # alpha x logit x foreground share
    dice_gated = 1 - 1 / 17
    assert losses["gate/loss"].item() == pytest.approx((20 * focal_gated + dice_gated) / 2)
    losses["loss"].backward()
    assert raw.grad[0].abs().sum() == 0
    assert raw.grad[1].abs().sum() > 0
    assert score.grad[0] < 0  # the score term pushes the wrong "absent" up


def test_gate_of_an_absent_object_is_right():
    logits = torch.full((1, 1, 8, 8), -1024.0)
    target = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    losses = compute_losses([[predict(logits, score=-4.0)]], target, LossConfig())
    assert losses["gate/fraction"] == losses["gate/loss"] == 0


# -- what must not change it ----------------------------------------------------------------------


def test_padding_frames_contribute_nothing():
    frames, targets = random_frames(4, 2)
    valid = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    alone = compute_losses(
        [*frames[:2], [FramePrediction(torch.tensor([0]), *_rows(frames[2][0], [0]))]],
        targets[:3],
        LossConfig(),
    )
    padded = compute_losses(frames, targets, LossConfig(), valid)
    for name in alone:
        torch.testing.assert_close(padded[name], alone[name], msg=name)


def _rows(prediction, rows):
    return (
        prediction.mask_logits[rows],
        prediction.iou_predictions[rows],
        prediction.object_score_logits[rows],
    )


def test_object_order_does_not_matter():
    frames, targets = random_frames(3, 3)
    order = torch.tensor([2, 0, 1])
    shuffled = [
        [FramePrediction(torch.arange(3), *_rows(prediction, order)) for prediction in passes]
        for passes in frames
    ]
    a = compute_losses(frames, targets, LossConfig())
    b = compute_losses(shuffled, targets[:, order], LossConfig())
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def test_passes_may_be_split():
    frames, targets = random_frames(3, 3)
    split = [
        [
            FramePrediction(torch.tensor(rows), *_rows(prediction, rows))
            for prediction in passes
            for rows in ([1], [2, 0])
        ]
        for passes in frames
    ]
    a = compute_losses(frames, targets, LossConfig())
    b = compute_losses(split, targets, LossConfig())
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def test_sums_over_frames_and_divides_by_objects():
    frames, targets = random_frames(1, 2)
    once = compute_losses(frames, targets, LossConfig())["loss"]
    thrice = compute_losses(frames * 3, targets.expand(3, -1, -1, -1), LossConfig())["loss"]
    torch.testing.assert_close(thrice, 3 * once)
    one = compute_losses([[predict(torch.ones(1, 1, 8, 8), [0])]], targets[:, :1], LossConfig())
    of_two = compute_losses([[predict(torch.ones(1, 1, 8, 8), [0])]], targets, LossConfig())
    torch.testing.assert_close(of_two["loss"], one["loss"] / 2)


def test_the_sums_of_two_batches_are_those_of_one():
    """With other numbers of objects, one of them gated, and in a third batch none at all."""
    frames, targets = random_frames(2, 3)
    frames[0][0].mask_logits[0] = NO_OBJECT_LOGIT
    parts = [slice(0, 1), slice(1, 3)]
    batches = [
        (
            [[FramePrediction(torch.arange(3)[p], *_rows(one, p)) for one in f] for f in frames],
            targets,
        )
        for p in parts
    ]
    batches.append(([[], []], targets[:, :0]))
    sums = [sum_losses(*batch, LossConfig()) for batch in batches]
    total = {name: sum(part[name] for part in sums) for name in sums[0]}
    joint = compute_losses(frames, targets, LossConfig())
    divided = divide_losses(total, 3, LossConfig())
    assert divided.keys() == joint.keys()
    for name, value in joint.items():
        torch.testing.assert_close(divided[name], value, msg=name)
    assert 0 < joint["gate/fraction"] < 1
    assert divide_losses(sums[2], 0, LossConfig())["loss"] == 0


def test_bfloat16_predictions_are_summed_in_float32():
    frames, targets = random_frames(2, 2)
    half = [
        [FramePrediction(p.objects, *(x.bfloat16() for x in _rows(p, slice(None)))) for p in passes]
        for passes in frames
    ]
    losses = compute_losses(half, targets, LossConfig())
    assert losses["loss"].dtype == torch.float32
    assert losses["loss"].item() == pytest.approx(
        compute_losses(frames, targets, LossConfig())["loss"].item(), rel=0.02
    )


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="no object of the batch has a prompt"):
        compute_losses([[], []], torch.zeros(2, 1, 8, 8, dtype=torch.bool), LossConfig())


# -- a term from outside ---------------------------------------------------------------------------

AREA = '''
def area_term(decoded):
    """How far the area of the best candidate is from the true one, as a share of the frame."""
    areas = decoded.candidates.sigmoid().mean((-2, -1)) - decoded.truth.mean((-2, -1))
    return decoded.reduce(areas.abs(), mean=False)
'''


@pytest.fixture
def area_term():
    namespace = {}
    exec(AREA, namespace)
    return namespace["area_term"]


def test_a_term_is_a_function_and_a_line(area_term, monkeypatch):
    frames, targets = random_frames(3, 2)
    targets[1, 0] = False
    before = compute_losses(frames, targets, LossConfig())
    monkeypatch.setattr(losses, "TERMS", [*losses.TERMS, ("area", 0.5, area_term)])
    after = compute_losses(frames, targets, LossConfig())
    assert after.keys() - before.keys() == {"loss/area"}
    assert after["loss/area"] > 0
    torch.testing.assert_close(after["loss"], before["loss"] + 0.5 * after["loss/area"])
    # Padding is left out whatever the function says.
    nothing = compute_losses(frames, targets, LossConfig(), torch.zeros(3, 2, dtype=torch.bool))
    assert nothing["loss"] == nothing["loss/area"] == 0


def test_a_term_of_ones_own_trains_and_is_logged(monkeypatch, tmp_path):
    data = str(make_coco(tmp_path / "data", num_frames=3, size=(64, 64)))
    config = "sam2train/configs/sam2.1_hiera_demo.yaml"
    experiment = Experiment.model_validate(
        {
            "dataset": {"data_path": data, "image_size": [64, 64], "video_clip_length": 2},
            "model": {"config_path": config, "image_size": 64, "trainable_modules": ["*"]},
            "trainer": {"num_steps": 1, "log_every": 1, "device": "cpu", "audit": "warn"},
            "tracking": {"mode": "disabled"},
        }
    )

    def train(folder):
        torch.manual_seed(0)
        console = Console(quiet=True)
        Trainer(experiment, folder, run_id="run", name="test", console=console).run()
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return next(row for row in rows if "loss" in row)

    plain = train(tmp_path / "plain")
    # A random model calls every object absent, so that its masks carry no gradient: the score does.
    term = ("sure", 50.0, lambda decoded: 1 / (1 + decoded.object_score_logits**2))
    monkeypatch.setattr(losses, "TERMS", [*losses.TERMS, term])
    own = train(tmp_path / "own")
    assert "loss/sure" not in plain
    assert own["loss"] == pytest.approx(plain["loss"] + 50 * own["loss/sure"], rel=1e-4)
    assert own["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_a_term_in_the_file_has_a_key_in_the_section(tmp_path):
    """The change that CONTRIBUTING.md shows, made in a copy of the package."""
    package = Path(losses.__file__).parent
    copy = shutil.copytree(package, tmp_path / "sam2train", ignore=shutil.ignore_patterns("*.pyc"))
    line = '    Term("object_score", 1.0, object_score_term),\n'
    source = (package / "losses.py").read_text()
    assert source.count(line) == source.count("\nclass Term(") == 1
    source = source.replace(line, line + '    Term("area", 0.5, area_term),\n')
    source = source.replace("\nclass Term(", f"{AREA}\n\nclass Term(")
    (copy / "losses.py").write_text(source)
    code = (
        "from sam2train.config import ConfigError, build, to_yaml\n"
        "from sam2train.losses import LossConfig\n"
        "print(to_yaml(LossConfig()))\n"
        "print('given', build(LossConfig, {'area': '2e-1'}, 'file').area)\n"
        "try: build(LossConfig, {'area': -1, 'are': 1}, 'file')\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = done.stdout
    assert "object_score: 1.0\narea: 0.5\n" in written
    assert "given 0.2" in written
    assert "area: got -1; expected a number of at least 0" in written
    assert "are: unknown key, got 1; did you mean `area`?" in written


# -- SAM 2's numbers: what its training/loss_fns.py (1a80ead) gives for these inputs --------------


def reference_inputs():
    """Logits (3, 3, 12, 12) of 3 objects with 3 candidates each, masks (3, 12, 12), of which the
    last is absent, predicted IoU (3, 3) and object score (3, 1)."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    waves = [
        torch.stack([4 * torch.sin(0.7 * x + 0.4 * y * (m + 1) + k) - m for m in range(3)])
        for k in range(3)
    ]
    masks = torch.zeros(3, 12, 12, dtype=torch.bool)
    masks[0, 2:9, 1:6] = True
    masks[1, 5:11, 4:12] = True
    ious = torch.tensor([[0.9, 0.5, 0.2], [0.3, 0.6, 0.1], [0.4, 0.7, 0.8]])
    return torch.stack(waves), masks, ious, torch.tensor([[2.0], [-0.5], [0.25]])


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), torch.tensor(theirs), rtol=1e-5, atol=2e-6)


def test_each_loss_of_a_candidate_equals_sam2():
    logits, masks, ious, _ = reference_inputs()
    focal, dice = mask_losses(logits, masks, 0.25, 2.0)
    close(
        dice,
        [
            [0.7899303, 0.7024785, 0.7708536],
            [0.5764139, 0.6363947, 0.6753209],
            [0.9853483, 0.9826173, 0.9784517],
        ],
    )
    close(
        focal,
        [
            [0.9227288, 0.5523722, 0.3916746],
            [0.6129847, 0.5152509, 0.3859380],
            [0.7846167, 0.5028245, 0.2614191],
        ],
    )
    close(
        (ious - mask_iou(logits, masks[:, None])).abs(),
        [
            [0.7877551, 0.3292683, 0.0684211],
            [0.0282609, 0.3912088, 0.0927711],
            [0.4, 0.7, 0.8],
        ],
    )


OFFICIAL = {"focal": 20, "dice": 1, "iou": 1, "object_score": 1}


@pytest.mark.parametrize(
    ("weights", "all_iou", "l1", "expected", "total", "norms"),
    [
        (OFFICIAL, True, True, (0.2592042, 0.4820581, 0.1886317), 6.497088, (0.2847189, 0.2721655)),
        (
            OFFICIAL,
            False,
            False,
            (0.2592042, 0.4820581, 0.0044293),
            6.3128858,
            (0.2847189, 0.0768488),
        ),
        (
            {"focal": 1, "dice": 5, "iou": 0, "object_score": 0.5},
            True,
            False,
            (0.3884523, 0.4262975, None),
            2.8410971,
            (0.037403, None),
        ),
    ],
)
def test_the_sum_of_the_losses_equals_sam2(weights, all_iou, l1, expected, total, norms):
    """The best candidate learns, an absent object only its score; gradients reach the same size."""
    logits, masks, ious, scores = reference_inputs()
    leaves = [value.requires_grad_() for value in (logits, ious, scores)]
    config = LossConfig(**weights, supervise_all_iou=all_iou, iou_l1=l1)
    ours = compute_losses([[FramePrediction(torch.arange(3), *leaves)]], masks[None], config)
    for name, value in zip(("focal", "dice", "iou"), expected, strict=True):
        if value is not None:
            close(ours[f"loss/{name}"], value)
    close(ours["loss/object_score"], 0.6423148)
    close(ours["loss"], total)
    ours["loss"].backward()
    assert scores.grad.norm().item() == pytest.approx(0.282392 * weights["object_score"], rel=1e-5)
    for leaf, norm in zip((logits, ious), norms, strict=True):
        if norm is not None:
            assert leaf.grad.norm().item() == pytest.approx(norm, rel=1e-4)
