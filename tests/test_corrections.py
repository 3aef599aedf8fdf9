"""Correction clicks: where they fall, which frames get them, that they resume bit for bit."""

import json

import numpy as np
import pytest
import torch
from conftest import make_coco
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from rich.console import Console
from sam2.modeling import sam2_utils
from test_model import make_clip, make_model
from test_trainer import CONFIG, assert_same

from sam2train import checkpoint
from sam2train.clips import collate_fn
from sam2train.config import ConfigError, build
from sam2train.corrections import (
    InteractionConfig,
    SimulatedUser,
    add_clicks,
    center_clicks,
    uniform_clicks,
)
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.losses import LossConfig, compute_losses
from sam2train.trainer import Trainer


def make_user(seed=0, **settings):
    settings = {"num_correction_pt_per_frame": 2, **settings}
    return SimulatedUser(InteractionConfig(**settings), seed)


def masks_of(*pictures):
    """(n, H, W) bool from text, `#` for true."""
    return torch.tensor([[[c == "#" for c in line] for line in p.split()] for p in pictures])


# Where a click falls


def test_clicks_by_hand():
    truth = masks_of("##.. ##.. ....", "##.. ##.. ....", "#... .... ....", "#### #### ####")
    predicted = masks_of("##.. #... ....", "##.. ##.. ...#", "#... .... ....", "#### #### ####")
    # A missed pixel, a wrong one, nothing wrong, nothing wrong and no background.
    points, labels = uniform_clicks(truth, predicted, torch.full((4,), 0.999, dtype=torch.double))
    assert points.tolist() == [[[1.0, 1.0]], [[3.0, 2.0]], [[3.0, 2.0]], [[3.0, 2.0]]]
    assert labels.tolist() == [[1], [0], [0], [1]]
    assert (points.dtype, labels.dtype) == (torch.float32, torch.int32)
    points, labels = center_clicks(truth, predicted)
    assert points[:2].tolist() == [[[1.0, 1.0]], [[3.0, 2.0]]]
    assert labels.tolist() == [[1], [0], [0], [1]]


def test_all_wrong_pixels_are_equally_likely():
    truth = masks_of("###. ##.. ....")
    predicted = masks_of("#..# .... ..#.")
    errors = (truth ^ predicted)[0]
    count = int(errors.sum())
    draws = (torch.arange(count, dtype=torch.double) + 0.5) / count
    points, labels = uniform_clicks(
        truth.expand(count, -1, -1), predicted.expand(count, -1, -1), draws
    )
    x, y = points[:, 0].long().unbind(1)
    assert torch.stack([y, x], dim=1).tolist() == errors.nonzero().tolist()
    assert torch.equal(labels[:, 0] == 1, truth[0, y, x])


@given(st.data(), st.floats(0, 1, exclude_max=True))
def test_a_click_lies_on_an_error_and_says_what_is_there(data, draw):
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))
    truth, predicted = (torch.from_numpy(data.draw(arrays(bool, shape)))[None] for _ in range(2))
    wrong = truth ^ predicted
    for points, labels in (
        uniform_clicks(truth, predicted, torch.tensor([draw], dtype=torch.double)),
        center_clicks(truth, predicted),
    ):
        x, y = points[0, 0].long().tolist()
        assert bool(labels[0, 0]) == bool(truth[0, y, x])
        assert wrong[0, y, x] or not wrong.any()


