"""A step that is not finite: what was bad first, and a file with all that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sam2train.clips import BatchedVideoDatapoint
from sam2train.files import replacing
from sam2train.run_folder import RunFolder


def not_finite(
    folder: RunFolder,
    step: int,
    batches: Sequence[BatchedVideoDatapoint],
    scalars: Mapping[str, torch.Tensor],
    model: nn.Module,
    save: Callable[[], None],
) -> FloatingPointError:
    """What to raise after a step that is not finite: names the step, its clips, what was bad first,
    and the two files that keep the batches and the state before the step.

    Args:
        step, batches, model: see `save_bad_batch`.
        scalars: `loss` and `loss/<term>` of the step, and `grad_norm`.
        save: writes the state before the step as the last checkpoint.
    """
    path = folder.bad_batch(step)
    names = [name for batch in batches for name in batch.names]
    text = (
        f"step {step}: loss {scalars['loss'].item():.3g} or gradient norm "
        f"{scalars['grad_norm'].item():.3g} is not finite, on {'; '.join(names)}. "
    )
    try:
        losses = {n: v for n, v in scalars.items() if n.startswith("loss")}
        found = save_bad_batch(path, step, batches, losses, model)
        text += f"The first bad value: {found}; {path} has the clips. "
        save()
        text += f"{folder.last} is the state before this step. "
    except OSError as problem:  # the error of the step matters more than this one
        text += f"It could not be kept ({problem}). "
    return FloatingPointError(text + "Lower optimizer.learning_rate or look at these clips")


def save_bad_batch(
    path: Path,
    step: int,
    batches: Sequence[BatchedVideoDatapoint],
    losses: Mapping[str, torch.Tensor],
    model: nn.Module,
) -> str:
    """What was bad first, in words: a parameter, an input, a loss or a gradient, by name.

    The file at `path` gets plain tensors, texts and numbers, which `torch.load` reads: `step`,
    `first_bad`, `clips` (their names), `losses` by term, and `batches`, each with `images`
    (T, B, 3, H, W), `masks` (T, O, H, W), `frame_valid` (T, B) and the clips' `prompts`.

    Args:
        step: the one that was not finite, counted from 1.
        batches: of that step, on the CPU.
        model: with the gradients of the step; its parameters are those before it.
    """
    batches = [batch.to("cpu") for batch in batches]  # normalised
    found = next(_bad(batches, losses, model), "no single part; a sum overflows")
    content = {
        "step": step,
        "first_bad": found,
        "clips": [name for batch in batches for name in batch.names],
        "losses": {name: value.detach().float().cpu() for name, value in losses.items()},
        "batches": [
            {
                "images": batch.img_batch.cpu(),
                "masks": batch.masks.cpu(),
                "frame_valid": batch.frame_valid.cpu(),
                "prompts": _plain(batch.prompts),
            }
            for batch in batches
        ],
    }
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)
    return found


def _bad(
    batches: Sequence[BatchedVideoDatapoint],
    losses: Mapping[str, torch.Tensor],
    model: nn.Module,
) -> Iterator[str]:
    """What is not finite, causes before their effects."""
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, value in tensors:
            if not torch.isfinite(value.detach()).all():
                yield f"the {kind} {name}, {_described(value)}"
    for batch in batches:
        for clip, name in enumerate(batch.names):
            images = batch.img_batch[:, clip]
            if not torch.isfinite(images).all():
                yield f"the input, the frames of {name}, {_described(images)}"
    for name, value in losses.items():
        if name != "loss" and not torch.isfinite(value.detach()).all():
            yield f"the loss {name}, {float(value):.3g}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            yield f"the gradient of {name}, {_described(parameter.grad)}"


def _described(value: torch.Tensor) -> str:
    bad = int((~torch.isfinite(value.detach())).sum())
    return f"{bad:,} of {value.numel():,} values"


def _plain(value: Any) -> Any:
    """The value with tensors for arrays and Python numbers for NumPy's, at any depth."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
