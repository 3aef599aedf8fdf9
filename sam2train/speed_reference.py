"""SAM 2's own code as the other side of a comparison: its training model with its loss, and its
video predictor, both from the installed `sam2` package, with our weights and prompts."""

from __future__ import annotations

import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sam2train.clips import BatchedVideoDatapoint
from sam2train.errors import UserError
from sam2train.model import SAM2Model
from sam2train.model_inputs import split_by_kind
from sam2train.pretrained import resolve_config

# The official recipe's weights of the loss; ours are the same by default.
_LOSS_WEIGHTS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}
# What `build_sam2_video_predictor` sets otherwise, and what changes no more than its speed.
_AS_IN_TRAINING = {
    "binarize_mask_from_pts_for_mem_enc": False,
    "fill_hole_area": 0,
    "sam_mask_decoder_extra_args.dynamic_multimask_via_stability": False,
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_delta": 0.05,
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh": 0.98,
}


def import_training(module: str) -> types.ModuleType:
    """A module of `training`, SAM 2's own trainer, which the `sam2` package installs as well.

    Raises:
        UserError: it is not there, or the packages that it imports are not.
    """
    try:
        return import_module(f"training.{module}")
    except ImportError as problem:
        raise UserError(
            f"SAM 2's own training code cannot be imported ({problem}); to compare with it: "
            "pip install sam2==1.1.0 tensordict fvcore submitit tensorboard"
        ) from None


def build_theirs(target: str, ours: SAM2Model, settings: Mapping[str, Any]) -> nn.Module:
    """A model of SAM 2's from the config of ours, with the weights of ours, on its device.

    Args:
        target: what the config's `model:` node is built as.
        settings: keys of that node to set, by dotted name.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.load(resolve_config(ours.config_path)).model
    tokens = [ours.image_size // 16] * 2
    settings = {
        "_target_": target,
        "image_size": ours.image_size,
        "num_maskmem": ours.num_maskmem,
        "memory_attention.layer.self_attention.feat_sizes": tokens,
        "memory_attention.layer.cross_attention.feat_sizes": tokens,
        **settings,
    }
    for name, value in settings.items():
        OmegaConf.update(node, name, value, force_add=True)
    theirs = instantiate(node)
    theirs.load_state_dict(ours.sam2.state_dict())
    return theirs.to(ours.device)


class TheirTraining:
    """`SAM2Train` with `MultiStepMultiMasksAndIous`, training what ours trains.

    Only its choice of prompts is replaced: it would draw other clicks than ours.
    """

    def __init__(self, ours: SAM2Model):
        import_training("model.sam2")
        loss = import_training("loss_fns")
        target = "training.model.sam2.SAM2Train"
        self.model = build_theirs(target, ours, {"freeze_image_encoder": True})
        trained = ours.trainable_parameters()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.model.prepare_prompt_inputs = types.MethodType(_given_prompts, self.model)
        self.model.train()
        self._loss = loss.MultiStepMultiMasksAndIous(
            dict(_LOSS_WEIGHTS), supervise_all_iou=True, iou_use_l1_loss=True, pred_obj_scores=True
        )
        self._total = loss.CORE_LOSS_KEY

    def loss(self, batch: BatchedVideoDatapoint) -> torch.Tensor:
        """Its total on a batch, as its trainer computes it."""
        return self._loss(self.model(batch), batch.masks)[self._total]


def _given_prompts(
    model: nn.Module, backbone: dict[str, Any], batch: BatchedVideoDatapoint, start: int = 0
) -> dict[str, Any]:
    """`SAM2Train.prepare_prompt_inputs` for a batch whose objects have a prompt of one kind each,
    all on frame 0, and get no correction clicks."""
    prompts = [prompt for clip in batch.prompts for prompt in clip]
    ((_, points, masks),) = split_by_kind(prompts, batch.masks.device)
    return backbone | {
        "gt_masks_per_frame": {t: masks[:, None] for t, masks in enumerate(batch.masks)},
        "num_frames": batch.num_frames,
        "use_pt_input": points is not None,
        "init_cond_frames": [0],
        "frames_not_in_init_cond": list(range(1, batch.num_frames)),
        "mask_inputs_per_frame": {} if masks is None else {0: masks},
        "point_inputs_per_frame": {} if points is None else {0: points},
        "frames_to_add_correction_pt": [],
    }


def build_predictor(ours: SAM2Model) -> nn.Module:
    """`SAM2VideoPredictor` with the weights of ours, its switches as they are in training."""
    target = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    return build_theirs(target, ours, _AS_IN_TRAINING).eval()


def set_dropout(sam2: nn.Module, prob: float) -> None:
    """Let memory attention drop this share, in its attention and after it."""
    for module in sam2.memory_attention.modules():
        if isinstance(module, nn.Dropout):
            module.p = prob
        if hasattr(module, "dropout_p"):
            module.dropout_p = prob
