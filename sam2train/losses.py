"""SAM 2's training loss: focal, dice, IoU and object score, on the best of the mask candidates.

Formulas and conventions follow `MultiStepMultiMasksAndIous` in facebookresearch/sam2, which sums
over frames and decoder passes and divides by the number of objects of the whole optimiser step, on
all its devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field

from sam2train.clips import NO_OBJECT_LOGIT, FramePrediction
from sam2train.config import Section

SUMS = ("focal", "dice", "iou", "object_score", "visible", "gated", "gated_loss")


class LossConfig(Section):
    """The `loss:` section: weights of the terms; the defaults are SAM 2's."""

    focal: float = Field(20.0, ge=0)
    dice: float = Field(1.0, ge=0)
    iou: float = Field(1.0, ge=0)
    object_score: float = Field(
        1.0, ge=0, description="at 0 a wrong 'absent' is never corrected: no other term reaches it"
    )
    focal_alpha: float = Field(0.25, ge=0, le=1)
    focal_gamma: float = Field(2.0, ge=0)
    all_candidates: bool = Field(
        False,
        description="masks learn on the mean over the candidates, not on the best one: untrained "
        "heads all get a gradient, where best-of-3 feeds one",
    )
    supervise_all_iou: bool = Field(
        True, description="IoU loss on all candidates, not the best one"
    )
    iou_l1: bool = Field(True, description="L1 instead of squared error for the IoU loss")


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Sigmoid focal loss of each element (https://arxiv.org/abs/1708.02002)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    prob = logits.sigmoid()
    prob_of_target = prob * targets + (1 - prob) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * cross_entropy * (1 - prob_of_target) ** gamma


def dice_loss(
    logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """1 - (2 |P T| + 1) / (|P| + |T| + 1) over the last two axes: (..., H, W) -> (...).

    Args:
        kept: (..., H, W) bool, the pixels that count; None counts all.
    """
    prob = logits.sigmoid()
    if kept is not None:
        prob, targets = prob * kept, targets * kept
    prob, targets = prob.flatten(-2), targets.flatten(-2)
    overlap = (prob * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (prob.sum(-1) + targets.sum(-1) + 1)


def mask_iou(
    logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """IoU of the masks above 0 over the last two axes; 0 where both are empty, as in SAM 2.

    Args:
        kept: see `dice_loss`.
    """
    prediction, truth = logits.flatten(-2) > 0, targets.flatten(-2) > 0
    if kept is not None:
        prediction, truth = prediction & kept.flatten(-2), truth & kept.flatten(-2)
    union = (prediction | truth).sum(-1)
    return (prediction & truth).sum(-1) / union.clamp(min=1)


def compute_losses(
    frames: Sequence[Sequence[FramePrediction]],
    targets: torch.Tensor,
    config: LossConfig,
    valid: torch.Tensor | None = None,
    ignore: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of one batch, see `divide_losses`, divided by the number of its objects.

    Args:
        frames: for each of T frames the decoder passes on it.
        targets: (T, O, H, W) bool; all zeros where an object is absent.
        valid: (T, O) bool, False on padding frames; None where all are real.
        ignore: (T, O, H, W) bool, pixels without a label: no term counts them, and the mean of the
            focal loss is that of the others; None where all have one.

    Raises:
        ValueError: no object of the batch has a prompt.
    """
    if not any(frames):
        raise ValueError("no object of the batch has a prompt: there is nothing to learn from")
    sums = sum_losses(frames, targets, config, valid, ignore)
    return divide_losses(sums, targets.shape[1], config)


def sum_losses(
    frames: Sequence[Sequence[FramePrediction]],
    targets: torch.Tensor,
    config: LossConfig,
    valid: torch.Tensor | None = None,
    ignore: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Sums over frames, decoder passes and objects, () each and not weighted: `focal`, `dice`,
    `iou`, `object_score`; `visible` and `gated`, how many; `gated_loss`. Zeros where no object has
    a prompt. Those of several batches add up to those of one batch of all their clips.

    Args: see `compute_losses`.
    """
    sums = {name: torch.zeros((), device=targets.device) for name in SUMS}
    for frame_idx, passes in enumerate(frames):
        for prediction in passes:
            target = targets[frame_idx, prediction.objects]
            weight = None if valid is None else valid[frame_idx, prediction.objects]
            left_out = None if ignore is None else ignore[frame_idx, prediction.objects]
            for name, value in _pass_losses(prediction, target, weight, left_out, config).items():
                sums[name] = sums[name] + value
    return sums


def divide_losses(
    sums: Mapping[str, torch.Tensor], num_objects: int, config: LossConfig
) -> dict[str, torch.Tensor]:
    """`loss`, its unweighted terms `loss/focal`, `loss/dice`, `loss/iou`, `loss/object_score`, and
    the gate: `gate/fraction` of the visible objects that SAM 2 called absent and `gate/loss`, the
    weighted part of `loss` on their masks, which reaches no weight.

    Args:
        sums: of `sum_losses`.
        num_objects: of the whole optimiser step, in all its batches, with a prompt or without.
    """
    weights = {name: getattr(config, name) for name in ("focal", "dice", "iou", "object_score")}
    scaled = {name: sums[name] / max(num_objects, 1) for name in weights}
    return {
        "loss": sum(weights[name] * value for name, value in scaled.items()),
        **{f"loss/{name}": value.detach() for name, value in scaled.items()},
        "gate/fraction": sums["gated"] / sums["visible"].clamp(min=1),
        "gate/loss": sums["gated_loss"] / max(num_objects, 1),
    }


def _pass_losses(
    prediction: FramePrediction,
    target: torch.Tensor,
    valid: torch.Tensor | None,
    ignore: torch.Tensor | None,
    config: LossConfig,
) -> dict[str, torch.Tensor]:
    """Sums over the n objects of one decoder pass, (), not yet weighted.

    Args:
        target: (n, H, W) bool.
        valid: (n,) bool or None.
        ignore: (n, H, W) bool or None.
    """
    candidates = prediction.mask_logits.float()  # (n, M, H, W)
    truth = target[:, None].float().expand_as(candidates)
    visible = target.flatten(1).any(1)
    counted = torch.ones_like(visible) if valid is None else valid
    present = (visible & counted).float()

    focal = focal_loss(candidates, truth, config.focal_alpha, config.focal_gamma)
    kept = None if ignore is None else ~ignore[:, None]  # (n, 1, H, W)
    if kept is None:
        focal = focal.mean((-2, -1))
    else:
        focal = (focal * kept).sum((-2, -1)) / kept.sum((-2, -1)).clamp(min=1)
    dice = dice_loss(candidates, truth, kept)  # (n, M)
    predicted_iou = prediction.iou_predictions.float()
    difference = predicted_iou - mask_iou(candidates, truth, kept)
    iou = difference.abs() if config.iou_l1 else difference**2

    # Masks learn on the candidate of least loss; the one that enters the memory is another choice.
    best = (config.focal * focal + config.dice * dice).argmin(1, keepdim=True)  # (n, 1)
    if config.all_candidates:
        focal, dice = focal.mean(1), dice.mean(1)
    else:
        focal, dice = focal.gather(1, best)[:, 0], dice.gather(1, best)[:, 0]
    iou = iou.mean(1) if config.supervise_all_iou else iou.gather(1, best)[:, 0]
    score = F.binary_cross_entropy_with_logits(
        prediction.object_score_logits[:, 0].float(), visible.float(), reduction="none"
    )
    gated = (candidates.detach()[:, 0, 0, 0] == NO_OBJECT_LOGIT) & visible & counted
    return {
        "focal": (focal * present).sum(),
        "dice": (dice * present).sum(),
        "iou": (iou * present).sum(),
        "object_score": (score * counted).sum(),
        "gated": gated.sum(),
        "visible": present.sum(),
        "gated_loss": ((config.focal * focal + config.dice * dice).detach() * gated).sum(),
    }
