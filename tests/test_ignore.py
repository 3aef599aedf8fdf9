"""Pixels that the annotators left undecided, from the file to the loss, scores and pictures."""

import numpy as np
import pytest
import torch
from test_data_mask_values import NUM_FRAMES, SIZE, TRUTH, _void_ring, write
from test_losses import predict, random_frames

from sam2train.clips import collate_fn
from sam2train.corrections import InteractionConfig, SimulatedUser
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_vos import VosVideos
from sam2train.evaluate import EvaluationConfig, TrackedFrame, track_videos
from sam2train.losses import LossConfig, compute_losses, mask_iou, mask_losses
from sam2train.metrics import mean_scores, measure
from sam2train.pictures import clip_sheet, comparison, draw_errors, hatch_ignored
from sam2train.scores import score
from sam2train.transforms import AugmentConfig

RINGS = np.array([_void_ring(ids, 3) for ids in TRUTH]) == 255


@pytest.fixture
def root(tmp_path):
    """Two objects with a ring of void round each, on 4 frames."""
    return write(tmp_path, lambda ids, t: _void_ring(ids, 3))


def load(root, **options):
    options = {"video_clip_length": NUM_FRAMES, "prompt_types": ["mask"]} | options
    return ClipDataset(VosVideos(root), clip_settings(SIZE, **options))


# From the file to the batch


def test_a_clip_has_the_undecided_pixels_of_its_frames(root):
    clip = load(root)[0]
    assert clip.ignore.dtype == torch.bool
    np.testing.assert_array_equal(clip.ignore.numpy(), RINGS[clip.frame_indices])
    assert not (clip.ignore[:, None] & clip.masks).any()
    padded = load(root, video_clip_length=NUM_FRAMES + 2)[0]
    assert padded.ignore.shape == (NUM_FRAMES + 2, *SIZE)
    assert not padded.ignore[NUM_FRAMES:].any()


def test_at_another_size_they_still_leave_the_objects_alone(root):
    data = ClipDataset(VosVideos(root), clip_settings((31, 50), prompt_types=["mask"]))
    clip = data[0]
    assert clip.ignore.shape[1:] == (31, 50)
    assert clip.ignore.float().mean() == pytest.approx(RINGS.mean(), rel=0.3)
    assert not (clip.ignore[:, None] & clip.masks).any()


@pytest.mark.parametrize(
    "change",
    [{"horizontal_flip": 1.0}, {"vertical_flip": 1.0}, {"reverse": 1.0}],
    ids=["flipped", "upside down", "backwards"],
)
def test_augmentation_moves_them_with_the_masks(root, change):
    plain, moved = load(root)[0], load(root, augment=AugmentConfig(**change))[0]
    axis = {"horizontal_flip": -1, "vertical_flip": -2, "reverse": 0}[next(iter(change))]
    assert torch.equal(moved.ignore, plain.ignore.flip(axis))
    assert torch.equal(moved.masks, plain.masks.flip(axis))


def test_a_turn_and_a_crop_keep_them_round_the_objects(root):
    augment = AugmentConfig(degrees=30, shear=10, crop_scale=0.6)
    for epoch in range(5):
        clip = load(root, augment=augment)[epoch, 0]
        assert clip.ignore.any()
        assert not (clip.ignore[:, None] & clip.masks).any()


def test_a_batch_has_them_for_each_object(root, tmp_path):
    ours = load(root)[0]
    none = load(write(tmp_path / "plain", lambda ids, t: ids), video_clip_length=3)[0]
    assert none.ignore is None
    batch = collate_fn([none, ours])
    assert batch.ignore.shape == (NUM_FRAMES, 2, *SIZE)
    assert not batch.ignore[:, 0].any()
    assert torch.equal(batch.ignore[:, 1], ours.ignore)
    assert batch.object_ignore.shape == batch.masks.shape
    assert torch.equal(batch.object_ignore[:, 3], ours.ignore)
    assert collate_fn([none]).ignore is None
    assert collate_fn([none]).object_ignore is None
    assert torch.equal(batch.to("cpu").ignore, batch.ignore)
    fields = {k: v for k, v in vars(none).items() if k != "ignore"}  # as before there were any
    assert collate_fn([fields]).ignore is None


# Losses


def test_terms_by_hand():
    logits, target = torch.full((1, 4), 30.0), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    kept = torch.tensor([[True, True, True, False]])
    # 2 of the 3 pixels that count are right.
    _, dice = mask_losses(logits[None, None], target[None] > 0, 0.25, 2.0, kept[None])
    assert dice.item() == pytest.approx(1 - 5 / 6)
    assert mask_iou(logits, target, kept).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(all_candidates=True, iou_l1=False)])
def test_nothing_that_is_predicted_there_changes_a_loss(config):
    frames, targets = random_frames(4, 3)
    ignore = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    targets = targets & ~ignore
    told = compute_losses(frames, targets, config, ignore=ignore)
    for passes, void in zip(frames, ignore, strict=True):
        for prediction in passes:
            prediction.mask_logits[void[:, None].expand_as(prediction.mask_logits)] *= -3
    again = compute_losses(frames, targets, config, ignore=ignore)
    for name, value in told.items():
        assert value.item() == pytest.approx(again[name].item(), rel=1e-6), name
    assert compute_losses(frames, targets, config)["loss"] != again["loss"]


