"""SAM 2's training loss: focal, dice, IoU and object score, on the best of the mask candidates.

`TERMS` lists what is summed. A new term is a function of a `SupervisedPass` and a line there; it
then has a weight in the `loss:` section and is logged as `loss/<name>`.

Formulas and conventions follow `MultiStepMultiMasksAndIous` in facebookresearch/sam2, which sums
over frames and decoder passes and divides by the number of objects of the whole optimiser step, on
all its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, create_model

from sam2train.clips import NO_OBJECT_LOGIT, FramePrediction
from sam2train.config import Section

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SupervisedPass:
    """One decoder pass over n objects beside the truth: what a term is computed from."""

    candidates: torch.Tensor  # (n, M, H, W) float32 mask logits
    iou_predictions: torch.Tensor  # (n, M) float32
    object_score_logits: torch.Tensor  # (n,) float32
    target: torch.Tensor  # (n, H, W) bool; all False where an object is absent
    kept: torch.Tensor | None  # (n, H, W) bool, the pixels that have a label; None: all have
    config: LossConfig

    @cached_property
    def visible(self) -> torch.Tensor:
        """(n,) bool"""
        return self.target.flatten(1).any(1)

    @cached_property
    def truth(self) -> torch.Tensor:
        """(n, M, H, W) float32: the target beside each candidate."""
        return self.target[:, None].float().expand_as(self.candidates)

    @cached_property
    def mask_losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, M) focal and dice loss of each candidate, over its pixels that have a label."""
        alpha, gamma = self.config.focal_alpha, self.config.focal_gamma
        return mask_losses(self.candidates, self.target, alpha, gamma, self.kept)

    @property
    def focal(self) -> torch.Tensor:
        return self.mask_losses[0]

    @property
    def dice(self) -> torch.Tensor:
        return self.mask_losses[1]

    @cached_property
    def best(self) -> torch.Tensor:
        """(n, 1) index of the candidate of least loss, on which masks learn. The one that enters
        the memory is another choice: that of highest predicted IoU."""
        loss = self.config.focal * self.focal + self.config.dice * self.dice
        return loss.argmin(1, keepdim=True)

    def reduce(self, losses: torch.Tensor, *, mean: bool) -> torch.Tensor:
        """(n, M) losses of the candidates -> (n,): their mean, or that of the best one; 0 where the
        object is absent."""
        reduced = losses.mean(1) if mean else losses.gather(1, self.best)[:, 0]
        return reduced * self.visible


def focal_term(decoded: SupervisedPass) -> torch.Tensor:
    """Weight of the focal loss of the masks."""
    return decoded.reduce(decoded.focal, mean=decoded.config.all_candidates)


def dice_term(decoded: SupervisedPass) -> torch.Tensor:
    """Weight of the dice loss of the masks."""
    return decoded.reduce(decoded.dice, mean=decoded.config.all_candidates)


def iou_term(decoded: SupervisedPass) -> torch.Tensor:
    """Weight of the error of the predicted IoU."""
    target, kept = decoded.target[:, None], decoded.kept
    iou = mask_iou(decoded.candidates, target, None if kept is None else kept[:, None])
    difference = decoded.iou_predictions - iou
    error = difference.abs() if decoded.config.iou_l1 else difference**2
    return decoded.reduce(error, mean=decoded.config.supervise_all_iou)


def object_score_term(decoded: SupervisedPass) -> torch.Tensor:
    """Weight of the error of the object score. At 0 a wrong "absent" is never corrected: no other
    term reaches it."""
    import torch.nn.functional as F

    return F.binary_cross_entropy_with_logits(
        decoded.object_score_logits, decoded.visible.float(), reduction="none"
    )


class Term(NamedTuple):
    """One term of the loss."""

    name: str  # the key of its weight in the `loss:` section
    weight: float  # where the section does not say
    # The (n,) losses of the objects of a decoder pass, 0 where one does not count. Padding frames
    # are left out afterwards. The docstring says what the weight does, where that is not plain.
    function: Callable[[SupervisedPass], torch.Tensor]


TERMS = [
    Term("focal", 20.0, focal_term),
    Term("dice", 1.0, dice_term),
    Term("iou", 1.0, iou_term),
    Term("object_score", 1.0, object_score_term),
]

