"""The forward pass, its gradients and the loss against SAM 2's own training model and loss."""

import types

import numpy as np
import pytest
import torch
from conftest import moving_masks
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam2train.clips import Clip, Prompt, collate_fn
from sam2train.files import REPOSITORY
from sam2train.losses import LossConfig, compute_losses
from sam2train.model import SAM2Model

for needed in ("tensordict", "fvcore", "submitit", "tensorboard"):
    pytest.importorskip(needed)
reference_model = pytest.importorskip("training.model.sam2")
reference_loss = pytest.importorskip("training.loss_fns")
reference_data = pytest.importorskip("training.utils.data_utils")

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"


def make_clip(num_frames, num_objects, size, *, seed, absent=()):
    """A clip of rectangles on noise, without prompts; `absent` holds (frame, object) pairs."""
    rng = np.random.default_rng(seed)
    masks = moving_masks(num_frames, num_objects, (size, size))
    images = rng.normal(size=(num_frames, 3, size, size)).astype(np.float32)
    for t, k in absent:
        masks[t, k] = False
    for t in range(num_frames):
        for k in range(num_objects):
            images[t, :, masks[t, k]] += np.array([k + 1, -k, 1], np.float32)
    return Clip(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        prompts=[],
        video_id=seed,
        frame_indices=list(range(num_frames)),
        object_ids=list(range(1, num_objects + 1)),
        frame_valid=torch.ones(num_frames, dtype=torch.bool),
        frame_size=(size, size),
    )


