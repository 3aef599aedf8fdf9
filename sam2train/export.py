"""A run's checkpoint as a file that `build_sam2` and `build_sam2_video_predictor` load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sam2train.checkpoint import as_trained, load_checkpoint
from sam2train.clips import Prompt, empty_prompt
from sam2train.errors import UserError
from sam2train.experiment import Experiment, build_model
from sam2train.files import replacing
from sam2train.machine import say
from sam2train.model import SAM2Model
from sam2train.pretrained import resolve_config
from sam2train.prompts import box_fields

# Pixels of the test clip that half precision may move over the edge of a mask. A guess.
_HALF_TOLERANCE = 0.01


def export_checkpoint(
    experiment: Experiment, source: Path, target: Path, *, half: bool, console: Console
) -> None:
    """Write `{"model": state_dict}` with all of SAM 2's weights, trained or not; beside them, as
    `untrained_rows`, the temporal rows that no training has reached, if there are any.

    Before it gets its name the file is read back into a new model, strictly, which must then find
    the same masks in a small generated clip.

    Args:
        source: a checkpoint of a run of this experiment; what the run changed in the model counts.
        half: store float16; SAM 2 loads it into float32, about 3 decimal digits remain.

    Raises:
        UserError: a checkpoint that is missing or belongs to another base or architecture; in half
            precision also one whose masks change too much.
    """
    experiment = as_trained(experiment, source)
    _make_room(target)
    model = build_model(experiment)
    loaded = load_checkpoint(model, experiment, source)
    weights = {
        name: value.detach().cpu().to(torch.float16 if half else value.dtype)
        for name, value in model.sam2.state_dict().items()
    }
    content: dict[str, Any] = {"model": weights}
    if loaded.untrained_rows:
        content["untrained_rows"] = list(loaded.untrained_rows)
    with replacing(target) as partial:
        with open(partial, "wb") as file:  # torch would store the temporary file's name in it
            torch.save(content, file)
        again = build_model(_with_weights(experiment, partial))
        _compare_weights(again, weights)
        apart, pixels = compare_masks(model, again)
        if apart > (_HALF_TOLERANCE if half else 0):
            raise UserError(
                f"--export {target}: read back, {apart:.2%} of the pixels of a test clip change "
                "sides; nothing was written" + ("; export without --half" if half else "")
            )
    size = target.stat().st_size / 1e6
    same = "the same masks" if apart == 0 else f"masks that differ in {apart:.2%} of the pixels"
    say(
        console,
        f"wrote {target} ({size:.1f} MB); it loads strictly and gives {same} "
        f"({pixels:,} pixels in a test clip)",
    )
    say(console, f"  {how_to_load(experiment, target)}")


def _make_room(target: Path) -> None:
    """The folder of a file that is not there yet; UserError where that cannot be."""
    if target.exists():
        raise UserError(
            f"--export {target}: there is something already; name another file, or remove it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--export {target}: {problem.strerror}; name another place") from None


def how_to_load(experiment: Experiment, target: Path) -> str:
    """The call of SAM 2's that builds this model, as a user types it."""
    config = resolve_config(experiment.model.config_path)
    parts = config.parts
    inside = "sam2" in parts and "configs" in parts
    name = "/".join(parts[parts.index("configs") :]) if inside else config.name
    settings = {"num_maskmem": experiment.model.num_maskmem}
    settings |= {"image_size": experiment.model.image_size}
    if (pointers := experiment.model.max_obj_ptrs_in_encoder) == 0:
        settings["use_obj_ptrs_in_encoder"] = "false"
    elif pointers != 16:  # SAM 2's own
        settings["max_obj_ptrs_in_encoder"] = pointers
    extra = ", ".join(f'"++model.{key}={value}"' for key, value in settings.items())
    call = f'build_sam2_video_predictor("{name}", "{target}", hydra_overrides_extra=[{extra}])'
    return call if inside else f"{call}  # with {config.parent} as Hydra's config folder"


def compare_masks(one: SAM2Model, other: SAM2Model) -> tuple[float, int]:
    """How far apart two models are on a small generated clip.

    Returns:
        The share of pixels that are in the mask of one of them only, and the pixels in the masks of
        the first. NaN logits count as apart.
    """
    clip, prompt = _test_clip(one.image_size)
    logits = []
    for model in (one, other):
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits.append(model(clip.to(model.device), None, [[prompt]])["pred_masks"].cpu())
        model.train(was_training)
    apart = ((logits[0] > 0) != (logits[1] > 0)) | logits[0].isnan() | logits[1].isnan()
    return float(apart.float().mean()), int((logits[0] > 0).sum())


def _test_clip(side: int) -> tuple[torch.Tensor, Prompt]:
    """(1, T, 3, H, W) of a bright square that moves over noise, and its box on frame 0."""
    rng = np.random.default_rng(0)
    clip = rng.normal(size=(1, 4, 3, side, side)).astype(np.float32)
    edge = side // 4
    for t in range(4):
        clip[0, t, :, edge : 2 * edge, edge + 2 * t : 2 * edge + 2 * t] += 2
    box = np.array([edge, edge, 2 * edge - 1, 2 * edge - 1], np.float32)
    return torch.from_numpy(clip), {**empty_prompt(1, 0), **box_fields(box)}


def _with_weights(experiment: Experiment, path: Path) -> Experiment:
    model = experiment.model.model_copy(update={"checkpoint_path": str(path)})
    return experiment.model_copy(update={"model": model})


def _compare_weights(model: SAM2Model, weights: Mapping[str, torch.Tensor]) -> None:
    for name, value in model.sam2.state_dict().items():
        assert torch.equal(value.cpu(), weights[name].to(value.dtype)), name