_Weights = create_model(
    "_Weights",
    __base__=Section,
    **{
        name: (float, Field(weight, ge=0, description=function.__doc__))
        for name, weight, function in TERMS
    },
)


class LossConfig(_Weights):
    """The `loss:` section: a weight for each of `TERMS`, and options; the defaults are SAM 2's."""

    focal_alpha: float = Field(
        0.25, ge=0, le=1, description="focal loss: weight of the pixels of the object"
    )
    focal_gamma: float = Field(
        2.0, ge=0, description="focal loss: how much less a pixel counts that is nearly right"
    )
    all_candidates: bool = Field(
        False,
        description="masks learn on the mean over the candidates, not on the best one, so that "
        "untrained heads all get a gradient",
    )
    supervise_all_iou: bool = Field(
        True, description="IoU loss on all candidates, not the best one"
    )
    iou_l1: bool = Field(True, description="L1 instead of squared error for the IoU loss")


def mask_losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    gamma: float,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sigmoid focal loss (https://arxiv.org/abs/1708.02002), as mean over the pixels, and the
    dice loss 1 - (2 |P T| + 1) / (|P| + |T| + 1): (n, M) each.

    Args:
        logits: (n, M, H, W) float32.
        target: (n, H, W) bool.
        kept: (n, H, W) bool, the pixels that count; None counts all.
    """
    return _mask_losses_function().apply(logits, target, alpha, gamma, kept)


@cache
def _mask_losses_function() -> type[torch.autograd.Function]:
    """Both losses from one sigmoid. Step by step, autograd would keep some ten tensors of the size
    of the logits until the backward. This keeps the logits and computes their gradient from q, the
    probability of the wrong answer: 1 - p where the target is set, p elsewhere.
    """
    import torch

    class MaskLosses(torch.autograd.Function):
        forward = staticmethod(_losses_forward)
        backward = staticmethod(torch.autograd.function.once_differentiable(_losses_backward))

    return MaskLosses


def _losses_forward(ctx, logits, target, alpha, gamma, kept):
    import torch
    import torch.nn.functional as F

    counted = torch.ones_like(target) if kept is None else kept
    inside, everywhere = (target & counted).to(logits), counted.to(logits)  # (n, H, W)
    weight = torch.where(target, alpha, 1 - alpha) * everywhere
    wrong = _wrong_logits(logits, target)
    q = wrong.sigmoid()
    of_pixels = F.softplus(wrong).mul_(q.pow(gamma))
    num_pixels = everywhere.sum((-2, -1))[:, None].clamp(min=1)  # (n, 1)
    focal = _sum_pixels(of_pixels, weight) / num_pixels
    # |P T| = |T| - sum of q inside, |P| = |T| + sum of q everywhere - 2 * sum of q inside
    size = inside.sum((-2, -1))[:, None]
    missed, all_wrong = _sum_pixels(q, inside), _sum_pixels(q, everywhere)
    numerator = 2 * (size - missed) + 1
    denominator = 2 * size + all_wrong - 2 * missed + 1
    ctx.save_for_backward(logits, target, kept, numerator, denominator, num_pixels)
    ctx.alpha, ctx.gamma = alpha, gamma
    return focal, 1 - numerator / denominator


def _losses_backward(ctx, of_focal, of_dice):
    import torch
    import torch.nn.functional as F

    logits, target, kept, numerator, denominator, num_pixels = ctx.saved_tensors
    alpha, gamma = ctx.alpha, ctx.gamma
    wrong = _wrong_logits(logits, target)
    q = wrong.sigmoid()
    # d focal / d wrong = weight * q ** gamma * (q + gamma * (1 - q) * cross entropy)
    right = 1 - q
    gradient = F.softplus(wrong).mul_(right).mul_(gamma).add_(q).mul_(q.pow(gamma))
    weight = torch.where(target, alpha, 1 - alpha)[:, None]
    gradient.mul_(weight).mul_((of_focal / num_pixels)[..., None, None])
    # d dice / d q: twice (denominator - numerator) / denominator ** 2 more where it is set
    everywhere = of_dice * numerator / denominator**2  # (n, M)
    inside = of_dice * 2 * (denominator - numerator) / denominator**2
    of_q = torch.addcmul(
        everywhere[..., None, None], inside[..., None, None], target[:, None].to(q.dtype)
    )
    gradient.addcmul_(q.mul_(right), of_q)
    gradient = torch.where(target[:, None], gradient.neg(), gradient)
    if kept is not None:
        gradient.mul_(kept[:, None])
    return gradient, None, None, None, None


def _wrong_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(n, M, H, W) logits of the wrong answer: their sign is turned where the target is set."""
    import torch

    return logits * torch.where(target, -1.0, 1.0)[:, None]


def _sum_pixels(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(n, M, H, W) and (n, H, W) -> (n, M) weighted sums."""
    return (values * weights[:, None]).sum((-2, -1))


def mask_iou(
    logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """IoU of the masks above 0 over the last two axes; 0 where both are empty, as in SAM 2.

    Args:
        kept: bool, the pixels that count; None counts all.
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
    """Sums over frames, decoder passes and objects, () each: `loss/<name>` of each term, not
    weighted; `gate/visible` and `gate/gated`, how many; `gate/loss`, weighted. Zeros where no
    object has a prompt. Those of several batches add up to those of one batch of all their clips.

    Args: see `compute_losses`.
    """
    import torch

    names = [*(f"loss/{name}" for name, _, _ in TERMS), "gate/visible", "gate/gated", "gate/loss"]
    sums = {name: torch.zeros((), device=targets.device) for name in names}
    for frame_idx, passes in enumerate(frames):
        for prediction in passes:
            target = targets[frame_idx, prediction.objects]
            counted = None if valid is None else valid[frame_idx, prediction.objects]
            left_out = None if ignore is None else ignore[frame_idx, prediction.objects]
            for name, value in _sum_pass(prediction, target, counted, left_out, config).items():
                sums[name] = sums[name] + value
    return sums


def divide_losses(
    sums: Mapping[str, torch.Tensor], num_objects: int, config: LossConfig
) -> dict[str, torch.Tensor]:
    """`loss`, its terms `loss/<name>`, not weighted, and the gate: `gate/fraction` of the visible
    objects that SAM 2 called absent and `gate/loss`, the weighted part of `loss` on their masks,
    which reaches no weight of the model.

    Args:
        sums: of `sum_losses`.
        num_objects: of the whole optimiser step, in all its batches, with a prompt or without.
    """
    num_objects = max(num_objects, 1)
    # A term that is put into TERMS while the program runs has no key in the section.
    weights = {name: getattr(config, name, weight) for name, weight, _ in TERMS}
    scaled = {name: sums[f"loss/{name}"] / num_objects for name in weights}
    return {
        "loss": sum(weights[name] * value for name, value in scaled.items()),
        **{f"loss/{name}": value.detach() for name, value in scaled.items()},
        "gate/fraction": sums["gate/gated"] / sums["gate/visible"].clamp(min=1),
        "gate/loss": sums["gate/loss"] / num_objects,
    }


def _sum_pass(
    prediction: FramePrediction,
    target: torch.Tensor,
    counted: torch.Tensor | None,
    ignore: torch.Tensor | None,
    config: LossConfig,
) -> dict[str, torch.Tensor]:
    """`sum_losses` of one decoder pass.

    Args:
        target: (n, H, W) bool.
        counted: (n,) bool, False on padding; None where all count.
        ignore: (n, H, W) bool, pixels without a label; None where all have one.
    """
    import torch

    decoded = SupervisedPass(
        candidates=prediction.mask_logits.float(),
        iou_predictions=prediction.iou_predictions.float(),
        object_score_logits=prediction.object_score_logits[:, 0].float(),
        target=target,
        kept=None if ignore is None else ~ignore,
        config=config,
    )
    if counted is None:
        counted = torch.ones_like(decoded.visible)
    losses = {name: function(decoded) for name, _, function in TERMS}  # (n,) each
    on_masks = config.focal * losses["focal"] + config.dice * losses["dice"]
    visible = decoded.visible & counted
    gated = (decoded.candidates.detach()[:, 0, 0, 0] == NO_OBJECT_LOGIT) & visible
    return {
        **{f"loss/{name}": (value * counted).sum() for name, value in losses.items()},
        "gate/visible": visible.sum(),
        "gate/gated": gated.sum(),
        "gate/loss": (on_masks.detach() * gated).sum(),
    }