def make_models(
    image_size, num_maskmem, *, prompt, max_obj_ptrs=16, num_cond=1, score_bias=4.0, clicks=None
):
    """Ours and SAM 2's with the same random weights, everything trainable.

    Args:
        num_cond: conditioning frames; the first is frame 0, SAM 2's model draws the others.
        score_bias: added to the object score; at 4 random weights call every object visible.
        clicks: further settings of SAM 2's model for its correction clicks; None for no clicks.
    """
    torch.manual_seed(0)
    ours = SAM2Model(
        None, DEMO, ["*"], "cpu", image_size, num_maskmem, max_obj_ptrs_in_encoder=max_obj_ptrs
    ).load()
    with torch.no_grad():
        ours.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += score_bias

    node = OmegaConf.load(DEMO).model
    tokens = [image_size // 16] * 2
    settings = {
        "_target_": "training.model.sam2.SAM2Train",
        "image_size": image_size,
        "num_maskmem": num_maskmem,
        "max_obj_ptrs_in_encoder": max_obj_ptrs,
        "memory_attention.layer.self_attention.feat_sizes": tokens,
        "memory_attention.layer.cross_attention.feat_sizes": tokens,
    }
    for mode in ("train", "eval"):
        settings[f"prob_to_use_pt_input_for_{mode}"] = float(prompt != "mask")
        settings[f"prob_to_use_box_input_for_{mode}"] = float(prompt == "bbox")
        settings[f"num_init_cond_frames_for_{mode}"] = num_cond
        settings[f"num_frames_to_correct_for_{mode}"] = num_cond
    settings |= clicks or {}
    for name, value in settings.items():
        OmegaConf.update(node, name, value, force_add=True)
    theirs = instantiate(node)
    theirs.load_state_dict(ours.sam2.state_dict())

    original = theirs.prepare_prompt_inputs

    def keep_prompts(self, backbone_out, batch, start_frame_idx=0):
        backbone_out = original(backbone_out, batch, start_frame_idx)
        if clicks is None:
            backbone_out["frames_to_add_correction_pt"] = []
        self.seen = backbone_out
        return backbone_out

    theirs.prepare_prompt_inputs = types.MethodType(keep_prompts, theirs)
    return ours, theirs


def prompts_of(seen, batch):
    """What SAM 2's model has given its objects, as our prompts, clip by clip."""
    prompts = [[] for _ in range(batch.num_videos)]
    for index, clip in enumerate(batch.obj_to_frame_idx[0, :, 1].tolist()):
        for frame_idx in seen["init_cond_frames"]:
            prompt = Prompt(
                object_id=index,
                frame_index=frame_idx,
                type="mask",
                points=np.zeros((0, 2), np.float32),
                labels=np.zeros(0, np.int32),
                box=None,
                mask=None,
            )
            if frame_idx in seen["mask_inputs_per_frame"]:
                prompt["mask"] = seen["mask_inputs_per_frame"][frame_idx][index, 0].numpy()
            else:
                points = seen["point_inputs_per_frame"][frame_idx]
                prompt["type"] = "point"
                prompt["points"] = points["point_coords"][index].numpy()
                prompt["labels"] = points["point_labels"][index].numpy()
            prompts[clip].append(prompt)
    return prompts


def pick_objects(values, batch):
    """(B, T, N, ...) of our output as SAM 2's (T, O, ...)."""
    return values.transpose(1, 2)[batch.object_valid].transpose(0, 1)


def their_loss(frames, masks):
    """The total of SAM 2's loss in its official setting."""
    loss = reference_loss.MultiStepMultiMasksAndIous(
        {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
    )
    return loss(frames, masks)[reference_loss.CORE_LOSS_KEY]


def assert_same_gradients(ours, theirs):
    """Within 1e-4 of each tensor's norm, beside 1e-8 of all gradients together: the bias of a key
    has no gradient but float32's rounding."""
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    norms = {name: grad.norm() for name, grad in reference.items() if grad is not None}
    rounding = 1e-8 * torch.stack(list(norms.values())).norm()
    assert len(norms) > 200
    for name, parameter in ours.sam2.named_parameters():
        assert (parameter.grad is None) == (reference[name] is None), name
        if name in norms:
            difference = (parameter.grad - reference[name]).norm()
            assert difference <= 1e-4 * norms[name] + rounding, name


def assert_same_step(ours, theirs, outputs, their_frames, batch):
    """The loss of both, and the gradients that it gives."""
    losses = compute_losses(outputs["frames"], batch.masks, LossConfig(), batch.object_frame_valid)
    expected = their_loss(their_frames, batch.masks)
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["loss"].backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


# T, objects of each clip, prompt, num_maskmem, image size, further settings
CASES = [
    (1, (1,), "point", 7, 64, {}),
    (1, (2, 1), "bbox", 3, 64, {}),
    (2, (1,), "mask", 7, 96, {}),
    (2, (3,), "point", 1, 64, {}),
    (3, (2,), "bbox", 2, 64, {}),
    (3, (1, 2), "mask", 3, 64, {"mode": "train"}),
    (4, (3,), "mask", 7, 64, {"absent": [(2, 1), (3, 1)]}),
    (4, (2, 3), "point", 4, 96, {}),
    (5, (1,), "bbox", 5, 64, {"score_bias": 0.0, "gated": True}),
    (5, (2,), "point", 4, 64, {"num_cond": 2}),
    (6, (2,), "mask", 6, 64, {"max_obj_ptrs": 3, "num_cond": 3}),
    (7, (1, 1), "point", 7, 64, {"mode": "train"}),
    (8, (2,), "mask", 7, 64, {"absent": [(1, 0), (2, 0), (7, 1)]}),
    (9, (3,), "bbox", 7, 64, {}),
    (9, (1, 2), "mask", 2, 64, {}),
    (3, (2,), "point", 0, 64, {}),
]


@pytest.mark.parametrize(("num_frames", "objects", "prompt", "num_maskmem", "size", "more"), CASES)
def test_forward_gradients_and_loss(num_frames, objects, prompt, num_maskmem, size, more):
    ours, theirs = make_models(
        size,
        num_maskmem,
        prompt=prompt,
        max_obj_ptrs=more.get("max_obj_ptrs", 16),
        num_cond=more.get("num_cond", 1),
        score_bias=more.get("score_bias", 4.0),
    )
    mode = more.get("mode", "eval")
    ours.train(mode == "train")
    theirs.train(mode == "train")
    batch = collate_fn(
        [
            make_clip(num_frames, n, size, seed=seed, absent=more.get("absent", ()))
            for seed, n in enumerate(objects)
        ]
    )
    their_frames = theirs(batch)  # first: it draws the prompts
    outputs = ours(batched_video_datapoint=batch, prompts=prompts_of(theirs.seen, batch))

    assert outputs["pred_masks"].shape == (len(objects), num_frames, max(objects), size, size)
    for t, frame in enumerate(their_frames):
        assert len(outputs["frames"][t]) == 1
        (prediction,) = outputs["frames"][t]
        for name, expected in (
            ("mask_logits", frame["multistep_pred_multimasks_high_res"][0]),
            ("iou_predictions", frame["multistep_pred_ious"][0]),
            ("object_score_logits", frame["multistep_object_score_logits"][0]),
        ):
            torch.testing.assert_close(
                getattr(prediction, name), expected, rtol=0, atol=1e-4, msg=f"frame {t}: {name}"
            )
        masks = pick_objects(outputs["pred_masks"], batch)[t]
        expected = frame["pred_masks_high_res"][:, 0]
        torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)
        assert bool((expected == -1024).any()) == ("gated" in more)
    assert_same_step(ours, theirs, outputs, their_frames, batch)


def test_sam2s_own_datapoint():
    """SAM 2's tensorclass goes into our model; its objects then get their mask on frame 0."""
    ours, theirs = make_models(64, 7, prompt="mask")
    ours.eval()
    theirs.eval()
    clips = [make_clip(3, n, 64, seed=seed) for seed, n in enumerate((1, 2))]
    batch = collate_fn(clips)
    own = reference_data.collate_fn(
        [
            reference_data.VideoDatapoint(
                frames=[
                    reference_data.Frame(
                        data=clip.images[t],
                        objects=[
                            reference_data.Object(object_id, t, clip.masks[t, k])
                            for k, object_id in enumerate(clip.object_ids)
                        ],
                    )
                    for t in range(3)
                ],
                video_id=clip.video_id,
                size=clip.frame_size,
            )
            for clip in clips
        ],
        dict_key="all",
    )
    with torch.no_grad():
        expected = theirs(own)
        prompts = prompts_of(theirs.seen, batch)
        outputs = [ours(own), ours(batched_video_datapoint=own), ours(batch, prompts=prompts)]
    for output in outputs:
        masks = pick_objects(output["pred_masks"], batch)
        for t in range(3):
            torch.testing.assert_close(
                masks[t], expected[t]["pred_masks_high_res"][:, 0], rtol=0, atol=1e-4
            )
        assert (output["pred_masks"][0, :, 1] == -1024).all()  # the first clip has one object


def test_our_batch_has_sam2s_fields():
    clips = [make_clip(3, n, 64, seed=seed) for seed, n in enumerate((2, 1))]
    batch = collate_fn(clips)
    own = reference_data.BatchedVideoDatapoint(
        img_batch=batch.img_batch,
        obj_to_frame_idx=batch.obj_to_frame_idx,
        masks=batch.masks,
        metadata=reference_data.BatchedVideoMetaData(
            unique_objects_identifier=batch.metadata.unique_objects_identifier,
            frame_orig_size=batch.metadata.frame_orig_size,
            batch_size=[3],
        ),
        dict_key="all",
        batch_size=[3],
    )
    for name in ("num_frames", "num_videos"):
        assert getattr(own, name) == getattr(batch, name)
    for name in ("flat_img_batch", "flat_obj_to_img_idx"):
        assert torch.equal(getattr(own, name), getattr(batch, name))