def test_centres_equal_those_of_sam2():
    rng = np.random.default_rng(0)
    truth, predicted = (torch.from_numpy(rng.random((40, 16, 20)) < 0.6) for _ in range(2))
    truth[::3, 2:9, 3:12] = True
    predicted[1::3, 5:14, 6:18] = True
    points, labels = center_clicks(truth, predicted)
    expected = sam2_utils.sample_one_point_from_error_center(truth[:, None], predicted[:, None])
    assert torch.equal(points, expected[0])
    assert torch.equal(labels, expected[1])
    assert set(labels.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("right", [False, True])
def test_the_same_pixels_as_in_sam2_with_the_same_labels(right):
    """SAM 2 draws a random number for each pixel; what can come out is the same."""
    truth = masks_of("###. ##.. ....")
    predicted = truth if right else masks_of("#..# .... ..#.")
    many = 400
    pairs = truth.expand(many, -1, -1), predicted.expand(many, -1, -1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        theirs = sam2_utils.sample_random_points_from_errors(pairs[0][:, None], pairs[1][:, None])
    ours = uniform_clicks(*pairs, torch.from_numpy(np.random.default_rng(0).random(many)))
    drawn = [
        set(zip(*points[:, 0].T.tolist(), labels[:, 0].tolist(), strict=True))
        for points, labels in (ours, theirs)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == (7 if right else 6)


def clicks(user, truth, predicted, num_clips):
    """The labels of the first click on the object of each clip."""
    found = []
    for clip in range(num_clips):
        drawn = user.correct(0, [(clip, 0)], truth)
        _, label = user.next_click(truth, predicted, drawn.draws[:, 0], drawn.ignores[:, 0])
        found.append(int(label))
    return found


def test_a_share_of_the_clicks_ignores_the_prediction():
    truth = masks_of("##.. ##.. ....").expand(1, -1, -1)
    predicted = masks_of("##.. ##.. ...#")
    drawn = clicks(make_user(prob_to_sample_from_gt=0.25), truth, predicted, 400)
    assert 70 < sum(drawn) < 130  # the only error asks for a negative click
    assert not any(clicks(make_user(prob_to_sample_from_gt=0.0), truth, predicted, 50))


def test_clicks_are_added_behind_the_prompt():
    box = {
        "point_coords": torch.tensor([[[1.0, 2.0], [5.0, 6.0]]]),
        "point_labels": torch.tensor([[2, 3]], dtype=torch.int32),
    }
    point, label = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0]], dtype=torch.int32)
    both = add_clicks(box, point, label)
    assert both["point_coords"].tolist() == [[[1, 2], [5, 6], [3, 4]]]
    assert both["point_labels"].tolist() == [[2, 3, 0]]
    assert add_clicks(None, point, label) == {"point_coords": point, "point_labels": label}


def test_what_is_drawn_for_a_clip_hangs_on_the_clip_alone():
    """Not on the clips and objects beside it, nor on how many came before in other batches."""
    many = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    truth = torch.zeros(5, 2, 2, dtype=torch.bool)
    settings = {"prob_to_sample_from_gt": 0.5, "num_frames_to_correct": 4}
    user = make_user(num_correction_pt_per_frame=9, **settings)
    joint = user.correct(3, many, truth)
    frames = user.sample_frames(1, [0], 8)
    assert joint.draws.shape == (5, 9)
    assert len(joint.draws.unique()) == 45
    assert torch.equal(joint.ignores[2], joint.ignores[4])  # objects of one clip
    assert not torch.equal(joint.ignores[1], joint.ignores[2])

    user.num_clips += 1  # a batch of one clip has passed
    alone = user.correct(3, [(0, 2), (0, 1)], truth[:2])
    assert torch.equal(alone.draws, joint.draws[[4, 3]])
    assert torch.equal(alone.ignores, joint.ignores[[4, 3]])
    assert user.sample_frames(0, [0], 8) == frames
    assert not torch.equal(alone.draws, user.correct(4, [(0, 2), (0, 1)], truth[:2]).draws)
    other = make_user(seed=1, num_correction_pt_per_frame=9, **settings)
    assert not (other.correct(3, many, truth).draws == joint.draws).any()


# Which frames are corrected


@pytest.mark.parametrize(
    ("settings", "conditioning", "num_frames", "counts"),
    [
        ({"num_frames_to_correct": 1}, [0], 6, {1}),
        ({"num_frames_to_correct": 3}, [0], 6, {1, 2, 3}),
        ({"num_frames_to_correct": 3}, [1, 4], 6, {2, 3}),
        ({"num_frames_to_correct": 3, "rand_frames_to_correct": False}, [0], 6, {3}),
        ({"num_frames_to_correct": 5, "rand_frames_to_correct": False}, [4], 6, {2}),
        ({"num_frames_to_correct": 2}, [0], 1, {1}),
    ],
)
def test_conditioning_frames_are_corrected_and_some_more(
    settings, conditioning, num_frames, counts
):
    user = make_user(**settings)
    drawn = [user.sample_frames(clip, conditioning, num_frames) for clip in range(200)]
    assert {len(frames) for frames in drawn} == counts
    for frames in drawn:
        assert set(conditioning) <= frames <= set(range(min(conditioning), num_frames))
    if max(counts) > len(conditioning):
        assert set.union(*drawn) == set(range(min(conditioning), num_frames))


# In the model


def run(model, user, *clips):
    batch = collate_fn(clips)
    outputs = model(batch, interaction=user)
    valid = batch.object_frame_valid
    return outputs, compute_losses(outputs["frames"], batch.masks, LossConfig(), valid)["loss"]