def test_no_gradient_reaches_them():
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    targets = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    targets[..., 2:5, 2:5] = True
    ignore = torch.zeros_like(targets)
    ignore[..., 6:, :] = True
    loss = compute_losses(
        [[predict(logits)]], targets, LossConfig(all_candidates=True), None, ignore
    )
    loss["loss"].backward()
    assert not logits.grad[:, :, 6:].any()
    assert logits.grad[:, :, :6].any()


def test_the_focal_loss_is_the_mean_of_the_pixels_that_count():
    frames, targets = random_frames(1, 1, size=8)
    config = LossConfig(focal=1, dice=0, iou=0, object_score=0)
    ignore = torch.zeros_like(targets)
    ignore[..., 4:] = True
    cut = [predict(frames[0][0].mask_logits[..., :4])]
    half = compute_losses([cut], targets[..., :4], config)
    whole = compute_losses(frames, targets & ~ignore, config, ignore=ignore)
    assert whole["loss/focal"].item() == pytest.approx(half["loss/focal"].item(), rel=1e-5)


def test_the_simulated_user_does_not_click_there():
    truth = torch.zeros(1, 6, 6, dtype=torch.bool)
    truth[0, :3, :3] = True
    predicted = truth.clone()
    predicted[0, 5] = True  # wrong, were it not undecided
    void = torch.zeros_like(truth)
    void[0, 5] = True
    user = SimulatedUser(InteractionConfig(num_correction_pt_per_frame=1), 0)

    class Pass:
        def __init__(self, mask):
            self.mask_logits = torch.where(mask, 5.0, -5.0)[:, None]
            self.low_res_logits = None

    def label(*args):
        correction = user.correct(0, [(0, 0)], truth, *args)
        points, _ = correction.run(None, Pass(predicted), lambda *_: Pass(truth))
        return points["point_coords"][0, 0, 1].item()

    assert label() == 5
    clicks = [user.correct(0, [(0, 0)], truth, void).select(torch.tensor([0])) for _ in range(1)]
    assert clicks[0].void is not None
    _, ious = clicks[0].run(None, Pass(predicted), lambda *_: Pass(truth)), user._ious[-1]
    assert ious[0].item() == 1  # before any click: only undecided pixels differ


# Scores


def test_object_and_ring_is_right_and_background_wrong():
    truth = TRUTH == 1
    found = truth | RINGS
    told = measure(found, truth, ignore=RINGS)
    assert told.J.tolist() == [1] * NUM_FRAMES
    assert told.F.tolist() == [1] * NUM_FRAMES
    plain = measure(found, truth)
    assert (plain.J < 0.7).all()
    nothing = measure(found, truth, ignore=np.zeros_like(truth))
    for ours, theirs in zip(nothing, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="expected bool"):
        measure(found, truth, ignore=RINGS[0])


def generous(data, video, prompts):
    """A tracker that adds the ring to its objects."""
    for t in range(len(video.frames)):
        yield TrackedFrame({o: (TRUTH[t] == o) | RINGS[t] for o in video.object_ids}, {})


@pytest.mark.parametrize(("rule", "low", "high"), [("ignore", 1, 1), ("background", 0.2, 0.7)])
def test_the_setting_says_whether_void_counts(root, rule, low, high):
    config = EvaluationConfig(void=rule)
    means = mean_scores(
        [video.scores for video in track_videos(generous, load(root), config, seed=0)]
    )
    assert low <= means["J"] <= high
    rows = score(generous, load(root), config, split="val", model="m", step=0, seed=0, label="m")
    assert {row["void"] for row in rows.objects} == {rule}
    assert EvaluationConfig().void == "ignore"


# Pictures


def test_they_are_hatched_and_no_error():
    picture = np.full((40, 60, 3), 120, np.uint8)
    ignore = np.zeros((40, 60), bool)
    ignore[10:30, 10:30] = True
    hatched = hatch_ignored(picture, ignore)
    changed = (hatched != picture).any(-1)
    assert not changed[~ignore].any()
    assert 0.4 < changed[ignore].mean() < 0.9
    assert len(np.unique(hatched[ignore][:, 0])) == 3  # dark, light, the picture itself
    assert hatch_ignored(picture, None) is picture
    wrong = {1: ignore.copy()}
    plain = draw_errors(picture, wrong, {1: ignore & False})
    told = draw_errors(picture, wrong, {1: ignore & False}, ignore)
    assert (plain[ignore] != told[ignore]).any()
    np.testing.assert_array_equal(told[ignore], draw_errors(picture, {}, {})[ignore])


def test_sheets_show_them(root):
    frames = np.zeros((NUM_FRAMES, *SIZE, 3), np.uint8)
    masks = {1: TRUTH == 1}
    plain = comparison(frames, masks, masks, [], title="t")
    same = comparison(frames, masks, masks, [], title="t", ignore=RINGS & False)
    np.testing.assert_array_equal(plain, same)
    assert (comparison(frames, masks, masks, [], title="t", ignore=RINGS) != plain).any()
    clip = load(root)[0]
    with_void = clip_sheet({"a": clip})
    object.__setattr__(clip, "ignore", None)
    assert (clip_sheet({"a": clip}) != with_void).any()