def test_every_click_is_a_pass_with_one_candidate():
    clip = make_clip(("point", 0), ("bbox", 0), num_frames=3)
    user = make_user(num_frames_to_correct=3, rand_frames_to_correct=False)
    outputs, _ = run(make_model(), user, clip)
    candidates = [
        sorted((len(p.objects), p.mask_logits.shape[1]) for p in passes)
        for passes in outputs["frames"]
    ]
    # The first click of an object gives three masks; a box is two points, and gives one.
    assert candidates[0] == [(1, 1)] * 5 + [(1, 3)]
    # Tracked: three masks without a click, three with one click, one with two.
    assert candidates[1] == candidates[2] == [(2, 1), (2, 3), (2, 3)]


def test_the_loss_counts_every_pass():
    clip = make_clip(("point", 0), num_frames=2)
    batch = collate_fn([clip])
    outputs, loss = run(make_model(), make_user(num_correction_pt_per_frame=3), clip)
    assert [len(passes) for passes in outputs["frames"]] == [4, 1]
    alone = [
        compute_losses([[one] if t == s else [] for s in range(2)], batch.masks, LossConfig())
        for t, passes in enumerate(outputs["frames"])
        for one in passes
    ]
    assert loss.item() == pytest.approx(sum(part["loss"].item() for part in alone), rel=1e-5)


def test_no_click_changes_nothing():
    """A user who only looks: conditioning frames chosen, not one click given."""
    model, clip = make_model(), make_clip(("point", 0), ("mask", 0), num_frames=3)
    with torch.no_grad():
        plain = model(collate_fn([clip]))
        looked, _ = run(model, make_user(num_correction_pt_per_frame=0), clip)
    torch.testing.assert_close(plain["pred_masks"], looked["pred_masks"], rtol=0, atol=1e-5)


def test_an_object_prompted_with_its_mask_is_not_corrected():
    model = make_model()
    both = make_clip(("mask", 0), ("point", 0), num_frames=3)
    user = make_user(num_frames_to_correct=3, rand_frames_to_correct=False)
    with torch.no_grad():
        outputs, _ = run(model, user, both)
        plain = model(collate_fn([both]))
    for passes in outputs["frames"]:
        assert sum(0 in prediction.objects.tolist() for prediction in passes) == 1
    masks, before = outputs["pred_masks"][0], plain["pred_masks"][0]
    torch.testing.assert_close(masks[:, 0], before[:, 0], rtol=0, atol=1e-4)
    assert ((masks[:, 1] - before[:, 1]).abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.parametrize("becomes", [True, False])
def test_a_corrected_frame_becomes_a_conditioning_frame(becomes):
    """The frames after it then read it with the last row of the temporal encoding."""
    model, clip = make_model(num_maskmem=3), make_clip(("point", 0), num_frames=3)
    results = []
    for shift in (0.0, 5.0):
        user = make_user(add_all_frames_to_correct_as_cond=becomes)
        user.sample_frames = lambda clip, conditioning, num_frames: {0, 1}
        with torch.no_grad():
            model.sam2.maskmem_tpos_enc[0] += shift  # the row of the frame before
            results.append(run(model, user, clip)[0]["pred_masks"][0, 2])
    moved = (results[0] - results[1]).abs().max() > 1e-5
    assert bool(moved) == (not becomes)


def test_clicks_train_the_mask_prompt():
    model = make_model()
    clip = make_clip(("point", 0), num_frames=2)
    weight = model.sam2.sam_prompt_encoder.mask_downscaling[0].weight
    run(model, None, clip)[1].backward()
    assert weight.grad is None
    run(model, make_user(), clip)[1].backward()
    assert weight.grad.norm() > 0


def test_the_scalars_tell_whether_clicks_help():
    user = make_user()
    truth = masks_of("##.. ##.. ....", ".... .... ....")
    half = torch.where(masks_of("##.. .... ....", "#... .... ...."), 1.0, -1.0)
    full = torch.where(truth, 1.0, -1.0)
    user.keep_ious(truth, half, full)  # the absent object does not count
    sums, num_corrected = user.take_sums(truth.device)
    assert num_corrected == 1
    assert {k: v.item() for k, v in user.scalars(sums).items()} == {
        "interaction/iou_before": 0.5,
        "interaction/iou_after": 1.0,
    }
    sums, num_corrected = user.take_sums(truth.device)
    assert (sums.tolist(), num_corrected) == ([0.0, 0.0, 0.0], 0)
    user.keep_ious(truth[1:], half[1:], full[1:])
    sums, num_corrected = user.take_sums(truth.device)
    assert num_corrected == 1
    assert [v.item() for v in user.scalars(sums).values()] == [0.0, 0.0]


def test_clicks_need_masks():
    clip = make_clip(("point", 0), num_frames=2)
    with pytest.raises(UserError, match="correction clicks need the masks"):
        make_model()(clip.images[None], prompts=clip.prompts, interaction=make_user())


def test_both_layouts_are_corrected_alike():
    model, clip = make_model(), make_clip(("point", 0), ("point", 0), num_frames=2)
    with torch.no_grad():
        first = model(collate_fn([clip]), interaction=make_user())
        second = model(clip.images[None], clip.masks[None], clip.prompts, interaction=make_user())
    assert torch.equal(first["pred_masks"], second["pred_masks"])


# In a run


@pytest.fixture
def settings(tmp_path):
    data = str(make_coco(tmp_path / "data", num_videos=2, num_frames=4, size=(64, 64)))
    return {
        "dataset": {
            "data_path": data,
            "image_size": [64, 64],
            "video_clip_length": 3,
            "prompt_types": ["point", "bbox"],
        },
        "model": {"config_path": CONFIG, "image_size": 64, "num_maskmem": 2},
        "interaction": {
            "num_correction_pt_per_frame": 2,
            "num_frames_to_correct": 2,
            "prob_to_sample_from_gt": 0.3,
        },
        "trainer": {"num_steps": 4, "save_every": 2, "log_every": 1, "device": "cpu"},
        "tracking": {"mode": "disabled"},
    }


def make_trainer(settings, run_dir, **options):
    experiment = Experiment.model_validate(settings)
    console = Console(quiet=True)
    return Trainer(experiment, run_dir, run_id="run", name="test", console=console, **options)


def stopped_at_two(settings, run_dir):
    """The last.pt of a run that died right after writing it."""
    trainer = make_trainer(settings, run_dir)
    saved = checkpoint.save

    def save_and_crash(path, content, previous):
        saved(path, content, previous)
        if trainer.step == 2:
            raise RuntimeError("the machine goes down")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_crash)
        with pytest.raises(RuntimeError, match="goes down"):
            trainer.run()
    return run_dir / "checkpoints" / "last.pt"


def test_a_resumed_run_clicks_as_one_that_was_never_stopped(settings, tmp_path):
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    make_trainer(settings, whole).run()
    last = stopped_at_two(settings, parts)
    assert checkpoint.load(last)["step"] == 2
    make_trainer(settings, parts, resume=last).run()
    ends = [checkpoint.load(d / "checkpoints" / "last.pt") for d in (whole, parts)]
    assert_same(ends[0]["model"], ends[1]["model"])

    # The place in the run matters: clicks that start anew give other weights.
    replay = make_trainer(settings, other, resume=stopped_at_two(settings, other))
    before = replay.num_clips
    replay._first_clip_of = lambda place: replay.num_clips - before
    replay.run()
    replayed = checkpoint.load(other / "checkpoints" / "last.pt")["model"]
    assert any(not torch.equal(replayed[name], ends[0]["model"][name]) for name in replayed)


def test_a_run_logs_what_its_clicks_gain(settings, tmp_path):
    make_trainer(settings, tmp_path / "run").run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 4
    for row in losses:
        assert 0 <= row["interaction/iou_before"] <= 1
        assert 0 <= row["interaction/iou_after"] <= 1


def test_off_by_default(settings, tmp_path):
    del settings["interaction"]
    settings["trainer"] |= {"num_steps": 1}
    trainer = make_trainer(settings, tmp_path / "run")
    assert trainer.interaction is None
    trainer.run()


def test_clicks_that_are_switched_on_later(settings, tmp_path):
    """Over a checkpoint from before: they are those that the clips would have had."""
    plain = {name: section for name, section in settings.items() if name != "interaction"}
    last = stopped_at_two(plain, tmp_path / "run")
    trainer = make_trainer(settings, tmp_path / "run", resume=last)
    assert trainer._first_clip_of(0) == 2


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("dataset", {"prompt_types": ["mask"]}, "dataset.prompt_types has masks only"),
        ("dataset", {"max_conditioning_frames": 3}, "every conditioning frame is corrected"),
        ("interaction", {"num_frames_to_correct": 0}, "interaction.num_frames_to_correct: got 0"),
        ("interaction", {"num_corection_pt_per_frame": 1}, "did you mean"),
        ("interaction", {"prob_to_sample_from_gt": 1.5}, "of at least 0 and of at most 1"),
    ],
)
def test_settings_that_cannot_work(settings, section, change, message):
    settings[section] |= change
    with pytest.raises(ConfigError, match=message):
        build(Experiment, settings, "test.yaml")
